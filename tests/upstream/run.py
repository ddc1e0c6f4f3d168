"""
Runs pytorch-ood's own tests with the classes of this package among its own.

    python tests/upstream/run.py [--distribution NAME]

downloads the source distribution of the installed version of pytorch-ood with pip into a temporary
folder and runs the tests in it, with every detector, loss and benchmark that the distribution
registers as a member of ``pytorch_ood.detector``, ``.loss`` and ``.benchmark``. The tests find
classes there by the name of their module, so for this process they are given another. The source
distribution lacks some helpers; ``stand_ins`` has replacements.

    python tests/upstream/run.py --tree FOLDER [--classes NAME ...]

runs the tests of a checkout or an unpacked source distribution on the package in it, which has to
export classes of these names. ``benchmarks/upstream_patch.py`` checks its patches so.

The exit status is 0 if all tests passed and 1 if not. Without a network it is 2, or 0 if
``ALLOW_SKIP=1`` is set.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pood_plugins import registry

STAND_INS = Path(__file__).parent / "stand_ins"
# file -> where pytorch-ood's tests import it from
PLACES = {
    "helpers.py": "tests/helpers/__init__.py",
    "smoke.py": "tests/detectors/test_all_detectors_smoke.py",
}


class DownloadError(Exception):
    """The source distribution can't be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--distribution", default="pood-plugins", help="whose classes (default: %(default)s)"
    )
    parser.add_argument("--tree", type=Path, help="whose tests and package (default: a download)")
    parser.add_argument("--classes", nargs="*", default=[], help="of the tree, to be tested")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        tree = options.tree
        if tree is None:
            version = importlib.metadata.version("pytorch-ood")
            try:
                tree = unpack(download(version, folder / "download"), folder / "unpacked")
            except DownloadError as error:
                print(f"The tests of pytorch-ood {version} were not run: {error}", file=sys.stderr)
                return 0 if os.environ.get("ALLOW_SKIP") == "1" else 2
            members = add_members(options.distribution)
            names = ", ".join(member.__name__ for member in members)
            print(f"pytorch-ood {version} with {names} of {options.distribution}", flush=True)
        else:
            members = members_of(tree.resolve(), options.classes)
        write_tests(tree, folder)
        return run(folder, members, add_losses=options.tree is None)


def download(version: str, folder: Path) -> Path:
    """The source distribution of a version of pytorch-ood, as an archive."""
    python = sys.executable
    if importlib.util.find_spec("pip") is None:  # uv makes environments without it
        made = subprocess.run([python, "-m", "venv", str(folder / "venv")], capture_output=True)
        if made.returncode:
            raise DownloadError("there is no pip, and python -m venv provides none")
        python = str(folder / "venv" / "bin" / "python")
    # the default, five tries, takes half a minute to find out that there is no network
    command = [python, "-m", "pip", "download", f"pytorch-ood=={version}"]
    command += ["--no-deps", "--no-binary", "pytorch-ood", "--dest", str(folder)]
    command += ["--retries", "1", "--timeout", "15", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[0].removeprefix("ERROR: ") if errors else f"status {done.returncode}"
        raise DownloadError(
            f"pip can't download its source distribution; is there a network? ({reason})"
        )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a source distribution and return the folder in which its files lie."""
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def write_tests(tree: Path, folder: Path) -> None:
    """Write the tests of pytorch-ood, and what the tree lacks of them, into a folder."""
    for path in sorted((tree / "tests").rglob("*.py")):
        # some tests import the checkout, which would be a second copy of every class
        text = path.read_text("utf-8").replace("src.pytorch_ood", "pytorch_ood")
        _write(folder / path.relative_to(tree), text)
    for name, place in PLACES.items():
        if not (tree / place).exists():
            _write(folder / place, (STAND_INS / name).read_text("utf-8"))
    for package in {path.parent for path in (folder / "tests").rglob("*.py")}:
        (package / "__init__.py").touch()
    # its own settings, of which no marker may be unknown; also keeps pytest from looking further
    _write(folder / "setup.cfg", (tree / "setup.cfg").read_text("utf-8"))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def add_members(distribution: str) -> list[type]:
    """Make the registered classes of a distribution members of pytorch-ood's subpackages."""
    added = []
    for kind in ("detector", "loss", "benchmark"):
        package = importlib.import_module(f"pytorch_ood.{kind}")
        for info in registry.list_plugins(kind).values():
            if info.origin == distribution:
                member = info.load()
                member.__module__ = f"{package.__name__}.{distribution.replace('-', '_')}"
                setattr(package, info.name, member)
                added.append(member)
    if not added:
        raise SystemExit(f"{distribution} registers no detector, loss or benchmark")
    return added


def members_of(tree: Path, names: list[str]) -> list[type]:
    """The classes of these names in pytorch-ood's subpackages, as the tree has them."""
    package = importlib.import_module("pytorch_ood")
    if tree not in Path(str(package.__file__)).resolve().parents:
        raise SystemExit(
            f"This would test {package.__file__}. Put {tree / 'src'} in front: PYTHONPATH=..."
        )
    found = {}
    for kind in ("detector", "loss", "benchmark"):
        found.update(vars(importlib.import_module(f"pytorch_ood.{kind}")))
    missing = [name for name in names if name not in found]
    if missing:
        raise SystemExit(f"pytorch_ood of {tree} does not export {', '.join(missing)}")
    return [found[name] for name in names]


class Summary:
    """Counts outcomes by file."""

    def __init__(self, members: list[type], add_losses: bool) -> None:
        self.members = members
        self.add_losses = add_losses
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        test_info = importlib.import_module("tests.test_info")
        smoke = importlib.import_module("tests.detectors.test_all_detectors_smoke")
        if hasattr(smoke, "CLASSES"):  # the stand-in
            smoke.CLASSES.update(self.members)
        if self.add_losses:
            # this table says how each loss is called, and the tests demand an entry for each
            test_info.LOSS_INPUTS.update(smoke.loss_inputs(test_info.C))
        # otherwise all could pass without having seen any
        found = [*test_info.DETECTORS, *test_info.LOSSES, *test_info.BENCHMARKS]
        missed = [member.__name__ for member in self.members if member not in found]
        if missed:
            raise pytest.UsageError(f"the tests do not find {', '.join(missed)}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid]["failed"].add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a test reports several times, for its set-up and for subtests
        if report.when == "call" or not report.passed:
            file = report.nodeid.partition("::")[0]
            self.outcomes[file][report.outcome].add(report.nodeid)

    def table(self) -> str:
        rows = [["file", "run", "passed", "failed", "skipped"]]
        total: Counter[str] = Counter()
        for file, outcomes in sorted(self.outcomes.items()):
            failed = outcomes["failed"]
            skipped = outcomes["skipped"] - failed
            passed = outcomes["passed"] - failed - skipped
            counts = {"passed": len(passed), "failed": len(failed), "skipped": len(skipped)}
            total.update(counts)
            rows.append([file, str(sum(counts.values())), *map(str, counts.values())])
        in_total = [total["passed"], total["failed"], total["skipped"]]
        rows.append(["total", str(sum(in_total)), *map(str, in_total)])
        width = max(len(row[0]) for row in rows)
        return "\n".join(
            row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]) for row in rows
        )


def run(folder: Path, members: list[type], add_losses: bool) -> int:
    """Run all tests in a folder, print a table and return the exit status."""
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.chdir(folder)
    summary = Summary(members, add_losses)
    arguments = ["-q", "-rfE", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "tests"]
    arguments += ["--durations-min=60", "-o", "log_cli=false"]
    status = pytest.main(arguments, plugins=[summary])
    print(summary.table())
    return 0 if status == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main())
