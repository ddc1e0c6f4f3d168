"""
What a pull request to pytorch-ood would contain, one for each method and one for the registry.

    python benchmarks/upstream_patch.py GROOD FOLDER

writes into a checkout or an unpacked source distribution of pytorch-ood: the module, which is the
one of this package with its imports changed and nothing else; its export, page of documentation,
tests and line in the README; and where pytorch-ood's own tests list all classes, an entry there.
Then it runs ``ruff`` with pytorch-ood's configuration, and all its tests, on the patched tree. The
patches are ``GROOD``, ``NERO``, ``GReg`` and ``registry``.

    python benchmarks/upstream_patch.py all

downloads the source distribution of the installed version, tries each patch on a fresh copy of it
and writes ``benchmarks/results/upstream_patch.json`` and the table ``upstream_patch.md``. The
source distribution has no documentation and lacks some helpers of the tests; ``tests/upstream``
has replacements, which are there before a patch is written. Exit status: 0 if all is well.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pood_plugins.evaluation.report import environment
from pood_plugins.training.checkpoint import replacing

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests" / "upstream"))
import run as upstream_tests  # noqa: E402

# what becomes of names; the first that fits counts
RENAMED = {
    "from pood_plugins import neighbors": "from pytorch_ood.utils import neighbors",
    "from ..neighbors import": "from ..utils.neighbors import",
    "pood_plugins.neighbors": "pytorch_ood.utils.neighbors",
    "pood_plugins.entry_points": "pytorch_ood.registry",
    "pood_plugins.detector": "pytorch_ood.detector",
    "pood_plugins.loss": "pytorch_ood.loss",
}
# settings of this project's tests that pytorch-ood's do not have
DROPPED = ['pytestmark = pytest.mark.usefixtures("one_thread")\n\n', "@pytest.mark.gpu\n"]


@dataclass(frozen=True)
class Patch:
    """One pull request."""

    #: ours -> place in pytorch-ood
    files: dict[str, str]
    #: subpackage of pytorch-ood, "" for the package itself
    package: str
    #: module in it, and what it exports
    module: str
    exports: list[str]
    #: title of the page of documentation, its place and the page it comes next to
    title: str
    page: str
    beside: str = ""
    #: text of the page between title and module
    introduction: str = ""
    #: table of the README and cells of the new row, the last of which is the label of a reference
    table: str = ""
    row: list[str] = field(default_factory=list)
    reference: str = ""


PATCHES = {
    "GROOD": Patch(
        files={
            "pood_plugins/detector/grood.py": "src/pytorch_ood/detector/grood.py",
            "pood_plugins/neighbors.py": "src/pytorch_ood/utils/neighbors.py",
            "tests/detector/test_grood.py": "tests/detectors/test_grood.py",
            "tests/test_neighbors.py": "tests/test_neighbors.py",
        },
        package="detector",
        module="grood",
        exports=["GROOD", "grood_gradients", "mixup_prototype", "noise_prototype"],
        title="Gradient-aware OOD Detection (GROOD)",
        page="detectors/grood",
        beside="detectors/knn",
        table="**Detectors**:",
        row=[
            "GROOD",
            "Gradient-aware out-of-distribution detection with respect to an OOD prototype.",
            "2025",
            "GROOD",
        ],
        reference="ElAraby, M., Sahoo, S., Pequignot, Y., Novello, P., & Paull, L. (2025) GROOD: "
        "GRadient-Aware Out-of-Distribution Detection. TMLR.",
    ),
    "NERO": Patch(
        files={
            "pood_plugins/detector/nero.py": "src/pytorch_ood/detector/nero.py",
            "tests/detector/test_nero.py": "tests/detectors/test_nero.py",
        },
        package="detector",
        module="nero",
        exports=["NERO", "nero_relevance"],
        title="Neuron-level Relevance (NERO)",
        page="detectors/nero",
        beside="detectors/knn",
        table="**Detectors**:",
        row=["NERO", "Explainable detection by neuron-level relevance.", "2025", "NERO"],
        reference="Chhetri, A., Korhonen, J., Gyawali, P., & Bhattarai, B. (2025) NERO: "
        "Explainable Out-of-Distribution Detection with Neuron-level Relevance. MICCAI.",
    ),
    "GReg": Patch(
        files={
            "pood_plugins/loss/greg.py": "src/pytorch_ood/loss/greg.py",
            "tests/loss/test_greg.py": "tests/loss/test_greg.py",
        },
        package="loss",
        module="greg",
        exports=["GRegLoss"],
        title="Gradient-Regularized Loss (GReg)",
        page="losses/gregloss",
        beside="losses/energyregularizedloss",
        table="**Objective Functions**:",
        row=["GReg", "Regularizes the gradient of the energy at the inputs.", "2024", "GReg"],
        reference="Sharifi, S., Entesari, T., Safaei, B., Patel, V. M., & Fazlyab, M. (2024) "
        "Gradient-Regularized Out-of-Distribution Detection. ECCV.",
    ),
    "registry": Patch(
        files={
            "pood_plugins/entry_points.py": "src/pytorch_ood/registry.py",
            "tests/test_entry_points.py": "tests/test_registry.py",
        },
        package="",
        module="registry",
        exports=[],
        title="Plugins",
        page="registry",
        beside="utils",
        introduction="""\
Packages can add detectors, losses and benchmarks without being a part of this one. Each is a
subclass of the base class here, with an entry point in the package's ``pyproject.toml``:

.. code-block:: toml

    [project.entry-points."pytorch_ood.detectors"]
    MyDetector = "my_package.my_module:MyDetector"

Once the package is installed, the class is found by its name. Nothing is imported before it is
loaded, so a package that is broken fails alone.

.. code-block:: python

    from pytorch_ood.registry import find_plugins

    plugins = {plugin.name: plugin for plugin in find_plugins("detector")}
    detector = plugins["MyDetector"].load()(model.features)
""",
    ),
}
# how tests of pytorch-ood make one, in lists where they want all classes to be
SMOKE = """\
            (
                "{0}",
                lambda: (lambda model: {0}(model.features, model.classifier))(eval_model()),
            ),
"""
LOSS_INPUTS = """\
    loss.GRegLoss: lambda s: (
        loss.GRegLoss(),
        (nn.Linear(D, C), torch.randn(s[0], D), _targets(s)),
    ),
"""


class PatchError(Exception):
    """The tree is not what the patch was made for."""


def rewrite(text: str) -> str:
    """Text of a module with pytorch-ood's names."""
    for dropped in DROPPED:
        text = text.replace(dropped, "")
    choices = "|".join(map(re.escape, RENAMED))
    return re.sub(choices, lambda match: RENAMED[match.group()], text)


def write(patch: Patch, tree: Path) -> list[Path]:
    """Write a patch into a tree of pytorch-ood, and return the files that are new or changed."""
    tree = tree.resolve()
    if not (tree / "src/pytorch_ood/api.py").is_file():
        raise PatchError(f"{tree} is no checkout or source distribution of pytorch-ood")
    new = []
    for ours, theirs in patch.files.items():
        source = rewrite((REPOSITORY / ours).read_text("utf-8"))
        if "pood" in source:
            line = next(line for line in source.splitlines() if "pood" in line)
            raise PatchError(f"{ours} names this package where pytorch-ood can't follow: {line}")
        path = tree / theirs
        if path.exists():
            raise PatchError(f"{path} exists already; take a tree without this patch")
        new.append(_write(path, source))
    # blank lines and order of imports, by pytorch-ood's configuration
    names = [str(path) for path in new]
    _ruff(tree, "check", "--quiet", "--select", "I", "--fix", *names)
    _ruff(tree, "format", "--quiet", *names)
    for ours, path in zip(patch.files, new):
        if _statements(rewrite((REPOSITORY / ours).read_text("utf-8"))) != _statements(
            path.read_text("utf-8")
        ):
            raise PatchError(f"more than the imports of {ours} would change")

    underline = "=" * len(patch.title)
    module = ".".join(filter(None, ["pytorch_ood", patch.package, patch.module]))
    parts = [f"{patch.title}\n{underline}\n", patch.introduction, f".. automodule:: {module}\n"]
    page = _write(tree / "docs" / f"{patch.page}.rst", "\n".join(filter(None, parts)))
    changed = [
        _edit(tree / "src/pytorch_ood" / patch.package / "__init__.py", add_exports, patch),
        *_add_to_tests(patch, tree),
    ]
    _ruff(tree, "format", "--quiet", *(str(path) for path in changed))
    for listing in sorted((tree / "docs").glob("*.rst")):
        if f"   {patch.beside}\n" in listing.read_text("utf-8"):
            changed.append(_edit(listing, add_to_contents, patch))
    if patch.row:
        changed.append(_edit(tree / "README.rst", add_to_readme, patch))
    return [*new, page, *changed]


def _statements(source: str) -> list[str]:
    """All of a module but its imports and its formatting."""
    body = ast.parse(source).body
    return [ast.dump(node) for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def _edit(path: Path, edit: Any, *arguments: Any) -> Path:
    before = path.read_text("utf-8")
    try:
        after = edit(before, *arguments)
    except (StopIteration, ValueError, AttributeError) as error:
        raise PatchError(f"{path} is not written as in pytorch-ood 0.4.0: {error!r}") from error
    return _write(path, after)


def add_exports(text: str, patch: Patch) -> str:
    """The ``__init__.py`` of a package with the module, or what it exports, in its place."""
    if not patch.package:
        return text.replace("model, utils\n", f"model, {patch.module}, utils\n", 1).replace(
            '"model", "utils"', f'"model", "{patch.module}", "utils"', 1
        )
    line = f"from .{patch.module} import {', '.join(patch.exports)}\n"
    imports = list(re.finditer(r"^from \.(\w+) import ", text, re.M))
    place = next(found.start() for found in imports if found.group(1) > patch.module)
    text = text[:place] + line + text[place:]
    if "\n__all__ = [" in text:
        for name in patch.exports:
            entries = re.finditer(r'^    "(\w+)",\n', text[text.index("\n__all__ = [") :], re.M)
            start = text.index("\n__all__ = [")
            follower = next(e for e in entries if e.group(1).lower() > name.lower())
            place = start + follower.start()
            text = f'{text[:place]}    "{name}",\n{text[place:]}'
    return text


def add_to_contents(text: str, patch: Patch) -> str:
    """A page of documentation with an entry after those that are listed with a like page."""
    listed = re.search(rf"^   {re.escape(patch.beside)}\n(   \S+\n)*", text, re.M)
    assert listed is not None  # the caller has seen it
    return f"{text[: listed.end()]}   {patch.page}\n{text[listed.end() :]}"


def add_to_readme(text: str, patch: Patch) -> str:
    """The README with a row at the end of a table, and a reference after the last."""
    rows = re.compile(r"^(?:[+|].*\n)+", re.M).search(text, text.index(patch.table))
    border = rows.group().splitlines()[-1]
    widths = [len(part) - 2 for part in border.strip("+").split("+")]
    cells = [*patch.row[:-1], f"[#{patch.row[-1]}]_"]
    if any(len(cell) > width for cell, width in zip(cells, widths)):
        raise ValueError(f"a cell of {cells} is too long")
    row = "".join(f"| {cell.ljust(width)} " for cell, width in zip(cells, widths)) + "|"
    text = f"{text[: rows.end()]}{row}\n{border}\n{text[rows.end() :]}"
    return f"{text.rstrip()}\n\n.. [#{patch.row[-1]}] {patch.reference}\n"


def _add_to_tests(patch: Patch, tree: Path) -> list[Path]:
    """Entries where pytorch-ood's tests demand one for every class."""

    def add_loss(text: str) -> str:
        place = text.index("    loss.IILoss: ")
        return text[:place] + LOSS_INPUTS + text[place:]

    def add_detector(text: str) -> str:
        first = '            (\n                "KNN",\n'
        text = text.replace(first, SMOKE.format(patch.module.upper()) + first, 1)
        return text.replace("    GMM,\n", f"    GMM,\n    {patch.module.upper()},\n", 1)

    if patch.package == "loss":
        return [_edit(tree / "tests/test_info.py", add_loss)]
    smoke = tree / "tests/detectors/test_all_detectors_smoke.py"
    if patch.package == "detector" and smoke.exists() and '"KNN",' in smoke.read_text("utf-8"):
        _edit(smoke, add_detector)
        _ruff(tree, "check", "--quiet", "--select", "I", "--fix", str(smoke))
        return [smoke]
    return []


def _ruff(tree: Path, *arguments: str) -> list[str]:
    """What ruff prints about a tree, with the tree's configuration."""
    command = [sys.executable, "-m", "ruff", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode > (1 if lines else 0):
        raise PatchError(f"ruff failed: {done.stderr.strip()}")
    return lines


def findings(tree: Path, files: list[Path]) -> list[str]:
    """
    What ruff finds in a tree, and what of some files Python 3.8 would not read. Nothing if all is
    as it should be.
    """
    concise = ["--output-format", "concise"]
    commands = [["check", *concise, "."], ["format", "--check", *concise, "."]]
    if files:
        python = ["--isolated", "--target-version", "py38", "--select", "E9,FA102"]
        commands.append(["check", *concise, *python, *map(str, files)])
    lines = [line for command in commands for line in _ruff(tree, *command)]
    # the remaining lines are summaries
    return [line for line in lines if re.match(r"\S+:\d+:\d+: ", line)]


def check(patch: Patch, tree: Path, files: list[Path], before: list[str]) -> dict[str, Any]:
    """Run ruff and all tests on a patched tree."""
    python = [path for path in files if path.suffix == ".py"]
    after = [finding for finding in findings(tree, python) if finding not in before]
    for finding in after:
        print(finding)
    classes = [name for name in patch.exports if name[0].isupper()]
    command = [sys.executable, str(REPOSITORY / "tests/upstream/run.py"), "--tree", str(tree)]
    command += ["--classes", *classes] if classes else []
    path = os.pathsep.join(filter(None, [str(tree / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout)
    total = re.search(r"^total +(\d+) +(\d+) +(\d+) +(\d+)$", done.stdout, re.M)
    counts = map(int, total.groups()) if total is not None else (0, 0, 0, 0)
    return {
        "files": {
            str(path.relative_to(tree)): len(path.read_text("utf-8").splitlines())
            for path in files
        },
        "ruff": after,
        "ruff_before": before,
        "tests": dict(zip(("run", "passed", "failed", "skipped"), counts)),
        "status": done.returncode,
    }


def apply(name: str, tree: Path) -> dict[str, Any]:
    """Write a patch into a tree and check it."""
    patch, tree = PATCHES[name], tree.resolve()
    before = findings(tree, [])
    files = write(patch, tree)
    print(f"{name}: " + ", ".join(str(path.relative_to(tree)) for path in files), flush=True)
    return check(patch, tree, files, before)


def is_well(result: dict[str, Any]) -> bool:
    return result["status"] == 0 and result["tests"]["passed"] > 0 and not result["ruff"]


def table(results: dict[str, Any]) -> str:
    """
    A Markdown table with a row for each patch.
    """
    lines = [
        "| patch | new lines of code | of tests | tests run | passed | failed | skipped | ruff |"
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for name, result in results.items():
        new = set(PATCHES[name].files.values())
        sizes = {path: count for path, count in result["files"].items() if path in new}
        code = sum(count for path, count in sizes.items() if path.startswith("src"))
        cells = [name, code, sum(sizes.values()) - code, *result["tests"].values()]
        cells.append(f"{len(result['ruff'])} findings" if result["ruff"] else "clean")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def apply_all() -> int:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        version = upstream_tests.importlib.metadata.version("pytorch-ood")
        archive = upstream_tests.download(version, folder / "download")
        for patch in PATCHES:
            tree = upstream_tests.unpack(archive, folder / patch)
            for stand_in, place in upstream_tests.PLACES.items():
                _write(tree / place, (upstream_tests.STAND_INS / stand_in).read_text("utf-8"))
            results[patch] = apply(patch, tree)
            shutil.rmtree(tree)
    report = {
        "command": "python benchmarks/upstream_patch.py all",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "patches": results,
    }
    path = REPOSITORY / "benchmarks" / "results" / "upstream_patch.json"
    with replacing(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    with replacing(path.with_suffix(".md")) as file:
        file.write(table(results).encode())
    print(table(results))
    return 0 if all(is_well(result) for result in results.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patch", choices=[*PATCHES, "all"])
    parser.add_argument("tree", type=Path, nargs="?", help="checkout or source distribution")
    options = parser.parse_args()
    if (options.tree is None) != (options.patch == "all"):
        parser.error("give a patch and a folder with pytorch-ood, or 'all' and no folder")
    try:
        if options.patch == "all":
            return apply_all()
        return 0 if is_well(apply(options.patch, options.tree)) else 1
    except (PatchError, upstream_tests.DownloadError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
