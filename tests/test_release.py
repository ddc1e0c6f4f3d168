"""What is released: the distributions, an installation of the wheel, and how to cite it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from pood_plugins import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pood_plugins", "tests", "docs", "benchmarks")
ENTRY_POINTS = """
console_scripts pood
pytorch_ood.benchmarks Digits
pytorch_ood.detectors GROOD
pytorch_ood.detectors NERO
pytorch_ood.losses GRegLoss
"""


def run(*command, **settings):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", **settings
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """
    Folder with the source distribution and the wheel that is built from it, as by ``make dist``,
    but of a copy: building leaves files beside the sources.
    """
    place = tmp_path_factory.mktemp("release")
    (place / "copy").mkdir()
    leftover = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info")
    for path in ROOT.iterdir():
        if path.name in SOURCES:
            shutil.copytree(path, place / "copy" / path.name, ignore=leftover)
        elif path.is_file():
            shutil.copy(path, place / "copy" / path.name)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist")
    run(*build, place / "copy")
    return place / "dist"


@pytest.fixture(scope="module")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def modules():
    package = ROOT / "pood_plugins"
    return {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"pood_plugins-{__version__}-py3-none-any.whl"
    info = f"pood_plugins-{__version__}.dist-info"
    described = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == {
            *modules(),
            "pood_plugins/py.typed",
            f"{info}/licenses/LICENSE",
            *(f"{info}/{name}" for name in described),
        }
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        code = sum(item.file_size for item in archive.infolist() if item.filename in modules())
    assert wheel.stat().st_size < 300_000
    assert code < 1_000_000


def test_source_distribution_holds_what_a_checkout_does(distributions):
    (path,) = distributions.glob("*.tar.gz")
    assert path.name == f"pood_plugins-{__version__}.tar.gz"
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile"}
    expected |= {"tests/conftest.py", "tests/api.json", "docs/conf.py", "docs/index.rst"}
    expected |= {"benchmarks/digits.py", "benchmarks/results/digits.md", "pyproject.toml"}
    assert expected | modules() | {"pood_plugins/py.typed"} <= files
    assert not [name for name in files if "__pycache__" in name or name.startswith("results")]
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert folders == {*SOURCES, "pood_plugins.egg-info"}


def test_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"pood_plugins-{__version__}.dist-info/entry_points.txt").decode()
    for line in ENTRY_POINTS.split("\n")[1:-1]:
        group, name = line.split()
        section = text.partition(f"[{group}]\n")[2].partition("[")[0]
        assert f"{name} = pood_plugins." in section


def test_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("pood-plugins", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "GROOD" in metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    classifiers = metadata.get_all("Classifier")
    assert {"Typing :: Typed", "Programming Language :: Python :: 3"} <= set(classifiers)
    for url in metadata.get_all("Project-URL", []):
        assert " https://" in url


def test_every_dependency_has_a_lower_bound(metadata):
    """But for the tools, of which the newest will do."""
    requirements = list(map(Requirement, metadata.get_all("Requires-Dist")))
    needed = {r.name for r in requirements if r.marker is None}
    assert {"pytorch-ood", "torch", "torchvision", "numpy", "pillow", "tqdm"} <= needed
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": "benchmark"}):
            assert [s.operator for s in requirement.specifier] == [">="], str(requirement)
    assert {"benchmark", "deploy", "docs", "dev"} == set(metadata.get_all("Provides-Extra"))


def test_lower_bounds_are_those_that_were_tested(metadata):
    """Whoever changes one runs ``benchmarks/minimum_versions.py``."""
    path = ROOT / "benchmarks" / "results" / "minimum_versions.json"
    if not path.exists():
        pytest.skip("the tests with the oldest versions are being run now")
    record = json.loads(path.read_text(encoding="utf-8"))
    bounds = {}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        for specifier in requirement.specifier:
            bounds[requirement.name] = specifier.version
    del bounds["setuptools"]  # a tool, and no part of the environment's versions
    assert record["versions"] == bounds
    assert record["passed"] > 1000 and record["failed"] == 0


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """
    A fresh environment with the wheel. Nothing is downloaded: it finds the dependencies in the
    environment of the tests, through a path file, by which it does not see how the checkout is
    installed there.
    """
    environment = tmp_path_factory.mktemp("installed") / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Settings of a process that starts in an empty folder and does not see the checkout."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    return {"cwd": tmp_path_factory.mktemp("outside"), "env": clean}


@pytest.mark.skipif(os.name == "nt", reason="environments look different there")
def test_installed_command(installed, outside):
    where = "import pood_plugins; print(pood_plugins.__file__)"
    module = Path(run(installed / "bin" / "python", "-c", where, **outside).stdout.strip())
    assert installed in module.parents and ROOT not in module.parents

    lines = run(installed / "bin" / "pood", "list", **outside).stdout.splitlines()
    for name in ("GROOD", "NERO", "GRegLoss", "Digits"):
        assert [line.split()[1:] for line in lines if line.split()[0] == name] == [
            ["pood-plugins", __version__]
        ]
    assert any(line.split()[:2] == ["KNN", "pytorch-ood"] for line in lines)

    done = run(installed / "bin" / "pood", "benchmark", "digits", "--quick", **outside)
    assert "no result to report" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Report: {Path('results', 'digits')}"
    folder = outside["cwd"] / "results" / "digits"
    files = {"results.csv", "results.json", "results.md", "roc.png", "scores.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert {path.name for path in outside["cwd"].iterdir()} == {"results"}
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert record["versions"]["pood-plugins"] == __version__
    assert [row["detector"] for row in record["results"]][-2:] == ["NERO", "GROOD"]
    assert all(row["error"] is None for row in record["results"])


def test_citation():
    """The keys that version 1.2.0 of the Citation File Format requires."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["authors"]
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    identifiers = [reference.get("url", "") for reference in citation["references"]]
    for number in ("2312.14427", "2506.15404", "2404.12368"):
        assert f"https://arxiv.org/abs/{number}" in identifiers
    for reference in citation["references"]:
        assert reference["type"] in ("article", "conference-paper") and reference["title"]
        assert all({"given-names", "family-names"} <= set(a) for a in reference["authors"])
