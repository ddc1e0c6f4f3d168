"""``pood finetune`` and ``pood benchmark --train``, in this process."""

import csv
import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from pood_plugins import cli
from pood_plugins.benchmark import digits
from pood_plugins.loss import GRegLoss
from pood_plugins.model.split import split_model

pytestmark = pytest.mark.usefixtures("one_thread", "trained")


@pytest.fixture(scope="module")
def classifier():
    return digits.train_classifier(digits.Digits(), epochs=2)


@pytest.fixture
def trained(classifier, monkeypatch):
    """A classifier that is there at once."""
    from pood_plugins.evaluation import digits as evaluation

    for module in (digits, evaluation):
        monkeypatch.setattr(module, "train_classifier", lambda *_, **__: deepcopy(classifier))


def finetune(folder, *arguments):
    return cli.main(["finetune", "--benchmark", "digits", "--output", str(folder), *arguments])


def test_writes_weights_history_and_settings(tmp_path, capsys, classifier):
    arguments = ["--train", "greg", "--epochs", "2", "--seed", "3", "--beta", "0.5"]
    assert finetune(tmp_path / "new", *arguments) == 0
    split = split_model(deepcopy(classifier))
    history = digits.finetune_classifier(digits.Digits(), split, "greg", 3, 2, beta=0.5)

    weights = load_file(tmp_path / "new" / "model.safetensors")
    assert weights.keys() == split.model.state_dict().keys()
    assert all(torch.equal(weights[n], t) for n, t in split.model.state_dict().items())
    digits.digits_classifier().load_state_dict(weights)
    with open(tmp_path / "new" / "history.csv", newline="") as file:
        rows = [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
        ]
    assert rows == history
    record = json.loads((tmp_path / "new" / "finetune.json").read_text())
    assert record["arguments"] == {"train": "greg", "seed": 3, "epochs": 2, "beta": 0.5}
    assert record["steps"] == 18 and "torch" in record["versions"]
    assert 0.5 < record["accuracy"] <= 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["epoch", "loss", "cross_entropy", "energy", "gradient"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    mean = sum(row["loss"] for row in history[:9]) / 9
    assert float(lines[1].split()[1]) == pytest.approx(mean, rel=1e-3)
    assert f"ID accuracy {100 * record['accuracy']:.1f} %" in lines[3]
    assert str(tmp_path) in lines[4]
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"model.safetensors", "history.csv", "finetune.json", "checkpoint.zip"}


def test_learning_rate(tmp_path):
    assert finetune(tmp_path, "--train", "ce", "--epochs", "1", "--lr", "0.002") == 0
    with open(tmp_path / "history.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["learning_rate"]) == 0.002


def test_resume_after_an_interruption(tmp_path, capsys, monkeypatch):
    arguments = ["--epochs", "2"]
    assert finetune(tmp_path / "whole", *arguments) == 0
    n_calls, terms = 0, GRegLoss.terms

    def interrupted(*given):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 13:
            raise RuntimeError("power failure")
        return terms(*given)

    with monkeypatch.context() as patch:
        patch.setattr(GRegLoss, "terms", interrupted)
        assert finetune(tmp_path / "parts", *arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "pood: power failure"
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint.zip"]
    assert finetune(tmp_path / "parts", *arguments, "--resume") == 0
    for name in ("model.safetensors", "history.csv"):
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_divergence_is_one_line(tmp_path, capsys):
    assert finetune(tmp_path, "--lr", "1e30", "--epochs", "1") == 1
    error = capsys.readouterr().err
    assert error.startswith("pood: training diverged in epoch 1, step 2: loss")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "model.safetensors").exists()


def test_damaged_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "checkpoint.zip").write_bytes(b"damaged")
    assert finetune(tmp_path, "--resume") == 1
    error = capsys.readouterr().err
    assert "checkpoint.zip is damaged" in error and len(error.splitlines()) == 1


def test_argument_that_the_loss_does_not_have(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "train_classifier", lambda *_, **__: pytest.fail("trained"))
    assert finetune(tmp_path, "--train", "energy", "--beta", "1") == 2
    assert "energy has no hyperparameter beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["finetune"],
        ["finetune", "--benchmark", "unknown"],
        ["finetune", "--benchmark", "digits", "--train", "gregg"],
        ["finetune", "--benchmark", "digits", "--epochs", "0"],
        ["finetune", "--benchmark", "digits", "--alpha", "much"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: pood" in capsys.readouterr().err


def test_unknown_training(capsys):
    assert cli.main(["benchmark", "digits", "--train", "gregg"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pood: no way to fine-tune is called 'gregg': choose ce, oe, energy")
    assert len(error.splitlines()) == 1


def test_without_safetensors(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert finetune(tmp_path) == 1
    assert "pip install 'pood-plugins[deploy]'" in capsys.readouterr().err


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    text = capsys.readouterr().out
    for option in ("--train", "--lr", "--alpha", "--beta", "--margin-in", "--resume"):
        assert option in text


def test_benchmark_of_fine_tuned_classifiers(tmp_path, capsys):
    def table(*arguments):
        command = ["benchmark", "digits", "--seeds", "1", "--output", str(tmp_path)]
        assert cli.main([*command, *arguments]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        return results["train"], {r["detector"]: r["metrics"] for r in results["results"]}

    train, tuned = table("--train", "oe", "--detectors", "energy")
    assert train == "oe"
    train, both = table("--detectors", "energy,oe->energy")
    assert train is None and list(both) == ["Energy", "OE → Energy"]
    assert both["OE → Energy"] == tuned["Energy"] != both["Energy"]
    assert "OE → Energy" in capsys.readouterr().out


def test_unknown_training_of_a_row(tmp_path, capsys):
    command = ["benchmark", "digits", "--seeds", "1", "--output", str(tmp_path)]
    assert cli.main([*command, "--detectors", "abc->energy"]) == 2
    assert "no way to fine-tune is called 'abc'" in capsys.readouterr().err
