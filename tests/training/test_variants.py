"""The ways to fine-tune that have names, and the settings that were chosen for the digits."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from pytorch_ood.loss import EnergyRegularizedLoss, OutlierExposureLoss
from torch import nn

from pood_plugins import cli
from pood_plugins.benchmark.digits import (
    FINETUNING,
    Digits,
    digits_classifier,
    finetune_classifier,
)
from pood_plugins.loss import GRegLoss
from pood_plugins.model.split import split_model
from pood_plugins.training.variants import DISPLAY_NAMES, make_criterion

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "greg_digits.json"
LOSSES = {
    "ce": nn.CrossEntropyLoss,
    "oe": OutlierExposureLoss,
    "energy": EnergyRegularizedLoss,
    "greg": GRegLoss,
    "greg+": GRegLoss,
}


def test_names_are_the_same_everywhere():
    assert list(LOSSES) == list(cli._TRAININGS) == list(DISPLAY_NAMES) == list(FINETUNING)


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_are_those_of_the_loss(name):
    criterion = make_criterion(name)
    assert type(criterion) is LOSSES[name]
    ours, theirs = vars(criterion), vars(LOSSES[name]())
    assert {n: v for n, v in ours.items() if n[0] != "_"} == {
        n: v for n, v in theirs.items() if n[0] != "_"
    }


def test_arguments_are_passed_on():
    arguments = {"alpha": 0.2, "beta": 3.0, "margin_in": -9.0, "margin_out": -2.0}
    assert set(arguments) == set(cli._LOSS_ARGUMENTS)
    criterion = make_criterion("greg", **arguments)
    assert {name: getattr(criterion, name) for name in arguments} == arguments
    assert set(arguments) <= set(inspect.signature(GRegLoss).parameters)
    assert make_criterion("oe", alpha=0.2).alpha == 0.2
    assert make_criterion("energy", margin_in=-9.0).m_in == -9.0


def test_unknown_names():
    with pytest.raises(LookupError, match="'gregg': choose ce, oe, energy, greg, greg+"):
        make_criterion("gregg")
    with pytest.raises(LookupError, match="ce has no hyperparameter alpha: it has none"):
        make_criterion("ce", alpha=1.0)
    with pytest.raises(
        LookupError, match="energy has .*beta: it has alpha, margin_in, margin_out"
    ):
        make_criterion("energy", beta=1.0)


def test_settings_are_those_that_validation_chose():
    record = json.loads(RECORD.read_text())
    assert record["chosen"] == FINETUNING
    least = record["search"]["not fine-tuned"]["accuracy"] - record["accuracy_loss"]
    for train, trials in record["search"]["trials"].items():
        good = [trial for trial in trials if trial.get("accuracy", 0) >= least]
        best = max(good, key=lambda trial: trial["AUROC"])
        assert best["settings"] == FINETUNING[train]


@pytest.fixture(scope="module")
def benchmark():
    return Digits()


def tuned(benchmark, train, seed=0, epochs=1, **arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        split = split_model(digits_classifier(width=8).eval())
    history = finetune_classifier(benchmark, split, train, seed, epochs, **arguments)
    return split, history


@pytest.mark.usefixtures("one_thread")
class TestDigits:
    @pytest.mark.parametrize("train", LOSSES)
    def test_every_way_to_fine_tune(self, benchmark, train):
        split, history = tuned(benchmark, train)
        assert len(history) == 9  # 540 digits in batches of 64
        assert history[0]["learning_rate"] == FINETUNING[train]["learning_rate"]
        assert ("gradient" in history[0]) == train.startswith("greg")
        assert not split.training

    def test_repeatable(self, benchmark):
        state = torch.get_rng_state()
        weights = [tuned(benchmark, "energy", seed)[0].head.weight for seed in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        assert torch.equal(torch.get_rng_state(), state)

    def test_settings_can_be_given(self, benchmark, tmp_path):
        _, history = tuned(
            benchmark, "greg", learning_rate=0.002, beta=0.0, checkpoint=tmp_path / "c"
        )
        row = history[0]
        assert row["learning_rate"] == 0.002 and (tmp_path / "c").exists()
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.1 * row["energy"])

    def test_same_batches_for_all_without_a_sampler(self, benchmark):
        _, energy = tuned(benchmark, "energy")
        _, greg = tuned(benchmark, "greg", **FINETUNING["energy"])
        assert energy[0]["cross_entropy"] == pytest.approx(greg[0]["cross_entropy"], rel=1e-5)

    def test_unknown_names(self, benchmark):
        with pytest.raises(LookupError, match="choose ce"):
            tuned(benchmark, "gregg")
        with pytest.raises(LookupError, match="no hyperparameter momentum"):
            tuned(benchmark, "greg", momentum=0.9)

    def test_test_sets_and_validation_are_not_used(self, benchmark, monkeypatch):
        for name in ("test_sets", "validation_set"):
            monkeypatch.setattr(benchmark, name, lambda *_, **__: pytest.fail("used"))
        tuned(benchmark, "greg")
