"""
Fine-tunes a ResNet-20 for CIFAR-10 with and without outliers, and detects OOD data with each of
the networks.

    python benchmarks/greg_cifar10.py --data DIR

The trainings are cross-entropy alone, outlier exposure, energy regularization, GReg and GReg+,
each with the same number of steps. The training outliers are CIFAR-100 images of 50 classes,
near-OOD those of the other 50. Learning rate, margins and the weight of the gradient term are
chosen on validation data.

``benchmarks/results/greg_cifar10.json`` holds all results, the search and the loss curves; tables
and figures are drawn from it. It is written after every run, and runs that it has are skipped.
``--quick`` tries all of this with a few steps and images; its numbers mean nothing.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy
import pandas
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.loss import CrossEntropyLoss, EnergyRegularizedLoss, OutlierExposureLoss
from pytorch_ood.metrics import OODMetrics
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms import Compose, Normalize

from pood_plugins import build, evaluation, split_model
from pood_plugins.dataset import ImagePack, PackLoader, RandomCropFlip
from pood_plugins.evaluation.report import Report, Result, environment
from pood_plugins.loss import GRegLoss
from pood_plugins.model import SplitModel, resnet20
from pood_plugins.training import DivergenceError, EnergyClusterSampler, finetune

ROOT = Path(__file__).resolve().parent.parent
UNTOUCHED = "untouched"
TRAININGS = ("CE", "OE", "Energy", "GReg", "GReg+")
DETECTORS = ("MSP", "Energy", "KNN", "GROOD", "NERO")
NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Settings:
    """All that results depend on, besides data, packages and the number of threads."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    batch_size: int = 32  # ID images of a step, and outliers; GReg+ selects twice as many
    candidates: int = 192  # outliers that GReg+ selects from
    alpha: float = 0.1
    search_seed: int = 100
    search_steps: int = 60
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    margin_quantiles: tuple[float, ...] = (0.5, 0.25, 0.1)
    betas: tuple[float, ...] = (1.0, 10.0, 100.0)
    accuracy_loss: float = 0.02  # that the search tolerates: two standard errors
    validation_outliers: int = 2000
    fit_images: int = 10_000  # ID training images that detectors are fitted on
    test_images: int | None = None  # of each test set


QUICK = Settings(
    seeds=(0, 1),
    steps=20,
    batch_size=8,
    candidates=48,
    search_steps=2,
    learning_rates=(0.001,),
    margin_quantiles=(0.25,),
    betas=(1.0, 10.0),
    validation_outliers=100,
    fit_images=200,
    test_images=100,
)


class UnseenClasses(Benchmark):
    """CIFAR-10 against OOD images of kinds that are not among the training outliers."""

    near_ood_names = ["CIFAR-100 unseen"]
    far_ood_names = ["MNIST", "Textures"]
    ood_names = near_ood_names + far_ood_names

    def __init__(self, train: ImagePack, known: ImagePack, oods: list[ImagePack]):
        self.train = train
        self.known = known
        self.oods = oods

    def train_set(self) -> Dataset:
        return self.train

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset]:
        if known and unknown:
            return [ConcatDataset([self.known, ood]) for ood in self.oods]
        return [self.known] if known else list(self.oods)


class Data:
    """All images, by what they are used for."""

    def __init__(self, folder: Path, settings: Settings):
        def read(*names: str) -> ImagePack:
            return ImagePack.read(*(folder / name for name in names), transform=NORMALIZE)

        index = numpy.load(folder / "openood_index.npz", allow_pickle=False)
        coarse = numpy.load(folder / "cifar100_superclasses.npz", allow_pickle=False)["coarse"]
        self.train = read("cifar10_train_1of2.webp.zip", "cifar10_train_2of2.webp.zip")
        outliers = read("cifar100_outliers.webp.zip").relabel(-1)
        order = shuffled(len(outliers))
        self.outliers = outliers.subset(order[settings.validation_outliers :])
        self.validation_ood = outliers.subset(order[: settings.validation_outliers])
        cifar10 = read("cifar10_test.webp.zip")
        self.validation_id = cifar10.subset(index["cifar10_val"])
        cifar100 = read("cifar100_test.webp.zip").subset(index["cifar100_as_ood_test"])
        tests = [
            cifar10.subset(index["cifar10_test"]),
            cifar100.subset(coarse[cifar100.y] % 2 == 1).relabel(-1),
            read("mnist_test.npz").relabel(-1).resize(32),
            read("dtd10_32.npz").relabel(-1),
        ]
        if settings.test_images is not None:
            tests = [drawn(pack, settings.test_images) for pack in tests]
        fit = drawn(self.train, settings.fit_images)
        self.benchmark = UnseenClasses(fit, tests[0], tests[1:])

    def sizes(self) -> dict[str, int]:
        test_sets = dict(zip(self.benchmark.ood_names, self.benchmark.oods))
        packs = {
            "training ID": self.train,
            "training outliers": self.outliers,
            "validation ID": self.validation_id,
            "validation OOD": self.validation_ood,
            "detectors' fit": self.benchmark.train,
            "test ID": self.benchmark.known,
            **{f"test {name}": pack for name, pack in test_sets.items()},
        }
        return {use: len(pack) for use, pack in packs.items()}


def shuffled(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def drawn(pack: ImagePack, n: int, seed: int = 0) -> ImagePack:
    return pack.subset(shuffled(len(pack), seed)[:n])


class Experiment:
    """Trainings and evaluations, and the json file with what came of them."""

    def __init__(self, path: Path, settings: Settings):
        self.path = path
        self.settings = settings
        start = {"settings": json.loads(json.dumps(asdict(settings))), **environment()}
        self.content: dict[str, Any] = {**start, "search": {}, "chosen": {}, "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            for key in ("settings", "versions"):
                if self.content.get(key) != start[key]:
                    raise SystemExit(
                        f"{path} was made with other {key}. Move it away to start anew, or give "
                        "another --output."
                    )

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Runs to do: the training and its seed."""
        runs = [(UNTOUCHED, 0)]
        runs += [(training, seed) for seed in self.settings.seeds for training in TRAININGS]
        return [run for run in runs if run_name(*run) not in self.content["runs"]]

    def run(self, folder: Path) -> None:
        """
        :param folder: where the data are
        """
        data = Data(folder, self.settings)
        self.content.update(images=data.sizes(), threads=torch.get_num_threads())
        self.search(folder, data)
        for training, seed in self.missing:
            start = time.perf_counter()
            split = load_network(folder)
            history = []
            if training != UNTOUCHED:
                choice = self.content["chosen"][training]
                history = self.train(split, data, training, choice, seed, self.settings.steps)
            trained = time.perf_counter()
            detectors = {name: build(name, split) for name in DETECTORS}
            report = evaluation.run(data.benchmark, detectors, loader_kwargs={"batch_size": 250})
            for result in report.failed:
                raise RuntimeError(f"{result.detector} failed: {result.error}")
            self.content["runs"][run_name(training, seed)] = {
                "training": training,
                "seed": seed,
                "commit": environment()["commit"],
                "training_seconds": round(trained - start, 1),
                "evaluation_seconds": round(time.perf_counter() - trained, 1),
                "curve": block_means(history, blocks=30),
                "results": [
                    {"detector": r.detector, "accuracy": r.accuracy, "metrics": r.metrics}
                    for r in report.results
                ],
            }
            self.save()
            print(
                f"{run_name(training, seed)}: {trained - start:.0f} s of training, "
                f"{len(self.missing)} runs left\n{report.to_text()}",
                flush=True,
            )

    def search(self, folder: Path, data: Data) -> None:
        """Chooses settings by short trainings and validation data."""
        search, chosen = self.content["search"], self.content["chosen"]
        if UNTOUCHED not in search:
            split = load_network(folder)
            search[UNTOUCHED] = [validate(split, data, score) for score in ("MSP", "Energy")]
            self.content["margins"] = margins(split, data, self.settings.margin_quantiles)
            self.save()
        for training in TRAININGS:
            choices = self.choices(training)
            tried = search.setdefault(training, [])
            for choice in choices[len(tried) :]:
                split = load_network(folder)
                seed, steps = self.settings.search_seed, self.settings.search_steps
                score = "MSP" if training in ("CE", "OE") else "Energy"
                try:
                    self.train(split, data, training, choice, seed, steps)
                    tried.append({**choice, **validate(split, data, score)})
                except DivergenceError as error:
                    tried.append({**choice, "score": score, "error": str(error)})
                self.save()
                print(f"search {training}: {tried[-1]}", flush=True)
            chosen[training] = choices[self.best(training)]
        self.save()

    def choices(self, training: str) -> list[dict[str, float]]:
        """What the search tries. GReg builds on the choice for Energy, and GReg+ on GReg's."""
        rates = [{"learning_rate": rate} for rate in self.settings.learning_rates]
        if training == "Energy":
            return [{**rate, **pair} for pair in self.content["margins"] for rate in rates]
        if training == "GReg":
            return [{**self.content["chosen"]["Energy"], "beta": b} for b in self.settings.betas]
        if training == "GReg+":
            return [self.content["chosen"]["GReg"]]
        return rates

    def best(self, training: str) -> int:
        """The highest AUROC without much loss of accuracy, or else the highest accuracy."""
        tried = self.content["search"][training]
        least = self.content["search"][UNTOUCHED][0]["accuracy"] - self.settings.accuracy_loss

        def key(i: int) -> tuple[bool, float]:
            accuracy = tried[i].get("accuracy", -1.0)
            good = accuracy >= least
            return good, tried[i]["AUROC"] if good else accuracy

        return max(range(len(tried)), key=key)

    def train(
        self,
        split: SplitModel,
        data: Data,
        training: str,
        choice: dict[str, float],
        seed: int,
        steps: int,
    ) -> list[dict[str, float]]:
        """
        With one seed, all trainings see the same ID images, and those without a sampler the same
        outliers.
        """
        size = self.settings.batch_size
        optimizer = SGD(
            split.parameters(),
            lr=choice["learning_rate"],
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=True,
        )
        sampler = EnergyClusterSampler(n_clusters=size, seed=seed)
        return finetune(
            split,
            train_loader(drawn(data.train, steps * size, seed), size, 2 * seed),
            None if training == "CE" else train_loader(data.outliers, size, 2 * seed + 1),
            self.criterion(training, choice),
            epochs=1,
            optimizer=optimizer,
            sampler=sampler if training == "GReg+" else None,
            candidates_per_step=self.settings.candidates,
        )

    def criterion(self, training: str, choice: dict[str, float]) -> nn.Module:
        alpha = self.settings.alpha
        arguments = {name: value for name, value in choice.items() if name != "learning_rate"}
        if training == "CE":
            return CrossEntropyLoss()
        if training == "OE":
            return OutlierExposureLoss()
        if training == "Energy":
            return EnergyRegularizedLoss(alpha, **arguments)
        return GRegLoss(alpha, **arguments)


def run_name(training: str, seed: int) -> str:
    return f"{training} {seed}"


def load_network(folder: Path) -> SplitModel:
    model = resnet20()
    model.load_state_dict(torch.load(folder / "resnet20_cifar10.pt", weights_only=True))
    return split_model(model.eval())


def train_loader(pack: ImagePack, batch_size: int, seed: int) -> PackLoader:
    generator = torch.Generator().manual_seed(seed)
    augment = Compose([RandomCropFlip(generator), NORMALIZE])
    return PackLoader(pack, batch_size, shuffle=True, generator=generator, transform=augment)


@torch.no_grad()
def logits_of(split: SplitModel, pack: ImagePack) -> Tensor:
    split.eval()
    return torch.cat([split(x) for x, _ in PackLoader(pack, 250)])


def validate(split: SplitModel, data: Data, score: str) -> dict[str, Any]:
    known, ood = logits_of(split, data.validation_id), logits_of(split, data.validation_ood)
    y = torch.from_numpy(data.validation_id.y)
    logits = torch.cat([known, ood])
    metrics = OODMetrics()
    metrics.update(
        -logits.softmax(1).amax(1) if score == "MSP" else -logits.logsumexp(1),
        torch.cat([y, torch.full((len(ood),), -1)]),
    )
    accuracy = (known.argmax(dim=1) == y).double().mean()
    return {
        "score": score,
        "AUROC": float(metrics.compute()["AUROC"]),
        "accuracy": float(accuracy),
    }


def margins(split: SplitModel, data: Data, quantiles: tuple[float, ...]) -> list[dict[str, float]]:
    """
    Pairs of margins that, with the network as it is, this share of ID images and of outliers
    keeps.
    """
    known, ood = (
        -logits_of(split, pack).logsumexp(dim=1)
        for pack in (data.validation_id, data.validation_ood)
    )
    return [
        {
            "margin_in": round(float(known.quantile(q)), 1),
            "margin_out": round(float(ood.quantile(1 - q)), 1),
        }
        for q in quantiles
    ]


def block_means(history: list[dict[str, float]], blocks: int) -> list[dict[str, float]]:
    """Means over this many parts of a training, for curves without noise."""
    size = -(-len(history) // blocks)
    parts = [history[i : i + size] for i in range(0, len(history), size or 1)]
    return [{key: round(fmean(s[key] for s in part), 5) for key in part[0]} for part in parts]


def reports_of(content: dict[str, Any]) -> dict[str, list[Report]]:
    """By training, one report for each seed that is finished."""
    reports: dict[str, list[Report]] = {}
    for training in (UNTOUCHED, *TRAININGS):
        for run in content["runs"].values():
            if run["training"] == training:
                report = Report(
                    [Result(class_name="", **result) for result in run["results"]],
                    UnseenClasses.ood_names,
                    UnseenClasses.near_ood_names,
                    UnseenClasses.far_ood_names,
                )
                reports.setdefault(training, []).append(report)
    return reports


def combined(content: dict[str, Any]) -> dict[str, Report]:
    """By training, the mean over the seeds."""
    return {
        training: Report.combine(reports) if len(reports) > 1 else reports[0]
        for training, reports in reports_of(content).items()
    }


def percent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def table(content: dict[str, Any]) -> list[list[str]]:
    """AUROC / FPR95 in percent, the best of each column in bold."""
    reports = combined(content)
    rows = [(training, detector) for training in reports for detector in DETECTORS]
    cells: dict[tuple[str, str], list[str]] = {row: list(row) for row in rows}
    columns = [*UnseenClasses.ood_names, "far"]
    for column in columns:
        texts: dict[tuple[str, str], list[str]] = {row: [] for row in rows}
        for metric, better in (("AUROC", max), ("FPR95", min)):
            values = {row: reports[row[0]].value(row[1], column, metric) for row in rows}
            best = better(round(mean, 3) for mean, _ in values.values())
            for row, (mean, std) in values.items():
                bold = "**" if round(mean, 3) == best else ""
                texts[row].append(f"{bold}{percent(mean, std)}{bold}")
        for row in rows:
            cells[row].append(" / ".join(texts[row]))
    for training, parts in reports_of(content).items():
        accuracies = [part.results[0].accuracy for part in parts]
        std = stdev(accuracies) if len(accuracies) > 1 else None
        for detector in DETECTORS:
            cells[training, detector].append(percent(fmean(accuracies), std))
    return [["Training", "Detector", *columns, "ID accuracy"], *cells.values()]


def search_table(experiment: Experiment) -> list[list[str]]:
    names = ("learning_rate", "margin_in", "margin_out", "beta")
    rows = [
        [
            "Training",
            *("learning rate", "ID margin", "OOD margin", "β"),
            *("score", "AUROC", "ID accuracy", "chosen"),
        ]
    ]
    for training, tried in experiment.content["search"].items():
        for i, result in enumerate(tried):
            chosen = training != UNTOUCHED and i == experiment.best(training)
            rows.append(
                [
                    training,
                    *(f"{result[name]:g}" if name in result else "–" for name in names),
                    result["score"],
                    *(
                        percent(result[name], None) if name in result else "diverged"
                        for name in ("AUROC", "accuracy")
                    ),
                    "yes" if chosen else "–",
                ]
            )
    return rows


def write_markdown(path: Path, rows: list[list[str]]) -> None:
    header, *rows = rows
    lines = [header, ["---"] * len(header), *rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def write_tables(experiment: Experiment) -> None:
    stem = experiment.path.with_suffix("")
    reports = combined(experiment.content)
    frame = pandas.concat({training: report.frame for training, report in reports.items()})
    frame = frame.droplevel(1).drop(columns=["fit_seconds", "score_seconds", "error"])
    frame.to_csv(f"{stem}.csv", index_label="training", float_format="%.6f")
    write_markdown(Path(f"{stem}.md"), table(experiment.content))
    write_markdown(Path(f"{stem}_search.md"), search_table(experiment))


def plot_curves(content: dict[str, Any], path: Path) -> None:
    """Weighted terms of each loss over the steps: mean over the seeds, and their range."""
    figure = new_figure(13, 3.4)
    axes = figure.subplots(1, len(TRAININGS), sharex=True, sharey=True)
    styles = {
        "loss": ("loss", "#000000", "-"),
        "cross_entropy": ("cross-entropy", "#0072B2", "--"),
        "energy": ("α · energy term", "#D55E00", ":"),
        "gradient": ("β · gradient term", "#009E73", "-."),
    }
    for axis, training in zip(axes, TRAININGS):
        curves = [r["curve"] for r in content["runs"].values() if r["training"] == training]
        weights = {
            "energy": content["settings"]["alpha"],
            "gradient": content["chosen"][training].get("beta"),
        }
        for term, (label, color, line) in styles.items():
            if not curves or term not in curves[0][0]:
                continue
            steps = [point["step"] for point in curves[0]]
            weight = weights.get(term, 1)
            values = [[weight * point[term] for point in points] for points in zip(*curves)]
            means = [fmean(v) for v in values]
            axis.plot(steps, means, line, color=color, label=label, linewidth=1.4)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title=training, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def plot_detection(content: dict[str, Any], path: Path) -> None:
    """AUROC and FPR95 on near- and far-OOD: a mark for each seed, a line for their mean."""
    runs = reports_of(content)
    figure = new_figure(11, 6)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    colors = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
    columns = {"near: CIFAR-100 unseen": UnseenClasses.near_ood_names[0], "far": "far"}
    for row, metric in zip(axes, ("AUROC", "FPR95")):
        for axis, (title, column) in zip(row, columns.items()):
            for i, (detector, color, marker) in enumerate(zip(DETECTORS, colors, "osD^v")):
                for x, reports in enumerate(runs.values()):
                    values = [
                        100 * report.value(detector, column, metric)[0] for report in reports
                    ]
                    at = x + 0.14 * (i - 2)
                    axis.plot([at] * len(values), values, marker, color=color, alpha=0.6, ms=4)
                    axis.hlines(fmean(values), at - 0.06, at + 0.06, color=color)
                axis.plot([], [], marker, color=color, label=detector)
            axis.set_xticks(range(len(runs)), list(runs))
            axis.set_title(title if metric == "AUROC" else "")
            axis.grid(axis="y", alpha=0.3)
        row[0].set_ylabel(f"{metric} [%]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning with outliers on CIFAR-10")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="few steps and images, for a test")
    arguments = parser.parse_args()
    results, figures = ROOT / "benchmarks" / "results", ROOT / "docs" / "_static"
    if arguments.quick:
        results = figures = Path(tempfile.mkdtemp(prefix="greg_cifar10_"))
    results, figures = arguments.output or results, arguments.figures or figures

    experiment = Experiment(
        results / "greg_cifar10.json", QUICK if arguments.quick else Settings()
    )
    if experiment.missing:
        if arguments.data is None:
            parser.error("name the folder with the data by --data or POOD_DATA")
        experiment.run(arguments.data)
    write_tables(experiment)
    plot_curves(experiment.content, figures / "greg_cifar10_curves.png")
    plot_detection(experiment.content, figures / "greg_cifar10_detection.png")
    print(f"results: {results}, figures: {figures}")


if __name__ == "__main__":
    main()
