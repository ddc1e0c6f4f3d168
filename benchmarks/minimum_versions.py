"""
The tests with the oldest versions of all dependencies that ``pyproject.toml`` allows.

    python benchmarks/minimum_versions.py --python python3.10
    python benchmarks/minimum_versions.py tests/detector tests/test_registry.py

makes a virtual environment with exactly these versions and the newest of the tools, of the Python
that is named or else of the one that runs this, runs all tests
or those that are named, in a copy of the sources, and writes
``benchmarks/results/minimum_versions.json``: what was installed, and how many tests passed,
failed and were skipped, and why. It needs a network and Python 3.11 or later. The exit status is
that of the tests.

Here, a ``DeprecationWarning`` is no error: old packages use what Python and the newest versions of
their own dependencies have deprecated since. All other warnings are errors, as in ``make test``.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "minimum_versions.json"
EXTRAS = ("benchmark", "deploy")
#: of the time of the oldest matplotlib, which makes the newest warn wherever a picture is drawn
INDIRECT = {"pyparsing": "3.0.9"}
SOURCES = ("pood_plugins", "tests", "benchmarks", "docs")


def lower_bounds() -> dict[str, str]:
    """
    :return: lowest version that is allowed, by name of the package
    :raises ValueError: if a dependency has no lower bound
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in EXTRAS)]
    bounds = {}
    for requirement in sum(lists, []):
        match = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if not match:
            raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound: add one")
        bounds[match[1]] = match[2]
    return bounds


def install(folder: Path, bounds: dict[str, str], interpreter: str) -> Path:
    """
    :param folder: where to put a copy of the sources and the environment
    :param bounds: versions to install
    :param interpreter: Python to make the environment of
    :return: the environment's Python
    """
    copy = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "_build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    # what an earlier run found is no matter of this one, and a test compares it with the bounds
    (copy / RESULT.relative_to(ROOT)).unlink(missing_ok=True)
    subprocess.run([interpreter, "-m", "venv", folder / "environment"], check=True)
    python = folder / "environment" / "bin" / "python"
    pinned = [f"{name}=={version}" for name, version in {**bounds, **INDIRECT}.items()]
    install = [python, "-m", "pip", "install", "--quiet", "--editable", f"{copy}[dev]", *pinned]
    subprocess.run(install, check=True)
    return python


def run_tests(python: Path, folder: Path, arguments: list[str]) -> dict[str, object]:
    """
    :param python: the environment's Python
    :param folder: where the copy of the sources is
    :param arguments: tests to run; all, if there are none
    :return: command, time, counts and reasons
    """
    lenient = ("-W", "default::DeprecationWarning", "-W", "default::PendingDeprecationWarning")
    command = ["-m", "pytest", "-p", "no:cacheprovider", *lenient, *arguments]
    report = folder / "report.xml"
    start = time.perf_counter()
    subprocess.run(
        [python, *command, "-q", f"--junitxml={report}"],
        cwd=folder / "sources",
        # the commands that tests start are those of the environment, too
        env={**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    seconds = time.perf_counter() - start
    counts = Counter(dict.fromkeys(("passed", "failed", "skipped"), 0))
    failed, skipped = {}, Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            message = child.get("message", "").splitlines()[0][:200]
            if child.tag == "skipped":
                outcome = "skipped"
                skipped[re.sub(r"^Skipped: ", "", message)] += 1
            elif child.tag in ("failure", "error"):
                outcome = "failed"
                failed[f"{case.get('classname')}::{case.get('name')}"] = message
        counts[outcome] += 1
    return {
        "command": " ".join(["python", *command]),
        "seconds": round(seconds),
        **counts,
        "failures": failed,
        "reasons for skipping": dict(skipped),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="what to run (default: all tests)")
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument("--folder", type=Path, help="scratch folder to keep (default: none)")
    options = parser.parse_args()
    bounds = lower_bounds()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        python = install(folder, bounds, options.python)
        code = "import platform; print(platform.python_version())"
        found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": found.stdout.strip(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": bounds,
            "indirect": INDIRECT,
        }
        content.update(run_tests(python, folder, options.tests))
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
