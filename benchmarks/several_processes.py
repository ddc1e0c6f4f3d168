"""
What several processes gain on a CPU: two processes of one thread each beside one of two threads.

    python benchmarks/several_processes.py

starts itself under torchrun and takes the median of repeated passes in one run, in each of which
the two ways take turns, for

- features: a ResNet-20 (random weights) over random images, gathered on both processes;
- gathering: 50,000 features of width 512, which lie with the processes by batches, on both or on
  the first only;
- GROOD: 10,000 queries, 50,000 gradients in the bank, k = 1, of width 64 and 512. Scored are all
  queries by the first process alone, which is what ``evaluation.run`` does; a share of the queries
  by each process that has the whole bank; or all queries by each process that has a share of the
  bank, and the smallest distance taken.

All processes wait for one another before a pass, which lasts until the first one has the result.
With ``--quick``, sizes are small: to see whether it runs. Writes
``benchmarks/results/several_processes.json``.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pood_plugins import distributed
from pood_plugins.dataset import ImagePack, PackLoader
from pood_plugins.detector import GROOD
from pood_plugins.evaluation.report import environment
from pood_plugins.model import resnet20
from pood_plugins.training.checkpoint import replacing

PROCESSES = 2
BATCH = 256

#: how a pass is done: by all processes of one thread each, or by the first of several threads
Ways = dict[str, tuple[Callable[[], Tensor], bool]]


def extraction(images: int) -> Ways:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    pack = ImagePack(x, np.arange(images) % 10)
    torch.manual_seed(0)
    model = resnet20().eval()
    encoder = nn.Sequential(*list(model.children())[:-1])

    def alone() -> Tensor:
        with torch.no_grad():
            return torch.cat([encoder(x).flatten(1) for x, _ in PackLoader(pack, BATCH)])

    def shared() -> Tensor:
        return distributed.extract(encoder, pack, loader_kwargs={"batch_size": BATCH})[0]

    return {"one process": (alone, False), "two processes": (shared, True)}


def gathering(rows: int, width: int) -> Ways:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    batches = features.split(BATCH)[distributed.rank() :: distributed.size()]
    return {
        "everywhere": (lambda: distributed.gather(batches), True),
        "on the first process": (lambda: distributed.gather(batches, everywhere=False), True),
    }


def scoring(queries: int, bank: int, width: int) -> Ways:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(bank, width, generator=generator).abs_()
    query = torch.randn(queries, width, generator=generator).abs_()
    head = nn.Linear(width, 10).requires_grad_(False)
    head.weight.normal_(generator=generator)
    head.weight.sub_(head.weight.mean(dim=1, keepdim=True))  # no class has all the images
    head.bias.zero_()
    labels = head(z).argmax(dim=1)  # all are classified correctly, so that all are in the bank
    detector = GROOD(None, head, ood_prototype="mean", k=1).fit_features(z, labels)
    part = copy.copy(detector)
    part.bank_ = detector.bank_[distributed.rank() :: distributed.size()].clone()
    batches = query.split(-(-queries // distributed.size()))

    def alone() -> Tensor:
        return detector.predict_features(query)

    def queries_shared() -> Tensor:
        return distributed.gather([detector.predict_features(batches[distributed.rank()])])

    def bank_shared() -> Tensor:
        nearest = part.predict_features(query)
        found = [torch.empty_like(nearest) for _ in range(distributed.size())]
        torch.distributed.all_gather(found, nearest)
        return torch.stack(found).amin(dim=0)

    return {
        "one process": (alone, False),
        "first process, one thread": (lambda: alone() if not distributed.rank() else query, True),
        "queries shared": (queries_shared, True),
        "bank shared": (bank_shared, True),
    }


def measure(ways: Ways, repeat: int) -> dict[str, list[float]]:
    """Seconds of each pass but the first, which warms up, on the first process."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(repeat + 1):
        for name, (way, together) in ways.items():
            torch.set_num_threads(1 if together else PROCESSES)
            distributed.exchange(None, name)
            start = time.perf_counter()
            if together or distributed.rank() == 0:
                results[name] = way()
            seconds[name].append(time.perf_counter() - start)
    if distributed.rank() == 0:
        first, *others = results.values()
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two processes beside one of two threads")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR")
    options = parser.parse_args()
    if not distributed.launched():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(PROCESSES), __file__, *sys.argv[1:]]
        raise SystemExit(subprocess.run(command).returncode)

    images, rows, queries = (512, 2000, 500) if options.quick else (5000, 50_000, 10_000)
    with distributed.join():
        seconds = {
            f"features of {images:,} images": measure(extraction(images), options.repeat),
            f"gathering {rows:,} x 512": measure(gathering(rows, 512), options.repeat),
        }
        for width in (64, 512):
            name = f"GROOD, {queries:,} queries, {rows:,} in the bank, width {width}"
            seconds[name] = measure(scoring(queries, rows, width), options.repeat)
        first = distributed.rank() == 0
    if not first:
        return
    content = {
        **environment(),
        "threads": {"one process": PROCESSES, "two processes": 1},
        "passes": options.repeat,
        "quick": options.quick,
        "median seconds": {
            task: {way: round(statistics.median(values), 4) for way, values in ways.items()}
            for task, ways in seconds.items()
        },
        "seconds": {
            task: {way: [round(value, 4) for value in values] for way, values in ways.items()}
            for task, ways in seconds.items()
        },
    }
    with replacing(options.output / "several_processes.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content["median seconds"], indent=1))


if __name__ == "__main__":
    main()
