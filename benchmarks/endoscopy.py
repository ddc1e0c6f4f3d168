"""
Fine-tunes ResNet-18 and DeiT-S on endoscopy images as NERO's paper does, evaluates detectors on
them, and sets the paper's figures beside ours.

    python benchmarks/endoscopy.py --data DIR --device cuda
    python benchmarks/endoscopy.py --data DIR --datasets KvasirV2 --networks resnet18 \\
        --init resnet18=resnet18-f37072fd.pth

``DIR`` holds ``kvasir-dataset-v2`` and ``Gastrovision`` as published, see
``pood_plugins.dataset.endoscopy``, which also says what of the protocol is inferred. The networks
begin with ImageNet weights, torchvision's ``IMAGENET1K_V1`` and timm's
``deit_small_patch16_224.fb_in1k``, which are downloaded unless ``--init`` names their files.

Training is that of the released code: Adam with a learning rate of 1e-4, batches of 32, cross-
entropy, 20 epochs (what the released script for Kvasir-v2 sets; for GastroVision it is not known),
images of 224 × 224 pixels, flipped, with changed colors, inverted and equalized at random. Every
five epochs, accuracy is taken on validation images, and the best weights are kept. The released
code takes it on the ID test images.

State is kept after every epoch in the work folder, and training goes on from there. The best
weights are written there as ``NETWORK.pt``, for ``pood benchmark --weights``, and the lists of
images as ``split.csv``. Results go to ``benchmarks/results/endoscopy_*``. On a CPU this takes
days; ``--quick`` tries it with few small images, one epoch and random weights, and its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_ood.benchmark import Benchmark
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms
from tqdm import tqdm

from pood_plugins import evaluation, registry, split_model
from pood_plugins.benchmark import GastroVisionBenchmark, KvasirV2Benchmark
from pood_plugins.benchmark.endoscopy import PREPROCESSING
from pood_plugins.dataset import GastroVision, KvasirV2
from pood_plugins.dataset.endoscopy import ELEVENTH
from pood_plugins.evaluation import Report
from pood_plugins.evaluation.rows import SLOW, RowBuilder
from pood_plugins.model.preprocessing import Preprocessing
from pood_plugins.model.zoo import load_classifier
from pood_plugins.training.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent

DATASETS: dict[str, tuple[type[Any], type[Any]]] = {
    "KvasirV2": (KvasirV2, KvasirV2Benchmark),
    "GastroVision": (GastroVision, GastroVisionBenchmark),
}

#: row of the paper's table -> row of ours
ROWS: dict[str, str | None] = {
    "MSP": "MSP",
    "ODIN": "ODIN",
    "Energy": "Energy",
    "Entropy": "Entropy",
    "MaxLogit": "MLS",
    "Mahalanobis": "Mahalanobis",
    "ViM": "ViM",
    "NECO": None,
    "Energy+ReAct": "ReAct",
    "GradNorm": "GradNorm",
    "NERO": "NERO",
}
#: rows of the paper's table that need images or gradients
NEED_IMAGES = ("ODIN", "ReAct", "GradNorm")

#: AUROC and FPR95 in percent, from the README of the paper's released code
PUBLISHED: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "resnet18": {
        "KvasirV2": {
            "MSP": (90.30, 41.72),
            "ODIN": (91.77, 35.44),
            "Energy": (88.85, 52.36),
            "Entropy": (90.38, 41.86),
            "MaxLogit": (88.90, 52.38),
            "Mahalanobis": (84.05, 54.06),
            "ViM": (90.62, 41.10),
            "NECO": (89.64, 47.90),
            "Energy+ReAct": (86.57, 53.78),
            "GradNorm": (85.33, 54.68),
            "NERO": (90.76, 28.84),
        },
        "GastroVision": {
            "MSP": (66.93, 90.56),
            "ODIN": (69.79, 79.27),
            "Energy": (70.31, 79.79),
            "Entropy": (67.37, 87.32),
            "MaxLogit": (70.08, 80.44),
            "Mahalanobis": (65.93, 89.69),
            "ViM": (72.70, 76.98),
            "NECO": (79.81, 71.61),
            "Energy+ReAct": (61.93, 83.86),
            "GradNorm": (62.55, 90.50),
            "NERO": (75.95, 74.33),
        },
    },
    "deit_small": {
        "KvasirV2": {
            "MSP": (87.05, 40.18),
            "ODIN": (88.41, 36.40),
            "Energy": (85.77, 44.02),
            "Entropy": (87.20, 39.94),
            "MaxLogit": (85.77, 44.02),
            "Mahalanobis": (94.50, 21.86),
            "ViM": (93.88, 24.38),
            "NECO": (88.31, 37.60),
            "Energy+ReAct": (83.49, 46.84),
            "GradNorm": (71.33, 57.80),
            "NERO": (92.73, 18.96),
        },
        "GastroVision": {
            "MSP": (70.00, 90.74),
            "ODIN": (73.37, 83.68),
            "Energy": (75.35, 83.68),
            "Entropy": (70.34, 90.19),
            "MaxLogit": (75.11, 84.20),
            "Mahalanobis": (75.68, 81.43),
            "ViM": (76.69, 78.37),
            "NECO": (76.95, 81.92),
            "Energy+ReAct": (73.42, 83.22),
            "GradNorm": (54.85, 88.68),
            "NERO": (82.03, 76.74),
        },
    },
}
REMARK = (
    "AUROC / FPR95 in percent. In this table, FPR95 is the paper's: the share of OOD images that "
    "pass when about 95 % of the ID images do. The paper's figures are of one training run, with "
    "another split of the ID images; which classes are ID is inferred. There is no NECO here, "
    "GradNorm is the whole network's and not the last layer's, and the paper's ReAct clips at a "
    "fixed value."
)
UPSTREAM_REMARK = (
    "AUROC / FPR95 in percent. Here, OOD is the positive class: FPR95 is the share of ID images "
    "that are flagged when 95 % of the OOD images are found, which is not the paper's."
)


@dataclass(frozen=True)
class Settings:
    """All that results depend on, besides data, first weights, packages and device."""

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-4
    validate_every: int = 5
    seed: int = 42
    size: int = 224
    images: int | None = None  # of each part; None is all
    verify: bool = True
    eleventh: str = ELEVENTH[0]  # ID class of GastroVision
    split_seed: int = 0

    def of_dataset(self, name: str) -> dict[str, Any]:
        """Arguments for a data set or benchmark."""
        own = {"eleventh": self.eleventh} if name == "GastroVision" else {}
        return {"seed": self.split_seed, "verify": self.verify, **own}


QUICK = Settings(epochs=1, batch_size=8, size=32, images=24, verify=False)


class Network(NamedTuple):
    """How a network is made, with the head of ImageNet's classes or another."""

    arch: str
    pretrained: str  # weights to download
    replace_head: Callable[[nn.Module, int], None]


def _replace_fc(model: nn.Module, num_classes: int) -> None:
    fc: Any = model.fc
    model.fc = nn.Linear(fc.in_features, num_classes)


def _reset_classifier(model: Any, num_classes: int) -> None:
    model.reset_classifier(num_classes)


NETWORKS = {
    "resnet18": Network("torchvision:resnet18", "IMAGENET1K_V1", _replace_fc),
    "deit_small": Network("timm:deit_small_patch16_224.fb_in1k", "pretrained", _reset_classifier),
}


def tiny(num_classes: int) -> nn.Module:
    """A network to try the script with."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def make_network(
    name: str, num_classes: int, settings: Settings, init: Path | None, random: bool
) -> nn.Module:
    """
    :param name: one of ``NETWORKS``, or ``tiny``
    :param num_classes: number of ID classes
    :param settings: give the seed of what is random, and the size of the images
    :param init: state dict of ImageNet weights; default is to download it
    :param random: begin with random weights instead
    :return: network to be fine-tuned
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if name == "tiny":
            return tiny(num_classes)
        network = NETWORKS[name]
        model: nn.Module
        if init is not None:
            model, _ = load_classifier(network.arch, str(init), 1000)
        elif random and name == "deit_small":
            import timm

            arch = network.arch.removeprefix("timm:")
            model = timm.create_model(arch, num_classes=num_classes, img_size=settings.size)
        elif random:
            from torchvision.models import resnet18

            model = resnet18()
        else:
            try:
                model, _ = load_classifier(network.arch, network.pretrained)
            except Exception as error:  # what a missing network raises depends on the package
                raise SystemExit(
                    f"the ImageNet weights of {name} can't be downloaded ({error}): give their "
                    f"file by --init {name}=FILE"
                ) from error
        network.replace_head(model, num_classes)
        return model


def augmentation(preprocessing: Preprocessing) -> transforms.Compose:
    """What the released code does to training images."""
    return transforms.Compose(
        [
            transforms.Resize((preprocessing.size, preprocessing.size)),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
            transforms.RandomVerticalFlip(0.5),
            transforms.RandomInvert(0.3),
            transforms.RandomEqualize(0.3),
            transforms.ToTensor(),
            preprocessing.normalize,
        ]
    )


def some(dataset: Dataset, n: int | None) -> Dataset:
    """A part of a data set, of all its classes."""
    size = len(dataset)  # type: ignore[arg-type]
    if n is None or n >= size:
        return dataset
    return Subset(dataset, torch.linspace(0, size - 1, n).long().tolist())


class Part(Benchmark):
    """A benchmark on at most so many images of each set."""

    def __init__(self, whole: Any, n: int | None):
        self.whole = whole
        self.n = n
        self.num_classes = whole.num_classes
        self.ood_names = whole.ood_names
        self.near_ood_names = whole.near_ood_names
        self.far_ood_names = whole.far_ood_names
        self._known = some(whole.test_sets(unknown=False)[0], n)
        self._oods = [some(ood, n) for ood in whole.test_sets(known=False)]

    def train_set(self) -> Dataset:
        return some(self.whole.train_set(), self.n)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset]:
        if known and unknown:
            return [ConcatDataset([self._known, ood]) for ood in self._oods]
        return [self._known] if known else list(self._oods)


def accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Share of images that are classified correctly, in evaluation mode."""
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for x, y in loader:
            correct += int((model(x.to(device)).argmax(dim=1).cpu() == y).sum())
            total += len(y)
    return correct / total


def train(
    model: nn.Module,
    train_set: Dataset,
    validation_set: Dataset,
    settings: Settings,
    device: torch.device,
    checkpoint: Path,
    workers: int = 0,
) -> list[dict[str, float]]:
    """
    Fine-tunes a network in place, from its checkpoint on if there is one, and leaves it with the
    best weights, in evaluation mode.

    :param model: network to begin with
    :param train_set: ID training images, augmented
    :param validation_set: ID images to choose the weights by
    :param settings: how to train
    :param device: where to train
    :param checkpoint: file for the state after every epoch
    :param workers: processes that read images
    :return: for each epoch its loss and, if it was taken, the validation accuracy
    """
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_accuracy = -1.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["settings"] != asdict(settings):
            raise SystemExit(f"{checkpoint} has other settings: remove it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best, best_accuracy = state["history"], state["best"], state["best_accuracy"]

    validation = DataLoader(
        validation_set, settings.batch_size, num_workers=workers, generator=torch.Generator()
    )
    for epoch in range(len(history) + 1, settings.epochs + 1):
        # seeded by the epoch, so that one that is begun anew after an interruption is the same
        seed = 1000 * settings.seed + epoch
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            loader = DataLoader(
                train_set,
                settings.batch_size,
                shuffle=True,
                num_workers=workers,
                generator=torch.Generator().manual_seed(seed),
            )
            model.train()
            total, n = torch.zeros((), device=device), 0
            for x, y in tqdm(loader, f"epoch {epoch}", disable=None):
                loss = F.cross_entropy(model(x.to(device)), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(y)
                n += len(y)
        line: dict[str, float] = {"epoch": epoch, "loss": float(total) / n}
        if epoch % settings.validate_every == 0 or epoch == settings.epochs:
            line["accuracy"] = accuracy(model, validation, device)
            if line["accuracy"] > best_accuracy:
                best, best_accuracy = deepcopy(dict(model.state_dict())), line["accuracy"]
        history.append(line)
        print(", ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
        save_checkpoint(
            checkpoint,
            {
                "settings": asdict(settings),
                "history": history,
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "best": best,
                "best_accuracy": best_accuracy,
            },
        )
    model.load_state_dict(best)
    model.eval()
    return history


def evaluate(
    model: nn.Module,
    benchmark: Benchmark,
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int = 0,
) -> Report:
    """All detectors of logits and features, and those of the paper's table that need images."""
    shape = (3, preprocessing.size, preprocessing.size)
    split = split_model(model, example=torch.zeros(2, *shape, device=device))
    rows = RowBuilder(split, benchmark, shape=shape, normalize=preprocessing.normalize)
    built, left_out = rows.build_all(images=False)
    for name in NEED_IMAGES:
        try:
            built |= [rows.build(name)]
        except ValueError as error:
            left_out[name] = str(error)
    # the released code's number for both networks; the default is a fraction of the width
    built["NERO"] = registry.build("NERO", split, n_neurons=min(175, split.head.in_features))
    report = evaluation.run(
        benchmark,
        built,
        device=device,
        loader_kwargs={"batch_size": 64, "num_workers": workers},
        max_images=SLOW,
    )
    report.metadata["left_out"] = left_out
    for row, reason in left_out.items():
        print(f"{row} is left out: {reason}")
    for result in report.failed:
        print(f"{result.detector} failed: {result.error}")
    return report


def passing(known: Tensor, unknown: Tensor) -> float:
    """
    The paper's FPR95.

    :param known: scores of ID images
    :param unknown: scores of OOD images
    :return: share of OOD images whose score is not above that of the ID image at 95 %
    """
    threshold = known.sort().values[int(0.95 * len(known))]
    return float((unknown <= threshold).double().mean())


def figures(report: Report) -> dict[str, dict[str, float]]:
    """AUROC and the paper's FPR95 in percent, by row of the paper's table."""
    results = {result.detector: result for result in report.results if not result.error}
    (name,) = report.ood_names
    return {
        theirs: {
            "AUROC": 100 * results[ours].metrics[name]["AUROC"],
            "FPR95": 100 * passing(*results[ours].scores[name]),
        }
        for theirs, ours in ROWS.items()
        if ours in results
    }


def comparison(network: str, measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """
    :param network: name of a network
    :param measured: by data set what :func:`figures` returns
    :return: Markdown table, the paper's figures beside ours
    """
    published = PUBLISHED.get(network, {})
    lines = [["Method", *(f"{d}, {who}" for d in measured for who in ("paper", "ours"))]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in ROWS:
        cells = [row]
        for dataset, ours in measured.items():
            theirs = published.get(dataset, {}).get(row)
            cells.append("—" if theirs is None else f"{theirs[0]:.2f} / {theirs[1]:.2f}")
            mine = ours.get(row)
            cells.append("—" if mine is None else f"{mine['AUROC']:.2f} / {mine['FPR95']:.2f}")
        lines.append(cells)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def given_files(texts: Sequence[str], networks: Sequence[str]) -> dict[str, Path]:
    """
    :param texts: ``NETWORK=FILE``, or ``FILE`` if there is only one network
    :param networks: names of the networks
    :return: files by the names of networks
    """
    files = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals and len(networks) == 1:
            name, file = networks[0], text
        if name not in networks or not Path(file).is_file():
            raise SystemExit(
                f"--init {text} must be NETWORK=FILE, with one of {', '.join(networks)} and an "
                "existing file"
            )
        files[name] = Path(file)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="NERO's benchmarks of endoscopy images")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument(
        "--networks", nargs="+", choices=[*NETWORKS, "tiny"], default=list(NETWORKS)
    )
    parser.add_argument(
        "--init", nargs="+", default=[], metavar="[NETWORK=]FILE", help="ImageNet weights"
    )
    parser.add_argument(
        "--eleventh", choices=ELEVENTH, default=ELEVENTH[0], help="ID class of GastroVision"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="that read images")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "endoscopy")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="few small images, random weights")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("name the folder with the images by --data or POOD_DATA")
    settings = replace(QUICK if options.quick else Settings(), eleventh=options.eleventh)
    if options.quick:
        # nothing of a trial may be taken for a result, or be gone on from
        scratch = Path(tempfile.mkdtemp(prefix="endoscopy_"))
        for name in ("work", "output"):
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, scratch)
    files = given_files(options.init, options.networks)
    device = torch.device(options.device)
    numbers = asdict(PREPROCESSING) | {"size": settings.size, "resize": (settings.size,) * 2}
    preprocessing = Preprocessing(**numbers)

    # all folders are looked at before hours are spent on the first
    benchmarks: dict[str, Any] = {}
    for dataset in options.datasets:
        try:
            benchmarks[dataset] = DATASETS[dataset][1](
                options.data, preprocessing.transform, **settings.of_dataset(dataset)
            )
        except ValueError as error:
            raise SystemExit(f"{error} Other data sets go on alone by --datasets.") from error

    # and all weights
    for network in options.networks:
        make_network(network, 2, settings, files.get(network), options.quick)

    for network in options.networks:
        measured = {}
        for dataset, whole in benchmarks.items():
            print(f"{network} on {dataset}", flush=True)
            start = time.perf_counter()
            model = make_network(
                network, whole.num_classes, settings, files.get(network), options.quick
            )
            train_set = DATASETS[dataset][0](
                options.data,
                "train",
                augmentation(preprocessing),
                **settings.of_dataset(dataset),
            )
            work = options.work / dataset
            whole.write_lists(work / "split.csv")
            history = train(
                model,
                some(train_set, settings.images),
                some(whole.id_validation_set(), settings.images),
                settings,
                device,
                work / f"{network}.zip",
                options.workers,
            )
            torch.save(model.state_dict(), work / f"{network}.pt")
            seconds = round(time.perf_counter() - start, 1)
            benchmark = Part(whole, settings.images)
            report = evaluate(model, benchmark, preprocessing, device, options.workers)
            measured[dataset] = figures(report)
            report.metadata.update(
                benchmark=dataset,
                network=network,
                first_weights=(
                    "random"
                    if network == "tiny" or (options.quick and network not in files)
                    else files[network].name
                    if network in files
                    else NETWORKS[network].pretrained
                ),
                settings=asdict(settings),
                device=(
                    torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
                ),
                training_seconds=seconds,
                history=history,
                comparison=measured[dataset],
                published=PUBLISHED.get(network, {}).get(dataset),
            )
            options.output.mkdir(parents=True, exist_ok=True)
            stem = f"endoscopy_{dataset.lower()}_{network}"
            report.to_json(options.output / f"{stem}.json")
            text = f"{report.to_markdown()}\n{UPSTREAM_REMARK}\n"
            (options.output / f"{stem}.md").write_text(text, "utf-8")
            print(report.to_text(), flush=True)
        table = comparison(network, measured) + f"\n{REMARK}\n"
        (options.output / f"endoscopy_{network}.md").write_text(table, "utf-8")
        print(table, flush=True)
    print(f"results: {options.output}/endoscopy_*")


if __name__ == "__main__":
    main()
