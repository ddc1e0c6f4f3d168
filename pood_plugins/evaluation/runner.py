"""
Fits and evaluates many detectors on one benchmark, through pytorch-ood's own
:meth:`Benchmark.evaluate <pytorch_ood.benchmark.Benchmark.evaluate>`.

.. code-block:: python

    from pood_plugins import evaluation, registry
    from pood_plugins.model import split_model

    split = split_model(model.eval())
    detectors = {name: registry.build(name, split) for name in ["GROOD", "NERO", "Energy", "KNN"]}
    report = evaluation.run(benchmark, detectors, device="cuda", loader_kwargs={"batch_size": 256})
    print(report.to_markdown())

What the runner adds to ``evaluate``:

- Detectors of logits and of pooled features share one pass of the encoder over each data set.
  Logits are computed from these features by the head, if the detector's model is a
  :class:`~pood_plugins.model.SplitModel`.
- Every detector that needs it is fitted on ``benchmark.train_set()``, with the same features.
- The model is put into evaluation mode, and gradients are off for detectors that do not ask for
  them.
- Rows carry the names that you gave, so a detector may occur several times, with different
  settings.
- A detector that fails becomes a row with its reason, and the others go on.

..  autofunction:: pood_plugins.evaluation.run
"""

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_ood.api import Detector, FeaturesDetector, GradientDetector, LogitsDetector
from pytorch_ood.benchmark import Benchmark
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..model.split import SplitModel
from .report import Report, Result

log = logging.getLogger(__name__)


def run(
    benchmark: Benchmark,
    detectors: Mapping[str, Detector],
    *,
    device: str | torch.device = "cpu",
    loader_kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """
    Fits the detectors and evaluates them on all OOD sets of a benchmark.

    Detectors and models are moved to ``device``, and models put into evaluation mode. Progress is
    shown if the output is a terminal.

    :param benchmark: where training and test sets come from. Its attributes ``near_ood_names`` and
        ``far_ood_names``, if there are any, say which OOD sets are averaged as near- and far-OOD.
    :param detectors: detectors by the name of their row
    :param device: where to compute
    :param loader_kwargs: arguments for :class:`torch.utils.data.DataLoader`, e.g. ``{"batch_size":
        256}``, which is the default. Data are never shuffled.
    :return: report with one result per detector
    :raises ValueError: if there are no detectors, or a data set has no ID or no OOD samples
    """
    if not detectors:
        raise ValueError("No detectors to evaluate. Pass a dictionary of at least one.")
    device = torch.device(device)
    arguments = {"batch_size": 256, **(loader_kwargs or {}), "shuffle": False}
    names = list(benchmark.ood_names)
    sources = {name: _Source(detector) for name, detector in detectors.items()}
    stored: dict[_Source, _Stored] = {}
    for source in sources.values():
        if source:
            same = stored.setdefault(source, _Stored(source, names, device))
            same.head = same.head or source.head
    labels: list[Tensor] = []  # of the test sets, read only if a detector needs images
    results = []

    with tqdm(total=len(detectors), desc="detectors", disable=None) as progress:
        for name, detector in detectors.items():
            progress.set_postfix_str(name)
            result = Result(detector=name, class_name=type(detector).__name__)
            source = sources[name]
            try:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    # detectors that draw at random get the same numbers in every run
                    torch.manual_seed(0)
                    for model in _models(detector):
                        model.eval()
                    detector.to(device)
                    if source:
                        features = stored[source]
                        features.extract(benchmark, arguments, fit=detector.requires_fit)
                        _evaluate_stored(detector, source, features, result)
                    else:
                        labels = labels or _read_labels(benchmark, arguments)
                        _evaluate_raw(detector, benchmark, arguments, device, labels, result)
            except _BrokenBenchmark as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                log.debug(f"{name} failed", exc_info=True)
                result.error = f"{type(error).__name__}: {error}"
            results.append(result)
            progress.update()

    return Report(
        results,
        ood_names=names,
        near_ood_names=list(getattr(benchmark, "near_ood_names", [])),
        far_ood_names=list(getattr(benchmark, "far_ood_names", [])),
    )


class _BrokenBenchmark(Exception):
    """The benchmark, and not a detector, is at fault."""


class _Source:
    """
    Where the input of a detector comes from: the encoder of its features, or else the model of its
    logits. False for detectors that need images.
    """

    def __init__(self, detector: Detector):
        self.producer: Any = None
        self.head: nn.Module | None = None  # from what is stored to logits, where that is known
        if isinstance(detector, GradientDetector):
            return
        if isinstance(detector, FeaturesDetector):
            self.producer = getattr(detector, "encoder", None)
            head = getattr(detector, "head", None)
            self.head = head if isinstance(head, nn.Linear) else None
        elif isinstance(detector, LogitsDetector):
            self.producer, self.head = getattr(detector, "model", None), nn.Identity()
            if isinstance(self.producer, SplitModel):
                self.producer, self.head = self.producer.encoder, self.producer.head

    def __bool__(self) -> bool:
        return self.producer is not None

    # By identity of the producer, which is kept alive here: an id alone may be used again.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self.producer is other.producer

    def __hash__(self) -> int:
        return id(self.producer)


class _Stored(Benchmark):
    """
    A benchmark whose samples are the stored outputs of a producer. Each data set is one batch.
    """

    def __init__(self, source: _Source, ood_names: list[str], device: torch.device):
        self.source = source
        self.ood_names = ood_names
        self.device = device
        self.head: nn.Module | None = None
        self.train: tuple[Tensor, Tensor] | None = None
        self.known: tuple[Tensor, Tensor] | None = None
        self.unknown: list[tuple[Tensor, Tensor]] = []

    def extract(self, benchmark: Benchmark, arguments: Mapping[str, Any], fit: bool) -> None:
        """Runs the producer over whatever is not stored yet."""
        if self.known is None:
            known, *unknown = [
                self._output(dataset, arguments, f"test {name}")
                for name, dataset in _test_sets(benchmark)
            ]
            self.known, self.unknown = known, unknown
        if fit and self.train is None:
            self.train = self._output(benchmark.train_set(), arguments, "train")

    def _output(
        self, dataset: Dataset, arguments: Mapping[str, Any], description: str
    ) -> tuple[Tensor, Tensor]:
        outputs, labels = [], []
        loader = DataLoader(dataset, **arguments)
        with torch.no_grad():
            for x, y in tqdm(loader, desc=description, leave=False, disable=None):
                outputs.append(self.source.producer(x.to(self.device)).flatten(1).cpu())
                labels.append(y)
        return torch.cat(outputs), torch.cat(labels)

    def train_set(self) -> Dataset:
        return [self.train]  # type: ignore[return-value]

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset]:
        assert known and unknown and self.known is not None
        return [[self.known, ood] for ood in self.unknown]  # type: ignore[misc]


def _test_sets(benchmark: Benchmark) -> list[tuple[str, Dataset]]:
    """The ID test set and the OOD test sets, by name, if they are what a benchmark promises."""
    known = benchmark.test_sets(known=True, unknown=False)
    unknown = benchmark.test_sets(known=False, unknown=True)
    names = list(benchmark.ood_names)
    if len(known) != 1 or len(unknown) != len(names) or not names:
        raise _BrokenBenchmark(
            f"{type(benchmark).__name__} names {len(names)} OOD sets ({', '.join(names)}) but has "
            f"{len(unknown)}, and {len(known)} ID test sets. There must be one ID test set and as "
            "many OOD sets as names, at least one."
        )
    sets = [("ID", known[0]), *zip(names, unknown)]
    for name, dataset in sets:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise _BrokenBenchmark(
                f"The test set '{name}' of {type(benchmark).__name__} is empty: there is nothing "
                "to compare. Check the data folder."
            )
    return sets


def _evaluate_stored(detector: Detector, source: _Source, stored: _Stored, result: Result) -> None:
    """Fits and evaluates a detector of logits or features on stored outputs."""
    assert stored.known is not None
    if stored.head is not None:
        with torch.no_grad():
            predicted = stored.head.to(stored.device)(stored.known[0].to(stored.device))
        correct = predicted.argmax(dim=1).cpu() == stored.known[1]
        result.accuracy = float(correct.double().mean())

    # upstream asks the detector for the network to run; what is left of it replaces it
    attribute, fit = "encoder", "fit_features"
    rest: nn.Module = nn.Identity()
    if isinstance(detector, LogitsDetector):
        assert source.head is not None
        attribute, fit = "model", "fit_logits"
        rest = source.head.to(stored.device)

    if detector.requires_fit:
        assert stored.train is not None
        z, y = stored.train
        with torch.no_grad():
            z = rest(z.to(stored.device)).cpu()
        start = time.perf_counter()
        getattr(detector, fit)(z, y)
        result.fit_seconds = time.perf_counter() - start

    labels = [torch.cat([stored.known[1], ood[1]]) for ood in stored.unknown]
    original = getattr(detector, attribute)
    setattr(detector, attribute, rest)
    try:
        _evaluate(detector, stored, {"batch_size": None}, stored.device, labels, result)
    finally:
        setattr(detector, attribute, original)


def _evaluate_raw(
    detector: Detector,
    benchmark: Benchmark,
    arguments: Mapping[str, Any],
    device: torch.device,
    labels: list[Tensor],
    result: Result,
) -> None:
    """Fits and evaluates a detector that needs images."""
    if detector.requires_fit:
        start = time.perf_counter()
        loader = DataLoader(benchmark.train_set(), **arguments)
        detector.fit(tqdm(loader, desc="fit", leave=False, disable=None))
        result.fit_seconds = time.perf_counter() - start
    with torch.no_grad():
        _evaluate(detector, benchmark, arguments, device, labels, result)


def _evaluate(
    detector: Detector,
    benchmark: Benchmark,
    arguments: Mapping[str, Any],
    device: torch.device,
    labels: list[Tensor],
    result: Result,
) -> None:
    """Calls upstream's ``evaluate`` and keeps its metrics and the scores that it saw."""
    for name, y in zip(benchmark.ood_names, labels):
        for kind, count in (("ID", int((y >= 0).sum())), ("OOD", int((y < 0).sum()))):
            if count == 0:
                raise _BrokenBenchmark(
                    f"The test set '{name}' has no {kind} samples, so no metric is defined. OOD "
                    "samples need labels < 0 and ID samples labels >= 0."
                )
    with _recorded(detector) as record, warnings.catch_warnings():
        # the only metric that is undefined for constant scores is one that is not reported
        warnings.filterwarnings("ignore", message="AUTC is undefined")
        rows = benchmark.evaluate(detector, loader_kwargs=dict(arguments), device=str(device))
    result.score_seconds = record.seconds
    scores = torch.cat(record.scores).double()
    for row, y, part in zip(rows, labels, scores.split([len(y) for y in labels])):
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"scores on '{row['Dataset']}' are not finite")
        result.add(
            row["Dataset"],
            {
                "AUROC": row["AUROC"],
                "AUPR-IN": row["AUPR-IN"],
                "AUPR-OUT": row["AUPR-OUT"],
                "FPR95": row["FPR95TPR"],
            },
            scores_id=part[y >= 0],
            scores_ood=part[y < 0],
        )


class _Record:
    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.seconds = 0.0


@contextmanager
def _recorded(detector: Detector) -> Iterator[_Record]:
    """Keeps the scores that the detector returns meanwhile, and the time it takes for them."""
    record = _Record()
    depth = 0

    def recording(method: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal depth
            start = time.perf_counter()
            depth += 1
            try:
                scores = method(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:  # `predict` may call `predict_features`
                record.scores.append(scores.detach().cpu().flatten())
                record.seconds += time.perf_counter() - start
            return scores

        return wrapped

    methods = [
        m for m in ("predict", "predict_logits", "predict_features") if hasattr(detector, m)
    ]
    for method in methods:
        setattr(detector, method, recording(getattr(detector, method)))
    try:
        yield record
    finally:
        for method in methods:
            delattr(detector, method)


def _read_labels(benchmark: Benchmark, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Labels of each test set, ID and OOD."""
    known, *unknown = [
        torch.cat([y for _, y in DataLoader(dataset, **arguments)])
        for _, dataset in _test_sets(benchmark)
    ]
    return [torch.cat([known, ood]) for ood in unknown]


def _models(detector: Detector) -> Iterator[nn.Module]:
    for value in vars(detector).values():
        owner = getattr(value, "__self__", value)
        for candidate in owner if isinstance(owner, (list, tuple)) else [owner]:
            if isinstance(candidate, nn.Module):
                yield candidate
