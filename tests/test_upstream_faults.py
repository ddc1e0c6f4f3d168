"""
The faults of pytorch-ood that the documentation reports are still there, and it reports all.

When a script no longer fails, the fault is mended: its script and its section can go, and with
them what this package does about it.
"""

import ast
import importlib.util
import re
import runpy
import traceback
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCRIPTS = sorted((DOCS / "upstream").glob("*.py"))
PAGE = (DOCS / "faults.rst").read_text("utf-8")


def workaround(script: Path) -> str | None:
    """The module of this package that avoids the fault, as the script says without being run."""
    for statement in ast.parse(script.read_text("utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="WORKAROUND")], value=value):
                return ast.literal_eval(value)
    pytest.fail(f"{script.name} has no WORKAROUND: name a module of this package, or None")


def run(script: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(script), run_name="__main__")


# pytorch-ood reads its cache so; torch 2.4 says that it is unsafe, later ones read it safely
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_fault_is_still_there(script):
    try:
        run(script)
    except AssertionError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename == str(script), "the error comes from elsewhere"
        assert str(error), "the error does not say what is wrong"
    else:
        module = workaround(script)
        rest = f"the workaround in {module} can go" if module else "there is no workaround"
        pytest.fail(
            f"pytorch-ood {version('pytorch-ood')} has fixed this, {rest}: remove {script.name} "
            "and its section of docs/faults.rst if that is the oldest version that is supported"
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_can_be_reported(script):
    text = script.read_text("utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    assert "Proposed fix" in docstring and re.search(r"``pytorch_ood/\w+/?\w*\.py``", docstring)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    packages = {module.partition(".")[0] for module in modules}
    assert packages <= {"torch", "pytorch_ood", "copy", "tempfile", "warnings"}


def test_page_shows_every_script_once_with_its_workaround():
    *sections, _ = PAGE.split("\n\n.. literalinclude:: ")
    shown = re.findall(r"^\.\. literalinclude:: upstream/(\w+)\.py$", PAGE, re.MULTILINE)
    assert sorted(shown) == [script.stem for script in SCRIPTS]
    for section, name in zip(sections, shown, strict=True):
        module = workaround(DOCS / "upstream" / f"{name}.py")
        paragraph = section.rpartition("~~~\n\n")[2]
        assert re.findall(r":mod:`([\w.]+)`", paragraph) == ([module] if module else []), name
        assert module is None or importlib.util.find_spec(module), f"{module} does not exist"
