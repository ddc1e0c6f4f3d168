"""
Whether an explanation by NERO means something: whether the neurons that it names make the score.

    python benchmarks/explanations.py [--data DIR]

The neurons that deviate most from the nearest class are replaced by what is typical of that class,
and the sample is scored again; the same for as many random neurons, and for as many of those whose
features (not their relevance) are farthest from the class mean, which needs no explanation at all.
There are two ways to replace a neuron:

features
    its feature becomes the mean feature of the class in the training data. Logits, probabilities
    and with them the relevance of all other neurons change, too.
relevance
    its relevance becomes the mean relevance of the class, all else stays. This is the space in
    which the detector measures distances, so that it is an easier test.

Digits need no data: the seeds are those of three networks. With ``--data``, a ResNet-20 and a
ResNet-56 for CIFAR-10 follow, where each seed has other OOD images and other random neurons, and
the time of an explanation is measured.

Results go to ``benchmarks/results/explanations.json``, the table to ``explanations.md`` beside it,
figures to ``docs/_static``. ``--quick`` tries all of this with few images; its numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pood_plugins import split_model
from pood_plugins.benchmark import Digits, PackedCIFAR10
from pood_plugins.benchmark.digits import train_classifier
from pood_plugins.dataset import ImagePack, PackLoader
from pood_plugins.detector import NERO, nero_relevance
from pood_plugins.evaluation.cache import Cache, of_dataset, of_module
from pood_plugins.evaluation.report import environment
from pood_plugins.evaluation.statistics import interval
from pood_plugins.model.zoo import Preprocessing, load_classifier
from pood_plugins.threshold import Threshold, calibrate

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("resnet20", "resnet56")
DIGITS = "digits"
#: which neurons are replaced first
TOP, RANDOM, PLAIN = "top deviation", "random", "feature distance"
CHOICES = (TOP, RANDOM, PLAIN)
ABLATIONS = ("features", "relevance")
#: whose explanations are judged: of OOD images that are flagged, or of all
POPULATIONS = ("flagged images", "all images")
STATISTICS = ("median", "mean", "share flagged")
BATCH = 256


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    digits_images: int | None = None  # OOD images of each set; ``None`` is all
    images: int = 2000  # OOD images of each set and seed for CIFAR-10, no image in two seeds
    training: int | None = None  # CIFAR-10 training images; ``None`` is all
    draws: int = 5  # random orders of the neurons for each image
    resamples: int = 1000  # of the bootstrap over images
    cost_images: int = 1000
    rounds: int = 7  # of the times


QUICK = Settings(
    digits_images=80, images=40, training=300, draws=2, resamples=40, cost_images=50, rounds=2
)


# Ablation


@dataclass(frozen=True)
class Fitted:
    """A detector, what is typical of its classes, and its threshold."""

    detector: NERO
    class_means: Tensor  #: mean features, in the order of the detector's classes
    threshold: Threshold

    @classmethod
    def on(cls, split: Any, z: Tensor, y: Tensor, z_validation: Tensor) -> Fitted:
        detector = NERO(split.encoder, split.head).fit_features(z, y)
        assert detector.classes_ is not None
        means = torch.stack([z[y == c].mean(dim=0) for c in detector.classes_])
        return cls(detector, means, calibrate(detector.predict_features(z_validation), tpr=0.95))


@dataclass(frozen=True)
class Ablated:
    """Scores of some images after more and more of their neurons were replaced."""

    score: Tensor  #: before, of shape n
    flagged: Tensor  #: whether it is above the threshold, of shape n
    threshold: float
    neurons: list[int]  #: M numbers of neurons that were replaced
    first: dict[str, dict[str, float | None]]  #: what the first neuron of two choices does
    #: by ablation and choice: scores of shape M × n × draws
    scores: dict[str, dict[str, Tensor]]


def counts(dimension: int) -> list[int]:
    """Numbers of neurons to replace: powers of 2, what is halfway between them, and all."""
    powers = [2**i for i in range(dimension.bit_length())]
    numbers = {0, *powers, *(3 * p // 2 for p in powers if p > 1), dimension}
    return sorted(n for n in numbers if n <= dimension)


@torch.no_grad()
def ablate(fitted: Fitted, z: Tensor, draws: int, seed: int) -> Ablated:
    detector = fitted.detector
    n, dimension = z.shape
    explanation = detector.explain_features(z, n_neurons=dimension)
    assert detector.classes_ is not None and detector.centroids_ is not None
    nearest = torch.searchsorted(torch.tensor(detector.classes_), explanation.nearest_class)
    means, centroids = fitted.class_means[nearest], detector.centroids_[nearest]
    relevance, bias_relevance = relevance_of(detector, z)
    generator = torch.Generator().manual_seed(seed)
    orders = {
        TOP: explanation.top_neurons[None],
        RANDOM: torch.rand(draws, n, dimension, generator=generator).argsort(dim=2),
        PLAIN: (z - means).abs().argsort(dim=1, descending=True)[None],
    }

    def of_features(first: Tensor) -> Tensor:
        return detector.predict_features(z.scatter(1, first, means.gather(1, first))).double()

    def of_relevance(first: Tensor) -> Tensor:
        moved = relevance.scatter(1, first, centroids.gather(1, first))
        return score_of(detector, moved, bias_relevance, z)

    scores: dict[str, dict[str, Tensor]] = {}
    for ablation, function in zip(ABLATIONS, (of_features, of_relevance)):
        scores[ablation] = {
            choice: torch.stack(
                [
                    torch.stack([function(order[:, :m]) for order in order_of_draw], dim=1)
                    for m in counts(dimension)
                ]
            )
            for choice, order_of_draw in orders.items()
        }
    score, flagged = explanation.score.double(), fitted.threshold(explanation.score)
    first = {
        choice: first_neuron(detector, z[flagged], means[flagged], orders[choice][0, flagged, :1])
        for choice in (TOP, PLAIN)
    }
    threshold = fitted.threshold.value
    return Ablated(score, flagged, threshold, counts(dimension), first, scores)


def first_neuron(
    detector: NERO, z: Tensor, means: Tensor, neuron: Tensor
) -> dict[str, float | None]:
    """Why the score falls or rises when the feature of a single neuron becomes the class mean."""

    def magnitude(features: Tensor) -> Tensor:
        # relevance is divided by logits, of which those of probable classes count
        logits = detector.head(features)
        return (logits.softmax(dim=1) * logits.abs()).sum(dim=1)

    target = means.gather(1, neuron)
    replaced = z.scatter(1, neuron, target)
    relative = detector.predict_features(replaced) / detector.predict_features(z)
    lowered = (target < z.gather(1, neuron))[:, 0]

    def middle(values: Tensor) -> float | None:
        return rounded(values.median()) if len(values) else None

    return {
        "share lowered": rounded(lowered.double().mean()),
        "relative score if lowered": middle(relative[lowered]),
        "relative score if raised": middle(relative[~lowered]),
        "relative logits": middle(magnitude(replaced) / magnitude(z)),
    }


def relevance_of(detector: NERO, z: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = detector.head.weight.double(), detector.head.bias
    return nero_relevance(
        z.double(), weight, None if bias is None else bias.double(), detector.eps
    )


def score_of(detector: NERO, relevance: Tensor, bias_relevance: Tensor, z: Tensor) -> Tensor:
    """
    NERO's score of a relevance that no features need to have. The features only count in the
    ratio, whose neurons are those of the lowest relevance given.
    """
    assert detector.components_ is not None and detector.projected_centroids_ is not None
    projected = relevance @ detector.components_
    distance = torch.cdist(projected, detector.projected_centroids_, p=1).amin(dim=1)
    lowest = relevance.topk(int(detector.n_neurons * z.shape[1]), dim=1, largest=False).indices
    magnitude = z.double().abs()
    ratio = magnitude.gather(1, lowest).sum(dim=1) / magnitude.sum(dim=1).clamp(min=1e-300)
    return (distance + detector.bias_scale_ * bias_relevance.abs()) * ratio


# Curves


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """
    :param values: of shape n × r, of which all of a row have the weight of the row
    :param weights: whole numbers of shape b × n
    :return: medians of shape b, the lower one of two
    """
    ordered, order = values.flatten().sort()
    passed = weights[:, order // values.shape[1]].cumsum(dim=1)
    index = (passed < passed[:, -1:] / 2).sum(dim=1)
    return ordered[index]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights.double() @ values.mean(dim=1) / weights.sum(dim=1)


def resample(n: int, resamples: int, seed: int) -> Tensor:
    """How often each image is drawn: once in the first row, which is no resample."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    weights = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return torch.cat([torch.ones(1, n), weights])


def curves_of(ablated: Ablated, population: str, weights: Tensor) -> dict[str, Any]:
    """Of shape M × (1 + resamples), by ablation, statistic and choice."""
    # a score of 0 has no relative value; no such image is flagged
    chosen = ablated.flagged if population == POPULATIONS[0] else ablated.score > 0
    weights = weights[:, chosen]
    curves: dict[str, Any] = {}
    for ablation, by_choice in ablated.scores.items():
        curves[ablation] = {name: {} for name in STATISTICS}
        for choice, scores in by_choice.items():
            kept = scores[:, chosen]
            relative = kept / ablated.score[chosen][:, None]
            above = (kept > ablated.threshold).double()
            for name, function, values in (
                ("median", weighted_median, relative),
                ("mean", weighted_mean, relative),
                ("share flagged", weighted_mean, above),
            ):
                curve = torch.stack([function(step, weights) for step in values])
                curves[ablation][name][choice] = curve
    return curves


def summarize(
    curves: list[dict[str, Tensor]], neurons: list[int], bands_kept: bool
) -> dict[str, Any]:
    """
    :param curves: for each seed, curves by choice
    :param neurons: how many are replaced
    :param bands_kept: whether to return those of single seeds; where they separate is told anyway
    :return: means over the seeds and single curves with bands, areas, and where they separate
    """
    fractions = torch.tensor(neurons, dtype=torch.float64) / neurons[-1]
    means = {choice: torch.stack([c[choice] for c in curves]).mean(dim=0) for choice in CHOICES}
    areas = {choice: torch.trapezoid(mean, fractions, dim=0) for choice, mean in means.items()}
    areas[f"{RANDOM} - {TOP}"] = areas[RANDOM] - areas[TOP]
    areas[f"{PLAIN} - {TOP}"] = areas[PLAIN] - areas[TOP]
    bands = [{choice: interval(curve[:, 1:]) for choice, curve in c.items()} for c in curves]
    # every seed by itself must tell the curves apart
    below = torch.stack([band[TOP][1] < band[RANDOM][0] for band in bands]).all(dim=0)
    above = torch.stack([band[TOP][0] > band[RANDOM][1] for band in bands]).any(dim=0)
    return {
        "curves": {
            choice: {
                "mean of seeds": with_band(means[choice]),
                "seeds": [
                    with_band(c[choice]) if bands_kept else {"value": numbers(c[choice][:, 0])}
                    for c in curves
                ],
            }
            for choice in CHOICES
        },
        "areas": {
            name: {
                **with_band(area[None]),
                "seeds": [single_area(c, name, fractions) for c in curves],
            }
            for name, area in areas.items()
        },
        "separated at": [m for m, is_below in zip(neurons, below.tolist()) if is_below],
        "reversed at": [m for m, is_above in zip(neurons, above.tolist()) if is_above],
    }


def single_area(curves: dict[str, Tensor], name: str, fractions: Tensor) -> float:
    parts = [torch.trapezoid(curves[c][:, 0], fractions) for c in name.split(" - ")]
    return rounded(parts[0] - parts[1] if len(parts) == 2 else parts[0])


def with_band(curve: Tensor) -> dict[str, Any]:
    low, high = interval(curve[:, 1:])
    parts = {"value": curve[:, 0], "low": low, "high": high}
    return {
        name: numbers(part) if len(part) > 1 else rounded(part) for name, part in parts.items()
    }


def numbers(values: Tensor) -> list[float]:
    return [rounded(value) for value in values]


def rounded(value: Any) -> float:
    # of significant digits, as a mean of ratios can be anything
    return float(f"{float(value):.4g}")


def judge(network: str, ood: str, ablated: list[Ablated], weights: list[Tensor]) -> dict[str, Any]:
    """What is known of the explanations for one network and one OOD set, from all seeds."""
    content: dict[str, Any] = {
        "network": network,
        "ood": ood,
        "neurons": ablated[0].neurons,
        "images": [len(a.score) for a in ablated],
        "flagged": [int(a.flagged.sum()) for a in ablated],
        "score 0": [int((a.score == 0).sum()) for a in ablated],
        "first neuron, flagged images": [a.first for a in ablated],
    }
    for population in POPULATIONS:
        parts = [curves_of(a, population, w) for a, w in zip(ablated, weights)]
        content[population] = {
            ablation: {
                name: summarize(
                    [part[ablation][name] for part in parts],
                    ablated[0].neurons,
                    bands_kept=(population, name) == (POPULATIONS[0], STATISTICS[0]),
                )
                for name in STATISTICS
            }
            for ablation in ABLATIONS
        }
    return content


# Networks and their data


@contextmanager
def one_thread() -> Iterator[None]:
    """Since rounding depends on the number, and the training of a network amplifies it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def encode(encoder: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    z, y = (torch.cat(parts) for parts in zip(*((encoder(x), y) for x, y in loader)))
    return z, y


def run_digits(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Curves for three networks on the same images, and the times of one."""
    benchmark = Digits()
    loaders = {
        name: DataLoader(dataset, BATCH)
        for name, dataset in zip(benchmark.ood_names, benchmark.test_sets(known=False))
    }
    ablated: dict[str, list[Ablated]] = {name: [] for name in loaders}
    times: list[dict[str, Any]] = []
    for seed in settings.seeds:
        model = train_classifier(benchmark, seed)
        split = split_model(model, example=benchmark.train_set()[0][0].repeat(2, 1, 1, 1))
        z, y = encode(split.encoder, DataLoader(benchmark.train_set(), BATCH))
        z_validation, y_validation = encode(
            split.encoder, DataLoader(benchmark.validation_set(), BATCH)
        )
        fitted = Fitted.on(split, z, y, z_validation[y_validation >= 0])
        for name, loader in loaders.items():
            z_ood, _ = encode(split.encoder, loader)
            z_ood = z_ood[: settings.digits_images]
            ablated[name].append(ablate(fitted, z_ood, settings.draws, seed))
        if not times:
            x = torch.cat([x for x, _ in loaders["flower"]])[: settings.cost_images]
            times = measure(DIGITS, split, fitted.detector, x, settings)
    curves = []
    for name, of_seeds in ablated.items():
        # the same resamples for all networks, as they see the same images
        weights = resample(len(of_seeds[0].score), settings.resamples, 0)
        curves.append(judge(DIGITS, name, of_seeds, [weights] * len(of_seeds)))
    return curves, times


def drawn(pack: ImagePack, n: int | None, seed: int = 0) -> ImagePack:
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(seed))
    return pack.subset(order[:n].sort().values)


def run_cifar10(
    name: str, folder: Path, settings: Settings, cache: Cache
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Curves of one network for other images with each seed, and times."""
    model, preprocessing = load_classifier(name, str(folder / f"{name}_cifar10.pt"), 10)
    assert isinstance(preprocessing, Preprocessing)
    data = PackedCIFAR10(folder, preprocessing.normalize)
    train: Any = data.train_set()
    split = split_model(model, example=train[0][0].repeat(2, 1, 1, 1))

    def features(pack: ImagePack, of: str) -> tuple[Tensor, Tensor]:
        key = {"data": of_dataset(pack), "device": "cpu", "model": of_module(split.encoder)}

        def compute() -> dict[str, Any]:
            z, y = encode(split.encoder, PackLoader(pack, BATCH))
            return {"features": z, "y": y}

        stored = cache.get(f"features {of}", key, compute)
        return stored["features"], stored["y"]

    z, y = features(drawn(train, settings.training), "train")
    validation: Any = data.id_validation_set()
    fitted = Fitted.on(split, z, y, features(validation, "validation ID")[0])
    curves = []
    for ood, dataset in zip(data.ood_names, data.test_sets(known=False)):
        pack: Any = dataset
        each = min(settings.images, len(pack) // len(settings.seeds))
        z_ood, _ = features(drawn(pack, each * len(settings.seeds)), f"test {ood}")
        order = torch.randperm(len(z_ood), generator=torch.Generator().manual_seed(0))
        ablated = [
            ablate(fitted, z_ood[part], settings.draws, seed)
            for seed, part in zip(settings.seeds, order.split(each))
        ]
        weights = [resample(each, settings.resamples, seed) for seed in settings.seeds]
        curves.append(judge(name, ood, ablated, weights))
    (id_test,) = data.test_sets(known=True, unknown=False)
    images: Any = drawn(id_test, settings.cost_images)  # type: ignore[arg-type]
    x = torch.cat([x for x, _ in PackLoader(images, BATCH)])
    with one_thread():
        return curves, measure(name, split, fitted.detector, x, settings)


# Time


@torch.no_grad()
def measure(
    network: str, split: Any, detector: NERO, x: Tensor, settings: Settings
) -> list[dict[str, Any]]:
    """Time of explanations beside that of scores of the same images or features."""
    encoder = nn.Sequential(split.feature_maps, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    z = encoder(x)
    original, detector.encoder = detector.encoder, encoder
    batches = x.split(BATCH)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "images, with heat maps": (
            lambda: [detector.predict(batch) for batch in batches],
            lambda: [detector.explain(batch, layer=encoder[0]) for batch in batches],
        ),
        "images": (
            lambda: [detector.predict(batch) for batch in batches],
            lambda: [detector.explain(batch) for batch in batches],
        ),
        "features": (
            lambda: [detector.predict_features(batch) for batch in z.split(BATCH)],
            lambda: [detector.explain_features(batch) for batch in z.split(BATCH)],
        ),
    }
    results = []
    for given, (score, explain) in calls.items():
        taken: dict[str, list[tuple[float, float]]] = {"score": [], "explain": []}
        # the first round warms up, and the two take turns since others may use the processor
        for round_number in range(settings.rounds + 1):
            for what, call in (("score", score), ("explain", explain)):
                start = time.perf_counter(), time.process_time()
                call()
                end = time.perf_counter(), time.process_time()
                if round_number:
                    taken[what].append((end[0] - start[0], end[1] - start[1]))
        row: dict[str, Any] = {"network": network, "given": given, "images": len(x)}
        row |= {"features": z.shape[1], "rounds": settings.rounds}
        for i, clock in enumerate(("wall", "processor")):
            seconds = {what: [pair[i] for pair in pairs] for what, pairs in taken.items()}
            row[f"{clock} seconds"] = {what: rounded(median(s)) for what, s in seconds.items()}
            row[f"{clock} ratio"] = rounded(median(seconds["explain"]) / median(seconds["score"]))
        results.append(row)
    detector.encoder = original
    return results


# Table and figures, all from the json


def verdict(summary: dict[str, Any], neurons: list[int]) -> str:
    """Where the bands of all seeds are apart, among the numbers up to half of all neurons."""
    asked = [m for m in neurons if 1 <= m <= neurons[-1] / 2]
    separated = [m for m in asked if m in summary["separated at"]]
    reverse = [m for m in asked if m in summary["reversed at"]]
    if separated == asked:
        return "yes"
    text = f"no, {ranges(separated, asked)}" if separated else "no"
    return text + (f"; worse {ranges(reverse, asked)}" if reverse else "")


def ranges(numbers: list[int], among: list[int]) -> str:
    """Such as "at 1, 4–16"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and among.index(number) == among.index(groups[-1][-1]) + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return "at " + ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in groups)


def table(content: dict[str, Any]) -> str:
    """Of the images that are flagged."""
    header = ["network", "OOD set", "flagged", "replaced", *(f"area, {c}" for c in CHOICES)]
    header += [f"{RANDOM} − {TOP}", *(f"apart ({name})" for name in STATISTICS)]
    lines = [header, ["---"] * 4 + ["---:"] * 4 + ["---"] * 3]
    for entry in content["curves"]:
        share = sum(entry["flagged"]) / sum(entry["images"])
        for ablation in ABLATIONS:
            by_statistic = entry[POPULATIONS[0]][ablation]
            areas = by_statistic["median"]["areas"]
            cells = [with_interval(areas[choice]) for choice in CHOICES]
            difference = areas[f"{RANDOM} - {TOP}"]
            low, high = min(difference["seeds"]), max(difference["seeds"])
            cells.append(f"{with_interval(difference)} ({low:.2f} to {high:.2f})")
            cells += [verdict(by_statistic[name], entry["neurons"]) for name in STATISTICS]
            lines.append(
                [entry["network"], entry["ood"], f"{100 * share:.0f} %", ablation, *cells]
            )
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + "\n" + "\n\n".join(cost_lines(content)) + "\n"


def with_interval(area: dict[str, Any]) -> str:
    return f"{area['value']:.2f} [{area['low']:.2f}, {area['high']:.2f}]"


def cost_lines(content: dict[str, Any]) -> list[str]:
    return [
        f"{row['network']}, {row['given']} ({row['images']:,}, {row['features']} features each): "
        f"an explanation takes {row['wall ratio']:.2f} times as long as a score "
        f"({row['processor ratio']:.2f} by processor time), "
        f"{1000 * row['wall seconds']['explain']:,.1f} ms instead of "
        f"{1000 * row['wall seconds']['score']:,.1f} ms."
        for row in content["cost"]
    ]


#: distinct for all common kinds of color vision, and in black and white by marks and lines
STYLES: dict[str, dict[str, Any]] = {
    TOP: {"color": "#000000", "marker": "o", "linestyle": "-", "label": "top deviation (NERO)"},
    RANDOM: {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "random neurons"},
    PLAIN: {
        "color": "#0072B2",
        "marker": "^",
        "linestyle": ":",
        "label": "largest feature distance",
    },
}
LABELS = {"features": "features replaced", "relevance": "relevance replaced"}


def plot(content: dict[str, Any], folder: Path) -> None:
    """One figure for each network: a column for each OOD set, a row for each ablation."""
    folder.mkdir(parents=True, exist_ok=True)
    for network in dict.fromkeys(entry["network"] for entry in content["curves"]):
        entries = [entry for entry in content["curves"] if entry["network"] == network]
        figure = Figure(figsize=(3.3 * len(entries), 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(ABLATIONS), len(entries), sharey="row", squeeze=False)
        for line, ablation in zip(axes, ABLATIONS):
            top = 1.05
            for axis, entry in zip(line, entries):
                curves = entry[POPULATIONS[0]][ablation]["median"]["curves"]
                draw(axis, curves, entry["neurons"])
                top = max(top, *(max(s["value"]) for c in curves.values() for s in c["seeds"]))
                axis.set_title(entry["ood"] if ablation == ABLATIONS[0] else "")
            line[0].set_ylim(0, min(1.02 * top, 2))
            line[0].set_ylabel(f"score, relative to before\n({LABELS[ablation]})")
        for axis in axes[-1]:
            axis.set_xlabel("neurons replaced")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        save(figure, folder / f"explanations_{network}.png")


def save(figure: Figure, path: Path) -> None:
    figure.set_dpi(90)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    # few colors are enough, and a third of the size
    Image.fromarray(pixels).convert("RGB").quantize(96).save(path, optimize=True)


def draw(axis: Any, curves: dict[str, Any], neurons: list[int]) -> None:
    for choice, style in STYLES.items():
        mean = curves[choice]["mean of seeds"]
        axis.plot(neurons, mean["value"], markersize=4.5, linewidth=1.5, **style)
        axis.fill_between(
            neurons, mean["low"], mean["high"], color=style["color"], alpha=0.25, linewidth=0
        )
        for seed in curves[choice]["seeds"]:
            line = {"color": style["color"], "linestyle": style["linestyle"], "alpha": 0.45}
            axis.plot(neurons, seed["value"], linewidth=0.7, **line)
    axis.set_xscale("symlog", base=2, linthresh=1, linscale=0.7)
    ticks = [0, *(m for m in neurons if m & (m - 1) == 0 and m)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(-0.15, neurons[-1] * 1.15)
    axis.grid(alpha=0.3)


def to_text(content: dict[str, Any]) -> str:
    text = json.dumps(content, indent=1, allow_nan=False)
    # a list of numbers on one line: there are thousands
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether explanations by NERO mean something")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--features-cache", type=Path, default=ROOT / "results" / "cache")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    parser.add_argument(
        "--networks",
        default=",".join((DIGITS, *NETWORKS)),
        metavar="A,B",
        help="default: %(default)s; without data, only digits",
    )
    parser.add_argument("--quick", action="store_true", help="few images, for a test")
    parser.add_argument("--draw", action="store_true", help="only table and figures, from json")
    options = parser.parse_args()
    results, figures = ROOT / "benchmarks" / "results", ROOT / "docs" / "_static"
    if options.quick:
        results = figures = Path(tempfile.mkdtemp(prefix="explanations_"))
        options.features_cache = results / "cache"
    results, figures = options.output or results, options.figures or figures
    path = results / "explanations.json"
    results.mkdir(parents=True, exist_ok=True)

    if options.draw:
        content = json.loads(path.read_text("utf-8"))
    else:
        settings = QUICK if options.quick else Settings()
        content = {**environment(), "settings": asdict(settings), "curves": [], "cost": []}
        start = time.perf_counter()
        for name in options.networks.split(","):
            if name == DIGITS:
                with one_thread():
                    curves, times = run_digits(settings)
            elif options.data is None:
                print(f"{name} needs the data: name their folder by --data or POOD_DATA")
                continue
            else:
                cache = Cache(options.features_cache)
                curves, times = run_cifar10(name, Path(options.data), settings, cache)
            content["curves"] += curves
            content["cost"] += times
            print(f"{name}: after {time.perf_counter() - start:.0f} s", flush=True)
        content["seconds"] = round(time.perf_counter() - start, 1)
        temporary = path.with_suffix(".part")
        temporary.write_text(to_text(content), "utf-8")
        temporary.replace(path)
    (results / "explanations.md").write_text(table(content), "utf-8")
    plot(content, figures)
    print(table(content))
    print(f"results: {results}, figures: {figures}")


if __name__ == "__main__":
    main()
