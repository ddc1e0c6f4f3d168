"""
Runs detectors on a benchmark of images with a given classifier. This is what ``pood benchmark``
does for any benchmark but digits.

..  autofunction:: pood_plugins.evaluation.images.run_images

Rows
----

..  automodule:: pood_plugins.evaluation.rows
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pytorch_ood.benchmark import Benchmark
from torchvision.transforms import Normalize

from .. import distributed, registry
from ..benchmark.folder import FolderBenchmark
from ..benchmark.openood import OPENOOD_CLASSES, is_packed, openood
from ..model.preprocessing import Preprocessing, complete
from ..model.split import split_model
from ..model.zoo import load_classifier
from ..persistence import fingerprint
from .report import Report
from .rows import SLOW, RowBuilder
from .runner import run
from .sheets import explanation_sheets

log = logging.getLogger(__name__)


def run_images(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    arch: str | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    detectors: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    folders: Mapping[str, Any] | None = None,
    download: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    max_images: Mapping[str, int] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    sheets: bool = False,
) -> Report:
    """
    :param name: ``cifar10-openood``, ``cifar100-openood``, ``imagenet200-openood``,
        ``imagenet-openood``, ``folder``, or any benchmark of the registry
    :param root: folder with the images
    :param arch: architecture, see :func:`~pood_plugins.model.zoo.load_classifier`
    :param weights: state dict or key, likewise
    :param num_classes: number of classes of the weights, if the benchmark does not tell
    :param size: height and width of the network's inputs, if its preprocessing is not known
    :param mean: means of the channels, likewise
    :param std: standard deviations of the channels, likewise
    :param detectors: rows, see :mod:`pood_plugins.evaluation.rows`. Default is all detectors of
        logits and features; ``"all"`` as the only one adds those that need images.
    :param options: further arguments for the benchmark's constructor
    :param folders: for ``folder``, the arguments ``train``, ``test``, ``ood`` and ``near`` of
        :class:`~pood_plugins.benchmark.FolderBenchmark`
    :param download: whether to fetch what is missing
    :param cache_dir: see :func:`~pood_plugins.evaluation.run`
    :param max_images: likewise; default is 1000 for the slowest detectors
    :param device: where to compute
    :param batch_size: images per batch
    :param workers: processes that read images
    :param sheets: whether to explain some images, for the HTML report
    :return: report, with intervals, which of several processes only the first computes
    :raises LookupError: if a name is unknown
    :raises ValueError: if data, weights or preprocessing are missing or don't fit
    :raises OSError: if a file can't be read
    """
    start = time.perf_counter()
    known = name.casefold()
    packed = root is not None and is_packed(known, root)

    extra = {**({"download": True} if download else {}), **(options or {})}
    own = ("transform", "name", "root") if known in OPENOOD_CLASSES else ("transform",)
    foreign = [option for option in extra if option in own or known == "folder"]
    if foreign:
        raise ValueError(f"{name} has no option {', '.join(foreign)}: leave it out")

    def make(transform: Any) -> Benchmark:
        if known == "folder":
            return _folder(folders or {}, transform)
        if known not in OPENOOD_CLASSES:
            return _registered(name, root, extra, transform)
        if root is None:
            raise ValueError("there is no folder with the images: name it by --root")
        return openood(known, root, transform, **extra)

    if num_classes is None and known == "folder":
        num_classes = make(None).num_classes
    elif num_classes is None and known not in OPENOOD_CLASSES:
        found = getattr(registry.load(name, "benchmark"), "num_classes", None)
        num_classes = found if isinstance(found, int) else None
    with distributed.ahead():  # weights may have to be downloaded
        model, preprocessing = load_classifier(
            arch, weights, num_classes or OPENOOD_CLASSES.get(known)
        )
    preprocessing = complete(preprocessing, size, mean, std)
    transform = _for_packs(preprocessing) if packed else preprocessing.transform
    with distributed.ahead() if extra.get("download") else nullcontext():
        benchmark = make(transform)

    (example_set,) = benchmark.test_sets(known=True, unknown=False)
    example = example_set[0][0][None]
    split = split_model(model.to(device), example=example.repeat(2, 1, 1, 1).to(device))
    expected = getattr(benchmark, "num_classes", None)
    if expected not in (None, split.head.out_features):
        raise ValueError(
            f"the classifier has {split.head.out_features} classes, but {name} has {expected}: "
            "choose weights that were trained on its classes"
        )
    rows = RowBuilder(
        split,
        benchmark,
        shape=tuple(example.shape[1:]),
        normalize=preprocessing.normalize,
        batch_size=batch_size,
    )
    everything = detectors is not None and [d.casefold() for d in detectors] == ["all"]
    if detectors is None or everything:
        built, refused = rows.build_all(images=everything)
    else:
        built, refused = dict(rows.build(detector) for detector in detectors), {}
    limits = SLOW if max_images is None else max_images
    report = run(
        benchmark,
        built,
        device=device,
        loader_kwargs={"batch_size": batch_size, "num_workers": workers},
        cache_dir=cache_dir,
        max_images=limits,
    )
    if distributed.rank() == 0 and any(not result.error for result in report.results):
        report.bootstrap()
        if sheets:
            try:
                report.sheets = explanation_sheets(report, benchmark, built, preprocessing)
            except (ImportError, OSError, ValueError) as error:  # the table is worth more
                log.warning(f"There are no explanations: {error}")
    report.metadata.update(
        benchmark=name,
        arch=arch,
        weights=None if weights is None else Path(weights).name if arch else weights,
        weights_sha256=fingerprint(split.model),
        preprocessing=repr(transform),
        packed=packed,
        left_out=refused,
        device=str(device),
        seconds=round(time.perf_counter() - start, 1),
    )
    return report


def _for_packs(preprocessing: Preprocessing) -> Normalize:
    """What is left to do with images of 32 pixels in [0, 1]."""
    resize = preprocessing.resize
    if preprocessing.size != 32 or resize not in (None, 32, (32, 32)):
        raise ValueError(
            f"images in packs have 32 pixels, but this classifier takes {preprocessing.size} of "
            f"{resize or preprocessing.size}: unpack them into files"
        )
    return preprocessing.normalize


def _folder(folders: Mapping[str, Any], transform: Callable[..., Any] | None) -> Benchmark:
    for argument in ("train", "test"):
        if not folders.get(argument):
            raise ValueError(f"the folder benchmark needs --{argument} DIR")
    return FolderBenchmark(
        folders["train"],
        folders["test"],
        ood=folders.get("ood", {}),
        near=folders.get("near", ()),
        transform=transform,
    )


def _registered(
    name: str, root: Any, options: Mapping[str, Any], transform: Callable[..., Any] | None
) -> Benchmark:
    benchmark_class = registry.load(name, "benchmark")
    parameters = inspect.signature(benchmark_class).parameters
    given: dict[str, Any] = {"root": root} if root is not None else {}
    if "transform" in parameters:
        given["transform"] = transform
    if "download" in parameters:  # upstream's default is to fetch everything
        given["download"] = False
    given.update(options)
    unknown = [argument for argument in given if argument not in parameters]
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}: it has {', '.join(parameters) or 'none'}"
        )
    try:
        return benchmark_class(**given)
    except TypeError as error:
        raise ValueError(f"{name} can't be made ({error}): give --option KEY=VALUE") from error
