"""
Entry points: what is found, in which order, and how a broken plugin fails.

Plugins are written to a temporary folder as ``*.dist-info`` next to a module, which is all that
importlib.metadata needs to see.
"""

import re
import subprocess
import sys

import pytest
from pytorch_ood.api import Detector

from pood_plugins.entry_points import PluginInfo, find_plugins

DETECTOR = """
from pytorch_ood.api import FeaturesDetector

class Third(FeaturesDetector):
    def predict(self, x):
        return x.flatten(1).sum(1)
"""
GROUPS = [
    ("detector", "detectors", "pytorch_ood.api.Detector"),
    ("loss", "losses", "torch.nn.Module"),
    ("benchmark", "benchmarks", "pytorch_ood.benchmark.Benchmark"),
]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one module and one entry point for one test."""

    def install(distribution, name, source=DETECTOR, version="1.0", group="detectors", folder="."):
        module = re.sub(r"[-_.]+", "_", distribution).lower()  # as installers name the folder
        root = tmp_path / folder
        info = root / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(source)
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        info.joinpath("entry_points.txt").write_text(
            f"[pytorch_ood.{group}]\n{name} = {module}:{name}\n"
        )
        monkeypatch.syspath_prepend(root)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return info

    return install


def found(kind="detector"):
    return {plugin.qualified_name: plugin for plugin in find_plugins(kind)}


@pytest.mark.parametrize("kind, group, base", GROUPS)
def test_finds_plugins_of_each_kind(install, kind, group, base):
    install("Acme.OOD__Extras", "Third", version="2.3", group=group)
    expected = PluginInfo("Third", kind, "acme-ood-extras", "2.3", "acme_ood_extras:Third")
    assert found(kind)["acme-ood-extras:Third"] == expected
    for other, _, _ in GROUPS:
        assert other == kind or "acme-ood-extras:Third" not in found(other)


def test_loads_a_class_when_it_is_asked_for(install):
    install("acme", "Third")
    plugin = found()["acme:Third"]
    assert "acme" not in sys.modules
    loaded = plugin.load()
    assert loaded is sys.modules["acme"].Third and issubclass(loaded, Detector)


def test_several_distributions_may_claim_a_name(install):
    install("acme", "Third")
    install("rival", "Third")
    assert {"acme:Third", "rival:Third"} <= set(found())


def test_the_first_copy_of_a_distribution_counts(install):
    install("acme", "Old", folder="behind")
    install("Acme", "New", version="2.0", folder="before")
    assert "acme:New" in found() and "acme:Old" not in found()


def test_a_first_copy_without_entry_points_counts_too(install):
    install("acme", "Old", folder="behind")
    (install("acme", "Gone", version="2.0", folder="before") / "entry_points.txt").unlink()
    assert not any(plugin.origin == "acme" for plugin in find_plugins())


def test_a_distribution_without_entry_points_is_left_out(install):
    (install("acme", "Third") / "entry_points.txt").unlink()
    assert not any(plugin.origin == "acme" for plugin in find_plugins())


def test_unreadable_metadata_hides_no_others(install, caplog, tmp_path):
    install("acme", "Third")
    (install("torn", "Torn") / "METADATA").unlink()
    assert "acme:Third" in found() and "Torn" not in str(found())
    assert caplog.text.count("Skipped a distribution") == 1 and str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    "source, cause",
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("", "AttributeError"),
        ("def", "SyntaxError"),
    ],
)
def test_a_broken_plugin_fails_by_name_when_it_is_loaded(install, source, cause):
    install("acme", "Third", source, version="0.9")
    with pytest.raises(ImportError, match=f"'acme:Third' of acme 0.9 .*{cause}"):
        found()["acme:Third"].load()


@pytest.mark.parametrize("source", ["class Odd: pass", "def Odd(): pass", "Odd = 3"])
@pytest.mark.parametrize("kind, group, base", GROUPS)
def test_what_is_no_subclass_is_refused(install, kind, group, base, source):
    install("odd", "Odd", source, group=group)
    with pytest.raises(ImportError, match=f"{kind} Odd .*'odd:Odd' of odd 1.0 .*{base}"):
        found(kind)["odd:Odd"].load()


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'detectors': choose from detector, loss"):
        find_plugins("detectors")


def test_finding_imports_no_plugin(install, tmp_path):
    install("heavy", "Heavy", "raise RuntimeError")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from pood_plugins.entry_points import find_plugins; "
        "assert 'Heavy' in [plugin.name for plugin in find_plugins()]; "
        "print('heavy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
