"""What README.md and the first page of the documentation tell people to type."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pood_plugins import cli
from pood_plugins.benchmark.digits import Digits, train_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (ROOT / "docs" / "index.rst").read_text(encoding="utf-8")
MARKDOWN_BLOCK = r"^```{language}\n(.*?)^```$"
RST_BLOCK = r"^\.\. code-block:: {language}\n\n((?:    [^\n]*\n|\n)+)"


def blocks(language):
    """Of both pages, as lists of texts."""
    pages = {"README.md": (README, MARKDOWN_BLOCK), "index.rst": (INDEX, RST_BLOCK)}
    return {
        name: [
            textwrap.dedent(block)
            for block in re.findall(pattern.format(language=language), text, re.M | re.S)
        ]
        for name, (text, pattern) in pages.items()
    }


def commands():
    """Lines after the prompt, those that go on in the next line in one."""
    lines = [line for page in blocks("console").values() for block in page
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


# commands


def check(command):
    """Fail if a command is none."""
    first, *words = shlex.split(command)
    if first == "torchrun":
        position = words.index("pood_plugins.cli")
        assert words[position - 1] == "-m"
        first, words = "pood", words[position + 1 :]
    if first == "pood":
        cli._parser().parse_args(words)
    elif first == "python":
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets), f"make has no target {words}"
    else:
        assert first == "git", f"nothing is known of {command!r}"


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command):
    check(command)


def test_commands_in_the_text_exist():
    """Those that are named in passing, without all of their arguments."""
    for text in re.findall(r"`((?:pood|make) [^`]*)`", README):
        first, *words = text.split()
        if first == "make":
            check(text)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
            cli.main([words[0], "--help"])
        assert stop.value.code == 0
        for word in words:
            assert not word.startswith("--") or word in out.getvalue().split(), text


@pytest.mark.parametrize(
    "command",
    [
        "pood fit --archs resnet18",
        "pood scores x",
        "python benchmarks/nothing.py",
        "make nothing",
        "torchrun -m pood_plugins.cli benchmark",
        "conda install pood",
    ],
)
def test_wrong_commands_are_noticed(command, capsys):
    with pytest.raises((SystemExit, AssertionError)):
        check(command)


def test_commands_of_the_readme_do_what_it_says(tmp_path, monkeypatch, capsys):
    """From digits as PNG files to explanations, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    typed = [shlex.split(command) for command in commands() if " digits/" in f"{command} "]
    assert [words[1] for words in typed] == ["fit", "score", "inspect", "explain"]
    assert "python benchmarks/deployment.py --prepare digits" in commands()
    spec = importlib.util.spec_from_file_location(
        "script_deployment", ROOT / "benchmarks" / "deployment.py"
    )
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["deployment.py", "--prepare", "digits"])
    script.main()
    capsys.readouterr()
    said = {}
    for words in typed:
        assert cli.main(words[1:]) == 0
        said[words[1]] = capsys.readouterr().out
    (claim,) = re.findall(r"`(accepts [^`]*)`", README)
    assert " ".join(claim.split()) in said["fit"]
    lines = Path("digits", "scores.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split(",")[:2] == ["file", "score"] and len(lines) == 1 + 328 + 1000
    assert f"{len(lines) - 1} images scored" in said["score"]
    assert "All files are what was written." in said["inspect"]
    assert list(Path("digits", "explanations").glob("*.png"))


# python


@pytest.fixture
def names():
    """What the snippets take for granted: a trained classifier, loaders and a benchmark."""
    benchmark = Digits()
    trained = train_classifier(benchmark, epochs=3)
    known, unknown = (
        DataLoader(dataset, batch_size=64, shuffle=True)
        for dataset in (benchmark.train_set(), benchmark.outlier_set())
    )
    return {
        "model": nn.Sequential(OrderedDict(features=trained[:-1], fc=trained[-1])),
        "benchmark": benchmark,
        "train_loader": known,
        "id_loader": known,
        "outlier_loader": unknown,
        "images": next(iter(unknown))[0],
    }


def execute(block, names):
    if not torch.cuda.is_available():
        block = block.replace('"cuda"', '"cpu"')
    exec(compile(block.replace("epochs=20", "epochs=1"), "snippet", "exec"), names)
    if "scores" in names and "known" not in names:  # before anything is trained
        names["known"] = torch.cat([names["detector"](x) for x, _ in names["train_loader"]])


@pytest.mark.parametrize("page", ["README.md", "index.rst"])
def test_snippets_run(page, names, capsys):
    weights = names["model"].fc.weight.clone()
    snippets = blocks("python")[page]
    for snippet in snippets:
        execute(snippet, names)

    table = capsys.readouterr().out
    for detector in names["detectors"]:
        assert f"\n| {detector} | " in table
    assert {"GROOD", "NERO", "Energy"} <= set(names["detectors"]) and not names["report"].failed

    scores = names["scores"]
    assert scores.shape == (len(names["images"]),) and scores.isfinite().all()
    assert scores.median() > names["known"].median()  # larger = more outlying

    trained = any("finetune(" in snippet for snippet in snippets)
    assert trained == (page == "README.md")
    assert torch.equal(names["model"].fc.weight, weights) != trained
