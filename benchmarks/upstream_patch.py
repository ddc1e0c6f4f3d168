"""
What a pull request to pytorch-ood would contain, one for each method and one for the registry.

    python benchmarks/upstream_patch.py GROOD FOLDER

writes into a checkout or an unpacked source distribution of pytorch-ood: the module, which is the
one of this package with its imports changed and nothing else; its export, page of documentation,
tests and line in the README; and where pytorch-ood's own tests list all classes, an entry there.
Then it runs ``ruff`` with pytorch-ood's configuration, and all its tests, on the patched tree. The
patches are ``GROOD``, ``NERO``, ``GReg`` and ``registry``.

    python benchmarks/upstream_patch.py all [--python python3.8]

downloads the source distribution of the installed version, tries each patch on a fresh copy of it,
and with ``--python`` all together in an environment of another Python, for the oldest that
pytorch-ood supports. Writes ``benchmarks/results/upstream_patch.json`` and the table
``upstream_patch.md``. The source distribution has no documentation and lacks some helpers of the
tests; ``tests/upstream`` has replacements, which are there before a patch is written. Exit status:
0 if all is well.
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
from collections.abc import Callable
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
    #: text of the page between title and module, and after it
    introduction: str = ""
    appendix: str = ""
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
        appendix="Search\n------\n\n.. automodule:: pytorch_ood.utils.neighbors\n",
        table="**Detectors**:",
        row=[
            "GROOD",
            "Gradient-aware out-of-distribution detection with respect to an OOD prototype.",
            "2025",
            "GROOD",
        ],
        reference="ElAraby, M., Sahoo, S., Pequignot, Y., Novello, P., & Paull, L. (2025) GROOD: "
        "GRadient-Aware Out-of-Distribution Detection. TMLR. `ArXiv <https://arxiv.org/abs/2312.14427>`__.",
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
        "Explainable Out-of-Distribution Detection with Neuron-level Relevance. MICCAI. "
        "`ArXiv <https://arxiv.org/abs/2506.15404>`__.",
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
        "Gradient-Regularized Out-of-Distribution Detection. ECCV. "
        "`ArXiv <https://arxiv.org/abs/2404.12368>`__.",
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
subclass of :class:`pytorch_ood.api.Detector`, :class:`torch.nn.Module` or
:class:`pytorch_ood.benchmark.Benchmark`, with an entry point in the package's ``pyproject.toml``:

.. code-block:: toml

    [project.entry-points."pytorch_ood.detectors"]
    MyDetector = "my_package.my_module:MyDetector"

Once the package is installed, the class is found. Nothing is imported before it is loaded, so a
package that is broken fails alone.

.. code-block:: python

    from pytorch_ood.registry import find_plugins

    plugins = {plugin.qualified_name: plugin for plugin in find_plugins("detector")}
    detector = plugins["my-package:MyDetector"].load()(model.features)
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
    files = compose(patch, tree.resolve())
    for path, text in files.items():
        _write(path, text)
    return list(files)


def compose(patch: Patch, tree: Path) -> dict[Path, str]:
    """
    What a patch makes of a tree of pytorch-ood.

    :return: text by path of the files that are new or changed
    :raises PatchError: if the tree is not one that the patch fits
    """
    check_tree(tree)
    files = _modules(patch, tree)
    files[tree / "docs" / f"{patch.page}.rst"] = _page(patch)
    for path, edit in _edits(patch, tree).items():
        try:
            files[path] = edit(path.read_text("utf-8"), patch)
        except (OSError, StopIteration, ValueError) as error:
            raise PatchError(f"{path} does not read as in pytorch-ood 0.4.0: {error}") from error
        if path.suffix == ".py":
            files[path] = _formatted(tree, path, files[path], sort=edit is add_detector)
    return files


def _modules(patch: Patch, tree: Path) -> dict[Path, str]:
    """Our modules and tests, with pytorch-ood's imports."""
    modules = {}
    for ours, theirs in patch.files.items():
        path, source = tree / theirs, rewrite((REPOSITORY / ours).read_text("utf-8"))
        if "pood" in source:
            line = next(line for line in source.splitlines() if "pood" in line)
            raise PatchError(f"{ours} names this package where pytorch-ood can't follow: {line}")
        if path.exists():
            raise PatchError(f"{path} exists already; take a tree without this patch")
        modules[path] = _formatted(tree, path, source)
        if _statements(modules[path]) != _statements(source):
            raise PatchError(f"more than the imports of {ours} would change")
    return modules


def _page(patch: Patch) -> str:
    """The page of documentation."""
    module = ".".join(filter(None, ["pytorch_ood", patch.package, patch.module]))
    title = f"{patch.title}\n{'=' * len(patch.title)}\n"
    parts = [title, patch.introduction, f".. automodule:: {module}\n", patch.appendix]
    return "\n".join(filter(None, parts))


def _edits(patch: Patch, tree: Path) -> dict[Path, Callable[[str, Patch], str]]:
    """What is to be done to files that are there."""
    edits: dict[Path, Callable[[str, Patch], str]] = {
        tree / "src/pytorch_ood" / patch.package / "__init__.py": add_exports
    }
    if patch.row:
        edits[tree / "README.rst"] = add_to_readme
    if patch.package == "loss":
        edits[tree / "tests/test_info.py"] = add_loss_inputs
    smoke = tree / upstream_tests.PLACES["smoke.py"]
    stand_in = (upstream_tests.STAND_INS / "smoke.py").read_text("utf-8")
    if patch.package == "detector" and smoke.exists() and smoke.read_text("utf-8") != stand_in:
        edits[smoke] = add_detector
    if (tree / "docs" / "conf.py").exists():  # not so in a source distribution
        listed = re.compile(_listed(patch), re.M)
        pages = sorted((tree / "docs").glob("*.rst"))
        listing = [page for page in pages if listed.search(page.read_text("utf-8"))]
        if not listing:
            raise PatchError(f"no page in {tree / 'docs'} lists {patch.beside}")
        edits[listing[0]] = add_to_contents
    return edits


def check_tree(tree: Path) -> None:
    """Refuse what is not pytorch-ood."""
    if not (tree / "src/pytorch_ood/api.py").is_file():
        raise PatchError(f"{tree} is no checkout or source distribution of pytorch-ood")


def _statements(source: str) -> list[str]:
    """All of a module but its imports and its formatting."""
    body = ast.parse(source).body
    return [ast.dump(node) for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def _formatted(tree: Path, path: Path, source: str, sort: bool = True) -> str:
    """Text of a module with blank lines and order of imports by the tree's configuration."""
    place = ["--stdin-filename", str(path), "-"]
    if sort:
        # told, since ruff looks for a module's file, and the new ones are not there yet
        own = ["--config", 'lint.isort.known-first-party=["pytorch_ood", "tests"]']
        arguments = ["check", "--quiet", "--select", "I", "--fix", *own, *place]
        source = _ruff(tree, *arguments, source=source)
    return _ruff(tree, "format", "--quiet", *place, source=source)


def _before(text: str, mark: str, new: str, start: int = 0) -> str:
    """Text with something new before the first mark."""
    place = text.find(mark, start)
    if place < 0:
        raise ValueError(f"there is no {mark.strip()!r}")
    return text[:place] + new + text[place:]


def add_exports(text: str, patch: Patch) -> str:
    """The ``__init__.py`` of a package with the module, or what it exports, in its place."""
    if not patch.package:
        text = _before(text, "utils\n\n__all__", f"{patch.module}, ")
        return _before(text, '"utils", ', f'"{patch.module}", ')
    imports = re.findall(r"^from \.\w+ import ", text, re.M)
    follower = next(line for line in imports if line > f"from .{patch.module} ")
    line = f"from .{patch.module} import {', '.join(patch.exports)}\n"
    text = _before(text, follower, line)
    listed = text.find("\n__all__ = [")
    for name in patch.exports if listed >= 0 else ():
        entries = re.findall(r'^    "(\w+)",\n', text[listed:], re.M)
        follower = next(entry for entry in entries if entry.lower() > name.lower())
        text = _before(text, f'    "{follower}",\n', f'    "{name}",\n', listed)
    return text


def _listed(patch: Patch) -> str:
    """Expression for the entries of a table of contents from a like page on."""
    return rf"^( +){re.escape(patch.beside)}\n(?:\1\S+\n)*"


def add_to_contents(text: str, patch: Patch) -> str:
    """A page of documentation with an entry after those that are listed with a like page."""
    return re.sub(_listed(patch), rf"\g<0>\g<1>{patch.page}\n", text, count=1, flags=re.M)


def add_loss_inputs(text: str, patch: Patch) -> str:
    """The tests of ``info`` with what the loss is called with."""
    return _before(text, "    loss.IILoss: ", LOSS_INPUTS)


def add_detector(text: str, patch: Patch) -> str:
    """The tests of all detectors with this one."""
    name = patch.module.upper()
    text = _before(text, '            (\n                "KNN",\n', SMOKE.format(name))
    return _before(text, "    GMM,\n", f"    {name},\n")


def add_to_readme(text: str, patch: Patch) -> str:
    """The README with a row at the end of a table, and a reference after the last."""
    rows = re.compile(r"^(?:[+|].*\n)+", re.M).search(text, text.index(patch.table))
    border = rows.group().splitlines()[-1] if rows is not None else ""
    if rows is None or not border.startswith("+-"):
        raise ValueError(f"there is no table below {patch.table}")
    widths = [len(part) - 2 for part in border.strip("+").split("+")]
    cells = [*patch.row[:-1], f"[#{patch.row[-1]}]_"]
    if any(len(cell) > width for cell, width in zip(cells, widths)):
        raise ValueError(f"a cell of {cells} is too long")
    row = "".join(f"| {cell.ljust(width)} " for cell, width in zip(cells, widths)) + "|"
    text = f"{text[: rows.end()]}{row}\n{border}\n{text[rows.end() :]}"
    return f"{text.rstrip()}\n\n.. [#{patch.row[-1]}] {patch.reference}\n"


def _ruff(tree: Path, *arguments: str, source: str | None = None) -> str:
    """What ruff prints about a tree, or makes of a source, with the tree's configuration."""
    command = [sys.executable, "-m", "ruff", *arguments]
    done = subprocess.run(command, cwd=tree, input=source, capture_output=True, text=True)
    if done.returncode > (1 if done.stdout else 0):
        raise PatchError(f"ruff failed: {done.stderr.strip()}")
    return done.stdout


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
    lines = [line for command in commands for line in _ruff(tree, *command).splitlines()]
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
    check_tree(tree)
    before = findings(tree, [])
    files = write(patch, tree)
    print(f"{name}: " + ", ".join(str(path.relative_to(tree)) for path in files), flush=True)
    return check(patch, tree, files, before)


def try_python(interpreter: str, tree: Path, folder: Path) -> dict[str, Any]:
    """The tests of all patches together, with another Python and the newest packages it takes."""
    for patch in PATCHES.values():
        write(patch, tree)
    environment = folder / "environment"
    subprocess.run([interpreter, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    packages = ["torch", "torchvision", "scipy", "numpy", "typing_extensions", "scikit-learn"]
    subprocess.run([python, "-m", "pip", "install", "-q", "pytest", *packages], check=True)
    tests = [t for patch in PATCHES.values() for t in patch.files.values() if t[:3] != "src"]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "log_cli=false"]
    done = subprocess.run(
        [*command, "--durations-min=60", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    code = "import platform, torch; print(platform.python_version(), torch.__version__)"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for count, outcome in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1]):
        if outcome in counts:
            counts[outcome] = int(count)
    return {
        **dict(zip(("python", "torch"), found.stdout.split())),
        "tests": counts,
        "status": done.returncode,
    }


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


def apply_all(interpreter: str | None) -> int:
    results, other = {}, None
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
        if interpreter is not None:
            other = try_python(interpreter, upstream_tests.unpack(archive, folder / "all"), folder)
    report = {
        "command": "python benchmarks/upstream_patch.py all",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "patches": results,
        "other_python": other,
    }
    text = table(results)
    if other is not None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in other["tests"].items())
        versions = f"Python {other['python']} and torch {other['torch']}"
        text += f"\nThe tests of all patches together, with {versions}: {counts}.\n"
    path = REPOSITORY / "benchmarks" / "results" / "upstream_patch.json"
    with replacing(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    with replacing(path.with_suffix(".md")) as file:
        file.write(text.encode())
    print(text)
    failed = other is not None and other["status"]
    return 0 if all(is_well(result) for result in results.values()) and not failed else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patch", choices=[*PATCHES, "all"])
    parser.add_argument("tree", type=Path, nargs="?", help="checkout or source distribution")
    parser.add_argument("--python", help="with all: another interpreter to try them with")
    options = parser.parse_args()
    if (options.tree is None) != (options.patch == "all"):
        parser.error("give a patch and a folder with pytorch-ood, or 'all' and no folder")
    try:
        if options.patch == "all":
            return apply_all(options.python)
        return 0 if is_well(apply(options.patch, options.tree)) else 1
    except (PatchError, upstream_tests.DownloadError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
