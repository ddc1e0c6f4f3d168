"""
Peak memory of scoring a whole split in one call.

Compares 20,000 queries with a bank of 50,000 rows, both of width 512 and in float32, through

- ``kth_distance``: the exact nearest-neighbor search on its own,
- ``GROOD.predict_features``: the same search, preceded by the gradients of the queries.

All distances at once would take 3815 MiB. Measured is how far the resident set of a fresh process
rises during the call above what it was just before, when bank and queries exist and a tiny call
has made torch set itself up. Run it with ``python benchmarks/memory.py`` (Linux only); it writes
``benchmarks/results/memory.json``.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytorch_ood
import torch
from torch import Tensor, nn

import pood_plugins
from pood_plugins.detector import GROOD
from pood_plugins.neighbors import kth_distance

#: upper bound of the memory of each call, in MiB
TARGET = 512


def features(n: int, dimension: int, seed: int) -> Tensor:
    return torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed)).abs_()


def search(bank: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    return lambda z: kth_distance(z, bank, k)


def grood(z: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    head = nn.Linear(z.shape[1], 10).requires_grad_(False)
    head.weight.normal_(generator=torch.Generator().manual_seed(2))
    labels = head(z).argmax(dim=1)  # all are classified correctly, so that all are in the bank
    detector = GROOD(None, head, ood_prototype="mean", k=k).fit_features(z, labels)
    assert detector.bank_ is not None and len(detector.bank_) == len(z)
    return detector.predict_features


CALLS = {"kth_distance": search, "GROOD.predict_features": grood}


def resident(field: str) -> float:
    """
    :param field: ``VmRSS`` is the resident set of this process, ``VmHWM`` its peak
    :return: size in MiB
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(name: str, queries: int, bank: int, dimension: int, k: int) -> float:
    """
    Has to run in a process of its own, which no earlier measurement has left memory in.

    :param name: key of ``CALLS``
    :return: memory of the call in MiB
    """
    call = CALLS[name](features(bank, dimension, seed=0), k)
    z = features(queries, dimension, seed=1)
    call(z[:2])
    # memory that preparation has freed goes back to the system, so that the call can't reuse it
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before = resident("VmRSS")
    call(z)
    return resident("VmHWM") - before


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
    default = Path(__file__).parent / "results" / "memory.json"
    parser = argparse.ArgumentParser(
        description="Peak memory of scoring a whole split in one call"
    )
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--k", type=int, default=1, help="which neighbor (default: the nearest)")
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("queries", "bank", "dimension", "k")}

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(measure, (name,), sizes) for name in CALLS}

    matrix = 4 * arguments.queries * arguments.bank / 2**20
    print(f"{'call':<26}{'peak memory [MiB]':>20}")
    for name, peak in memory.items():
        print(f"{name:<26}{peak:>20.0f}")
    print(f"all distances at once: {matrix:.0f} MiB; target: at most {TARGET} MiB")

    write_json(
        arguments.output,
        {
            **sizes,
            "dtype": "float32",
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "seeds": [0, 1, 2],
            "peak_memory_mib": memory,
            "distance_matrix_mib": matrix,
            "target_mib": TARGET,
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
