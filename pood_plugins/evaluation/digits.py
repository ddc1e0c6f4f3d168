"""
The default benchmark run: trains small classifiers on :class:`~pood_plugins.benchmark.Digits`, one
per seed, and evaluates detectors on each. This is what ``make benchmark`` does.

A row such as ``GReg → Energy`` shows a detector on a copy of the classifier that was fine-tuned
with the benchmark's training outliers first, by
:func:`~pood_plugins.benchmark.digits.finetune_classifier`. The ways to fine-tune are CE (without
outliers), OE, Energy, GReg and GReg+.

..  autofunction:: pood_plugins.evaluation.digits.run_digits
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from pytorch_ood.api import Detector
from tqdm import tqdm

from ..benchmark.digits import Digits, finetune_classifier, train_classifier
from ..model.preprocessing import Preprocessing
from ..model.split import SplitModel, split_model
from ..training.variants import DISPLAY_NAMES
from .report import Report
from .rows import RowBuilder
from .runner import run
from .sheets import explanation_sheets

#: rows of the table if no others are asked for; in full, since other distributions may have
#: detectors of these names
DEFAULT_DETECTORS = (
    "pytorch-ood:MaxSoftmax",
    "pytorch-ood:EnergyBased",
    "pytorch-ood:Mahalanobis",
    "pytorch-ood:KNN",
    "pytorch-ood:ViM",
    "pood-plugins:NERO",
    "pood-plugins:GROOD",
    "GROOD (mean)",
    "GROOD (early mix-up)",
    "GROOD (noise)",
    "GROOD (outliers)",
    "GReg → pytorch-ood:EnergyBased",
    "GReg → pood-plugins:GROOD",
)
#: the same for a quick run
QUICK_DETECTORS = (
    "pytorch-ood:MaxSoftmax",
    "pytorch-ood:EnergyBased",
    "pytorch-ood:KNN",
    "pood-plugins:NERO",
    "pood-plugins:GROOD",
)

_ARROW = "→"
_LOADER: dict[str, Any] = {"batch_size": 256}
_QUICK_EPOCHS = 2


def run_digits(
    detectors: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: str | torch.device = "cpu",
    train: str | None = None,
    sheets: bool = False,
    quick: bool = False,
) -> Report:
    """
    :param detectors: rows of the table: names of the registry, and GROOD with each source of its
        OOD prototype, as in ``DEFAULT_DETECTORS``, which is the default. ``"all"`` as the only
        name takes everything that can be built. With a way to fine-tune and ``→`` (or ``->``)
        before the name, the detector is that of a fine-tuned classifier.
    :param seeds: one classifier is trained for each seed
    :param device: where to compute
    :param train: way to fine-tune the classifiers of all rows that do not name one: ``ce``,
        ``oe``, ``energy``, ``greg`` or ``greg+``. Default is not to.
    :param sheets: whether to explain some images, of the first seed, for the HTML report
    :param quick: whether to see only that everything runs: one network, of the first seed, two
        epochs of training and of fine-tuning, and ``QUICK_DETECTORS`` by default. The report says
        that it is no result.
    :return: report of the means over the seeds
    :raises LookupError: if a name is unknown
    :raises ValueError: if there is no seed, or a detector cannot be built from a classifier alone
    """
    if not seeds:
        raise ValueError("No seeds to train with. Pass at least one.")
    start = time.perf_counter()
    default = QUICK_DETECTORS if quick else DEFAULT_DETECTORS
    if quick:
        seeds = seeds[:1]
    benchmark = Digits()
    reports, pages = [], []
    left_out: dict[str, str] = {}
    for seed in tqdm(seeds, desc="seeds", disable=None):
        classifiers = _Classifiers(benchmark, seed, device, quick)
        if detectors is not None and list(detectors) == ["all"]:
            built, left_out = _rows(classifiers, train).build_all(images=True)
        else:
            names = detectors
            if names is None:
                names = [n for n in default if train is None or _ARROW not in n]
            built = dict(_build_row(name, classifiers, train) for name in names)
        reports.append(run(benchmark, built, device=device, loader_kwargs=_LOADER))
        if sheets and len(reports) == 1:
            known = Preprocessing(8, (0.0,), (1.0,), channels=1)
            pages = explanation_sheets(reports[0], benchmark, built, known)
    metadata = {
        "benchmark": "digits",
        "train": train,
        "seeds": list(seeds),
        "left_out": left_out,
        "quick": quick,
        "device": str(device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    report = Report.combine(reports, metadata)
    if pages:
        report.sheets = pages
    if quick:
        report.notes["Quick run"] = (
            f"one network, trained for {_QUICK_EPOCHS} epochs; no result to report"
        )
    return report


class _Classifiers:
    """The classifier of a seed, and what fine-tuning makes of it, when asked for."""

    def __init__(self, benchmark: Digits, seed: int, device: str | torch.device, quick: bool):
        self.benchmark = benchmark
        self.seed = seed
        self.epochs: dict[str, Any] = {"epochs": _QUICK_EPOCHS} if quick else {}
        model = train_classifier(benchmark, seed, device=device, **self.epochs)
        self.splits: dict[str | None, SplitModel] = {None: split_model(model)}

    def __getitem__(self, train: str | None) -> SplitModel:
        if train not in self.splits:
            split = split_model(deepcopy(self.splits[None].model))
            finetune_classifier(self.benchmark, split, str(train), self.seed, **self.epochs)
            self.splits[train] = split
        return self.splits[train]


def _build_row(name: str, classifiers: _Classifiers, train: str | None) -> tuple[str, Detector]:
    """Name of the row and detector."""
    first, arrow, last = (part.strip() for part in name.replace("->", _ARROW).partition(_ARROW))
    if not arrow:
        return _rows(classifiers, train).build(name)
    train = first.casefold()
    row, detector = _rows(classifiers, train).build(last)
    return f"{DISPLAY_NAMES[train]} {_ARROW} {row}", detector


def _rows(classifiers: _Classifiers, train: str | None) -> RowBuilder:
    return RowBuilder(classifiers[train], classifiers.benchmark, shape=(1, 8, 8), **_LOADER)
