"""
The package in docs/example_plugin, built and installed into a temporary folder: what
docs/plugin.rst says about it.
"""

import csv
import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_contract as contract
import torch

from pood_plugins import cli, persistence, registry

pytestmark = [
    pytest.mark.usefixtures("installed", "one_thread"),
    # as in test_contract.py
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

EXAMPLE = Path(__file__).parents[1] / "docs" / "example_plugin"
NAME = "CosinePrototypes"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, since building writes beside them."""
    folder = tmp_path_factory.mktemp("example") / "source"
    left_over = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(EXAMPLE, folder, ignore=left_over)


@pytest.fixture(scope="module")
def installed(source):
    """What pip does with a folder, without a network and also where there is no pip."""
    pytest.importorskip("setuptools", "77", reason="building the package needs setuptools")
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(source.parent)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = source.parent.glob("*.whl")
    site = source.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        forget("ood_cosine")
        yield
    forget("ood_cosine")


def forget(package):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[module]


@pytest.fixture
def detector():
    split = contract.classifier()
    return registry.build(NAME, split).fit(contract.loader())


def test_is_listed_and_not_imported():
    forget("ood_cosine")
    assert NAME in registry.list_detectors()
    assert registry.get_info("cosineprototypes") == registry.PluginInfo(
        NAME, "detector", "ood-cosine", "0.1.0", "ood_cosine.detector:CosinePrototypes"
    )
    assert "ood_cosine" not in sys.modules
    assert registry.load(NAME).__module__ == "ood_cosine.detector"


def test_needs_pytorch_ood_only():
    assert importlib.metadata.requires("ood-cosine") == ["pytorch-ood>=0.4", "torch"]
    files = [*EXAMPLE.glob("ood_cosine/*.py"), *EXAMPLE.glob("tests/*.py")]
    assert len(files) == 3
    assert not [file for file in files if "pood_plugins" in file.read_text("utf-8")]


def test_its_own_tests_pass(source, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])

    class Passed(list):
        def pytest_runtest_logreport(self, report):
            if report.when == "call" and report.passed:
                self.append(report.nodeid)

    passed = Passed()
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(source), "-c"]
    arguments += [str(source / "pyproject.toml"), str(source / "tests")]
    assert pytest.main(arguments, plugins=[passed]) == 0
    assert len(passed) >= 10
    forget("test_cosine_prototypes")


def test_what_build_fills_in(detector):
    record = detector.build_record
    assert record.from_split == ("encoder",) and record.hyperparameters == {}
    assert detector.encoder is record.split.encoder and detector.centered is False


@pytest.mark.parametrize("centered", [False, True])
def test_scores_by_hand(centered):
    split = contract.classifier()
    detector = registry.build(NAME, split, centered=centered).fit(contract.loader())
    x = contract.images(8, seed=1)
    with torch.no_grad():
        z_fit = split.encoder(contract.images(24)).double().numpy()
        z = split.encoder(x).double().numpy()
    origin = z_fit.mean(axis=0) if centered else 0
    means = [z_fit[contract.labels(24) == label].mean(axis=0) for label in range(3)]
    rays, axes = z - origin, np.stack(means) - origin
    cosines = rays @ axes.T
    cosines /= np.linalg.norm(rays, axis=1)[:, None] * np.linalg.norm(axes, axis=1)
    expected = torch.from_numpy(-cosines.max(axis=1)).float()
    torch.testing.assert_close(detector(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", contract.RULES["detector"])
def test_keeps_the_rules(rule):
    (info,) = [i for name, i in contract.registered("detector").items() if "ood-cosine" in name]
    rule(info.load())


def test_is_saved_and_loaded(detector, tmp_path):
    pytest.importorskip("safetensors")
    x = contract.images(8, seed=1)
    persistence.save(detector, tmp_path / "saved")
    loaded = persistence.load(tmp_path / "saved", contract.classifier())
    assert loaded is not detector and type(loaded) is registry.load(NAME)
    assert torch.equal(loaded(x), detector(x))


def test_is_a_row_of_the_table(tmp_path, capsys):
    arguments = ["benchmark", "digits", "--seeds", "1", "--detectors", f"{NAME},MSP"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert f"\n{NAME} " in capsys.readouterr().out
    with open(tmp_path / "results.csv", newline="") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file) if row["detector"] == NAME}
    for dataset in ("digits 6-9", "flower", "noise"):
        assert float(rows[dataset]["AUROC"]) > 0.95 and not rows[dataset]["error"]


def test_the_loss_of_the_page_keeps_the_rules(monkeypatch):
    page = (EXAMPLE.parent / "plugin.rst").read_text("utf-8")
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)*)", page, re.M)
    (block,) = (block for block in blocks if "class UniformOutliers" in block)
    module = ModuleType("my_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module)["__name__"] = module.__name__
    exec(textwrap.dedent(block), vars(module))
    assert contract.broken_rules("loss", module.UniformOutliers) == {}
