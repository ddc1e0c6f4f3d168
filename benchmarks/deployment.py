"""
From a trained classifier to a detector in production, on handwritten digits as PNG files, with the
commands that a new user types.

    python benchmarks/deployment.py

trains a small classifier, writes images and weights into a folder, runs ``pood fit``, ``pood
score`` and ``pood inspect`` for several detectors, and writes ``deployment.json`` and
``deployment.md`` into ``benchmarks/results``: how long it took, and whether the thresholds keep
what they promise on images that nothing was fitted on.

    python benchmarks/deployment.py --prepare digits

writes the folder only, and tells the commands.
"""

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from pood_plugins.benchmark.digits import Digits, train_classifier
from pood_plugins.dataset import GreyPatches, HandwrittenDigits, UniformNoise
from pood_plugins.evaluation.report import environment
from pood_plugins.training.checkpoint import replacing

try:
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f"{error}. Saved detectors need it: pip install 'pood-plugins[benchmark,deploy]'")

RESULTS = Path(__file__).parent / "results"
DETECTORS = ("GROOD", "NERO", "Energy", "KNN", "Mahalanobis")
#: folder and name of the outliers
OUTLIERS = {"near": "digits 6-9", "flower": "flower", "noise": "noise"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the folder only")
    parser.add_argument("--detectors", nargs="+", default=DETECTORS, metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare)
        for command in commands("GROOD", options.prepare):
            print("pood", shlex.join(command))
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        prepare(Path(folder))
        record = {
            **environment(),
            "date": time.strftime("%Y-%m-%d"),
            "prepare_seconds": time.perf_counter() - start,
            "detectors": {name: measure(name, Path(folder)) for name in options.detectors},
        }
    for name, content in {
        "deployment.json": json.dumps(record, indent=1),
        "deployment.md": table(record["detectors"]),
    }.items():
        with replacing(options.output / name) as file:
            file.write((content + "\n").encode())
    print(table(record["detectors"]))


def prepare(folder: Path) -> None:
    """Write images and the weights of a classifier into a folder."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: name another folder")
    for part in ("train", "validation", "test"):
        write_images(HandwrittenDigits(part, range(6)), folder / part)
    write_images(HandwrittenDigits(classes=range(6, 10), outliers=True), folder / "near")
    write_images(GreyPatches("flower.jpg"), folder / "flower")
    write_images(UniformNoise(), folder / "noise")
    save_file(train_classifier(Digits(), seed=0).state_dict(), folder / "model.safetensors")


def write_images(dataset: Dataset, folder: Path) -> None:
    """PNG files, in a folder for each class if there are classes."""
    for i, (image, label) in enumerate(dataset):  # type: ignore[arg-type]
        of_class = folder / str(label) if label >= 0 else folder
        of_class.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(of_class / f"{i:04}.png")


def commands(detector: str, folder: Path) -> list[list[str]]:
    saved, scores = str(folder / "detector"), str(folder / "scores.csv")
    fit = ["fit", "--arch", "digits", "--weights", str(folder / "model.safetensors")]
    fit += ["--data", str(folder / "train"), "--calibration", str(folder / "validation")]
    fit += ["--detector", detector, "--output", saved]
    sets = [str(folder / name) for name in ("test", *OUTLIERS)]
    score = ["score", "--detector", saved, "--data", *sets, "--output", scores]
    return [fit, score, ["inspect", saved]]


def measure(detector: str, folder: Path) -> dict[str, Any]:
    """Run the commands, each in a process of its own, and read what they wrote."""
    seconds = {}
    for command in commands(detector, folder):
        start = time.perf_counter()
        subprocess.run(["pood", *command], check=True)
        seconds[command[0]] = round(time.perf_counter() - start, 1)
    threshold = json.loads((folder / "detector" / "config.json").read_text())["threshold"]
    with open(folder / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    accepted = {}
    for name in ("test", *OUTLIERS):
        decisions = [r["decision"] for r in rows if Path(r["file"]).is_relative_to(folder / name)]
        found = binomtest(decisions.count("ID"), len(decisions))
        interval = found.proportion_ci()
        accepted[name] = {
            "images": len(decisions),
            "share": found.statistic,
            "interval": [interval.low, interval.high],
        }
    shutil.rmtree(folder / "detector")
    return {"seconds": seconds, "threshold": threshold, "accepted": accepted}


def table(detectors: dict[str, Any]) -> str:
    names = ["promised TPR", "TPR", *(f"{name} accepted" for name in OUTLIERS.values())]
    names += ["fit s", "score s"]
    lines = ["| detector | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for name, of_detector in detectors.items():
        lower, upper = of_detector["threshold"]["tpr_interval"]
        accepted = [f"{100 * part['share']:.1f}" for part in of_detector["accepted"].values()]
        low, high = of_detector["accepted"]["test"]["interval"]
        accepted[0] += f" [{100 * low:.1f}, {100 * high:.1f}]"
        shares = " | ".join(accepted)
        seconds = of_detector["seconds"]
        lines.append(
            f"| {name} | {100 * lower:.1f} to {100 * upper:.1f} | {shares} | {seconds['fit']} | "
            f"{seconds['score']} |"
        )
    first = next(iter(detectors.values()))
    lines.append("")
    lines.append(
        f"In percent. Thresholds for a TPR of 95 % from {first['threshold']['n_id']} images, and "
        f"what they accept of {first['accepted']['test']['images']} test images; all intervals "
        "with 95 % confidence, each by itself. Seconds of whole commands, most of which are "
        "imports."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
