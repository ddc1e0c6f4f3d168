"""
What a first installation costs, and that it works: time and disk space of a fresh virtual
environment with the wheel and pip's default torch, and what the commands say there.

    python benchmarks/installation.py

builds the wheel, installs it with its dependencies, runs ``pood list`` and ``pood benchmark digits
--quick`` in an empty folder, and writes ``benchmarks/results/installation.json``. It needs a
network. Packages that pip has in its cache are not downloaded again; ``--no-cache`` leaves the
cache alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (["list"], ["benchmark", "digits", "--quick"])
PACKAGES = ("pood-plugins", "pytorch-ood", "torch", "torchvision", "numpy", "scikit-learn")


def build_wheel(folder: Path) -> Path:
    """As ``make dist`` does: a source distribution, and a wheel from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def disk_space(folder: Path) -> int:
    """Bytes that the files take on disk, those with several names once."""
    files = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            files[status.st_ino] = status.st_blocks * 512
    return sum(files.values())


def try_command(environment: Path, command: list[str], place: Path) -> dict[str, object]:
    """
    :param environment: where the wheel is installed
    :param command: arguments of ``pood``
    :param place: folder to run it in
    :return: status, time, number of lines and the files that it wrote
    """
    clean = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    start = time.perf_counter()
    done = subprocess.run(
        [environment / "bin" / "pood", *command],
        cwd=place,
        env=clean,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return {
        "command": " ".join(["pood", *command]),
        "status": done.returncode,
        "seconds": round(seconds, 1),
        "lines": len(done.stdout.splitlines()),
        "files": sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()),
    }


def versions(environment: Path) -> dict[str, str]:
    code = f"from importlib.metadata import version\nfor p in {PACKAGES}: print(version(p))"
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(PACKAGES, done.stdout.split()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-cache", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment, place = folder / "environment", folder / "place"
        place.mkdir()
        wheel = build_wheel(folder / "dist")
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
        pip += ["--no-cache-dir"] if options.no_cache else []
        subprocess.run([*pip, f"{wheel}[benchmark]"], check=True)
        result = {
            "command": "pip install pood-plugins[benchmark]",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start),
            "gigabytes": round(disk_space(environment) / 1e9, 1),
            "pip_cache": not options.no_cache,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "wheel": wheel.name,
            "wheel_kilobytes": round(wheel.stat().st_size / 1e3),
            "versions": versions(environment),
            "tried": [try_command(environment, command, place) for command in COMMANDS],
        }
    path = ROOT / "benchmarks" / "results" / "installation.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return max(tried["status"] for tried in result["tried"])


if __name__ == "__main__":
    sys.exit(main())
