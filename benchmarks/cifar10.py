"""
The CIFAR-10 benchmark of OpenOOD v1.5 with a ResNet-20 and a ResNet-56: every detector that can be
built, GROOD with every source of its OOD prototype, and settings chosen on validation data.

    python benchmarks/cifar10.py --data DIR [--features-cache DIR]

Rules
    Validation ID images are OpenOOD's (1,000 of CIFAR-10's test images, not among the 9,000 of the
    test). Validation OOD images are CIFAR-100 training images of 25 classes, the OOD prototype of
    "GROOD (outliers)" is made of those of 25 other classes. Rows that were chosen or fitted with
    either are marked, and judged on the CIFAR-100 test images of the remaining 50 classes and on
    MNIST and Textures, which are never used for a choice.

Results go to ``benchmarks/results/cifar10.json`` and ``.csv``, tables to ``cifar10_*.md`` beside
them, figures to ``docs/_static``. What is in the features cache is not computed again. ``--quick``
tries all of this with few images; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_ood.api import Detector, LogitsDetector
from pytorch_ood.metrics import AUROC
from pytorch_ood.utils import GridSearch
from torch import Tensor, nn

from pood_plugins import evaluation, registry, split_model
from pood_plugins.benchmark import PackedCIFAR10
from pood_plugins.dataset import ImagePack, PackLoader, read_pack
from pood_plugins.detector import GROOD, grood_gradients, mixup_prototype, noise_prototype
from pood_plugins.evaluation import Report
from pood_plugins.evaluation.cache import Cache, of_dataset, of_module
from pood_plugins.evaluation.report import environment
from pood_plugins.evaluation.rows import SLOW, RowBuilder, uses_features
from pood_plugins.model.zoo import Preprocessing, load_classifier
from pood_plugins.neighbors import kth_distance

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("resnet20", "resnet56")
UNSEEN = "CIFAR100 unseen"
#: superclasses of CIFAR-100 whose training images make the prototype, and validate
PROTOTYPE_SUPERCLASSES = (0, 4, 8, 12, 16)
VALIDATION_SUPERCLASSES = (2, 6, 10, 14, 18)
LAYERS = ("layer1", "layer2", "layer3")
ARGUMENTS = {"batch_size": 256}


@dataclass(frozen=True)
class Settings:
    """How many images are used where; ``None`` is all."""

    train: int | None = None
    test: int | None = None
    tuning_ood: int = 2500  # validation OOD images for GridSearch
    tuning_fit: int = 2000  # training images that detectors which need images are tuned with
    search_bank: int = 10_000
    search_ood: int = 5000  # validation OOD images for the search of GROOD's setting
    fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the spread
    neighbors: tuple[int, ...] = (1, 10, 50)
    choices: int | None = None  # of each hyper-parameter that GridSearch tries
    temperatures: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    repetitions: int = 3  # seeds of the ablation of the number of synthetic samples
    max_images: int | None = None  # of each test set, for all detectors that need images


QUICK = Settings(
    train=1100,
    test=120,
    tuning_ood=60,
    tuning_fit=60,
    search_bank=300,
    fractions=(1 / 8, 1.0),
    neighbors=(1,),
    choices=1,
    temperatures=(0.5, 1.0),
    repetitions=2,
    max_images=16,
)


class Data(PackedCIFAR10):
    """OpenOOD's CIFAR-10 benchmark, CIFAR-100's unseen classes as a set of their own, outliers."""

    def __init__(self, folder: Path, settings: Settings, normalize: nn.Module):
        super().__init__(folder, normalize)
        coarse = np.load(folder / "cifar100_superclasses.npz", allow_pickle=False)["coarse"]
        index = np.load(folder / "openood_index.npz", allow_pickle=False)
        classes = read_pack(folder / "cifar100_test.webp.zip")["y"][index["cifar100_as_ood_test"]]
        whole: Any = self._sets["CIFAR100"]
        self._sets[UNSEEN] = whole.subset(coarse[classes] % 2 == 1)
        self.ood_names = ["CIFAR100", UNSEEN, "MNIST", "Textures"]
        self.near_ood_names, self.far_ood_names = [UNSEEN], ["MNIST", "Textures"]
        count = len(self._sets[UNSEEN])
        self.notes[UNSEEN] = f"{count:,} images, of the 50 classes in superclasses of odd number"
        arrays = read_pack(folder / "cifar100_outliers.webp.zip")
        outliers = ImagePack(arrays["x"], arrays["y"], normalize).relabel(-1)
        of_superclass = arrays["superclass"]
        self.outliers = outliers.subset(np.isin(of_superclass, PROTOTYPE_SUPERCLASSES))
        self.validation_ood = outliers.subset(np.isin(of_superclass, VALIDATION_SUPERCLASSES))
        if settings.test is not None:
            for name in ("ID test", *self.ood_names):
                self._sets[name] = drawn(self._sets[name], settings.test)
            self.outliers, self.validation_ood = (
                drawn(pack, settings.test) for pack in (self.outliers, self.validation_ood)
            )
        if settings.train is not None:
            self._sets["ID training"] = drawn(self.train_set(), settings.train)

    def outlier_set(self) -> ImagePack:
        return self.outliers


def drawn(pack: ImagePack, n: int) -> ImagePack:
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(0))
    return pack.subset(order[:n].sort().values)


class Network:
    """A classifier, its data, and their features."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings, cache_dir: Path):
        self.split = split_model(model, example=data.train_set()[0][0].repeat(2, 1, 1, 1))
        self.data = data
        self.settings = settings
        self.cache_dir = cache_dir
        self.cache = Cache(cache_dir)
        self.rows = RowBuilder(
            self.split,
            data,
            shape=(3, 32, 32),
            normalize=data.train_set().transform,
        )

    @torch.no_grad()
    def features(self, dataset: Any, name: str) -> tuple[Tensor, Tensor]:
        """Of a data set, from the cache that the runner fills if they are there."""

        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            batches = [(self.split.encoder(x), y) for x, y in PackLoader(dataset, 256)]
            z, y = (torch.cat(parts) for parts in zip(*batches))
            return {"features": z, "y": y, "seconds": time.perf_counter() - start}

        model = of_module(self.split.encoder)
        key = {"data": of_dataset(dataset), "device": "cpu", "model": model}
        stored = self.cache.get(f"features {name}", key, compute)
        return stored["features"], stored["y"]

    def prototype(self, layer: str) -> Tensor:
        """OOD prototype by mix-up after a layer, kept in the cache."""

        def compute() -> dict[str, Any]:
            split = split_model(self.split.model, early=layer)
            assert split.early is not None and split.late is not None
            loader = PackLoader(self.data.train_set(), 256)
            return {"z": mixup_prototype(split.early, split.late, split.head, loader)}

        key = {"data": of_dataset(self.data.train_set()), "model": of_module(self.split.model)}
        return self.cache.get(f"prototype {layer}", {**key, "layer": layer}, compute)["z"]

    def noise(self) -> Tensor:
        normalize = self.rows.normalize
        return noise_prototype(
            self.split.encoder, self.split.head, (3, 32, 32), normalize=normalize
        )

    def grood(self, name: str, **settings: Any) -> tuple[str, Detector]:
        return name, registry.build("GROOD", self.split, **settings)


def build(network: Network, images: bool) -> tuple[dict[str, Detector], dict[str, str]]:
    """Detectors with their default settings, and GROOD with each source of its prototype."""
    rows, refused = network.rows.build_all(images=True)
    for name in [name for name in rows if not (images or uses_features(type(rows[name])))]:
        del rows[name]
        refused[name] = "needs images, and was not run with this network"
    for name in [name for name in rows if name.startswith("GROOD (")]:
        del rows[name]
    outliers, _ = network.features(network.data.outliers, "outliers")
    rows |= dict(
        [
            network.rows.build("GROOD (mean)"),
            network.grood("GROOD (noise)", ood_prototype=network.noise()),
            *(
                network.grood(f"GROOD (mix-up {layer})", ood_prototype=network.prototype(layer))
                for layer in LAYERS
            ),
            network.grood("GROOD (outliers)", ood_prototype=outliers.mean(dim=0)),
            network.rows.build("GROOD (auto)"),
        ]
    )
    return rows, refused


def tune(network: Network, images: bool, log: dict[str, Any]) -> dict[str, Detector]:
    """Detectors with the settings that validation data choose among those that they declare."""
    data, split, settings = network.data, network.split, network.settings
    z, y = network.features(data.train_set(), "train")
    id_set = data.id_validation_set()
    ood_set = drawn(data.validation_ood, settings.tuning_ood)
    validation = [network.features(id_set, "validation ID")]
    validation.append(network.features(ood_set, "validation OOD for tuning"))
    tuned = {}
    for name in registry.list_detectors():
        detector_class = registry.load(name)
        try:
            row, detector = network.rows.build(name)
        except ValueError:
            continue
        space = {k: v[: settings.choices] for k, v in usable(detector).items()}
        if not space or not (images or uses_features(detector_class)):
            continue
        start = time.perf_counter()
        if uses_features(detector_class):
            attribute = "model" if isinstance(detector, LogitsDetector) else "encoder"
            original = getattr(detector, attribute)
            setattr(detector, attribute, split.head if attribute == "model" else nn.Identity())
            fit: Any = [(z, y)]
            search = GridSearch(detector, fit, validation, hyperparameter_space=space)
            search.run()
            setattr(detector, attribute, original)
        else:
            fit = PackLoader(drawn(data.train_set(), settings.tuning_fit), 256)
            batches = [b for d in (id_set, ood_set) for b in PackLoader(drawn(d, 1000), 256)]
            with torch.no_grad():
                search = GridSearch(detector, fit, batches, hyperparameter_space=space)
                search.run()
        log[row] = {
            "best": search.best_params_,
            "AUROC": search.best_score_,
            "tried": search.results_,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"  {row}: {search.best_params_} {search.best_score_:.4f}", flush=True)
        tuned[f"{row} (tuned)"] = registry.build(name, split, **search.best_params_)
    return tuned


def usable(detector: Detector) -> dict[str, list]:
    """The declared search space without what exceeds ten classes and 64 features."""
    space = dict(detector.hyperparameter_space)
    if "M" in space:
        space["M"] = [m for m in space["M"] if m <= 10]
    if "d" in space:
        space["d"] = [d for d in space["d"] if d < 64]
    return space


def run_network(
    name: str, folder: Path, settings: Settings, cache_dir: Path, images: bool
) -> dict[str, Any]:
    model, preprocessing = load_classifier(name, str(folder / f"{name}_cifar10.pt"), 10)
    assert isinstance(preprocessing, Preprocessing)
    data = Data(folder, settings, preprocessing.normalize)
    network = Network(model, data, settings, cache_dir)
    print(f"{name}: detectors", flush=True)
    rows, refused = build(network, images)
    print(f"{name}: tuning", flush=True)
    tuning: dict[str, Any] = {}
    tuned = tune(network, images, tuning)
    limits = dict(SLOW)
    if settings.max_images is not None:
        on_images = [r for r, d in {**rows, **tuned}.items() if not uses_features(type(d))]
        limits = dict.fromkeys(on_images, settings.max_images)
    start = time.perf_counter()
    report = evaluation.run(
        data,
        {**rows, **tuned},
        loader_kwargs=ARGUMENTS,
        cache_dir=cache_dir,
        max_images=limits,
    )
    report.bootstrap()
    print(report.to_text(), flush=True)
    report.metadata |= {"left_out": refused, "seconds": round(time.perf_counter() - start, 1)}
    seen = ["GROOD (outliers)", "GROOD (auto)", *tuned]
    content = {
        "images": {**report.metadata["images"], **data_sizes(data, settings)},
        "missing": report.missing,
        "notes": report.notes,
        "accuracy": next(r.accuracy for r in report.results if r.accuracy is not None),
        "forward_seconds": round(report.metadata["forward_seconds"], 1),
        "left_out": refused,
        "tuning": tuning,
        "seen": seen,
        "rows": [row_of(report, result) for result in report.results],
        "best_baseline": {c: report.best_baseline(c) for c in (*report.ood_names, "near", "far")},
    }
    report.plot(cache_dir / f"plots_{name}")
    print(f"{name}: search and ablations", flush=True)
    content["search"] = search_settings(network)
    content["ablations"] = ablate(network)
    content["parts"] = take_apart(network)
    return content


def data_sizes(data: Data, settings: Settings) -> dict[str, int]:
    return {
        "training ID": len(data.train_set()),
        "validation ID": len(data.id_validation_set()),
        "validation OOD": len(data.validation_ood),
        "validation OOD for the search": min(settings.search_ood, len(data.validation_ood)),
        "validation OOD for tuning": min(settings.tuning_ood, len(data.validation_ood)),
        "prototype outliers": len(data.outliers),
    }


def row_of(report: Report, result: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "detector": result.detector,
        "baseline": result.baseline,
        "images": result.images,
        "error": result.error,
        "fit_seconds": result.fit_seconds,
        "score_seconds": result.score_seconds,
        "columns": {},
    }
    for column in [] if result.error else [*report.ood_names, "far"]:
        cell: dict[str, Any] = {}
        for metric in ("AUROC", "FPR95"):
            low, high = report.interval(result.detector, column, metric)
            value, _ = report.value(result.detector, column, metric)
            cell |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
        difference = report.difference(result.detector, column)
        if difference is not None:
            cell["difference"] = [difference.mean, difference.low, difference.high]
        row["columns"][column] = {key: rounded(value) for key, value in cell.items()}
    return row


def rounded(value: Any) -> Any:
    return [rounded(v) for v in value] if isinstance(value, list) else round(float(value), 6)


# The search for a better setting, on validation data alone


def search_settings(network: Network) -> list[dict[str, Any]]:
    """
    GROOD's AUROC on validation data for each length of the features, source of the prototype,
    temperature in units of the spread, and k. ``length`` is "plain", "unit" (divided by their
    norm) or "centered" (the same after the training mean is taken away).
    """
    data, settings = network.data, network.settings
    z_train, y = network.features(data.train_set(), "train")
    z_id, _ = network.features(data.id_validation_set(), "validation ID")
    ood_set = drawn(data.validation_ood, settings.search_ood)
    z_ood, _ = network.features(ood_set, "validation OOD for the search")
    z_out, _ = network.features(data.outliers, "outliers")
    head = network.split.head
    raw = {"noise": network.noise(), **{layer: network.prototype(layer) for layer in LAYERS}}
    with torch.no_grad():
        logits = head(z_train)
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: settings.search_bank]
    bank_rows = chosen[(logits.argmax(dim=1) == y)[chosen]]
    runner_up = logits.topk(2, dim=1).indices[:, 1]
    center = z_train.mean(dim=0)
    lengths: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda z: z,
        "unit": lambda z: F.normalize(z, dim=-1),
        "centered": lambda z: F.normalize(z - center, dim=-1),
    }
    results = []
    for length, transform in lengths.items():
        z = transform(z_train)
        classes = y.unique()
        prototypes = torch.stack([z[y == c].mean(dim=0) for c in classes])
        spread = float((z - prototypes[torch.searchsorted(classes, y)]).norm(dim=1).mean())
        sources = {
            "mean": prototypes.mean(dim=0),
            "pairs": 0.5 * (z[chosen] + z[chosen.roll(1)]).mean(dim=0),
            "outliers": transform(z_out).mean(dim=0),
            **{f"mix-up {layer}": transform(raw[layer]) for layer in LAYERS},
            "noise": transform(raw["noise"]),
        }
        for weight in (0.0, 0.2, 0.5, 0.8):
            mixed = weight * z + (1 - weight) * prototypes[runner_up]
            sources[f"mix-up {weight}"] = mixed.mean(dim=0)
        for (source, o), fraction in product(sources.items(), settings.fractions):

            def gradients(x: Tensor) -> Tensor:
                return grood_gradients(x, prototypes, o, fraction * spread)

            bank = gradients(z[bank_rows])
            for k in settings.neighbors:
                scores = [kth_distance(gradients(transform(x)), bank, k) for x in (z_id, z_ood)]
                setting = {"length": length, "source": source, "fraction": fraction, "k": k}
                results.append({**setting, "AUROC": rounded(auroc(*scores))})
    return results


def auroc(scores_id: Tensor, scores_ood: Tensor) -> float:
    metric = AUROC()
    labels = torch.cat([torch.zeros(len(scores_id)), -torch.ones(len(scores_ood))]).long()
    metric.update(torch.cat([scores_id, scores_ood]), labels)
    return float(metric.compute()["AUROC"])


# Ablations, on test data: they explain, and choose nothing


def ablate(network: Network) -> dict[str, list[dict[str, Any]]]:
    """AUROC of GROOD on the test sets while one setting changes, all others the paper's."""
    n_train = len(network.data.train_set())
    counts = sorted({min(n, n_train) for n in (1, 10, 100, 1000, 10_000)})
    fractions = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    sweeps: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "synthetic samples": [
            (n, {"n_synthetic": n, "seed": seed})
            for n in counts
            for seed in range(network.settings.repetitions)
        ],
        "mix-up layer": [
            *((layer, {"ood_prototype": network.prototype(layer)}) for layer in LAYERS),
            ("penultimate", {"ood_prototype": "mixup"}),
        ],
        "k": [(k, {"k": k}) for k in (1, 3, 10, 30, 100, 300) if k <= n_train // 2],
        "bank fraction": [(f, {"bank_fraction": f, "k": 1}) for f in fractions],
        "temperature": [(t, {"temperature": t}) for t in network.settings.temperatures],
    }
    return {
        name: [{"value": value, **judge(network, settings)} for value, settings in points]
        for name, points in sweeps.items()
    }


def judge(network: Network, settings: dict[str, Any]) -> dict[str, Any]:
    detector = GROOD(None, network.split.head, **settings)
    z, y = network.features(network.data.train_set(), "train")
    detector.fit_features(z, y)
    assert detector.bank_ is not None
    pairs = scored(network, detector.predict_features)
    return {
        **{name: rounded(auroc(*pair)) for name, pair in pairs},
        "megabytes": round(detector.bank_.numel() * 4 / 2**20, 3),
    }


def scored(
    network: Network, score: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Scores of ID and OOD test samples, by OOD set without the classes seen."""
    (id_set,) = network.data.test_sets(known=True, unknown=False)
    scores_id = score(network.features(id_set, "test ID")[0])
    for name, dataset in zip(network.data.ood_names, network.data.test_sets(known=False)):
        if name != "CIFAR100":
            yield name, (scores_id, score(network.features(dataset, f"test {name}")[0]))


def take_apart(network: Network) -> list[dict[str, Any]]:
    """
    AUROC of the two parts of GROOD's gradient: its norm, the probability of the OOD prototype, and
    its direction, by the nearest unit vector of the bank.
    """
    z, y = network.features(network.data.train_set(), "train")
    sources: dict[str, Any] = {"mix-up": "mixup", "mean": "mean", "noise": network.noise()}
    results = []
    for (source, prototype), temperature in product(sources.items(), (1.0, "auto")):
        detector = GROOD(
            None, network.split.head, ood_prototype=prototype, temperature=temperature
        ).fit_features(z, y)
        prototypes, o, t = detector.prototypes_, detector.ood_prototype_, detector.temperature_
        assert prototypes is not None and o is not None and t is not None
        unit_bank = F.normalize(detector.bank_.double(), dim=1).float()

        def norm(x: Tensor) -> Tensor:
            return grood_gradients(x, prototypes, o, t).double().norm(dim=1)

        def direction(x: Tensor) -> Tensor:
            return kth_distance(F.normalize(x - o, dim=1), unit_bank, 1)

        for part, score in (
            ("both", detector.predict_features),
            ("norm", norm),
            ("direction", direction),
        ):
            values = {n: rounded(auroc(*pair)) for n, pair in scored(network, score)}
            setting = {"source": source, "temperature": temperature, "part": part}
            results.append({**setting, "value of T": round(float(t), 4), **values})
    return results


# Tables and figures, all from the json


def chosen(content: dict[str, Any]) -> list[tuple[float, dict[str, Any], list[float]]]:
    """Settings of the search by their mean validation AUROC over the networks, best first."""
    lists = [network["search"] for network in content["networks"].values()]
    rows = []
    for same in zip(*lists):
        values = [result["AUROC"] for result in same]
        setting = {k: v for k, v in same[0].items() if k != "AUROC"}
        rows.append((fmean(values), setting, values))
    return sorted(rows, key=lambda row: -row[0])


def table(network: dict[str, Any]) -> list[list[str]]:
    columns = ["CIFAR100", UNSEEN, "MNIST", "Textures", "far"]
    best = network["best_baseline"]
    header = ["AUROC / FPR95", "CIFAR-100", "unseen classes", "MNIST", "Textures", "far (2)"]
    header += [f"unseen vs {best['near']}", f"far vs {best['far']}", "fit s", "score s"]
    lines = [header]
    whole = [row for row in network["rows"] if not row["error"] and row["images"] is None]

    def top(column: str, metric: str) -> float:
        rows = [
            row for row in whole if column != "CIFAR100" or row["detector"] not in network["seen"]
        ]
        pick = max if metric == "AUROC" else min
        return pick(round(row["columns"][column][metric], 3) for row in rows)

    tops = {(c, m): top(c, m) for c in columns for m in ("AUROC", "FPR95")}
    for row in network["rows"]:
        name = row["detector"]
        seen = name in network["seen"]
        label = name + (" †" if seen else "")
        if row["images"] is not None:
            label += f" [{row['images']:,} images]"
        if row["error"]:
            lines.append([label, *["failed"] * 5, "", "", "", ""])
            continue
        cells = []
        for column in columns:
            texts = []
            for metric in ("AUROC", "FPR95"):
                value = row["columns"][column][metric]
                text = f"{100 * value:.1f}"
                hidden = row not in whole or (seen and column == "CIFAR100")
                if not hidden and round(value, 3) == tops[column, metric]:
                    text = f"**{text}**"
                texts.append(text)
            cell = " / ".join(texts)
            cells.append(f"({cell}) †" if seen and column == "CIFAR100" else cell)
        for column in (UNSEEN, "far"):
            cells.append(signed(row["columns"][column].get("difference")))
        times = [row["fit_seconds"], row["score_seconds"]]
        lines.append([label, *cells, *("" if t is None else f"{t:.1f}" for t in times)])
    return lines


def signed(difference: list[float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in difference)
    sign = "▲" if low > 0 else "▼" if high < 0 else "≈"
    return f"{sign} {mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def search_table(content: dict[str, Any], n: int = 8) -> list[list[str]]:
    rows = chosen(content)
    paper = [
        row
        for row in rows
        if row[1]["length"] == "plain" and row[1]["source"] == "mix-up 0.5" and row[1]["k"] == 1
    ]
    lines = [["features", "OOD prototype", "T / spread", "k", *content["networks"], "mean"]]
    for mean, setting, values in [*rows[:n], *paper]:
        lines.append(
            [
                setting["length"],
                setting["source"],
                f"{setting['fraction']:g}",
                str(setting["k"]),
                *(f"{100 * value:.2f}" for value in values),
                f"{100 * mean:.2f}",
            ]
        )
    return lines


def parts_table(content: dict[str, Any]) -> list[list[str]]:
    lines = [["network", "OOD prototype", "temperature", "part", UNSEEN, "MNIST", "Textures"]]
    for name, network in content["networks"].items():
        for row in network["parts"]:
            temperature = f"{row['temperature']} ({row['value of T']:.2f})"
            values = [f"{100 * row[column]:.1f}" for column in (UNSEEN, "MNIST", "Textures")]
            lines.append([name, row["source"], temperature, row["part"], *values])
    return lines


def tuning_table(content: dict[str, Any]) -> list[list[str]]:
    lines = [["detector", *content["networks"]]]
    logs = [network["tuning"] for network in content["networks"].values()]
    for row in logs[0]:
        cells = []
        for log in logs:
            if row not in log:
                cells.append("not run")
                continue
            best = ", ".join(f"{k} = {v:.4g}" for k, v in log[row]["best"].items())
            cells.append(f"{best} ({100 * log[row]['AUROC']:.1f})")
        lines.append([row, *cells])
    return lines


def write_tables(content: dict[str, Any], folder: Path) -> None:
    for name, network in content["networks"].items():
        write_markdown(folder / f"cifar10_{name}.md", table(network))
    write_markdown(folder / "cifar10_search.md", search_table(content))
    write_markdown(folder / "cifar10_parts.md", parts_table(content))
    write_markdown(folder / "cifar10_tuning.md", tuning_table(content))
    lines = []
    for name, network in content["networks"].items():
        for row in network["rows"]:
            seen = row["detector"] in network["seen"]
            for column, cell in row["columns"].items():
                difference = cell.get("difference", [None] * 3)
                lines.append(
                    {
                        "network": name,
                        "detector": row["detector"],
                        "dataset": column,
                        "classes_seen": seen and column == "CIFAR100",
                        **{key: value for key, value in cell.items() if key != "difference"},
                        "AUROC_difference": difference[0],
                        "AUROC_difference_low": difference[1],
                        "AUROC_difference_high": difference[2],
                        "images": row["images"],
                        "fit_seconds": row["fit_seconds"],
                        "score_seconds": row["score_seconds"],
                    }
                )
    frame = pandas.DataFrame(lines)
    frame.to_csv(folder / "cifar10.csv", index=False, float_format="%.6f", lineterminator="\n")


def write_markdown(path: Path, rows: list[list[str]]) -> None:
    header, *rows = rows
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    path.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), "utf-8")


COLORS = {UNSEEN: "#000000", "MNIST": "#0072B2", "Textures": "#D55E00"}
MARKS = {UNSEEN: "o", "MNIST": "s", "Textures": "D"}
AXES = {
    "synthetic samples": "number of synthetic samples",
    "mix-up layer": "layer at which samples are mixed",
    "k": "neighbor k",
    "bank fraction": "memory of the bank [MiB]",
    "temperature": "temperature",
}


def plot_ablations(content: dict[str, Any], folder: Path) -> None:
    """One figure for each setting: AUROC on the test sets, a panel for each network."""
    folder.mkdir(parents=True, exist_ok=True)
    for setting, label in AXES.items():
        networks = content["networks"]
        figure = Figure(figsize=(4.2 * len(networks), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
        for axis, (name, network) in zip(axes, networks.items()):
            points = network["ablations"][setting]
            key = "megabytes" if setting == "bank fraction" else "value"
            values = list(dict.fromkeys(point[key] for point in points))
            at = list(range(len(values))) if setting == "mix-up layer" else values
            for column, color in COLORS.items():
                groups = [[100 * p[column] for p in points if p[key] == v] for v in values]
                line = "" if setting == "mix-up layer" else "-"
                means = [fmean(group) for group in groups]
                axis.plot(at, means, MARKS[column] + line, color=color, label=column, ms=5)
                ends = [min(g) for g in groups], [max(g) for g in groups]
                axis.fill_between(at, *ends, color=color, alpha=0.2, linewidth=0)
            if setting == "mix-up layer":
                axis.set_xticks(at, values)
            else:
                axis.set_xscale("log")
            axis.set(title=name, xlabel=label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("AUROC [%]")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        path = folder / f"cifar10_{setting.replace(' ', '_').replace('-', '')}.png"
        figure.savefig(path, dpi=90, metadata={"Software": None})


def plot_overview(content: dict[str, Any], path: Path) -> None:
    """AUROC on unseen classes and on the far sets with intervals, rows of the better half."""
    networks = content["networks"]
    figure = Figure(figsize=(9.5, 13), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(networks), 2, squeeze=False)
    for line, (name, network) in zip(axes, networks.items()):
        rows = [r for r in network["rows"] if not r["error"] and r["images"] is None]
        rows.sort(key=lambda row: row["columns"][UNSEEN]["AUROC"])
        rows = rows[-32:]
        for axis, column in zip(line, (UNSEEN, "far")):
            for y, row in enumerate(rows):
                cell = row["columns"][column]
                color, mark = ("#0072B2", "o") if row["baseline"] else ("#D55E00", "D")
                ends = [100 * cell["AUROC_low"], 100 * cell["AUROC_high"]]
                axis.plot(ends, [y, y], color=color, linewidth=1.2)
                axis.plot(100 * cell["AUROC"], y, mark, color=color, ms=4)
            labels = [
                r["detector"] + (" †" if r["detector"] in network["seen"] else "") for r in rows
            ]
            axis.set_yticks(range(len(rows)), labels if column == UNSEEN else [""] * len(rows))
            axis.tick_params(axis="y", labelsize=8)
            axis.set(title=f"{name}: {column}", xlabel="AUROC [%]", ylim=(-1, len(rows)))
            axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def begin(path: Path, settings: Settings) -> dict[str, Any]:
    """What the json has, if it was made with the same settings and packages."""
    content = {**environment(), "settings": json.loads(json.dumps(asdict(settings)))}
    del content["commit"]  # each network has its own
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        for key in ("settings", "versions"):
            if found.get(key) != content[key]:
                raise SystemExit(f"{path} was made with other {key}: remove it to start anew")
        return found
    return {**content, "networks": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description="The CIFAR-10 benchmark of OpenOOD")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--features-cache", type=Path, default=ROOT / "results" / "cache")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    parser.add_argument(
        "--images",
        default=NETWORKS[0],
        metavar="A,B",
        help="networks to run the detectors with that need images (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="few images, for a test")
    parser.add_argument("--draw", action="store_true", help="only tables and figures, from json")
    options = parser.parse_args()
    results, figures = ROOT / "benchmarks" / "results", ROOT / "docs" / "_static"
    if options.quick:
        results = figures = Path(tempfile.mkdtemp(prefix="cifar10_"))
        options.features_cache = results / "cache"
    results, figures = options.output or results, options.figures or figures
    path = results / "cifar10.json"
    logging.basicConfig(level=logging.WARNING)

    if options.draw:
        content = json.loads(path.read_text("utf-8"))
    else:
        if options.data is None:
            parser.error("name the folder with the data by --data or POOD_DATA")
        settings = QUICK if options.quick else Settings()
        content = begin(path, settings)
        for name in options.networks.split(","):
            if name in content["networks"]:
                print(f"{name} is in {path} already")
                continue
            start = time.perf_counter()
            images = name in options.images.split(",")
            result = run_network(name, options.data, settings, options.features_cache, images)
            result["commit"] = environment()["commit"]
            result["seconds"] = round(time.perf_counter() - start, 1)
            content["networks"][name] = result
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
            temporary.replace(path)
    write_tables(content, results)
    plot_ablations(content, figures)
    plot_overview(content, figures / "cifar10_overview.png")
    print(f"results: {results}, figures: {figures}")


if __name__ == "__main__":
    main()
