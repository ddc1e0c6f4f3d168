"""The figures of the README: recorded, and still what the code gives."""

import json
import re
from pathlib import Path

import pytest

from pood_plugins import registry
from pood_plugins.evaluation.digits import DEFAULT_DETECTORS, run_digits

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "digits.json"


@pytest.fixture(scope="module")
def report():
    return run_digits()


def far_auroc(recorded, detector):
    """Mean over far sets and seeds."""
    entry = next(e for e in recorded["results"] if e["detector"] == detector)
    values = [value for name in recorded["far"] for value in entry["metrics"][name]["AUROC"]]
    return sum(values) / len(values)


def shown(match):
    return registry.display_name(match[1])


def test_every_default_row_is_there(report):
    rows = [re.sub(r"[\w-]+:(\w+)", shown, name) for name in DEFAULT_DETECTORS]
    assert [r.detector for r in report.results] == rows
    assert not report.failed


def test_networks_classify(report):
    for part in report._parts:
        assert part.results[0].accuracy >= 0.97


@pytest.mark.parametrize("detector", ["GROOD", "NERO"])
def test_quality_floor(report, detector):
    recorded = json.loads(RECORD.read_text())
    value = report.value(detector, "far", "AUROC")[0]
    assert value >= 0.80
    assert value >= far_auroc(recorded, detector) - 0.03


def test_example_outliers_help_on_far_sets(report):
    with_outliers = report.value("GROOD (outliers)", "far", "AUROC")[0]
    assert with_outliers > report.value("GROOD", "far", "AUROC")[0]


def test_same_figures_twice(report):
    again = run_digits(["GROOD", "NERO", "KNN"], seeds=[0])
    for result in again.results:
        first = next(r for r in report._parts[0].results if r.detector == result.detector)
        assert first.metrics == result.metrics


def test_readme_shows_the_record():
    table = (ROOT / "benchmarks" / "results" / "digits.md").read_text()
    assert table.strip() in (ROOT / "README.md").read_text()
