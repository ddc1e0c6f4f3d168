"""
Time and peak memory of one training step with GReg.

Compares, on a ResNet-20 for CIFAR with 64 ID images and 64 outliers of noise, on CPU

- ``energy``: the step without a gradient term (pytorch-ood's ``EnergyRegularizedLoss``),
- ``greg``: the step with ``GRegLoss``, one forward pass,
- ``jacobian``: the same loss by ``torch.autograd.functional.jacobian``, two forward passes.

Times are medians over rounds that run all three in turn, so that a slow phase of the machine meets
all of them. Memory is the growth of the peak resident set during the steps of a fresh process.
``python benchmarks/greg_cost.py`` prints a table and writes ``benchmarks/results/greg_cost.json``.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytorch_ood
import torch
from pytorch_ood.loss import EnergyRegularizedLoss
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import pood_plugins
from pood_plugins.loss import GRegLoss
from pood_plugins.model import resnet20

MARGIN_IN, MARGIN_OUT = -25.0, -7.0
#: upper bounds for the ratios of median times
TARGETS = {"greg / jacobian": 0.75, "greg / energy": 3.5}


def energy_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return EnergyRegularizedLoss(0.1, MARGIN_IN, MARGIN_OUT)(model(x), y)


def greg_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return GRegLoss(0.1, 1.0, MARGIN_IN, MARGIN_OUT)(model, x, y)


def jacobian_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def objective(x: Tensor) -> Tensor:
        energy = -torch.logsumexp(model(x), dim=1)
        gap_in = (MARGIN_IN - energy[y >= 0]).relu().mean()
        return (energy[y < 0] - MARGIN_OUT).relu().mean() - gap_in

    gradient = jacobian(objective, x, create_graph=True)
    return energy_loss(model, x, y) + gradient.flatten(1).norm(dim=1).mean()


LOSSES = {"energy": energy_loss, "greg": greg_loss, "jacobian": jacobian_loss}


class Step:
    """An SGD step of a freshly initialized network, with the same images for every loss."""

    def __init__(self, name: str):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(128, 3, 32, 32, generator=generator)
        self.y = torch.randint(0, 10, (128,), generator=generator)
        self.y[64:] = -1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = resnet20()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.loss = LOSSES[name]

    def __call__(self) -> float:
        """:return: seconds"""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model, self.x, self.y).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def peak_memory(name: str) -> float:
    """
    Has to run in a process of its own, since a peak never falls.

    :param name: loss
    :return: growth of the peak resident set over three steps, in MiB
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    step = Step(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def main() -> None:
    default = Path(__file__).parent / "results" / "greg_cost.json"
    parser = argparse.ArgumentParser(description="Time and peak memory of one step with GReg")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(LOSSES, pool.map(peak_memory, LOSSES, chunksize=1)))

    steps = {name: Step(name) for name in LOSSES}
    for step in steps.values():
        step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(arguments.rounds)]
    seconds = {name: statistics.median(times[name] for times in rounds) for name in LOSSES}
    ratios = {
        "greg / jacobian": seconds["greg"] / seconds["jacobian"],
        "greg / energy": seconds["greg"] / seconds["energy"],
    }

    print(f"{'step':<10}{'median [s]':>12}{'peak memory [MiB]':>20}")
    for name in LOSSES:
        print(f"{name:<10}{seconds[name]:>12.3f}{memory[name]:>20.0f}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} (target: at most {TARGETS[name]})")

    write_json(
        arguments.output,
        {
            "network": "ResNet-20",
            "batch": {"id": 64, "outliers": 64, "shape": [3, 32, 32]},
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "seed": 0,
            "median_seconds": seconds,
            "ratios": ratios,
            "targets": TARGETS,
            "peak_memory_mib": memory,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch-ood": pytorch_ood.__version__,
                "pood-plugins": pood_plugins.__version__,
            },
            "commit": commit(),
        },
    )


if __name__ == "__main__":
    main()
