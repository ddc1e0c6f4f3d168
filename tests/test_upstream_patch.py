"""
Patches for pytorch-ood, written into a tree that is made of the installed package. That they pass
pytorch-ood's tests takes its source distribution: ``python benchmarks/upstream_patch.py all``.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_ood

ROOT = Path(__file__).parent.parent
specification = importlib.util.spec_from_file_location(
    "upstream_patch", ROOT / "benchmarks" / "upstream_patch.py"
)
upstream_patch = importlib.util.module_from_spec(specification)
sys.modules["upstream_patch"] = upstream_patch  # where dataclasses look up annotations
specification.loader.exec_module(upstream_patch)
PATCHES = upstream_patch.PATCHES
SMOKE_PLACE = "tests/detectors/test_all_detectors_smoke.py"

README = """\
**Detectors**:

+----------+------------------------------------------------------------------------------------+------+---------------+
| Detector | Description                                                                        | Year | Ref           |
+==========+====================================================================================+======+===============+
| KNN      | Nearest neighbors                                                                  | 2022 | [#KNN]_       |
+----------+------------------------------------------------------------------------------------+------+---------------+

**Objective Functions**:

+----------+------------------------------------------------------------------------------------+------+---------------+
| Loss     | Description                                                                        | Year | Ref           |
+==========+====================================================================================+======+===============+
| Energy   | Energy                                                                             | 2020 | [#Energy]_    |
+----------+------------------------------------------------------------------------------------+------+---------------+

.. [#KNN] A paper.
"""  # noqa: E501
TEST_INFO = """\
from pytorch_ood import loss

LOSS_INPUTS = {
    loss.IILoss: lambda s: None,
}
"""
DOCS = """\
.. toctree::

    detectors/knn
    detectors/lts

Losses and others

.. toctree::

   losses/energyregularizedloss
   utils
"""
SMOKE = """\
from pytorch_ood.detector import (
    GMM,
    KNN,
)

BUILDERS = [
            (
                "KNN",
                lambda: (lambda model: KNN(model.features))(eval_model()),
            ),
]
"""


@pytest.fixture
def tree(tmp_path):
    """The installed pytorch-ood, in the layout of its sources."""
    folder = tmp_path / "pytorch-ood"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(pytorch_ood.__file__).parent, folder / "src/pytorch_ood", ignore=ignored)
    for name, text in {
        "README.rst": README,
        "pyproject.toml": '[tool.ruff]\nline-length = 99\n[tool.ruff.lint]\nselect = ["I"]\n',
        "tests/test_info.py": TEST_INFO,
        "docs/conf.py": "",
        "docs/detector.rst": DOCS,
    }.items():
        upstream_patch._write(folder / name, text)
    return folder


@pytest.mark.parametrize("name", PATCHES)
def test_modules_are_ours_with_other_imports(tree, name):
    patch = PATCHES[name]
    files = {str(path.relative_to(tree)): path for path in upstream_patch.write(patch, tree)}
    assert set(patch.files.values()) < set(files)
    for ours, theirs in patch.files.items():
        before, after = (ROOT / ours).read_text("utf-8"), files[theirs].read_text("utf-8")
        assert not re.search(
            "pood_plugins|one_thread|split_model|SplitModel|registry.build", after
        )
        if theirs.startswith("src"):
            imports = ("import ", "from ", "    ", ")", "\n")
            removed = [line for line in before.splitlines(True) if line not in after]
            assert all(line.startswith(imports) or "pood_plugins." in line for line in removed)
            assert len(removed) <= 12
    assert upstream_patch.findings(tree, [files[path] for path in patch.files.values()]) == []


def test_all_patches_together_can_be_imported(tree):
    shutil.rmtree(tree / "docs")  # as in a source distribution
    for patch in PATCHES.values():
        upstream_patch.write(patch, tree)
    script = """if True:
        import json, pytorch_ood
        from pytorch_ood import detector, loss, registry
        plugins = {p.qualified_name: p for p in registry.find_plugins()}
        from pood_plugins.registry import list_detectors
        print(json.dumps({
            "file": pytorch_ood.__file__,
            "modules": [detector.GROOD.__module__, detector.NERO.__module__,
                        loss.GRegLoss.__module__, registry.__name__],
            "all": [set(detector.__all__) > {"GROOD", "NERO", "nero_relevance"},
                    "registry" in pytorch_ood.__all__],
            "plugin": plugins["pood-plugins:NERO"].load().__module__,
            "names": [name for name in list_detectors() if "GROOD" in name],
        }))"""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "file": str(tree / "src/pytorch_ood/__init__.py"),
        "modules": [
            "pytorch_ood.detector.grood",
            "pytorch_ood.detector.nero",
            "pytorch_ood.loss.greg",
            "pytorch_ood.registry",
        ],
        "all": [True, True],
        "plugin": "pood_plugins.detector.nero",
        "names": ["pood-plugins:GROOD", "pytorch-ood:GROOD"],
    }


def test_documentation_readme_and_tests_are_edited(tree):
    smoke = upstream_patch._write(tree / SMOKE_PLACE, SMOKE)
    upstream_patch.write(PATCHES["NERO"], tree)
    page = (tree / "docs/detectors/nero.rst").read_text()
    assert page.endswith("====\n\n.. automodule:: pytorch_ood.detector.nero\n")
    contents = (tree / "docs/detector.rst").read_text()
    assert contents == DOCS.replace("/lts\n", "/lts\n    detectors/nero\n")
    text = smoke.read_text()
    assert "    NERO,\n)" in text and text.index('"NERO",\n') < text.index('"KNN",\n')
    compile(text, "smoke", "exec")
    rows = (tree / "README.rst").read_text().splitlines()
    row = next(line for line in rows if line.startswith("| NERO "))
    assert len(row) == len(rows[2]) and rows[rows.index(row) + 1] == rows[2]
    assert rows.index(row) < rows.index("**Objective Functions**:")
    assert rows[-1].startswith(".. [#NERO] Chhetri, A.")


def test_losses_get_their_inputs_and_their_table(tree):
    upstream_patch.write(PATCHES["GReg"], tree)
    text = (tree / "tests/test_info.py").read_text()
    assert text.index("loss.GRegLoss: lambda s") < text.index("loss.IILoss")
    compile(text, "test_info", "exec")
    rows = (tree / "README.rst").read_text().splitlines()
    row = next(line for line in rows if line.startswith("| GReg "))
    assert rows.index(row) > rows.index("**Objective Functions**:")


def replace(path, old, new):
    def spoil(tree):
        text = (tree / path).read_text()
        assert old in text
        (tree / path).write_text(text.replace(old, new))

    return spoil


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("GReg", lambda tree: shutil.rmtree(tree), "is no checkout or source"),
        ("GReg", lambda tree: (tree / "src/pytorch_ood/api.py").unlink(), "is no checkout or"),
        ("GReg", replace("tests/test_info.py", "loss.IILoss", "loss.Other"), "no 'loss.IILoss:'"),
        ("GReg", replace("README.rst", "**Objective", "Objective"), "does not read as in"),
        ("NERO", lambda tree: (tree / "README.rst").unlink(), "README.rst does not read as in"),
        ("NERO", replace("README.rst", "+--", "#--"), "README.rst does not read as in"),
        ("NERO", replace("docs/detector.rst", "/knn", "/none"), "no page in .*docs lists"),
        (
            "NERO",
            lambda tree: upstream_patch._write(tree / SMOKE_PLACE, "x = 1\n"),
            "test_all_detectors_smoke.py does not read as .* there is no",
        ),
        (
            "registry",
            replace("src/pytorch_ood/__init__.py", "model, utils", "model, utils, more"),
            "__init__.py does not read as in pytorch-ood 0.4.0: there is no 'utils",
        ),
        (
            "GReg",
            lambda tree: upstream_patch.write(PATCHES["GReg"], tree),
            "greg.py exists already; take a tree without this patch",
        ),
    ],
)
def test_other_trees_are_refused(tree, name, spoil, message):
    spoil(tree)
    before = {path: path.read_bytes() for path in tree.rglob("*.*") if path.is_file()}
    with pytest.raises(upstream_patch.PatchError, match=message):
        upstream_patch.write(PATCHES[name], tree)
    # nothing is written, or all
    assert before == {path: path.read_bytes() for path in tree.rglob("*.*") if path.is_file()}


def test_a_change_of_more_than_imports_is_noticed(tree, monkeypatch):
    monkeypatch.setattr(upstream_patch, "_ruff", lambda *_, source: source + "\nx = 1\n")
    with pytest.raises(upstream_patch.PatchError, match="more than the imports of .*greg.py"):
        upstream_patch.write(PATCHES["GReg"], tree)


def test_names_that_can_not_follow_are_noticed(tree, monkeypatch):
    monkeypatch.delitem(upstream_patch.RENAMED, "pood_plugins.loss")
    with pytest.raises(upstream_patch.PatchError, match="names this package .*pood_plugins.loss"):
        upstream_patch.write(PATCHES["GReg"], tree)


@pytest.mark.parametrize(
    "source, code",
    [("import os\nimport ast\n", "I001"), ("x: 'int | None' = 3\ny: list[int] = []\n", "FA102")],
)
def test_findings(tree, source, code):
    path = upstream_patch._write(tree / "src/pytorch_ood/bad.py", source)
    assert any(code in finding for finding in upstream_patch.findings(tree, [path]))
    path.write_text("x = [1,2]\n")
    (finding,) = upstream_patch.findings(tree, [path])
    assert finding.startswith("src/pytorch_ood/bad.py:1:") and "unformatted" in finding


def test_table_tells_failures():
    result = {
        "files": {
            "src/pytorch_ood/detector/nero.py": 7,
            "tests/detectors/test_nero.py": 5,
            "R": 9,
        },
        "ruff": [],
        "tests": {"run": 3, "passed": 2, "failed": 1, "skipped": 0},
        "status": 1,
    }
    assert "| NERO | 7 | 5 | 3 | 2 | 1 | 0 | clean |" in upstream_patch.table({"NERO": result})
    assert not upstream_patch.is_well(result)
    well = {**result, "status": 0}
    assert upstream_patch.is_well(well) and not upstream_patch.is_well({**well, "ruff": ["E"]})
    none = {"run": 0, "passed": 0, "failed": 0, "skipped": 0}
    assert not upstream_patch.is_well({**well, "tests": none})
