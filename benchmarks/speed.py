"""
How fast GROOD, NERO and the nearest-neighbor search are, and how much memory they take.

    python benchmarks/speed.py --data DIR [--parts grood,forward] [--device cuda]

Parts
    ``grood``: fit and score of GROOD beside a loop that differentiates sample by sample, as the
    published code does, and beside the matrix products of one full scan of the bank.
    ``neighbors``: ``kth_distance`` beside scikit-learn, faiss, ``torch.cdist`` and two detectors
    of pytorch-ood that search neighbors too.
    ``nero``: fit and score of NERO beside a loop over samples.
    ``forward``: GROOD and NERO beside the forward pass of the network whose features they use.
    ``skipping``: GROOD's search with and without what it skips.
    ``benchmark``: GROOD and NERO in the CIFAR-10 benchmark, beside its forward passes.
    ``loader``: peak memory of a fit over a loader, in processes of their own.
    ``growth``: time and peak memory over the rows of the bank and over the number of queries,
    each in a process of its own (Linux only, unless on a GPU).

Rules
    The contestants of a group take turns, round after round in one process, so that whatever else
    the machine does hits all of them; the first round warms up and does not count. Ratios are
    those of the medians. Results are checked before anything is timed: a wrong answer stops the
    script. Loops are timed on some of the rows and scaled. Real features are those of a ResNet-20
    on CIFAR-10; without ``--data``, what needs them is left out, and the results say so.

Results go to ``benchmarks/results/speed.json``, with a table of each part in ``speed_PART.md`` and
all of them in ``speed.md``, and a figure to ``docs/_static``. For a GPU, names begin with
``speed_cuda``. A part that is not run again keeps what it has; each part names its own commit,
time and machine. ``--quick`` tries all of this with tiny sizes; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pood_plugins import neighbors
from pood_plugins.detector import GROOD, NERO, grood_gradients, nero_relevance
from pood_plugins.evaluation.report import environment
from pood_plugins.neighbors import kth_distance

# what only one part needs is imported there: each process of the part on growth imports this file

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 10
REAL = "ResNet-20 on CIFAR-10"
#: what real features are made of
FILES = (
    "resnet20_cifar10.pt",
    "openood_index.npz",
    "cifar10_train_1of2.webp.zip",
    "cifar10_train_2of2.webp.zip",
    "cifar10_test.webp.zip",
    "cifar100_test.webp.zip",
    "mnist_test.npz",
    "dtd10_32.npz",
)
#: settings of GROOD by the name of the row
GROODS: dict[str, dict[str, Any]] = {
    "GROOD": {},
    "GROOD (auto)": {"temperature": "auto", "k": 10, "mixup": 0.0, "n_synthetic": 1.0},
    "GROOD (float16 bank)": {"bank_dtype": torch.float16},
}
#: queries x rows of a matrix product
TILES = [(1024, 1024), (1024, 512), (2048, 1024), (1024, 4096)]
#: a GPU needs larger ones, or it waits for the next launch
TILES_GPU = [*TILES, (2048, 16384), (8192, 16384)]


@dataclass(frozen=True)
class Sizes:
    """How many rows are used where."""

    bank: int = 50_000
    queries: int = 10_000
    sample: int = 2000  # rows that loops are timed on
    checked: int = 500  # queries compared with brute force
    width: int = 512  # of synthetic features
    forward_images: tuple[int, int] = (2048, 48)  # of ResNet-20 and ResNet-50
    forward_batches: tuple[int, int] = (256, 16)
    forward_pixels: tuple[int, int] = (32, 224)
    forward_widths: tuple[int, int] = (64, 2048)
    growth_banks: tuple[int, ...] = (10_000, 50_000, 200_000, 1_000_000)
    growth_queries: tuple[int, ...] = (1000, 10_000, 100_000)  # with the second of the banks
    growth_widths: tuple[int, ...] = (64, 512)


QUICK = Sizes(
    bank=400,
    queries=120,
    sample=30,
    checked=60,
    width=16,
    forward_images=(16, 2),
    forward_batches=(8, 2),
    forward_pixels=(32, 64),
    forward_widths=(64, 64),
    growth_banks=(300, 600),
    growth_queries=(10, 20),
    growth_widths=(16,),
)


@dataclass(frozen=True)
class Setup:
    """What was asked for."""

    sizes: Sizes
    device: torch.device
    repeat: int
    quick: bool
    real: Features | str  # features, or why there are none
    folder: Path | None = None

    def cases(self) -> tuple[list[Features], dict[str, str]]:
        """Real features, if there are any, synthetic ones, and what is left out."""
        sizes = self.sizes
        made = synthetic_features(sizes.bank, sizes.queries, sizes.width, self.device)
        if isinstance(self.real, str):
            return [made], {f"features of {REAL}": self.real}
        return [self.real, made], {}


# Features


@dataclass(frozen=True)
class Features:
    """Training features with labels, features to score, and the last layer of the network."""

    name: str
    z: Tensor
    y: Tensor
    queries: Tensor
    head: nn.Linear

    def sizes(self) -> dict[str, int]:
        rows, dimension = self.z.shape
        return {"bank": rows, "queries": len(self.queries), "dimension": dimension}

    def title(self) -> str:
        return f"{self.name}, {len(self.z):,} × {self.z.shape[1]}"


def synthetic(n: int, dimension: int, seed: int) -> Tensor:
    """Normal features: their gradients have nearly the same norm, so no search can skip much."""
    return torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed))


def synthetic_features(bank: int, queries: int, dimension: int, device: Any) -> Features:
    weight = F.normalize(synthetic(CLASSES, dimension, seed=2), dim=1)  # classes of like size
    head = nn.Linear(dimension, CLASSES).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(0.1 * synthetic(CLASSES, 1, seed=3)[:, 0])
    z = synthetic(bank, dimension, seed=0)
    # all are classified correctly, so that all are in the bank
    y = torch.cat([head(rows).argmax(dim=1) for rows in z.split(4096)])
    x = synthetic(queries, dimension, seed=1)
    return Features("synthetic", z.to(device), y, x.to(device), head.to(device))


def real_features(folder: Path | None, setup: Setup, cache_dir: Path | None) -> Features | str:
    """Features of a ResNet-20 on CIFAR-10, shared with ``cifar10.py`` in the cache."""
    if folder is None:
        return "no folder with data was named, by --data or POOD_DATA"
    if not folder.is_dir():
        return "the folder with data that was named does not exist"
    if absent := [name for name in FILES if not (folder / name).exists()]:
        return f"the folder with data lacks {', '.join(absent)}"

    from pood_plugins import split_model
    from pood_plugins.benchmark import PackedCIFAR10
    from pood_plugins.dataset import PackLoader
    from pood_plugins.evaluation.cache import Cache, of_dataset, of_module
    from pood_plugins.model.zoo import load_classifier

    model, preprocessing = load_classifier("resnet20", str(folder / FILES[0]), CLASSES)
    data = PackedCIFAR10(folder, preprocessing.normalize)  # type: ignore[union-attr]
    train_set: Any = data.train_set()
    tests: dict[str, Any] = dict(zip(["ID", *data.ood_names], data.test_sets(unknown=False)))
    tests |= dict(zip(data.ood_names, data.test_sets(known=False)))
    if setup.quick:
        train_set = train_set.subset(range(setup.sizes.bank))
        tests = {name: pack.subset(range(40)) for name, pack in tests.items()}
    split = split_model(model, example=torch.zeros(2, 3, 32, 32))
    network = of_module(split.encoder)

    @torch.no_grad()
    def extract(dataset: Any, name: str) -> tuple[Tensor, Tensor]:
        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            batches = [
                (split.encoder(x), y)
                for x, y in tqdm(PackLoader(dataset, 256), f"features {name}", disable=None)
            ]
            z, y = (torch.cat(parts) for parts in zip(*batches))
            return {"features": z, "y": y, "seconds": time.perf_counter() - start}

        key = {"data": of_dataset(dataset), "device": "cpu", "model": network}
        stored = Cache(cache_dir).get(f"features {name}", key, compute)
        return stored["features"], stored["y"]

    z, y = extract(train_set, "train")
    test = torch.cat([extract(pack, f"test {name}")[0] for name, pack in tests.items()])
    queries = test[drawn(len(test), setup.sizes.queries)]
    head = split.head.requires_grad_(False)
    return Features(REAL, z.to(setup.device), y, queries.to(setup.device), head.to(setup.device))


def drawn(total: int, n: int) -> Tensor:
    """Some rows at random, the same in every run."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values


# Timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(runs: Mapping[str, Callable[[], Any]], setup: Setup) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    steps = [(turn, name) for turn in range(setup.repeat + 1) for name in runs]
    for turn, name in tqdm(steps, disable=None, leave=False):
        seconds = seconds_of(runs[name], setup.device)
        if turn:  # the first round warms up
            rounds[name].append(seconds)
    return rounds


def scaled(seconds: Sequence[float], factor: float) -> list[float]:
    return [factor * value for value in seconds]


def group(
    title: str,
    rounds: Mapping[str, list[float]],
    references: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Contestants that took turns, for the json.

    :param references: by row, the rows that it is compared with
    :param notes: by row, what a reader has to know of it
    """
    rows = {}
    for name, seconds in rounds.items():
        ratios = {}
        for reference in references.get(name, ()):
            by_round = [a / b for a, b in zip(seconds, rounds[reference])]
            ratios[reference] = {
                "ratio": median(seconds) / median(rounds[reference]),
                **summary(by_round),
                "by_round": by_round,
            }
        rows[name] = {"seconds": summary(seconds), "ratios": ratios}
        if notes and name in notes:
            rows[name]["note"] = notes[name]
    return {"title": title, "sizes": dict(sizes), "rows": rows}


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def must_equal(
    what: str, found: Tensor, expected: Tensor, relative: float, absolute: float
) -> None:
    """A wrong answer must not be timed."""
    error = (found.double() - expected.double()).abs()
    if not bool((error <= absolute + relative * expected.double().abs()).all()):
        raise SystemExit(f"{what} is wrong: it is off by up to {float(error.max()):.3g}")


def brute_force(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distances to the k-th nearest row, by a matrix product in float64."""
    queries, bank = queries.double(), bank.double()
    squared = queries.square().sum(1)[:, None] + bank.square().sum(1) - 2 * queries @ bank.T
    return squared.clamp(min=0).sqrt().kthvalue(k, dim=1).values


# Part: GROOD


def gradient_loop(
    z: Tensor, predicted: Tensor, prototypes: Tensor, ood_prototype: Tensor, temperature: Tensor
) -> Tensor:
    """Gradients at the OOD prototype, one sample at a time by automatic differentiation."""
    gradients = []
    for x, target in zip(z, predicted):
        o = ood_prototype.clone().requires_grad_()
        distances = (x - torch.cat([prototypes, o[None]])).norm(dim=1)
        loss = F.cross_entropy(-distances / temperature, target)
        gradients.append(torch.autograd.grad(loss, o)[0])
    return temperature * torch.stack(gradients)  # GROOD leaves out the factor 1/T


def full_scan(queries: Tensor, bank: Tensor, tile: tuple[int, int]) -> None:
    """What no search can do without that compares every query with every row."""
    for x in queries.split(tile[0]):
        for b in bank.split(tile[1]):
            (x @ b.T).amin(1)


def grood_part(setup: Setup) -> dict[str, Any]:
    cases, left_out = setup.cases()
    groups = [g for case in cases for g in grood_groups(case, setup)]
    return {"groups": groups, "left_out": left_out}


def grood_groups(case: Features, setup: Setup) -> Iterator[dict[str, Any]]:
    z, y, x, head = case.z, case.y, case.queries, case.head
    detectors = {name: GROOD(None, head, **settings) for name, settings in GROODS.items()}
    rows = drawn(len(z), setup.sizes.sample)
    query_rows = drawn(len(x), setup.sizes.sample)
    predicted, query_predicted = head(z[rows]).argmax(dim=1), head(x[query_rows]).argmax(dim=1)
    gradients, banks = {}, {}
    for name, detector in detectors.items():
        detector.fit_features(z, y)
        gradients[name], banks[name] = check_grood(name, detector, case, setup)

    def state(name: str) -> tuple[Tensor, Tensor, Tensor]:
        detector = detectors[name]
        # the loop works in float32 throughout
        return detector.prototypes_, detector.ood_prototype_, detector.temperature_.float()

    loop, note = "autograd loop", f"scaled from {len(rows):,} rows"
    rounds = take_turns(
        {
            **{
                name: lambda detector=detector: detector.fit_features(z, y)
                for name, detector in detectors.items()
            },
            loop: lambda: gradient_loop(z[rows], predicted, *state("GROOD")),
        },
        setup,
    )
    rounds[loop] = scaled(rounds[loop], len(z) / len(rows))
    references = dict.fromkeys(detectors, [loop])
    yield group(f"{case.title()}: fit", rounds, references, case.sizes(), {loop: note})

    tiles = TILES if setup.device.type == "cpu" else TILES_GPU
    note = f"gradients of the queries only, scaled from {len(query_rows):,} rows"
    scans = {
        of: {f"full scan for {of}, {a} × {b}": (a, b) for a, b in tiles}
        for of in ("GROOD", "GROOD (auto)")  # the third has the values of the first
    }
    rounds = take_turns(
        {
            **{
                name: lambda detector=detector: detector.predict_features(x)
                for name, detector in detectors.items()
            },
            **{
                scan: lambda of=of, tile=tile: full_scan(gradients[of], banks[of], tile)
                for of, by_name in scans.items()
                for scan, tile in by_name.items()
            },
            loop: lambda: gradient_loop(x[query_rows], query_predicted, *state("GROOD")),
        },
        setup,
    )
    rounds[loop] = scaled(rounds[loop], len(x) / len(query_rows))
    fastest = {
        of: min(names, key=lambda name: median(rounds[name])) for of, names in scans.items()
    }
    fastest["GROOD (float16 bank)"] = fastest["GROOD"]
    references = {name: [fastest[name], loop] for name in detectors}
    title = f"{case.title()}: score {len(x):,}"
    scored = group(title, rounds, references, case.sizes(), {loop: note})
    scored["lower_bounds"] = fastest
    yield scored


def check_grood(name: str, detector: GROOD, case: Features, setup: Setup) -> tuple[Tensor, Tensor]:
    """
    Compares the bank with the loop, and scores with brute force.

    :return: gradients of the queries and of the correctly classified training features
    """
    z, x, head = case.z, case.queries, case.head
    points = detector.prototypes_, detector.ood_prototype_, detector.temperature_
    correct = (head(z).argmax(dim=1).cpu() == case.y).nonzero()[:, 0].to(z.device)
    bank, gradients = grood_gradients(z[correct], *points), grood_gradients(x, *points)
    for what, features, found in (("bank", z[correct], bank), ("queries", x, gradients)):
        rows = drawn(len(features), setup.sizes.sample).to(z.device)
        sample = features[rows]
        predicted = head(sample).argmax(dim=1)
        looped = gradient_loop(sample, predicted, *points[:2], points[2].float())
        must_equal(f"{name}: the gradient of {what}", found[rows], looped, 0, 1e-5)
    half = GROODS[name].get("bank_dtype") == torch.float16
    if not half:
        must_equal(f"{name}: the bank", detector.bank_, bank, 0, 1e-5)
    rows = drawn(len(x), setup.sizes.checked).to(z.device)
    expected = brute_force(gradients[rows], bank, detector.k)
    # eleven bits of gradients whose norm is at most 1
    absolute = 1e-3 if half else 1e-6
    scores = detector.predict_features(x)
    must_equal(f"{name}: the score", scores[rows], expected, 1e-5, absolute)
    return gradients, bank


# Part: nearest neighbors


def neighbors_part(setup: Setup) -> dict[str, Any]:
    cases, left_out = setup.cases()
    made = cases[-1]
    relu = replace(made, name="synthetic, ReLU", z=made.z.relu(), queries=made.queries.relu())
    groups = [neighbors_group(c, k, setup, left_out) for c in (*cases[:-1], relu) for k in (1, 10)]
    return {"groups": groups, "left_out": left_out, "threads_by_library": threads_by_library()}


def neighbors_group(
    case: Features, k: int, setup: Setup, left_out: dict[str, str]
) -> dict[str, Any]:
    from pytorch_ood.detector import KNN, NNGuide

    z, x = case.z, case.queries

    def cdist() -> Tensor:
        nearest = [torch.cdist(q, z).topk(k, largest=False).values for q in x.split(1024)]
        return torch.cat(nearest)[:, -1]

    guide = NNGuide(None, case.head, k=k).fit_features(z, case.y)
    runs: dict[str, Callable[[], Tensor]] = {
        "kth_distance": lambda: kth_distance(x, z, k),
        "torch.cdist and topk": cdist,
        "pytorch-ood's NNGuide": lambda: guide.predict_features(x),
    }
    notes = {
        "pytorch-ood's NNGuide": "inner products of normalized features",
        "pytorch-ood's KNN": "of normalized features, by scikit-learn",
        "torch.cdist and topk": "1,024 queries at once; float32 products, so not exact",
    }
    if setup.device.type != "cpu":
        left_out["scikit-learn, faiss and pytorch-ood's KNN"] = "they run on the CPU only"
    else:
        knn = KNN(None, k=k).fit_features(z, case.y)
        runs["pytorch-ood's KNN"] = lambda: knn.predict_features(x)
        runs |= scikit_learn(z, x, k, notes) | faiss_index(z, x, k, left_out)

    expected = runs["kth_distance"]()
    rows = drawn(len(x), setup.sizes.checked).to(x.device)
    must_equal("kth_distance", expected[rows], brute_force(x[rows], z, k), 1e-5, 1e-6)
    for name, run in runs.items():
        if not name.startswith("pytorch-ood"):  # which search normalized features
            must_equal(name, run(), expected, 1e-3, 1e-3)
    references = {name: ["kth_distance"] for name in runs if name != "kth_distance"}
    title = f"{case.title()}, {len(x):,} queries, k = {k}"
    rounds = take_turns(runs, setup)
    return group(title, rounds, references, {**case.sizes(), "k": k}, notes)


def scikit_learn(
    z: Tensor, x: Tensor, k: int, notes: dict[str, str]
) -> dict[str, Callable[[], Tensor]]:
    from sklearn.neighbors import NearestNeighbors

    def search(index: NearestNeighbors) -> Tensor:
        return torch.from_numpy(index.kneighbors(x.numpy(), k)[0][:, -1])

    brute = NearestNeighbors(algorithm="brute").fit(z.numpy())
    default = NearestNeighbors().fit(z.numpy())
    notes["scikit-learn, default"] = f"which chooses {default._fit_method}"
    return {
        "scikit-learn, brute": lambda: search(brute),
        "scikit-learn, default": lambda: search(default),
    }


def faiss_index(
    z: Tensor, x: Tensor, k: int, left_out: dict[str, str]
) -> dict[str, Callable[[], Tensor]]:
    try:
        import faiss
    except ImportError:
        left_out["faiss"] = "it is not installed (pip install faiss-cpu)"
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(z.shape[1])
    index.add(z.numpy())

    def search() -> Tensor:
        return torch.from_numpy(index.search(x.numpy(), k)[0][:, -1]).clamp(min=0).sqrt()

    return {"faiss IndexFlatL2": search}


def threads_by_library() -> dict[str, int]:
    """After all were used once."""
    from threadpoolctl import threadpool_info

    threads = {f"{p['prefix']} ({p['user_api']})": p["num_threads"] for p in threadpool_info()}
    return {"torch": torch.get_num_threads(), **threads}


@contextmanager
def same_threads(threads: int) -> Iterator[None]:
    """As many threads for every library as for torch."""
    import sklearn.neighbors  # noqa: F401  only what is loaded can be limited
    from threadpoolctl import threadpool_limits

    try:
        import faiss  # noqa: F401
    except ImportError:
        pass
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


# Part: NERO


def relevance_loop(z: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Relevance of neurons and bias, by layer-wise relevance propagation sample by sample."""
    relevances, bias_relevances = [], []
    weight, bias = head.weight.double(), head.bias.double()
    for x in z.double():
        logits = weight @ x + bias
        share = (logits.softmax(dim=0) / logits)[:, None]
        relevances.append((share * weight * x).sum(dim=0))
        bias_relevances.append((share[:, 0] * bias).sum())
    return torch.stack(relevances), torch.stack(bias_relevances)


def nero_fit_loop(z: Tensor, y: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """
    :return: class means of the relevance with that of the bias as last column, the scale of the
        bias relevance, and the relevance of the samples
    """
    relevance, bias_relevance = relevance_loop(z, head)
    full = torch.cat([relevance, bias_relevance[:, None]], dim=1)
    means = torch.stack([full[y == c].mean(dim=0) for c in y.unique()])
    distance = torch.stack([(row - means).abs().sum(dim=1).amin() for row in full]).mean()
    return means, distance / bias_relevance.abs().mean(), relevance


def nero_score_loop(
    z: Tensor, head: nn.Linear, principal: Any, means: Tensor, scale: Tensor, n_neurons: int
) -> Tensor:
    relevance, bias_relevance = relevance_loop(z, head)
    components = torch.from_numpy(principal.components_).T
    center = torch.from_numpy(principal.mean_)
    centroids = (means[:, :-1] - center) @ components
    scores = []
    for x, r, r_bias in zip(z.double(), relevance, bias_relevance):
        distance = ((r - center) @ components - centroids).abs().sum(dim=1).amin()
        lowest = r.argsort()[:n_neurons]
        ratio = x[lowest].abs().sum() / x.abs().sum()
        scores.append((distance + scale * r_bias.abs()) * ratio)
    return torch.stack(scores)


def nero_part(setup: Setup) -> dict[str, Any]:
    cases, left_out = setup.cases()
    groups = [g for case in cases for g in nero_groups(case, setup)]
    return {"groups": groups, "left_out": left_out}


def nero_groups(case: Features, setup: Setup) -> Iterator[dict[str, Any]]:
    from sklearn.decomposition import PCA

    z, y, x, head = case.z, case.y, case.queries, case.head
    detector = NERO(None, head).fit_features(z, y)
    # the released code works on the CPU
    host = nn.Linear(head.in_features, head.out_features).requires_grad_(False)
    host.load_state_dict(head.state_dict())
    z_host, x_host = z.cpu(), x.cpu()
    dimension = z.shape[1]
    n_components, n_neurons = int(2 / 3 * dimension), int(175 / 512 * dimension)
    rows, query_rows = (drawn(len(t), setup.sizes.sample) for t in (z, x))

    weight, bias = host.weight.double(), host.bias.double()
    relevance, bias_relevance = nero_relevance(z_host.double(), weight, bias)
    means, _, looped = nero_fit_loop(z_host[rows], y[rows], host)
    must_equal("NERO: the relevance", relevance[rows], looped, 1e-6, 1e-9)
    full = torch.cat([relevance, bias_relevance[:, None]], dim=1)
    means = torch.stack([full[y == c].mean(dim=0) for c in y.unique()])
    scale = torch.cdist(full, means, p=1).amin(dim=1).mean() / bias_relevance.abs().mean()

    def principal() -> Any:
        # exact, and the fastest of scikit-learn's solvers for many rows
        return PCA(n_components, svd_solver="covariance_eigh").fit(relevance.numpy())

    fitted = principal()
    scores = detector.predict_features(x)[query_rows.to(x.device)].cpu()
    arguments = x_host[query_rows], host, fitted, means, scale, n_neurons
    must_equal("NERO: the score", scores, nero_score_loop(*arguments), 1e-4, 1e-6)

    loop, pca = "loop", "PCA"
    notes = {loop: f"scaled from {len(rows):,} rows", pca: "of all rows, not scaled"}
    rounds = take_turns(
        {
            "NERO": lambda: detector.fit_features(z, y),
            loop: lambda: nero_fit_loop(z_host[rows], y[rows], host),
            pca: principal,
        },
        setup,
    )
    rounds[loop] = scaled(rounds[loop], len(z) / len(rows))
    rounds["loop and PCA"] = [a + b for a, b in zip(rounds[loop], rounds[pca])]
    references = {"NERO": ["loop and PCA"]}
    yield group(f"{case.title()}: fit", rounds, references, case.sizes(), notes)

    rounds = take_turns(
        {
            "NERO": lambda: detector.predict_features(x),
            loop: lambda: nero_score_loop(*arguments),
        },
        setup,
    )
    rounds[loop] = scaled(rounds[loop], len(x) / len(query_rows))
    title, notes = (
        f"{case.title()}: score {len(x):,}",
        {loop: f"scaled from {len(query_rows):,} rows"},
    )
    yield group(title, rounds, {"NERO": [loop]}, case.sizes(), notes)


# Part: the forward pass


def forward_part(setup: Setup) -> dict[str, Any]:
    from torchvision.models import resnet50

    from pood_plugins.model import resnet20

    sizes = setup.sizes
    networks = {"ResNet-20": resnet20(), "ResNet-50": resnet50(weights=None)}
    groups, left_out = [], {}
    for i, (name, network) in enumerate(networks.items()):
        case = setup.real
        if i > 0 or isinstance(case, str):
            if i == 0:
                left_out[f"features of {REAL}"] = f"{case}; synthetic ones take their place"
            width = sizes.forward_widths[i]
            case = synthetic_features(sizes.bank, sizes.queries, width, setup.device)
        count, batch, pixels = (
            values[i]
            for values in (sizes.forward_images, sizes.forward_batches, sizes.forward_pixels)
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, pixels, pixels, generator=generator).to(setup.device)
        groups.append(
            forward_group(name, network.eval().to(setup.device), images, batch, case, setup)
        )
    return {"groups": groups, "left_out": left_out}


def forward_group(
    name: str, network: nn.Module, images: Tensor, batch: int, case: Features, setup: Setup
) -> dict[str, Any]:
    z, y, x, head = case.z, case.y, case.queries, case.head
    grood, nero = GROOD(None, head).fit_features(z, y), NERO(None, head).fit_features(z, y)

    @torch.no_grad()
    def forward() -> None:
        for part in images.split(batch):
            network(part)

    rounds = take_turns(
        {
            "forward": forward,
            "GROOD, fit": lambda: grood.fit_features(z, y),
            "GROOD, score": lambda: grood.predict_features(x),
            "NERO, fit": lambda: nero.fit_features(z, y),
            "NERO, score": lambda: nero.predict_features(x),
        },
        setup,
    )
    forward_seconds = rounds.pop("forward")
    note = f"scaled from {len(images):,} images in batches of {batch}"
    counts = {"fit": len(z), "score": len(x)}
    of = {kind: f"forward pass, {count:,} images" for kind, count in counts.items()}
    notes = dict.fromkeys(of.values(), note)
    rounds |= {of[kind]: scaled(forward_seconds, n / len(images)) for kind, n in counts.items()}
    references = {row: [of[row.split(", ")[1]]] for row in rounds if row not in notes}
    pixels = f"3 × {images.shape[2]} × {images.shape[3]}"
    title = f"{name} ({pixels}), features: {case.title()}"
    sizes = {**case.sizes(), "images": len(images), "batch": batch, "pixels": images.shape[2]}
    return group(title, rounds, references, sizes, notes)


# Part: growth

#: what is measured of memory, in MiB
MEMORY = ("fit_peak_mib", "score_peak_mib", "held_mib")


class Memory:
    """Memory in use and its peak, in MiB: of the process, or of the GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def start(self) -> None:
        """Sets the peak to the present."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            # what was freed goes back to the system, so that it can't be reused unseen
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.used()

    def used(self) -> float:
        return torch.cuda.memory_allocated() / 2**20 if self.on_gpu else resident("VmRSS")

    def peak(self) -> float:
        """Above what there was at the start."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return resident("VmHWM") - self.before

    def held(self) -> float:
        """What is left now of what came since the start."""
        if not self.on_gpu:
            ctypes.CDLL(None).malloc_trim(0)
        return self.used() - self.before


def resident(field: str) -> float:
    """``VmRSS``, the resident set of this process, or ``VmHWM``, its peak, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(
    bank: int,
    queries: int,
    dimension: int,
    bank_dtype: str,
    repeat: int,
    device: Any,
    threads: int,
) -> dict[str, Any]:
    """
    Memory and seconds of GROOD in a process of its own, which no earlier measurement has left
    memory in. The first fit and the first scoring show the memory, and warm up.
    """
    torch.set_num_threads(threads)
    case = synthetic_features(bank, queries, dimension, device)
    z, y, x = case.z, case.y, case.queries
    settings = {} if bank_dtype == "float32" else {"bank_dtype": getattr(torch, bank_dtype)}
    tiny = GROOD(None, case.head, **settings).fit_features(z[:200], y[:200])  # sets up torch
    tiny.predict_features(x[:2])
    detector = GROOD(None, case.head, **settings)
    memory = Memory(device)

    memory.start()
    detector.fit_features(z, y)
    fit_peak, held = memory.peak(), memory.held()
    memory.start()
    detector.predict_features(x)
    score_peak = memory.peak()
    runs = {
        "fit": lambda: detector.fit_features(z, y),
        "score": lambda: detector.predict_features(x),
    }
    return {
        **{name: [seconds_of(run, device) for _ in range(repeat)] for name, run in runs.items()},
        "fit_peak_mib": fit_peak,
        "score_peak_mib": score_peak,
        "held_mib": held,
    }


#: makes the C library give memory back as soon as a tensor is gone. Otherwise, it depends on
#: chance how much of what was freed is in pieces that can't be used again, and peaks of the same
#: call differ.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def in_processes(
    measure: Callable[..., dict[str, Any]],
    sizes: Sequence[dict[str, Any]],
    setup: Setup,
    variables: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Measures each size in a process that has these environment variables from its start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    where = {"device": setup.device, "threads": torch.get_num_threads()}
    # a fresh one for each size, except where numbers mean nothing
    tasks = None if setup.quick else 1
    try:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=tasks) as pool:
            return [
                pool.apply(measure, kwds={**size, **where})
                for size in tqdm(sizes, disable=None, leave=False)
            ]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def growth_part(setup: Setup) -> dict[str, Any]:
    few, *more = setup.sizes.growth_queries
    banks, widths = setup.sizes.growth_banks, setup.sizes.growth_widths
    sizes = [
        {"bank": bank, "queries": queries, "dimension": width, "bank_dtype": dtype}
        for bank, queries, width, dtype in [
            *((bank, few, width, "float32") for width, bank in product(widths, banks)),
            *((banks[1], queries, width, "float32") for width, queries in product(widths, more)),
            (banks[-1], few, widths[-1], "float16"),
        ]
    ]
    for size in sizes:
        large = size["bank"] * size["queries"] * size["dimension"] > 1e11
        size["repeat"] = min(2, setup.repeat) if large else setup.repeat
    rows = in_processes(measure, sizes, setup, {})
    returning = rows
    if setup.device.type == "cpu" and not setup.quick:
        untimed = [{**size, "repeat": 0} for size in sizes]
        returning = in_processes(measure, untimed, setup, RETURN_MEMORY)
    rows = [
        {
            **size,
            "fit": summary(row["fit"]),
            "score": summary(row["score"]),
            **{key: memory[key] for key in MEMORY},
            "default_malloc": {key: row[key] for key in MEMORY},
            "features_mib": 4 * size["bank"] * size["dimension"] / 2**20,
        }
        for size, row, memory in zip(sizes, rows, returning)
    ]
    exponents = []
    for width in widths:
        of_bank = [r for r in growing(rows) if r["dimension"] == width]
        exponents.append(
            {
                "dimension": width,
                "fit": exponent(of_bank, lambda row: row["fit"]["median"]),
                "score": exponent(of_bank, lambda row: row["score"]["median"]),
                # below 1 MiB, it is the pages of the system that are measured
                "fit_peak_mib": exponent(of_bank, lambda row: max(1, row["fit_peak_mib"])),
                "score_peak_mib": exponent(of_bank, lambda row: max(1, row["score_peak_mib"])),
            }
        )
    return {"rows": rows, "exponents": exponents, "left_out": {}}


def growing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that differ in the bank only."""
    few = min(row["queries"] for row in rows)
    return [row for row in rows if row["queries"] == few and row["bank_dtype"] == "float32"]


def exponent(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """Slope of a straight line through the logarithms, over the rows of the bank."""
    x = torch.tensor([math.log(row["bank"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(value(row)) for row in rows], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


# Part: fit over a loader


class Loader:
    """Synthetic features in batches, made anew in every pass, so that they never exist at once."""

    def __init__(self, rows: int, dimension: int, batch: int = 4096):
        self.rows, self.batch = rows, batch
        self.dataset = range(rows)
        self.head = synthetic_features(1, 1, dimension, "cpu").head
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for seed, start in enumerate(range(0, self.rows, self.batch)):
            count = min(self.batch, self.rows - start)
            z = synthetic(count, self.head.in_features, seed=10 + seed)
            yield z, self.head(z).argmax(dim=1)


def measure_loader(
    rows: int, dimension: int, settings: dict[str, Any], device: Any, threads: int
) -> dict[str, Any]:
    """Memory of a fit in a process of its own, whose features come from a loader."""
    torch.set_num_threads(threads)
    loader = Loader(rows, dimension)
    head = loader.head.to(device)
    loader.head = nn.Linear(head.in_features, head.out_features).requires_grad_(False)
    loader.head.load_state_dict({k: v.cpu() for k, v in head.state_dict().items()})
    settings = {**settings, "bank_dtype": getattr(torch, settings["bank_dtype"])}
    GROOD(nn.Identity(), head, **settings).to(device).fit(Loader(100, dimension))  # sets up torch
    detector = GROOD(nn.Identity(), head, **settings).to(device)
    memory = Memory(device)
    memory.start()
    seconds = seconds_of(lambda: detector.fit(loader), device)
    assert detector.bank_ is not None
    return {
        "peak_mib": memory.peak(),
        "held_mib": memory.held(),
        "passes": loader.passes,
        "seconds": seconds,
        "bank": len(detector.bank_),
    }


def loader_part(setup: Setup) -> dict[str, Any]:
    rows, width = setup.sizes.growth_banks[-1], setup.sizes.growth_widths[-1]
    sizes = [
        {
            "rows": rows,
            "dimension": width,
            "settings": {"bank_dtype": dtype, "bank_fraction": fraction},
        }
        for dtype, fraction in product(("float32", "float16"), (1.0, 0.25))
    ]
    variables = RETURN_MEMORY if setup.device.type == "cpu" and not setup.quick else {}
    measured = in_processes(measure_loader, sizes, setup, variables)
    found = [
        {**size, **row, "features_mib": 4 * rows * width / 2**20}
        for size, row in zip(sizes, measured)
    ]
    return {"rows": found, "left_out": {}}


def loader_rows(part: Mapping[str, Any]) -> list[list[str]]:
    lines = [["bank", "rows", "passes", "peak MiB", "held MiB", "features MiB", "seconds"]]
    for row in part["rows"]:
        settings = row["settings"]
        share = f"{100 * settings['bank_fraction']:.0f} % of {row['rows']:,} × {row['dimension']}"
        memory = [f"{row[key]:,.0f}" for key in ("peak_mib", "held_mib", "features_mib")]
        counts = [f"{row['bank']:,}", str(row["passes"])]
        lines.append(
            [f"{settings['bank_dtype']}, {share}", *counts, *memory, figures(row["seconds"])]
        )
    return lines


# Part: the CIFAR-10 benchmark


def benchmark_part(setup: Setup) -> dict[str, Any]:
    """GROOD and NERO in the benchmark of OpenOOD, as ``pood benchmark`` runs it, without cache."""
    if isinstance(setup.real, str):
        return {"rows": [], "left_out": {"the CIFAR-10 benchmark": setup.real}}
    from pood_plugins import evaluation, registry, split_model
    from pood_plugins.benchmark import PackedCIFAR10
    from pood_plugins.model.zoo import load_classifier

    assert setup.folder is not None
    model, preprocessing = load_classifier("resnet20", str(setup.folder / FILES[0]), CLASSES)
    benchmark: Any = PackedCIFAR10(setup.folder, preprocessing.normalize)  # type: ignore[union-attr]
    if setup.quick:
        for name, pack in benchmark._sets.items():
            benchmark._sets[name] = pack.subset(drawn(len(pack), setup.sizes.queries))
    split = split_model(model.to(setup.device), example=torch.zeros(2, 3, 32, 32))
    names = ["GROOD", "NERO", "Energy"]
    detectors = {name: registry.build(name, split) for name in names}
    report = evaluation.run(benchmark, detectors, device=setup.device)
    forward = report.metadata["forward_seconds"]
    rows = [{"what": "forward passes, with the reading of images", "seconds": forward}]
    for result in report.results:
        seconds = (result.fit_seconds or 0) + result.score_seconds
        rows.append({"what": f"{result.detector}, fit and score", "seconds": seconds})
    both = sum(row["seconds"] for row in rows[1:3])
    rows.append({"what": "GROOD and NERO", "seconds": both, "required": 0.05})
    for row in rows:
        row["share"] = row["seconds"] / forward
    return {"rows": rows, "images": report.metadata["images"], "left_out": {}}


def benchmark_rows(part: Mapping[str, Any]) -> list[list[str]]:
    lines = [["what", "seconds", "% of the forward passes", "required"]]
    for row in part["rows"]:
        limit = row.get("required")
        met = "" if limit is None else "met" if row["share"] <= limit else "**not met**"
        required = "" if limit is None else f"at most {100 * limit:g} %: {met}"
        share = figures(100 * row["share"])
        lines.append([row["what"], figures(row["seconds"]), share, required])
    return lines


# Part: skipping


@contextmanager
def without_skipping() -> Iterator[None]:
    """The search compares every query with every row, in the tiles that it uses otherwise."""
    before = neighbors._skips, neighbors._ROWS_GPU
    neighbors._skips, neighbors._ROWS_GPU = lambda device: False, neighbors._ROWS
    try:
        yield
    finally:
        neighbors._skips, neighbors._ROWS_GPU = before


def pairs_compared(run: Callable[[], Any]) -> int:
    """Number of pairs of a query and a row whose product the search computes."""
    pairs = 0
    compare = neighbors._Scan.compare

    def counting(scan: Any, start: int, wanted: Tensor | None = None) -> None:
        nonlocal pairs
        queries = len(scan.norm) if wanted is None else int(wanted.sum())
        pairs += queries * min(scan.size, scan.bank.shape[0] - start)
        compare(scan, start, wanted)

    neighbors._Scan.compare = counting  # type: ignore[method-assign]
    try:
        run()
    finally:
        neighbors._Scan.compare = compare  # type: ignore[method-assign]
    return pairs


def skipping_part(setup: Setup) -> dict[str, Any]:
    cases, left_out = setup.cases()
    if setup.device.type != "cpu":
        return {"groups": [], "left_out": {"skipping": "on a GPU, nothing is skipped"}}
    groups = []
    for case in cases:
        for name, settings in list(GROODS.items())[:2]:
            detector = GROOD(None, case.head, **settings).fit_features(case.z, case.y)
            assert detector.bank_ is not None

            def run(detector: GROOD = detector, x: Tensor = case.queries) -> Tensor:
                return detector.predict_features(x)

            def run_whole(run: Callable[[], Tensor] = run) -> Tensor:
                with without_skipping():
                    return run()

            if not torch.equal(run(), run_whole()):
                raise SystemExit(f"{name}: skipping changes the scores")
            share = pairs_compared(run) / (len(case.queries) * len(detector.bank_))
            rounds = take_turns({"skipping": run, "comparing all": run_whole}, setup)
            notes = {"skipping": f"{100 * share:.1f} % of the pairs compared, same scores"}
            references = {"skipping": ["comparing all"]}
            title = f"{name}, {case.title()}, {len(case.queries):,} queries"
            of = group(title, rounds, references, case.sizes(), notes)
            groups.append({**of, "share_compared": share})
    return {"groups": groups, "left_out": left_out}


# Tables and the figure

PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "grood": grood_part,
    "neighbors": neighbors_part,
    "nero": nero_part,
    "forward": forward_part,
    "growth": growth_part,
    "loader": loader_part,
    "benchmark": benchmark_part,
    "skipping": skipping_part,
}
TITLES = {
    "grood": "GROOD beside a loop and a full scan of its bank",
    "neighbors": "Nearest neighbors",
    "nero": "NERO beside a loop",
    "forward": "GROOD and NERO beside the forward pass",
    "growth": "Growth with the bank and with the queries",
    "loader": "Memory of a fit over a loader",
    "benchmark": "GROOD and NERO in the CIFAR-10 benchmark",
    "skipping": "Rows that the search skips",
}


def table(name: str, part: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table, and paragraphs below it."""
    special = {"growth": growth_rows, "loader": loader_rows, "benchmark": benchmark_rows}
    rows = special[name](part) if name in special else group_rows(name, part)
    header, *body = rows
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    remarks = [f"{what} left out: {why}." for what, why in part["left_out"].items()]
    on = part["device"] if part["device"] != "CPU" else part["processor"] or "CPU"
    where = f"{on}, {part['threads']} threads, {part['measured']}"
    commit = part["commit"] or "unknown"
    remarks.append(f"Seconds are medians; rounds: {part['repeat']}. {where}, commit {commit}.")
    if part["quick"]:
        remarks.append(
            "Tiny sizes, to see whether the script runs: **these are no measurements.**"
        )
    return text + [line for remark in remarks for line in ("", remark)]


def group_rows(name: str, part: Mapping[str, Any]) -> list[list[str]]:
    lines = [["what", "seconds", "from – to", "relative to"]]
    for of in part["groups"]:
        lines.append([f"**{of['title']}**", *[""] * (len(lines[0]) - 1)])
        bounds = of.get("lower_bounds", {}).values()
        for row, values in of["rows"].items():
            if row.startswith("full scan") and row not in bounds:
                continue  # slower tiles are in the json
            seconds, note = values["seconds"], values.get("note")
            shown = relative_percent if name == "forward" else relative
            lines.append(
                [
                    f"{row} ({note})" if note else row,
                    figures(seconds["median"]),
                    f"{figures(seconds['min'])} – {figures(seconds['max'])}",
                    "; ".join(shown(r["ratio"], other) for other, r in values["ratios"].items()),
                ]
            )
    return lines


def relative(ratio: float, other: str) -> str:
    # small fractions are easier to read the other way round
    value = f"{figures(ratio)} ×" if ratio >= 0.1 else f"1/{float(f'{1 / ratio:.3g}'):,.0f} of"
    return f"{value} {other}"


def relative_percent(ratio: float, other: str) -> str:
    return f"{figures(100 * ratio)} % of {other}"


def figures(value: float) -> str:
    """Three significant figures, without exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{float(f'{value:.3g}'):,.{digits}f}"


def growth_rows(part: Mapping[str, Any]) -> list[list[str]]:
    peaks = ["peak of fit MiB (default)", "peak of score MiB (default)", "held", "features"]
    lines = [["width", "bank", "queries", "fit s", "score s", *peaks]]
    for row in part["rows"]:
        half = " (float16)" if row["bank_dtype"] == "float16" else ""
        lines.append(
            [
                str(row["dimension"]),
                f"{row['bank']:,}{half}",
                f"{row['queries']:,}",
                figures(row["fit"]["median"]),
                figures(row["score"]["median"]),
                *(f"{row[k]:,.0f} ({row['default_malloc'][k]:,.0f})" for k in MEMORY[:2]),
                *(f"{row[key]:,.0f}" for key in ("held_mib", "features_mib")),
            ]
        )
    for row in part["exponents"]:
        values = [f"{row[k]:.2f}" for k in ("fit", "score", "fit_peak_mib", "score_peak_mib")]
        lines.append([str(row["dimension"]), "**exponent**", "", *values, "", ""])
    return lines


def write_tables(content: Mapping[str, Any], folder: Path, stem: str) -> list[str]:
    """
    :return: all lines, those of ``speed.md``
    """
    whole: list[str] = []
    for name, part in content["parts"].items():
        lines = table(name, part)
        (folder / f"{stem}_{name}.md").write_text("\n".join(lines) + "\n", "utf-8")
        whole += [f"## {TITLES[name]}", "", *lines, ""]
    (folder / f"{stem}.md").write_text("\n".join(whole), "utf-8")
    return whole


def plot_growth(part: Mapping[str, Any], path: Path) -> None:
    """Seconds and memory over the rows of the bank, both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = growing(part["rows"])
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    looks = [("fit", "#0072B2", "o"), ("score", "#D55E00", "s")]
    for width, line in zip(dict.fromkeys(row["dimension"] for row in rows), ("-", "--", ":")):
        of_width = [row for row in rows if row["dimension"] == width]
        banks = [row["bank"] for row in of_width]
        for stage, color, mark in looks:
            label, look = f"{stage}, D = {width}", {"color": color, "marker": mark, "ls": line}
            axes[0].plot(banks, [r[stage]["median"] for r in of_width], label=label, **look)
            peaks = [max(1, row[f"{stage}_peak_mib"]) for row in of_width]
            axes[1].plot(banks, peaks, **look)
        sizes = [row["features_mib"] for row in of_width]
        label = None if width != rows[0]["dimension"] else "the features themselves"
        axes[1].plot(banks, sizes, color="0.6", ls=line, label=label)
    for axis, text in zip(axes, ("seconds", "memory above the inputs [MiB]")):
        axis.set(xscale="log", yscale="log", xlabel="rows of the bank", ylabel=text)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8, handlelength=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


# The command


def machine(device: torch.device) -> dict[str, Any]:
    """What a part was measured with, and when."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        **environment(),
        "device": name,
        "processor": models[0] if models else None,
        "processors": os.cpu_count(),
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of GROOD, NERO and the search")
    data = os.environ.get("POOD_DATA") or None
    parser.add_argument("--data", type=Path, default=data, metavar="DIR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test")
    parser.add_argument("--draw", action="store_true", help="only tables and figure, from json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="default: docs/_static, or DIR of --output"
    )
    parser.add_argument("--features-cache", type=Path, default=ROOT / "results" / "cache")
    options = parser.parse_args()
    parts = [] if options.draw else options.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    output = options.output or ROOT / "benchmarks" / "results"
    figures_folder = options.figures or options.output or ROOT / "docs" / "_static"
    device = torch.device(options.device)
    stem = "speed" if device.type == "cpu" else f"speed_{device.type}"
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{stem}.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {"parts": {}}

    setup = Setup(QUICK if options.quick else Sizes(), device, options.repeat, options.quick, "")
    # tiny sizes are fastest in one thread, above all on a machine that is busy
    with same_threads(1 if options.quick else torch.get_num_threads()):
        if set(parts) - {"growth", "loader"}:
            cache = None if options.quick else options.features_cache
            real = real_features(options.data, setup, cache)
            setup = replace(setup, real=real, folder=options.data)
        for name in parts:
            start = time.perf_counter()
            print(f"{name}: {TITLES[name]}", flush=True)
            result = PARTS[name](setup)
            content["parts"][name] = {
                **machine(device),
                "repeat": options.repeat,
                "quick": options.quick,
                "duration": round(time.perf_counter() - start, 1),
                "sizes": asdict(setup.sizes),
                **result,
            }
            content["parts"] = {n: content["parts"][n] for n in PARTS if n in content["parts"]}
            write_json(path, content)  # after each part, so that a stop loses one at most
    print("\n".join(write_tables(content, output, stem)))
    if "growth" in content["parts"]:
        plot_growth(content["parts"]["growth"], figures_folder / f"{stem}_growth.png")


if __name__ == "__main__":
    main()
