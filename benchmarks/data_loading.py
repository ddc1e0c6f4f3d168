"""
How fast images come from PNG files and from packs in memory, beside a ResNet-20's forward pass.

    python benchmarks/data_loading.py --data DIR

reads the same CIFAR-10 test images as PNG files, in this process and in two worker processes, and
from a pack, and takes the median of repeated passes in one run. Writes
``benchmarks/results/data_loading.json``.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

from pood_plugins.benchmark.folder import ImageFiles
from pood_plugins.dataset import ImagePack, PackLoader
from pood_plugins.evaluation.report import environment
from pood_plugins.model import resnet20
from pood_plugins.model.zoo import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
PREPROCESSING = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_all(batches: Iterable) -> None:
    for _ in batches:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second from files and from packs")
    parser.add_argument("--data", type=Path, default=os.environ.get("POOD_DATA"), metavar="DIR")
    parser.add_argument("--images", type=int, default=5000, metavar="N")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder with the data by --data or POOD_DATA")

    pack = ImagePack.read(options.data / "cifar10_test.webp.zip").subset(range(options.images))
    pack.transform = PREPROCESSING.normalize
    model = resnet20().eval()
    batch, _ = next(iter(PackLoader(pack, 256)))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.png") for i in range(len(pack))]
        for file, image in zip(files, pack.x):
            Image.fromarray(image).save(file)
        images = ImageFiles(files, pack.y.tolist(), PREPROCESSING.transform)
        runs: dict[str, Callable[[], None]] = {
            "PNG files": lambda: read_all(DataLoader(images, 256)),
            "PNG files, 2 workers": lambda: read_all(DataLoader(images, 256, num_workers=2)),
            "pack": lambda: read_all(PackLoader(pack, 256)),
            "forward pass of ResNet-20": lambda: read_all(
                model(batch) for _ in range(-(-len(pack) // 256))
            ),
            "both, pack": lambda: read_all(model(x) for x, _ in PackLoader(pack, 256)),
            "both, PNG files": lambda: read_all(model(x) for x, _ in DataLoader(images, 256)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        with torch.no_grad():
            for _ in range(options.repeat + 1):  # the first pass warms up
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    forward = medians["forward pass of ResNet-20"]
    content = {
        **environment(),
        "images": len(pack),
        "passes": options.repeat,
        "microseconds per image": {n: round(1e6 * t / len(pack), 1) for n, t in medians.items()},
        "relative to the forward pass": {n: round(t / forward, 3) for n, t in medians.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "data_loading.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
