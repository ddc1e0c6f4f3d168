"""What fine-tuning with outliers brings on the digits: recorded, and still so."""

import json
from pathlib import Path

import pytest

from pood_plugins.evaluation import digits
from pood_plugins.evaluation.digits import DEFAULT_DETECTORS, run_digits

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "greg_digits.json"


def test_record_shows_that_greg_helps_and_more_training_alone_does_not():
    rows = {row["detector"]: row for row in json.loads(RECORD.read_text())["test"]["rows"]}
    greg = rows["GReg → Energy"]
    for name in ("Energy", "CE → Energy"):
        assert greg["far FPR95"][0] < rows[name]["far FPR95"][0] / 3
    assert greg["accuracy"] > rows["Energy"]["accuracy"] - 0.005


@pytest.mark.usefixtures("one_thread")
def test_greg_helps():
    """The network on which the energy score does worst."""
    report = run_digits(["Energy", "CE → Energy", "GReg → Energy"], seeds=[1])
    plain, ce, greg = (
        report.value(result.detector, "far", "FPR95")[0] for result in report.results
    )
    assert greg < min(plain, ce) / 3
    assert report.results[2].accuracy > 0.98


def test_default_rows_of_fine_tuned_classifiers(monkeypatch):
    """All are fine-tuned alike, once, so that rows that name another training are left out."""
    built, trained = [], []
    monkeypatch.setattr(digits, "train_classifier", lambda *_, **__: digits_classifier())
    monkeypatch.setattr(digits, "finetune_classifier", lambda *given: trained.append(given[2:]))
    build = lambda _, name: built.append(name) or (name, None)  # noqa: E731
    monkeypatch.setattr(digits.RowBuilder, "build", build)
    monkeypatch.setattr(digits, "run", lambda *_, **__: None)
    monkeypatch.setattr(digits.Report, "combine", lambda reports, metadata: metadata)

    from pood_plugins.benchmark.digits import digits_classifier

    assert run_digits(seeds=[4], train="greg")["train"] == "greg"
    assert built == [name for name in DEFAULT_DETECTORS if "→" not in name]
    assert trained == [("greg", 4)]
    built.clear(), trained.clear()
    assert run_digits(seeds=[4])["train"] is None
    assert built[-2:] == ["pytorch-ood:EnergyBased", "pood-plugins:GROOD"] and trained == [
        ("greg", 4)
    ]
