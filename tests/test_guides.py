"""The guides of the documentation, typed from top to bottom: every command and every snippet."""

import re
import runpy
import shlex
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from pood_plugins import cli
from pood_plugins.benchmark.digits import Digits, train_classifier
from pood_plugins.dataset import HandwrittenDigits
from pood_plugins.evaluation import images as evaluation_of_images
from pood_plugins.model.zoo import load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(path.stem for path in (ROOT / "docs").glob("guide_*.rst"))
BLOCK = re.compile(r"^\.\. code-block:: (python|console)\n\n((?:    [^\n]*\n|\n)+)", re.M)
# too long to be typed in a test, or not there
NOT_TYPED = (
    "make ",
    "git ",
    "python ",
    "pood benchmark cifar10-openood",
    "pood fit --arch resnet",
)


def blocks(guide):
    """Languages and texts, in the order of the page."""
    text = (ROOT / "docs" / f"{guide}.rst").read_text("utf-8")
    return [(language, textwrap.dedent(block)) for language, block in BLOCK.findall(text)]


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def all_commands():
    return [
        (guide, command)
        for guide in GUIDES
        for language, block in blocks(guide)
        if language == "console"
        for command in commands(block)
    ]


def test_there_is_something_to_test():
    assert GUIDES == ["guide_engineer", "guide_maintainer", "guide_researcher"]
    for guide in GUIDES:
        assert {language for language, _ in blocks(guide)} == {"python", "console"}


@pytest.mark.parametrize("guide, command", all_commands())
def test_command_is_understood(guide, command):
    for part in command.split(" && "):
        first, *words = shlex.split(part)
        if first == "pood":
            cli._parser().parse_args(words)
        elif first == "python" and words[0] != "-m":
            assert (ROOT / words[0]).is_file()
        elif first == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
            assert set(words) <= set(targets)
        else:
            assert first in ("git", "cd") or words[:3] == ["-m", "pip", "install"], part


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with the digits of ``benchmarks/deployment.py --prepare digits``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deployment.py", "--prepare", "digits"])
    runpy.run_path(str(ROOT / "benchmarks" / "deployment.py"), run_name="__main__")
    return tmp_path


@pytest.fixture
def names(folder, monkeypatch):
    """What the snippets take for granted; digits in the place of CIFAR-10 and its networks."""
    digits = Digits()
    trained, _ = load_classifier("digits", "digits/model.safetensors", 6)
    for seed in range(3):
        torch.save(train_classifier(digits, seed=seed, epochs=2).state_dict(), f"seed{seed}.pt")
    run_images = evaluation_of_images.run_images

    def on_digits(name, *, root, arch, **arguments):
        if name == "folder":
            return run_images(name, root=root, arch=arch, **arguments)
        assert (name, root, arch) == ("cifar10-openood", "data", "resnet20")
        folders = {
            "train": "digits/train",
            "test": "digits/test",
            "ood": {"others": "digits/near", "flower": "digits/flower"},
            "near": ["others"],
        }
        digits = {"arch": "digits", "size": 8, "mean": [0.0], "std": [1.0]}
        return run_images("folder", folders=folders, **digits, **arguments)

    monkeypatch.setattr(evaluation_of_images, "run_images", on_digits)
    test_set = ConcatDataset(digits.test_sets())
    held_out = HandwrittenDigits("validation", range(6))
    return {
        "model": nn.Sequential(OrderedDict(features=trained[:-1], fc=trained[-1])),
        "train_loader": DataLoader(digits.train_set(), batch_size=64),
        "calibration_loader": DataLoader(held_out, batch_size=64),
        "test_loader": DataLoader(test_set, batch_size=64),
        "images": next(iter(DataLoader(digits.test_sets(known=False)[0], batch_size=64)))[0],
    }


@pytest.mark.parametrize("guide", GUIDES)
def test_guide(guide, names, capsys):
    """In one namespace and one folder, in the order of the page."""
    for language, block in blocks(guide):
        if language == "python":
            exec(compile(block, guide, "exec"), names)
            continue
        for command in commands(block):
            if not command.startswith(NOT_TYPED):
                assert cli.main(shlex.split(command)[1:]) == 0, command
    said = capsys.readouterr().out
    {
        "guide_engineer": check_engineer,
        "guide_maintainer": check_maintainer,
        "guide_researcher": check_researcher,
    }[guide](names, said)


def check_engineer(names, said):
    text = (ROOT / "docs" / "guide_engineer.rst").read_text("utf-8")
    pattern = r"with (\d+) images to calibrate .*?between ([\d.]+) and ([\d.]+) %"
    promised = "{} ID samples and, with 95% confidence, {}% to {}% of others"
    assert promised.format(*re.search(pattern, text, re.S).groups()) in said
    assert "All files are what was written." in said
    digit, flower = names["handle"](["digits/test/0/0000.png", "digits/flower/0000.png"])
    assert digit["class"] == "0" and flower["class"] is None and flower["score"] > digit["score"]
    Path("broken.png").write_bytes(b"no image")
    assert "error" in names["handle"](["broken.png"])[0]
    assert said.splitlines()[-2:] == ["False", "True"]  # test images are fine, other digits not
    assert names["flagged"].float().mean() > 0.5
    assert len(list(Path("digits", "explanations", "sheets").iterdir())) == 3


def check_maintainer(names, said):
    metrics = names["metrics"].compute()
    assert metrics["AUROC"] > 0.9
    assert said.splitlines()[-1].endswith("TMLR True")


def check_researcher(names, said):
    record = names["record"]
    assert record["weights"] == ["seed0.pt", "seed1.pt", "seed2.pt"]
    assert {"versions", "python", "machine", "threads", "commit"} <= set(record)
    assert "\n| GROOD | " in said and " ± " in said
    mean, deviation = names["report"].value("GROOD", "near", "AUROC")
    assert mean > 0.9 and deviation > 0
    assert len(names["report"].results) == 3
    for table in ("folder", "greg-table"):
        assert "Energy" in Path("results", table, "results.csv").read_text("utf-8")
