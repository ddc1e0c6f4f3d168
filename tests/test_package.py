"""What importing the package costs and offers."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pood_plugins


def test_public_names_resolve():
    for name in pood_plugins.__all__:
        assert getattr(pood_plugins, name) is not None
    assert set(pood_plugins.__all__) <= set(dir(pood_plugins))
    with pytest.raises(AttributeError, match="nothing"):
        pood_plugins.nothing


def test_type_checkers_see_the_public_names():
    """They don't run ``__getattr__``, so each name is imported for them alone, and no other."""
    tree = ast.parse(Path(pood_plugins.__file__).read_text("utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test)[0] == "T")
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == pood_plugins._MODULES


def test_every_module_imports_and_says_what_it_is():
    for module in pkgutil.walk_packages(pood_plugins.__path__, "pood_plugins."):
        assert importlib.import_module(module.name).__doc__, module.name


def test_no_optional_package_is_imported():
    """Importing every module loads none of the extras."""
    code = (
        "import importlib, pkgutil, sys, torch, pytorch_ood\n"
        "before = set(sys.modules)\n"
        "import pood_plugins\n"
        "for m in pkgutil.walk_packages(pood_plugins.__path__, 'pood_plugins.'):\n"
        "    importlib.import_module(m.name)\n"
        "optional = {'sklearn', 'matplotlib', 'pandas', 'gdown', 'timm', 'safetensors'}\n"
        "print('OPTIONAL', sorted(optional & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "OPTIONAL []"
