"""
What a first installation costs: time and disk space of a fresh virtual environment with pip's
default torch.

    python benchmarks/installation.py

needs a network, and writes ``benchmarks/results/installation.json``. Packages that pip has in its
cache are not downloaded again; ``--no-cache`` leaves the cache alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-cache", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(Path(folder, "bin", "python")), "-m", "pip", "install", "--quiet"]
        pip += ["--no-cache-dir"] if options.no_cache else []
        subprocess.run([*pip, f"{ROOT}[benchmark]"], check=True)
        seconds = time.perf_counter() - start
        files = {}
        for directory, _, names in os.walk(folder):
            for name in names:
                status = os.lstat(os.path.join(directory, name))
                files[status.st_ino] = status.st_blocks * 512
    result = {
        "command": "pip install pood-plugins[benchmark]",
        "seconds": round(seconds),
        "gigabytes": round(sum(files.values()) / 1e9, 1),
        "pip_cache": not options.no_cache,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    path = ROOT / "benchmarks" / "results" / "installation.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
