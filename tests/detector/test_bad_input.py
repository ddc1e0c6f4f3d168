"""
What the detectors of this package do with input that is bad, or good and unusual: a table.

Each row changes what a call is given and says what must come of it, the exact scores or an
exception. Each cell, which is one test, is a row applied to a call of a detector, or of a detector
in a setting that takes other ways through the code. Whatever comes of it, nothing that was handed
in is changed, and a failed call leaves the detector as it was.
"""

import copy
import math
import re
import warnings
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

import numpy as np
import pytest
import torch
from pytorch_ood.api import FeaturesDetector, ModelNotSetException, RequiresFittingException
from torch import Tensor, nn

from pood_plugins import registry
from pood_plugins.model import split_model

pytestmark = pytest.mark.usefixtures("one_thread")

N_CLASSES, PER_CLASS, N_OUTLIERS, WIDTH = 4, 15, 8, 12
N = N_CLASSES * PER_CLASS + N_OUTLIERS


# --- the data, and the networks ---


def _clouds() -> Tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """
    Features of separate classes and of outliers, their labels, queries of both kinds, and the head
    of the classes. Each class has a clear runner-up and all numbers are few digits long, so that
    heads and features in half precision tell the same.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = torch.eye(N_CLASSES).repeat_interleave(WIDTH // N_CLASSES, dim=1)
    centers = torch.cat([4 * blocks + blocks.roll(1, dims=0), torch.full((1, WIDTH), 2.0)])
    labels = torch.arange(N_CLASSES).repeat_interleave(PER_CLASS)
    labels = torch.cat([labels, torch.full((N_OUTLIERS,), -1)])

    def cloud(of: Tensor) -> Tensor:
        z = centers[of] + 0.3 * torch.randn(len(of), WIDTH, generator=generator)
        return (32 * z.relu()).round() / 32

    z, queries = cloud(labels), cloud(torch.tensor([0, 1, 2, 3, 1, -1, -1, -1]))
    head = nn.Linear(WIDTH, N_CLASSES)
    with torch.no_grad():
        head.weight.copy_((centers[:-1] - centers.mean(dim=0)).mul(16).round() / 16)
        head.bias.copy_(torch.tensor([-2.0, -1.75, -1.5, -1.25]))
    return z, labels, queries, head


Z, LABELS, QUERIES, HEAD = _clouds()


class Encoder(nn.Module):
    """Its features are the inputs, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)


# --- the detectors ---

#: settings that take other ways through the code than the defaults
SETTINGS: Dict[str, List[Dict[str, Any]]] = {
    "GROOD": [
        {"ood_prototype": "outliers"},
        {"ood_prototype": "mixup"},
        {"ood_prototype": "mean"},
        {"ood_prototype": torch.linspace(0.5, 1.5, WIDTH)},
        {"temperature": "auto"},
        {"bank_dtype": torch.float16},
        {"bank_fraction": 0.5},
        {"k": 10},
    ],
    "NERO": [
        {"bias": False},  # of the head
        {"n_components": 5, "n_neurons": 3},
        {"eps": 0.25},
    ],
}


class Variant(NamedTuple):
    name: str
    settings: Dict[str, Any] = {}

    def __str__(self) -> str:
        shown = {n: "tensor" if isinstance(v, Tensor) else v for n, v in self.settings.items()}
        return "-".join([self.name, *(f"{name}={value}" for name, value in shown.items())])

    def build(self) -> FeaturesDetector:
        """A detector that is not fitted. All of them share a network: copy it before a change."""
        if str(self) not in _BUILT:
            settings = dict(self.settings)
            head = copy.deepcopy(HEAD)
            if not settings.pop("bias", True):
                head.register_parameter("bias", None)
            split = split_model(nn.Sequential(Encoder(), head), example=QUERIES[:2]).eval()
            _BUILT[str(self)] = registry.build(f"pood-plugins:{self.name}", split, **settings)
        return copy.copy(_BUILT[str(self)])

    def fit(self) -> FeaturesDetector:
        return self.build().fit_features(Z.clone(), LABELS.clone())


_BUILT: Dict[str, FeaturesDetector] = {}
NAMES = [i.name for i in registry.list_plugins().values() if i.origin == "pood-plugins"]
VARIANTS = [
    Variant(name, settings) for name in NAMES for settings in [{}, *SETTINGS.get(name, [])]
]


# --- what the scores must be ---


def grood_scores(
    head: nn.Linear,
    z: Tensor,
    labels: Tensor,
    queries: Tensor,
    ood_prototype: Any = "auto",
    temperature: Any = 1,
    k: int = 1,
    bank_fraction: float = 1.0,
    bank_dtype: torch.dtype = torch.float32,
) -> Tuple[np.ndarray, float]:
    """
    GROOD in decimal numbers of so many digits that none of them matters, sample by sample.

    :return: scores and the error that rounding may cause
    """
    with localcontext() as context:
        context.prec = 100

        def exact(rows: Tensor) -> List[List[Decimal]]:
            return [[Decimal(value) for value in row] for row in rows.tolist()]

        def mean(rows: List[List[Decimal]]) -> List[Decimal]:
            return [sum(column) / len(rows) for column in zip(*rows)]

        def distance(first: List[Decimal], second: List[Decimal]) -> Decimal:
            return sum((a - b) ** 2 for a, b in zip(first, second)).sqrt()

        rows, ids = exact(z), labels.tolist()
        logits = (z @ head.weight.double().T + head.bias.double()).tolist()
        known = [i for i, label in enumerate(ids) if label >= 0]
        classes = sorted({ids[i] for i in known})
        prototypes = {c: mean([rows[i] for i in known if ids[i] == c]) for c in classes}
        outliers = [row for row, label in zip(rows, ids) if label < 0]
        source = ood_prototype
        if isinstance(source, str) and source == "auto":
            source = "outliers" if outliers else "mixup" if len(classes) > 1 else "mean"
        if isinstance(source, Tensor):
            o = exact(source[None])[0]
        elif source == "outliers":
            o = mean(outliers)
        elif source == "mean":
            o = mean(list(prototypes.values()))
        else:
            runners_up = [sorted(classes, key=lambda c: -logits[i][c])[1] for i in known]
            o = mean([mean([rows[i], prototypes[c]]) for i, c in zip(known, runners_up)])
        if temperature == "auto":
            distances = [distance(rows[i], prototypes[ids[i]]) for i in known]
            temperature = sum(distances) / len(distances) / 8
        temperature = Decimal(temperature)

        def gradient(x: List[Decimal]) -> List[float]:
            distances = [distance(x, p) for p in [*prototypes.values(), o]]
            weights = [((min(distances) - d) / temperature).exp() for d in distances]
            p, d = weights[-1] / sum(weights), distances[-1]
            return [float(p * (a - b) / d) if d else 0.0 for a, b in zip(x, o)]

        correct = [i for i in known if max(range(N_CLASSES), key=lambda c: logits[i][c]) == ids[i]]
        bank = [gradient(rows[i]) for i in correct or known]
        if bank_fraction < 1:
            order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
            bank = [bank[i] for i in order[: max(1, int(bank_fraction * len(bank)))]]
        scores = [sorted(math.dist(gradient(x), b) for b in bank)[k - 1] for x in exact(queries)]
    return np.array(scores), 2**-10 if bank_dtype == torch.float16 else 1e-6


def nero_scores(
    head: nn.Linear,
    z: Tensor,
    labels: Tensor,
    queries: Tensor,
    n_components: int = int(2 / 3 * WIDTH),
    n_neurons: int = int(175 / 512 * WIDTH),
    eps: float = 0.0,
    bias: bool = True,
) -> Tuple[np.ndarray, float]:
    """NERO in double precision, sample by sample, see :func:`grood_scores`."""
    weight = head.weight.detach().double().numpy()
    biases = head.bias.detach().double().numpy() if bias else np.zeros(len(weight))
    ids = [label for label in labels.tolist() if label >= 0]

    def relevance(x: np.ndarray) -> np.ndarray:
        """That of the bias in the last entry."""
        logits = [math.fsum(w * x) + b for w, b in zip(weight, biases)]
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        found = np.zeros(WIDTH + 1)
        for w, b, logit, e in zip(weight, biases, logits, exponentials):
            divisor = math.copysign(max(abs(logit) + eps, 1e-6), -1.0 if logit < 0 else 1.0)
            found += e / sum(exponentials) * np.append(w * x, b) / divisor
        return found

    train = np.array([relevance(x) for x in z[labels >= 0].numpy()])
    centroids = np.array([train[[i == c for i in ids]].mean(axis=0) for c in sorted(set(ids))])
    nearest = [min(np.abs(r - m).sum() for m in centroids) for r in train]
    magnitude = np.abs(train[:, -1]).mean()
    scale = np.mean(nearest) / magnitude if magnitude else 0.0
    neurons = train[:, :-1] - train[:, :-1].mean(axis=0)
    # of a unit size, because the decomposition squares
    _, deviations, components = np.linalg.svd(neurons / np.abs(neurons).max())
    large = [d > 1e-7 * deviations[0] for d in deviations]
    components = np.array([c for c, use in zip(components, large) if use])[:n_components]

    scores = []
    for x in queries.numpy():
        r = relevance(x)
        distance = min(np.abs(components @ (r - m)[:-1]).sum() for m in centroids)
        lowest = np.argsort(r[:-1], kind="stable")[:n_neurons]
        total = np.abs(x).sum()
        ratio = np.abs(x[lowest]).sum() / total if total else n_neurons / WIDTH
        scores.append((distance + scale * abs(r[-1])) * ratio)
    return np.array(scores), 1e-7


ORACLES = {"GROOD": grood_scores, "NERO": nero_scores}


_KNOWN_SCORES: Dict[Tuple, Tuple[np.ndarray, float]] = {}


def expected_scores(variant: Variant, z: Tensor, labels: Tensor, queries: Tensor) -> Tuple:
    """
    What the features mean, and the error that rounding may cause. Without an oracle, it is what
    the detector itself makes of plain features.
    """
    z, queries = (x.detach().cpu().float().contiguous() for x in (z, queries))
    labels = labels.cpu().long()
    if variant.name not in ORACLES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector = variant.build().fit_features(z, labels)
        return detector.predict_features(queries).numpy(), 1e-6
    key = (str(variant), *(x.numpy().tobytes() for x in (z, labels, queries)))
    if key not in _KNOWN_SCORES:  # many rows mean the same
        oracle = ORACLES[variant.name]
        _KNOWN_SCORES[key] = oracle(HEAD, z.double(), labels, queries.double(), **variant.settings)
    return _KNOWN_SCORES[key]


# --- the table ---

FIT, PREDICT = ("fit_features", "fit"), ("predict_features", "predict", "__call__")
ON_FEATURES, ON_INPUTS = ("fit_features", "predict_features"), ("fit", "predict", "__call__")
ALL = FIT + PREDICT


class Fails(NamedTuple):
    exception: Type[Exception]
    message: str
    after_fit: bool = False  #: the fit succeeds, but there are no scores from it


class Row(NamedTuple):
    calls: Tuple[str, ...]
    #: ``None`` for the exact scores
    expected: Optional[Fails] = None
    #: changes the features or inputs of a call
    features: Callable[[Tensor], Any] = lambda z: z
    #: training samples to use, by their labels
    samples: Callable[[Tensor], Tensor] = lambda labels: labels >= -1
    labels: Callable[[Tensor], Any] = lambda labels: labels
    #: changes a list of batches ``(x, y)``
    loader: Callable[[List], Any] = lambda batches: batches
    #: changes the features that are scored after a fit
    queries: Callable[[Tensor], Tensor] = lambda z: z
    #: done with the detector before the call
    before: Callable[[FeaturesDetector], Any] = lambda detector: None
    arguments: Dict[str, Any] = {}
    #: other outcomes of some detectors, or of detectors in some settings
    but: Dict[str, Optional[Fails]] = {}
    #: what is warned of, by detector, or by detector and settings
    warns: Dict[str, Tuple[str, ...]] = {}


def value(number: float) -> Callable[[Tensor], Tensor]:
    """Puts a number into two rows, into one of them twice."""

    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[0, 1] = z[0, 5] = z[2, 0] = number
        return z

    return change


def encoder(function: Optional[Callable]) -> Callable[[FeaturesDetector], None]:
    return lambda detector: setattr(detector, "encoder", function)


def head(change: Callable[[nn.Linear], Any]) -> Callable[[FeaturesDetector], None]:
    return lambda detector: setattr(detector, "head", change(copy.deepcopy(detector.head)))


def to_gpu(detector: FeaturesDetector) -> None:
    vars(detector).update(copy.deepcopy(vars(detector)))
    detector.to("cuda")


@torch.no_grad()
def without_number(linear: nn.Linear) -> nn.Linear:
    linear.weight[1, 2] = math.nan
    return linear


class Elsewhere(Tensor):
    """Stands for a tensor on another device: it has to be moved before it meets any other."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (Tensor.to, Tensor.cpu):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {})).as_subclass(Tensor)
        tensors = [a for a in args if isinstance(a, Tensor)]
        # an index may come from the host
        if func is not Tensor.__getitem__ and not all(isinstance(t, cls) for t in tensors):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs)


NOT_FINITE = Fails(ValueError, r"2 of \d+ .*rows contain NaN or infinite .* Remove or repair")
WIDTH_DIFFERS = Fails(ValueError, r"12 features, got \d+\. Use the features of the layer before")
NOT_FEATURES = Fails(ValueError, "Expected floating point features of shape B x D, got .*flatten")
NO_TENSOR = Fails(
    TypeError, r"Features must be a dense tensor, got .* Convert or pick .*as_tensor"
)
NO_INPUT = Fails(TypeError, r"Inputs must be a tensor, got .* Convert them first, .*as_tensor")
NO_LABELS = Fails(TypeError, "Labels must be a dense tensor, got .* Convert or pick .*tensor")
NO_IDS = Fails(ValueError, r"No ID samples \(labels >= 0\) to fit on\. Pass ID training data")
OTHER_LENGTH = Fails(ValueError, r"one label per feature row \(\d+\), got labels of shape \(\d+,")
NO_INTEGERS = Fails(ValueError, r"Labels must be integers, got torch\..* Use labels\.long\(\)")
NO_CLASS = Fails(ValueError, r"Label \d+ exceeds the 4 columns of the head\. Labels must be class")
NO_PAIRS = Fails(ValueError, r"must yield batches \(x, y\) .*, got .* Use a data set that returns")
NO_SIZE = Fails(ValueError, "batch_size must be an integer of at least 1, got .* Leave it out, or")
# nothing is computed, and it is torch that says so when the features are to be moved
NO_DATA = Fails(NotImplementedError, "Cannot copy out of meta tensor; no data")

OUTLIERS_LACK = Fails(ValueError, "needs samples with label < 0 in the fitted data. Add some, or")
CLASSES_LACK = Fails(ValueError, "Mix-up needs ID samples of at least two classes.* Use another")
SPREAD_LACKS = Fails(ValueError, "needs ID features that differ within their class.* or give a nu")
VARIANCE_LACKS = Fails(ValueError, "relevance is the same for all training samples.* Pass more")
BANK_LACKS = Fails(ValueError, "k=10 must be between 1 and the 1 rows.* Use a smaller k", True)
VANISHED = "100% of the bank have a gradient of norm 0.* Use a larger temperature"

ROWS = {
    # nothing bad: the table's own test
    "clean": Row(ALL),
    # values
    "NaN": Row(ALL, NOT_FINITE, features=value(math.nan)),
    "infinite": Row(ALL, NOT_FINITE, features=value(math.inf)),
    "minus infinite": Row(ALL, NOT_FINITE, features=value(-math.inf)),
    "beyond float32": Row(ALL, NOT_FINITE, features=lambda z: value(1e39)(z.double())),
    "NaN in small batches": Row(
        ON_FEATURES, NOT_FINITE, features=value(math.nan), arguments={"batch_size": 1}
    ),
    "huge": Row(PREDICT, features=lambda z: 1e30 * z),
    "tiny": Row(PREDICT, features=lambda z: 1e-30 * z),
    "subnormal": Row(PREDICT, features=lambda z: 1e-42 * z),
    "largest": Row(PREDICT, features=lambda z: torch.full_like(z, 3e38)),
    "zeros": Row(PREDICT, features=torch.zeros_like),
    "huge throughout": Row(
        FIT,
        features=lambda z: 1e30 * z,
        queries=lambda z: 1e30 * z,
        warns={"GROOD": (VANISHED,), "GROOD-temperature=auto": ()},
    ),
    "tiny throughout": Row(FIT, features=lambda z: 1e-30 * z, queries=lambda z: 1e-30 * z),
    "huge in the fit": Row(
        FIT,
        features=lambda z: 1e30 * z,
        warns={"GROOD": (VANISHED,), "GROOD-temperature=auto": ()},
    ),
    "tiny in the fit": Row(FIT, features=lambda z: 1e-30 * z),
    "equal rows": Row(
        FIT,
        features=lambda z: z[:1].repeat(len(z), 1),
        but={"GROOD-temperature=auto": SPREAD_LACKS, "NERO": VARIANCE_LACKS},
        warns={"GROOD": (VANISHED,), "GROOD-ood_prototype=tensor": ()},
    ),
    "equal rows in each class": Row(
        FIT,
        features=lambda z: torch.stack([z[LABELS == label][0] for label in LABELS]),
        but={"GROOD-temperature=auto": SPREAD_LACKS},
    ),
    "equal queries": Row(PREDICT, features=lambda z: z[:1].repeat(5, 1)),
    # shapes
    "too narrow": Row(ALL, WIDTH_DIFFERS, features=lambda z: z[:, :-1]),
    "too wide": Row(ALL, WIDTH_DIFFERS, features=lambda z: z.repeat(1, 2)),
    "no columns": Row(ALL, WIDTH_DIFFERS, features=lambda z: z[:, :0]),
    "one axis": Row(ON_FEATURES, NOT_FEATURES, features=lambda z: z[:, 0]),
    "maps": Row(ON_FEATURES, NOT_FEATURES, features=lambda z: z[:, :, None, None]),
    "a number": Row(ON_FEATURES, NOT_FEATURES, features=lambda z: z[0, 0]),
    "no queries": Row(PREDICT, features=lambda z: z[:0]),
    "no samples": Row(FIT, NO_IDS, samples=lambda labels: labels < -1),
    "one query": Row(PREDICT, features=lambda z: z[:1]),
    "one sample": Row(
        FIT,
        samples=lambda labels: torch.arange(len(labels)) == 0,
        but={
            "GROOD-ood_prototype=outliers": OUTLIERS_LACK,
            "GROOD-ood_prototype=mixup": CLASSES_LACK,
            "GROOD-temperature=auto": SPREAD_LACKS,
            "GROOD-k=10": BANK_LACKS,
            "NERO": VARIANCE_LACKS,
        },
        warns={
            "GROOD": (VANISHED, r"No ID sample for 3 of the 4 head columns \(1, 2, 3\)"),
            "GROOD-ood_prototype=tensor": ("No ID sample for 3 of the 4 head columns",),
        },
    ),
    # kinds of tensors
    "float64": Row(ALL, features=lambda z: z.double()),
    "float16": Row(ALL, features=lambda z: z.half()),
    "bfloat16": Row(ALL, features=lambda z: z.bfloat16()),
    "integers": Row(ON_FEATURES, NOT_FEATURES, features=lambda z: z.long()),
    "booleans": Row(ON_FEATURES, NOT_FEATURES, features=lambda z: z > 1),
    "complex": Row(ALL, NOT_FEATURES, features=lambda z: z.to(torch.complex64)),
    "sparse": Row(ON_FEATURES, NO_TENSOR, features=lambda z: z.to_sparse()),
    "requires grad": Row(ALL, features=lambda z: z.clone().requires_grad_()),
    "part of a graph": Row(ALL, features=lambda z: z.clone().requires_grad_() * 1),
    "transposed": Row(ALL, features=lambda z: z.T.contiguous().T),
    "every other column": Row(ALL, features=lambda z: z.repeat_interleave(2, dim=1)[:, ::2]),
    "expanded": Row(PREDICT, features=lambda z: z[:1].expand(5, -1)),
    "other device": Row(
        ALL,
        features=lambda z: z.clone().as_subclass(Elsewhere),
        labels=lambda labels: labels.clone().as_subclass(Elsewhere),
    ),
    "labels on another device": Row(
        FIT, labels=lambda labels: labels.clone().as_subclass(Elsewhere)
    ),
    "no data": Row(ON_FEATURES + PREDICT[1:], NO_DATA, features=lambda z: z.to("meta")),
    # no tensors
    "NumPy": Row(ON_FEATURES, NO_TENSOR, features=lambda z: z.numpy()),
    "list": Row(ON_FEATURES, NO_TENSOR, features=lambda z: z.tolist()),
    "None": Row(ON_FEATURES, NO_TENSOR, features=lambda z: None),
    "NumPy inputs": Row(ON_INPUTS, NO_INPUT, features=lambda z: z.numpy()),
    "list of inputs": Row(ON_INPUTS, NO_INPUT, features=lambda z: z.tolist()),
    "None as input": Row(PREDICT[1:], NO_INPUT, features=lambda z: None),
    # classes and labels
    "no ID sample": Row(FIT, NO_IDS, samples=lambda labels: labels < 0),
    "only negative labels": Row(FIT, NO_IDS, labels=lambda labels: -1 - labels.abs()),
    "no outliers": Row(
        FIT,
        samples=lambda labels: labels >= 0,
        but={"GROOD-ood_prototype=outliers": OUTLIERS_LACK},
    ),
    "single class": Row(
        FIT,
        samples=lambda labels: labels <= 0,
        but={"GROOD-ood_prototype=mixup": CLASSES_LACK},
        warns={"GROOD": (r"No ID sample for 3 of the 4 head columns \(1, 2, 3\)",)},
    ),
    "missing class": Row(
        FIT,
        samples=lambda labels: labels != 2,
        warns={"GROOD": (r"No ID sample for 1 of the 4 head columns \(2\)",)},
    ),
    "other labels than the head's": Row(
        FIT,
        labels=lambda labels: torch.where(labels < 0, labels, (labels + 1) % N_CLASSES),
        warns={"GROOD": ("classifies no training sample correctly.* Check that encoder, head",)},
    ),
    "label beyond the head": Row(FIT, NO_CLASS, labels=lambda labels: labels + 1),
    "label far beyond": Row(FIT, NO_CLASS, labels=lambda labels: labels + 2**62),
    "too few labels": Row(FIT, OTHER_LENGTH, labels=lambda labels: labels[:-1]),
    "too many labels": Row(
        FIT,
        OTHER_LENGTH,
        labels=lambda labels: torch.cat([labels, labels]),
        loader=lambda batches: [(x, torch.cat([y, y])) for x, y in batches],
    ),
    "one-hot labels": Row(
        FIT, OTHER_LENGTH, labels=lambda labels: (labels[:, None] == torch.arange(4)).long()
    ),
    "a column of labels": Row(FIT, OTHER_LENGTH, labels=lambda labels: labels[:, None]),
    "float labels": Row(FIT, NO_INTEGERS, labels=lambda labels: labels.float()),
    "boolean labels": Row(FIT, NO_INTEGERS, labels=lambda labels: labels > 1),
    "complex labels": Row(FIT, NO_INTEGERS, labels=lambda labels: labels.to(torch.complex64)),
    "int8 labels": Row(FIT, labels=lambda labels: labels.to(torch.int8)),
    "int32 labels": Row(FIT, labels=lambda labels: labels.int()),
    "NumPy labels": Row(FIT, NO_LABELS, labels=lambda labels: labels.numpy()),
    "list of labels": Row(FIT, NO_LABELS, labels=lambda labels: labels.tolist()),
    "None as labels": Row(FIT[:1], NO_LABELS, labels=lambda labels: None),
    "sparse labels": Row(FIT[:1], NO_LABELS, labels=lambda labels: labels.to_sparse()),
    # batch sizes
    **{
        f"batch size {size}": Row(ON_FEATURES, NO_SIZE, arguments={"batch_size": size})
        for size in (0, -1, 2.5, None)
    },
    "batch size 0 without queries": Row(
        PREDICT[:1], NO_SIZE, features=lambda z: z[:0], arguments={"batch_size": 0}
    ),
    "batch size 1": Row(ON_FEATURES, arguments={"batch_size": 1}),
    "batch size beyond the data": Row(ON_FEATURES, arguments={"batch_size": 10**9}),
    # loaders
    "loader without batches": Row(FIT[1:], NO_IDS, loader=lambda batches: []),
    "loader without samples": Row(
        FIT[1:], NO_IDS, loader=lambda batches: [(x[:0], y[:0]) for x, y in batches]
    ),
    "loader with an empty batch": Row(
        FIT[1:], loader=lambda batches: [(Z[:0], LABELS[:0]), *batches]
    ),
    "loader of lists": Row(FIT[1:], loader=lambda batches: [[x, y] for x, y in batches]),
    "loader that can be read once": Row(
        FIT[1:],
        loader=iter,
        but=dict.fromkeys(
            ["GROOD-bank_dtype=torch.float16", "GROOD-bank_fraction=0.5"],
            Fails(ValueError, "The loader gave other labels in another pass. Turn shuffling off"),
        ),
    ),
    "loader of inputs": Row(FIT[1:], NO_PAIRS, loader=lambda batches: [x for x, _ in batches]),
    "loader of two inputs": Row(FIT[1:], NO_PAIRS, loader=lambda batches: [batches[0][0][:2]]),
    "loader of dicts": Row(
        FIT[1:], NO_PAIRS, loader=lambda batches: [{"x": x, "y": y} for x, y in batches]
    ),
    "loader of triples": Row(
        FIT[1:], NO_PAIRS, loader=lambda batches: [(x, y, y) for x, y in batches]
    ),
    "loader of two widths": Row(
        FIT[1:],
        WIDTH_DIFFERS,
        loader=lambda batches: [(x[:, i:], y) for i, (x, y) in enumerate(batches)],
    ),
    "no loader": Row(FIT[1:], Fails(TypeError, "not iterable"), loader=lambda batches: None),
    # networks
    "unfitted": Row(
        PREDICT,
        Fails(RequiresFittingException, "call fit"),
        before=lambda detector: vars(detector).update(
            {name: None for name in vars(detector) if name.endswith("_")}
        ),
    ),
    "no encoder": Row(
        ON_INPUTS,
        Fails(ModelNotSetException, r"needs an encoder\. Pass one, or use \w+_features"),
        before=encoder(None),
    ),
    "encoder to maps": Row(ON_INPUTS, before=encoder(lambda x: x[:, :, None, None])),
    "encoder to half precision": Row(ON_INPUTS, before=encoder(lambda x: x.half())),
    "encoder to a graph": Row(ON_INPUTS, before=encoder(lambda x: x.clone().requires_grad_())),
    "encoder to tuples": Row(ON_INPUTS, NO_TENSOR, before=encoder(lambda x: (x, x))),
    "encoder to dicts": Row(ON_INPUTS, NO_TENSOR, before=encoder(lambda x: {"features": x})),
    "encoder to NumPy": Row(ON_INPUTS, NO_TENSOR, before=encoder(lambda x: x.numpy())),
    "encoder to None": Row(ON_INPUTS, NO_TENSOR, before=encoder(lambda x: None)),
    "encoder to sparse": Row(ON_INPUTS, NO_TENSOR, before=encoder(lambda x: x.to_sparse())),
    "encoder to integers": Row(ON_INPUTS, NOT_FEATURES, before=encoder(lambda x: x.long())),
    "encoder to one axis": Row(ON_INPUTS, NOT_FEATURES, before=encoder(lambda x: x[:, 0])),
    "encoder to a number": Row(ON_INPUTS, NOT_FEATURES, before=encoder(lambda x: x.sum())),
    "encoder to NaN": Row(
        ON_INPUTS,
        Fails(ValueError, r"(\d+) of \1 .*rows contain NaN or infinite .* Remove or repair"),
        before=encoder(lambda x: x * math.nan),
    ),
    "encoder to another width": Row(
        ON_INPUTS, WIDTH_DIFFERS, before=encoder(lambda x: x.repeat(1, 2))
    ),
    "encoder to fewer rows": Row(FIT[1:], OTHER_LENGTH, before=encoder(lambda x: x[1:])),
    "head in float64": Row(ALL, before=head(lambda linear: linear.double())),
    "head in float16": Row(ALL, before=head(lambda linear: linear.half())),
    "head in bfloat16": Row(ALL, before=head(lambda linear: linear.bfloat16())),
    "head in float16, huge features": Row(
        FIT,
        features=lambda z: 1e30 * z,
        queries=lambda z: 1e30 * z,
        before=head(lambda linear: linear.half()),
        but={
            "GROOD": Fails(
                ValueError, r"head maps 68 of 68 .* Check its weights, and use head\.fl"
            )
        },
    ),
    "head with NaN": Row(
        FIT,
        before=head(without_number),
        but={
            "GROOD": Fails(ValueError, "head maps 68 of 68 finite feature rows to NaN .* Check"),
            "NERO": Fails(ValueError, "NaN or infinite relevance for finite features. Check its"),
        },
    ),
    "head with NaN after the fit": Row(
        PREDICT,
        before=head(without_number),
        but={"NERO": Fails(ValueError, "NaN or infinite relevance for finite features. Check")},
    ),
}

GPU_ROWS = {
    "features on a GPU": Row(ALL, features=lambda z: z.cuda()),
    "labels on a GPU": Row(FIT, labels=lambda labels: labels.cuda()),
    "detector on a GPU": Row(ALL, before=to_gpu),
    "head on a GPU": Row(ALL, before=head(lambda linear: linear.cuda())),
    "NaN, detector on a GPU": Row(ALL, NOT_FINITE, features=value(math.nan), before=to_gpu),
}
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def cells() -> Iterator[Any]:
    for variant in VARIANTS:
        for rows, marks in ((ROWS, []), (GPU_ROWS, NEEDS_GPU)):
            for name, row in rows.items():
                for call in row.calls:
                    yield pytest.param(
                        variant, row, call, marks=marks, id=f"{variant}-{name}-{call}"
                    )


# --- one cell ---


def state(thing: Any) -> Any:
    """All that something holds, down to the bits, in a form that can be compared."""
    if isinstance(thing, Elsewhere):
        thing = thing.cpu()
    if isinstance(thing, Tensor):
        described = (thing.dtype, thing.shape, thing.device, thing.layout, thing.requires_grad)
        if thing.is_meta:
            return described
        dense = thing.detach().to_dense() if thing.layout != torch.strided else thing.detach()
        grad = thing.grad if thing.is_leaf else None
        return (*described, dense.cpu().contiguous().flatten().view(torch.uint8).tolist(), grad)
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    if isinstance(thing, nn.Module):
        tensors = [*thing.named_parameters(), *thing.named_buffers()]
        return thing.training, [(name, state(tensor)) for name, tensor in tensors]
    if isinstance(thing, dict):
        return {name: state(part) for name, part in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [state(part) for part in thing]
    if isinstance(thing, (FeaturesDetector, registry.BuildRecord)):
        return state(vars(thing))
    return thing


@dataclass
class Given:
    """What a call is handed."""

    z: Any
    labels: Any
    queries: Any
    batches: Any
    arguments: Dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row, call: str) -> "Given":
        chosen = row.samples(LABELS)
        z, labels, queries = row.features(Z.clone()), LABELS.clone(), QUERIES.clone()
        if not chosen.all():
            z, labels = z[chosen], labels[chosen]
        labels = row.labels(labels)
        if call in FIT:
            queries = row.queries(queries)
        else:
            z, queries = Z, row.features(queries)
        batches = None
        if call == "fit":
            cuts = range(0, int(chosen.sum()), 30)
            batches = row.loader([(z[i : i + 30], labels[i : i + 30]) for i in cuts])
        return cls(z, labels, queries, batches, row.arguments)

    def call(self, detector: FeaturesDetector, call: str) -> Any:
        if call == "fit_features":
            return detector.fit_features(self.z, self.labels, **self.arguments)
        if call == "fit":
            return detector.fit(self.batches)
        return getattr(detector, call)(self.queries, **self.arguments)


def lookup(table: Dict[str, Any], variant: Variant, default: Any) -> Any:
    return table.get(str(variant), table.get(variant.name, default))


@pytest.mark.parametrize("variant, row, call", list(cells()))
def test_cell(variant, row, call):
    expected = lookup(row.but, variant, row.expected)
    if expected is None or expected.after_fit:
        check_success(variant, row, call, expected)
        return
    detector = variant.fit()
    scores, attributes = detector.predict_features(QUERIES.clone()), dict(vars(detector))
    check_failure(detector, row, call, expected)
    vars(detector).update(attributes)
    assert torch.equal(detector.to("cpu").predict_features(QUERIES.clone()), scores)
    if call in FIT:
        detector = variant.build()
        check_failure(detector, row, call, expected)
        with pytest.raises(RequiresFittingException):
            detector.predict_features(QUERIES.clone())


def check_failure(detector: FeaturesDetector, row: Row, call: str, expected: Fails) -> None:
    row.before(detector)
    given = Given.of(row, call)
    before = state([detector, vars(given)])
    with pytest.raises(expected.exception, match=expected.message) as caught:
        given.call(detector, call)
    assert caught.type is expected.exception  # not a subclass that says less
    assert state([detector, vars(given)]) == before


def check_success(variant: Variant, row: Row, call: str, expected: Optional[Fails]) -> None:
    detector = variant.fit()
    row.before(detector)
    given = Given.of(row, call)
    before = state(vars(given))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = given.call(detector, call)
    check_warnings([str(w.message) for w in caught], lookup(row.warns, variant, ()))
    if call in FIT:
        assert result is detector
        if expected is not None:
            with pytest.raises(expected.exception, match=expected.message):
                detector.predict_features(given.queries)
            return
        result = detector.predict_features(given.queries)

    assert result.dtype == torch.float32 and result.shape == (len(given.queries),)
    assert not result.requires_grad and result.isfinite().all()
    scores, error = expected_scores(variant, given.z, given.labels, given.queries)
    np.testing.assert_allclose(result.cpu().numpy(), scores, rtol=1e-5, atol=error)

    assert state(vars(given)) == before
    assert not any(v.requires_grad for v in vars(detector).values() if isinstance(v, Tensor))
    for module in (v for v in vars(detector).values() if isinstance(v, nn.Module)):
        assert all(parameter.grad is None for parameter in module.parameters())


def check_warnings(messages: List[str], patterns: Tuple[str, ...]) -> None:
    assert len(messages) == len(patterns), messages
    for message, pattern in zip(messages, patterns):
        assert re.search(pattern, message), message
