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
- A detector that fails becomes a row with its reason, and the others go on. Images that can't be
  read end the run, since figures of the other images would be those of another benchmark.
- Detectors that need images score every data set once, and not the ID test set once with each OOD
  set. ``max_images`` has the slowest of them score a random part.
- With ``cache_dir``, features are kept, and so are the scores of detectors that need images: a
  second run over other detectors takes seconds, and one that was interrupted goes on.
- Packs of images are transformed on the device, a batch at a time.
- Several processes share the work, see :mod:`pood_plugins.distributed`.

..  autofunction:: pood_plugins.evaluation.run

Cache
-----

.. automodule:: pood_plugins.evaluation.cache
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pytorch_ood.api import Detector, FeaturesDetector, GradientDetector, LogitsDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import DICE, GMM
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .. import distributed
from ..dataset.packs import ImagePack, PackLoader
from ..model.split import SplitModel
from .cache import Cache, of_dataset, of_module, of_value
from .report import Report, Result

log = logging.getLogger(__name__)

# entries of the largest tensor that DICE and GMM may make of the rows that they score at once
_ENTRIES = 2**26


def run(
    benchmark: Benchmark,
    detectors: Mapping[str, Detector],
    *,
    device: str | torch.device = "cpu",
    loader_kwargs: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_images: Mapping[str, int] | None = None,
) -> Report:
    """
    Fits the detectors and evaluates them on all OOD sets of a benchmark.

    Detectors and models are moved to ``device``, and models put into evaluation mode. Progress is
    shown if the output is a terminal.

    :param benchmark: where training and test sets come from. Its attributes ``near_ood_names`` and
        ``far_ood_names``, if there are any, say which OOD sets are averaged as near- and far-OOD,
        ``missing`` and ``notes`` what is to be said of sets, and ``num_classes`` how many columns
        the classifier must have.
    :param detectors: detectors by the name of their row
    :param device: where to compute
    :param loader_kwargs: arguments for :class:`torch.utils.data.DataLoader`, e.g. ``{"batch_size":
        256}``, which is the default. Data are never shuffled.
    :param cache_dir: folder for features and scores, see :class:`~.cache.Cache`; default is to
        keep nothing. A detector whose scores were found there is not fitted afterwards.
    :param max_images: by the name of a row whose detector needs images, how many images of each
        test set it scores, drawn at random with a fixed seed
    :return: report with one result per detector
    :raises ValueError: if the device can't be used, there are no detectors, a data set has no ID
        or no OOD samples, an image can't be read, labels don't fit the classifier, or
        ``max_images`` has less than 1
    :raises ProcessError: if another process of the run has ended, see
        :mod:`pood_plugins.distributed`
    """
    if not isinstance(benchmark, Benchmark):
        raise ValueError(f"The benchmark must be a Benchmark, not {benchmark!r}. Construct it.")
    if not detectors:
        raise ValueError("No detectors to evaluate. Pass a dictionary of at least one.")
    for name, detector in detectors.items():
        if not isinstance(detector, Detector):
            raise ValueError(f"{name} must be a Detector, not {detector!r}: see registry.build.")
    device = torch.device(device)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # before every row fails
        raise ValueError(f"The device '{device}' can't be used: {error}") from error
    arguments = {"batch_size": 256, **(loader_kwargs or {}), "shuffle": False}
    names = list(benchmark.ood_names)
    sources = {name: _Source(detector) for name, detector in detectors.items()}
    data = _Data(benchmark, arguments, device, Cache(cache_dir))
    stored: dict[_Source, _Stored] = {}
    for source in sources.values():
        if source:
            same = stored.setdefault(source, _Stored(source, names, device))
            same.head = same.head or source.head
    for source in stored.values():
        _check_classes(benchmark, source.head)
    images = {name: len(dataset) for name, dataset in data.test_sets()}  # type: ignore[arg-type]
    limits = {
        name: _limit(max_images, name, max(images.values()))
        for name, source in sources.items()
        if max_images is not None and not source
    }
    results = {}
    for name, detector in detectors.items():
        results[name] = Result(detector=name, class_name=type(detector).__name__)
        results[name].baseline = type(detector).__module__.startswith("pytorch_ood.")

    own = _own_rows(sources)

    with _progress(len(own), "detectors", leave=True) as progress:

        def evaluate() -> None:
            for name in own:
                progress.set_postfix_str(name)
                detector, source, result = detectors[name], sources[name], results[name]
                if source:
                    work = partial(_evaluate_stored, detector, source, stored[source], result)
                else:
                    result.images = limits.get(name)
                    work = partial(_evaluate_raw, detector, data, result)
                if not result.error:
                    _attempt(detector, device, result, work)
                progress.update()

        for name, source in sources.items():
            if source:
                progress.set_postfix_str(name)
                work = partial(stored[source].extract, data, detectors[name].requires_fit)
                _attempt(detectors[name], device, results[name], work)
        distributed.together(evaluate, ValueError, "detectors")

    for rows in distributed.exchange({name: vars(results[name]) for name in own}, "results"):
        results.update({name: Result(**row) for name, row in rows.items()})
    return Report(
        list(results.values()),
        ood_names=names,
        near_ood_names=list(getattr(benchmark, "near_ood_names", [])),
        far_ood_names=list(getattr(benchmark, "far_ood_names", [])),
        missing=getattr(benchmark, "missing", {}),
        notes=getattr(benchmark, "notes", {}),
        metadata={
            "images": images,
            "forward_seconds": sum(features.seconds for features in stored.values()),
            **({"processes": distributed.size()} if distributed.size() > 1 else {}),
        },
    )


def _attempt(
    detector: Detector, device: torch.device, result: Result, work: Callable[[], None]
) -> None:
    """
    Prepares a detector and does the work. That it fails goes into its row, unless something else
    is at fault.
    """
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            parts = _detectors(detector)
            models = [part for part in _held(parts) if isinstance(part, nn.Module)]
            for model in models:
                model.eval()
            for part in parts:
                part.to(device)
            with _gradients_kept(models):
                work()
    except _BrokenBenchmark as error:
        raise ValueError(str(error)) from None
    except distributed.ProcessError:
        raise
    except Exception as error:
        log.debug(f"{result.detector} failed", exc_info=True)
        result.error = f"{type(error).__name__}: {error}"


@contextmanager
def _gradients_kept(models: list[nn.Module]) -> Iterator[None]:
    """Some detectors add to the gradients of the weights, which nobody trains here."""
    kept = [(p, p.grad) for model in models for p in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _own_rows(sources: Mapping[str, "_Source"]) -> list[str]:
    """Rows that this process evaluates: those on stored features, if it is the first."""
    rank, size = distributed.rank(), distributed.size()
    raw = [name for name, source in sources.items() if not source]
    # dealt out from the last process, as the first has the others to do
    elsewhere = set(raw) - set(raw[size - 1 - rank :: size])
    return [n for n, source in sources.items() if n not in elsewhere and not (source and rank)]


def _progress(total: int, description: str, leave: bool = False) -> tqdm:
    """Shown on a terminal, by the first process."""
    disable = True if distributed.rank() else None
    return tqdm(total=total, desc=description, leave=leave, disable=disable)


class _BrokenBenchmark(ValueError):
    """The benchmark, and not a detector, is at fault."""


class _Data:
    """The data sets of a benchmark as batches, and how to recognise them."""

    def __init__(
        self,
        benchmark: Benchmark,
        arguments: Mapping[str, Any],
        device: torch.device,
        cache: Cache,
    ):
        self.benchmark = benchmark
        self.arguments = arguments
        self.device = device
        self.cache = cache
        self._test_sets: list[tuple[str, Dataset[Any]]] = []
        self._keys: dict[int, str | None] = {}  # by identity of data sets, which are kept here
        self._kept: list[Dataset[Any]] = []

    def test_sets(self) -> list[tuple[str, Dataset[Any]]]:
        """The ID test set, named ID, and the OOD test sets."""
        self._test_sets = self._test_sets or _test_sets(self.benchmark)
        return self._test_sets

    def key(self, dataset: Dataset[Any]) -> str | None:
        if self.cache.directory is None:
            return None
        if id(dataset) not in self._keys:
            self._kept.append(dataset)
            self._keys[id(dataset)] = of_dataset(dataset)
        return self._keys[id(dataset)]

    def batches(
        self, dataset: Dataset[Any], description: str, shared: bool = False
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """
        Batches, any number of times: all, or the share of this process. What can't be read is the
        benchmark's fault.
        """
        return _Batches(dataset, self.arguments, self.device, description, shared)


class _Batches:
    def __init__(
        self,
        dataset: Dataset[Any],
        arguments: Mapping[str, Any],
        device: torch.device,
        description: str,
        shared: bool,
    ):
        self.loader: Any
        if shared:
            self.loader = distributed.share(dataset, device=device, loader_kwargs=arguments)
        elif isinstance(dataset, ImagePack):
            self.loader = PackLoader(dataset, arguments["batch_size"], device=device)
        else:
            self.loader = DataLoader(dataset, **arguments)
        self.description = description

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with _progress(len(self), self.description) as progress:
            batches = iter(self.loader)
            while True:
                try:
                    x, y = next(batches)
                except StopIteration:
                    return
                except Exception as error:  # what an image raises depends on where it is broken
                    kind = type(error).__name__
                    # of an error in a worker process, the last line says what it was
                    reason = [kind, *str(error).strip().splitlines()][-1]
                    reason = reason.removeprefix(f"{kind}: ")
                    if not isinstance(error, (OSError, RuntimeError, ValueError)):
                        reason = f"{kind}: {reason}"
                    raise _BrokenBenchmark(f"{self.description}: {reason}") from error
                yield x, y
                progress.update()


def _check_classes(benchmark: Benchmark, head: nn.Module | None) -> None:
    expected = getattr(benchmark, "num_classes", None)
    columns = getattr(head, "out_features", None)
    if expected is not None and columns is not None and expected != columns:
        raise ValueError(
            f"the classifier has {columns} classes, but {type(benchmark).__name__} has "
            f"{expected}: choose weights that were trained on its classes"
        )


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
        self.seconds = 0.0  # that the producer took, now or when it filled the cache
        self._model_key: str | None = None

    def extract(self, data: _Data, fit: bool) -> None:
        """Runs the producer over whatever is not stored yet."""
        if self.known is None:
            known, *unknown = [self._output(data, d, f"test {n}") for n, d in data.test_sets()]
            self.known, self.unknown = known, unknown
        if fit and self.train is None:
            self.train = self._output(data, data.benchmark.train_set(), "train")

    def _output(
        self, data: _Data, dataset: Dataset[Any], description: str
    ) -> tuple[Tensor, Tensor]:
        def compute() -> dict[str, Any]:
            outputs, labels = [], []
            start = time.perf_counter()

            def run_share() -> None:
                with torch.no_grad():
                    for x, y in data.batches(dataset, description, shared=True):
                        outputs.append(self.source.producer(x.to(self.device)).flatten(1).cpu())
                        labels.append(y.cpu())

            distributed.together(run_share, _BrokenBenchmark, description)
            features = distributed.gather(outputs, everywhere=False)
            y = distributed.gather(labels, everywhere=False)
            return {"features": features, "y": y, "seconds": time.perf_counter() - start}

        def find(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            key: dict[str, str | None] = {"data": data.key(dataset), "device": self.device.type}
            if data.cache.directory is not None:
                self._model_key = self._model_key or of_module(self.source.producer)
                key["model"] = self._model_key
            return data.cache.get(f"features {description}", key, compute)

        stored = distributed.unless_found(find, compute)
        if distributed.rank() or stored is None:
            return torch.empty(0), torch.empty(0)  # it is the first process that evaluates
        self.seconds += stored["seconds"]
        return stored["features"], stored["y"]

    def check_labels(self, labels: Tensor) -> None:
        columns = getattr(self.head, "out_features", None)
        if columns is not None and int(labels.max()) >= columns:
            raise _BrokenBenchmark(
                f"there is a label {int(labels.max())}, but the classifier has {columns} classes: "
                "labels must be columns of the classifier"
            )

    def train_set(self) -> Dataset[Any]:
        return [self.train]  # type: ignore[return-value]

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        assert known and unknown and self.known is not None
        return [[self.known, ood] for ood in self.unknown]  # type: ignore[misc]


def _test_sets(benchmark: Benchmark) -> list[tuple[str, Dataset[Any]]]:
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
        if len(dataset) == 0:
            raise _BrokenBenchmark(
                f"The test set '{name}' of {type(benchmark).__name__} is empty: there is nothing "
                "to compare. Check the data folder."
            )
    return sets


def _evaluate_stored(detector: Detector, source: _Source, stored: _Stored, result: Result) -> None:
    """Fits and evaluates a detector of logits or features on stored outputs."""
    assert stored.known is not None
    stored.check_labels(stored.known[1])
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
        stored.check_labels(y)
        if result.baseline:
            # fit() of pytorch-ood's detectors drops outliers before they see them
            z, y = z[y >= 0], y[y >= 0]
        with torch.no_grad():
            z = rest(z.to(stored.device)).cpu()
        start = time.perf_counter()
        getattr(detector, fit)(z, y)
        result.fit_seconds = time.perf_counter() - start

    labels = [torch.cat([stored.known[1], ood[1]]) for ood in stored.unknown]
    original = getattr(detector, attribute)
    setattr(detector, attribute, rest)
    try:
        rows = _rows_at_once(detector, stored)
        _evaluate(detector, stored, {"batch_size": None}, stored.device, labels, result, rows)
    finally:
        setattr(detector, attribute, original)


def _rows_at_once(detector: Detector, stored: _Stored) -> int | None:
    """Where pytorch-ood makes a tensor of samples x classes x features: how many samples."""
    if not isinstance(detector, (DICE, GMM)):
        return None
    assert stored.train is not None
    z, y = stored.train
    classes = getattr(stored.head, "out_features", int(y.max()) + 1)
    return max(1, _ENTRIES // (classes * z.shape[1]))


class _Replay(Detector):
    """Gives scores that are there already to upstream's ``evaluate``."""

    def predict(self, x: Tensor) -> Tensor:
        return x

    def fit(self, data_loader: DataLoader[Any]) -> "_Replay":
        return self


def _evaluate_raw(detector: Detector, data: _Data, result: Result) -> None:
    """Fits and evaluates a detector that needs images."""
    train = data.benchmark.train_set() if detector.requires_fit else None
    sets = [(name, _drawn(dataset, result.images)) for name, dataset in data.test_sets()]

    def compute() -> dict[str, Any]:
        fit_seconds = None
        if train is not None:
            start = time.perf_counter()
            detector.fit(data.batches(train, "fit"))
            fit_seconds = time.perf_counter() - start
        scores, labels, seconds = [], [], 0.0
        for name, dataset in sets:
            parts = []
            for x, y in data.batches(dataset, f"test {name}"):
                start = time.perf_counter()
                with torch.no_grad():
                    parts.append(detector(x.to(data.device)).detach().flatten().cpu())
                seconds += time.perf_counter() - start
                labels.append(y.cpu())
            scores.append(torch.cat(parts))
        return {
            "scores": scores,
            "labels": list(torch.cat(labels).split([len(part) for part in scores])),
            "fit_seconds": fit_seconds,
            "score_seconds": seconds,
        }

    def key() -> dict[str, str | None]:
        if data.cache.directory is None:
            return {}
        return {
            # the registry tells the version of its distribution
            "detector": of_value(detector) if hasattr(detector, "build_record") else None,
            "device": data.device.type,
            "batch_size": str(data.arguments["batch_size"]),  # some draw at random by batch
            "train": "none" if train is None else data.key(train),
            **{f"test {name}": data.key(dataset) for name, dataset in sets},
        }

    name, before = f"scores {type(detector).__name__}", key()
    stored = data.cache.get(name, before, compute)
    if None not in before.values() and (after := key()) != before:
        # a second run with this very detector, which is fitted now, finds them, too
        data.cache.get(name, after, lambda: stored)

    replayed = _Stored(_Source(detector), data.benchmark.ood_names, torch.device("cpu"))
    replayed.known, *replayed.unknown = zip(stored["scores"], stored["labels"])
    labels = [torch.cat([stored["labels"][0], y]) for y in stored["labels"][1:]]
    _evaluate(_Replay(), replayed, {"batch_size": None}, replayed.device, labels, result)
    result.fit_seconds, result.score_seconds = stored["fit_seconds"], stored["score_seconds"]


def _limit(max_images: Mapping[str, int], row: str, largest: int) -> int | None:
    """How many images of each test set a row scores, if that is only a part of the largest."""
    try:
        limit = max_images[row]  # not `get`, for the sake of a defaultdict
    except KeyError:
        return None
    if limit < 1:
        raise ValueError(f"max_images has {limit} for {row!r}: it must be at least 1")
    return limit if limit < largest else None


def _drawn(dataset: Dataset[Any], n: int | None) -> Dataset[Any]:
    """A random part of a data set, the same in every run."""
    if n is None or n >= len(dataset):  # type: ignore[arg-type]
        return dataset
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    rows = rows[:n].sort().values
    return dataset.subset(rows) if isinstance(dataset, ImagePack) else Subset(dataset, rows)  # type: ignore[arg-type]


def _evaluate(
    detector: Detector,
    benchmark: Benchmark,
    arguments: Mapping[str, Any],
    device: torch.device,
    labels: list[Tensor],
    result: Result,
    rows_at_once: int | None = None,
) -> None:
    """Calls upstream's ``evaluate`` and keeps its metrics and the scores that it saw."""
    for name, y in zip(benchmark.ood_names, labels):
        for kind, count in (("ID", int((y >= 0).sum())), ("OOD", int((y < 0).sum()))):
            if count == 0:
                raise _BrokenBenchmark(
                    f"The test set '{name}' has no {kind} samples, so no metric is defined. OOD "
                    "samples need labels < 0 and ID samples labels >= 0."
                )
    with _recorded(detector, rows_at_once) as record, warnings.catch_warnings():
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
def _recorded(detector: Detector, rows_at_once: int | None) -> Iterator[_Record]:
    """
    Keeps the scores that the detector returns meanwhile, and the time it takes for them. With
    ``rows_at_once``, it is not given more rows than that.
    """
    record = _Record()
    depth = 0

    def recording(method: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal depth
            start = time.perf_counter()
            depth += 1
            try:
                scores: Tensor
                if rows_at_once is None or depth > 1:
                    scores = method(*args, **kwargs)
                else:
                    scores = torch.cat([method(part) for part in args[0].split(rows_at_once)])
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


def _detectors(detector: Detector) -> list[Detector]:
    """A detector, and those that it holds: its ``to`` leaves these where they are."""
    found = [detector]
    for part in found:  # which grows meanwhile
        for value in _held([part]):
            if isinstance(value, Detector) and not any(value is other for other in found):
                found.append(value)
    return found


def _held(detectors: Iterable[Detector]) -> Iterator[Any]:
    """What attributes, and lists, tuples and dictionaries in them, are or are methods of."""
    for detector in detectors:
        for value in vars(detector).values():
            values = value.values() if isinstance(value, dict) else value
            several = isinstance(value, (dict, list, tuple))
            for part in values if several else [value]:
                yield getattr(part, "__self__", part)
