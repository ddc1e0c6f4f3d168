"""
Trains OpenOOD's ResNet-18 for CIFAR-10 and evaluates detectors of logits and features on it, to be
set beside the figures that were published for this network.

    python benchmarks/cifar10_resnet18.py --data DIR --device cuda --seeds 0 1 2

The network is a ResNet-18 with a first convolution of 3 × 3 and no pooling behind it, trained
as OpenOOD's: 100 epochs of SGD with momentum 0.9, weight decay 5e-4, a learning rate from 0.1 to 0
by a half cosine, batches of 128, random crops and flips; on a GPU in bfloat16, with all images on
the device. Preprocessing, training images and the test sets that there are differ from OpenOOD's
only as the table's remarks say.

State is kept after every epoch in the work folder, and training goes on from there. Results go to
``benchmarks/results/cifar10_resnet18.{csv,json,md}``. On a CPU this takes days; ``--quick`` tries
it with few images and one epoch, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import Normalize
from tqdm import tqdm

from pood_plugins import evaluation, split_model
from pood_plugins.benchmark import PackedCIFAR10
from pood_plugins.dataset import ImagePack, RandomCropFlip
from pood_plugins.evaluation import Report
from pood_plugins.evaluation.rows import RowBuilder
from pood_plugins.training.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
#: mean and standard deviation of CIFAR-10's training images, as OpenOOD normalizes them
NORMALIZE = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
LAYERS = ("layer1", "layer2", "layer3")
PUBLISHED = (
    "Published for this network, on all of OpenOOD's sets (near: CIFAR-100 and TinyImageNet): "
    "near-OOD AUROC of GROOD 91.16, KNN 90.64 ± 0.20, MSP 88.03 ± 0.25, Energy 87.58 ± 0.46."
)


@dataclass(frozen=True)
class Settings:
    """All that results depend on, besides seed, data, packages and device."""

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    train: int | None = None  # images; None is all
    test: int | None = None


QUICK = Settings(epochs=1, batch_size=32, train=128, test=24)


def make_network(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 × 32 pixels."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def train(
    pack: ImagePack, seed: int, settings: Settings, device: torch.device, checkpoint: Path
) -> nn.Module:
    """
    Trains a network, from its checkpoint on if there is one.

    :param pack: ID training images; its transform is not used
    :param seed: seed of weights, batches, crops and flips
    :param settings: how to train
    :param device: where to train
    :param checkpoint: file for the state after every epoch
    :return: network in evaluation mode
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_network().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    steps = -(-len(pack) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    augment = RandomCropFlip(generator)
    done = 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["settings"] != asdict(settings):
            raise SystemExit(f"{checkpoint} has other settings: remove it to start anew")
        done = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])

    images = torch.from_numpy(pack.x).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(pack.y).to(device)
    model.train()
    for epoch in range(done, settings.epochs):
        total = torch.zeros((), device=device)
        order = torch.randperm(len(pack), generator=generator)
        for rows in tqdm(order.split(settings.batch_size), f"epoch {epoch + 1}", disable=None):
            x = NORMALIZE(augment(images[rows.to(device)].float().div_(255)))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[rows.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        print(f"seed {seed}, epoch {epoch + 1}: loss {float(total) / len(pack):.4f}", flush=True)
        save_checkpoint(
            checkpoint,
            {
                "settings": asdict(settings),
                "epoch": epoch + 1,
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
            },
        )
    return model.eval()


def evaluate(model: nn.Module, data: PackedCIFAR10, device: torch.device) -> Report:
    """Detectors of logits and features, and GROOD with every source of its OOD prototype."""
    split = split_model(model, example=torch.zeros(2, 3, 32, 32, device=device))
    rows = RowBuilder(split, data, shape=(3, 32, 32), normalize=NORMALIZE)
    built, _ = rows.build_all(images=False)
    built |= dict(rows.build(f"GROOD (mix-up {layer})") for layer in LAYERS)
    return evaluation.run(data, built, device=device)


def drawn(pack: ImagePack, n: int | None) -> ImagePack:
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(0))
    return pack if n is None else pack.subset(order[:n].sort().values)


class Part(PackedCIFAR10):
    """The benchmark on the first images of a random order."""

    def __init__(self, folder: Path, transform: object, settings: Settings):
        super().__init__(folder, transform)
        if settings.test is not None:
            for name in ("ID test", *self.ood_names):
                self._sets[name] = drawn(self._sets[name], settings.test)
        self._sets["ID training"] = drawn(self.train_set(), settings.train)


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenOOD's ResNet-18 on CIFAR-10")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "cifar10_resnet18")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="few images, for a test")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder with the data by --data or POOD_DATA")
    settings = QUICK if options.quick else Settings()
    if options.quick and options.output == parser.get_default("output"):
        options.work = options.output = Path(tempfile.mkdtemp(prefix="cifar10_resnet18_"))
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    data = Part(options.data, NORMALIZE, settings)

    reports, seconds = [], []
    for seed in options.seeds:
        start = time.perf_counter()
        checkpoint = options.work / f"seed{seed}.zip"
        model = train(data.train_set(), seed, settings, device, checkpoint)
        seconds.append(round(time.perf_counter() - start, 1))
        reports.append(evaluate(model, data, device))
        print(reports[-1].to_text(), flush=True)
    metadata = {
        "settings": asdict(settings),
        "seeds": options.seeds,
        "device": name,
        "training_seconds": seconds,
        "published": PUBLISHED,
    }
    report = Report.combine(reports, metadata)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "cifar10_resnet18"
    report.to_csv(stem.with_suffix(".csv"))
    report.to_json(stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(report.to_markdown() + f"\n{PUBLISHED}\n", "utf-8")
    print(f"results: {stem}.csv, .json and .md")


if __name__ == "__main__":
    main()
