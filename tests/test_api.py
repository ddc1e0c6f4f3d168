"""
The names that other people's programs depend on, as recorded in ``api.json``: what the packages
export, what the reference documents, the commands and the entry points, with their parameters.

    python tests/test_api.py --update

records what there is now.
"""

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from pood_plugins import cli

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("api.json")
UPDATE = "python tests/test_api.py --update"
DIRECTIVE = re.compile(r"\.\. +auto(?:class|function|exception|data):: +(pood_plugins\.[\w.]+)")


def documented() -> set[str]:
    """Full names that the pages of the documentation show, and all that packages export."""
    pages = [*(ROOT / "docs").glob("*.rst"), *(ROOT / "pood_plugins").rglob("*.py")]
    names = {name for page in pages for name in DIRECTIVE.findall(page.read_text())}
    for path in (ROOT / "pood_plugins").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        exported = getattr(importlib.import_module(package), "__all__", ())
        names |= {f"{package}.{name}" for name in exported if not name.startswith("__")}
    return names


def find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names in order, with ``*`` before those that are given by name."""
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        names.append(prefix.get(parameter.kind, "") + parameter.name)
    return [name for name in names if name not in ("self", "cls")]


def constructor(cls: type) -> list[str]:
    """Parameters, if the constructor is this package's: others are not ours to keep."""
    owners = (base for base in cls.__mro__ if "__init__" in vars(base))
    return parameters(cls) if next(owners).__module__.startswith("pood_plugins") else []


def members(cls: type) -> dict[str, list[str]]:
    """Parameters by name, of methods; none, of properties and fields. Without inherited ones."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("pood_plugins")]
    found = {}
    for base in own:
        for name in {**vars(base), **inspect.get_annotations(base)}:
            if not name.startswith("_"):
                member = inspect.getattr_static(cls, name, None)
                member = getattr(member, "__func__", member)
                found[name] = parameters(member) if inspect.isfunction(member) else []
    return found


def commands() -> dict[str, list[str]]:
    """Positional arguments and options by command."""
    found = {}

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        found[name] = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, inner in action.choices.items():
                    walk(inner, f"{name} {command}")
            elif action.option_strings:
                found[name] += [text for text in action.option_strings if text != "-h"]
            else:
                found[name].append(str(action.metavar or action.dest).upper())

    walk(cli._parser(), "pood")
    return {name: sorted(given) for name, given in found.items()}


def surface() -> dict[str, list[str]]:
    """Everything that is public: parameters, options or entry points by name."""
    found = commands()
    seen = set()
    for name in sorted(documented(), key=lambda name: (-name.count("."), name)):
        thing = find(name)
        if not inspect.isclass(thing):
            found[name] = parameters(thing) if inspect.isroutine(thing) else []
            continue
        found[name] = constructor(thing)
        if thing not in seen:  # the members of a class that has several names, once
            found |= {f"{name}.{member}": names for member, names in members(thing).items()}
        seen.add(thing)
    for entry_point in sorted(distribution("pood-plugins").entry_points):
        found.setdefault(f"entry points {entry_point.group}", []).append(entry_point.name)
    return dict(sorted(found.items()))


def compare(record: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """
    :return: what is to be done about each difference, a sentence each
    """
    said = []
    for name in sorted(record | found):
        if name not in found:
            said.append(
                f"{name} is gone: bring it back, with a DeprecationWarning if it is to go (see "
                "docs/versioning.rst)"
            )
        elif name not in record:
            said.append(f"{name} is new: if it is meant to be public, run {UPDATE}")
        elif record[name] != found[name]:
            gone = [part for part in record[name] if part not in found[name]]
            new = [part for part in found[name] if part not in record[name]]
            if gone:
                said.append(
                    f"{name} has lost {', '.join(gone)}: bring it back, with a DeprecationWarning "
                    "if it is to go (see docs/versioning.rst)"
                )
            elif [part for part in found[name] if part in record[name]] != record[name]:
                said.append(f"{name} takes its parameters in another order: restore the old one")
            if new:
                said.append(
                    f"{name} has gained {', '.join(new)}: if it is meant to be public, run "
                    f"{UPDATE}"
                )
    return said


@pytest.fixture(scope="module")
def found():
    return surface()


def test_public_names_are_those_of_the_record(found):
    differences = compare(json.loads(RECORD.read_text()), found)
    assert not differences, "\n" + "\n".join(differences)


def test_record_holds_what_people_use(found):
    """So that a surface that finds nothing is no surface that has not changed."""
    assert found["pood_plugins.detector.GROOD"][:3] == ["encoder", "head", "*"]
    assert found["pood_plugins.detector.GROOD.explain"][0] == "x" and "--tpr" in found["pood fit"]
    assert found["pood inspect"] == ["--help", "--verbose", "DIR"]
    assert "weight" in found["pood_plugins.detector.nero_relevance"]
    assert {"GROOD", "NERO"} <= set(found["entry points pytorch_ood.detectors"])
    assert found["entry points console_scripts"] == ["pood"]
    assert "pood_plugins.evaluation.Report.failed" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda api: api.pop("f"), "f is gone: bring it back, with a DeprecationWarning"),
        (lambda api: api.update(g=[]), "g is new: if it is meant to be public, run python"),
        (lambda api: api.update(f=["a", "*"]), "f has lost b: bring it back"),
        (lambda api: api.update(f=["a", "*", "b", "c"]), "f has gained c: if it is meant"),
        (lambda api: api.update(f=["a", "b"]), r"f has lost \*: bring it back"),
        (lambda api: api.update(f=["b", "a", "*"]), "f takes its parameters in another order"),
    ],
)
def test_each_difference_is_told(change, said):
    record = {"f": ["a", "*", "b"]}
    changed = dict(record)
    change(changed)
    (sentence,) = compare(record, changed)
    assert re.match(said, sentence)
    assert compare(record, record) == []


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    RECORD.write_text(json.dumps(surface(), indent=1) + "\n")
    print(f"Recorded: {RECORD}")
