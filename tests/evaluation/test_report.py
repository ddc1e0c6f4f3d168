"""Tables, files and pictures say what the results say."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from pytorch_ood.metrics import OODMetrics

from pood_plugins.evaluation import Report
from pood_plugins.evaluation.plots import _ranks, roc_curve
from pood_plugins.evaluation.report import METRICS, Result, _write


def make(values, error=None, accuracy=0.9):
    """A report whose metrics are all the given value, per detector and OOD set."""
    results = []
    for name, sets in values.items():
        result = Result(name, "Class", accuracy=accuracy, fit_seconds=1.0, score_seconds=0.5)
        for ood, value in sets.items():
            scores = torch.arange(4.0)
            result.add(ood, dict.fromkeys(METRICS, value), scores, scores + value)
        results.append(result)
    if error:
        results.append(Result("broken", "Class", error=error))
    return Report(results, ["x", "y", "z"], near_ood_names=["x"], far_ood_names=["y", "z"])


@pytest.fixture
def report():
    return make({"a": dict(x=0.5, y=0.6, z=0.8), "b": dict(x=0.7, y=0.4, z=0.2)})


def test_means(report):
    assert report.value("a", "far", "AUROC") == (pytest.approx(0.7), None)
    assert report.value("a", "near", "FPR95") == (0.5, None)
    assert report.columns == ["x", "y", "z", "far"]


def test_best_is_marked_by_metric(report):
    lines = report.to_markdown().splitlines()
    assert lines[0].count("|") == lines[2].count("|")
    # higher AUROC is better, lower FPR95 is better
    assert "**50.0**" in lines[2] and "50.0 / **50.0**" in lines[2]
    assert "**70.0** / 70.0" in lines[3]
    assert "40.0 / **40.0**" in lines[3]
    assert "*70.0" in report.to_text()


def test_ties_as_printed_are_all_marked():
    report = make({"a": dict(x=0.50001, y=0.5, z=0.5), "b": dict(x=0.5, y=0.4, z=0.5)})
    assert report.to_markdown().count("**50.0** / **50.0**") >= 4


def test_failed_detectors_are_rows(report):
    report = make({"a": dict(x=0.5, y=0.6, z=0.8)}, error="ValueError: why")
    assert "failed" in report.to_markdown().splitlines()[-1]
    assert report.frame.iloc[-1]["error"] == "ValueError: why"
    assert [r.detector for r in report.failed] == ["broken"]


def test_combine():
    first = make({"a": dict(x=0.5, y=0.6, z=0.8)}, accuracy=0.8)
    second = make({"a": dict(x=0.7, y=0.6, z=0.6)}, accuracy=1.0)
    combined = Report.combine([first, second])
    mean, std = combined.value("a", "x", "AUROC")
    assert mean == pytest.approx(0.6) and std == pytest.approx(math.sqrt(2) / 10)
    assert combined.value("a", "far", "AUROC") == (
        pytest.approx(0.65),
        pytest.approx(math.sqrt(2) / 20),
    )
    assert combined.results[0].accuracy == pytest.approx(0.9)
    assert "60.0 ± 14.1" in combined.to_markdown()
    assert combined.frame.iloc[0]["AUROC_std"] == pytest.approx(math.sqrt(2) / 10)


def test_combine_keeps_failures():
    good = make({"a": dict(x=0.5, y=0.6, z=0.8)})
    bad = make({"a": dict(x=0.5, y=0.6, z=0.8)})
    bad.results[0].error = "RuntimeError: seed 1"
    assert Report.combine([good, bad]).failed[0].error == "RuntimeError: seed 1"


def test_combine_refuses_other_detectors(report):
    with pytest.raises(ValueError, match="same detectors"):
        Report.combine([report, make({"a": dict(x=0.5, y=0.6, z=0.8)})])


def test_files(report, tmp_path):
    report.save(tmp_path / "new")
    files = {file.name for file in (tmp_path / "new").iterdir()}
    assert files == {
        "results.csv",
        "results.json",
        "results.md",
        "roc.png",
        "scores.png",
    }
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["far"] == ["y", "z"]
    assert content["versions"]["torch"] == version("torch")
    assert content["threads"] == torch.get_num_threads()
    assert content["results"][0]["metrics"]["x"]["AUROC"] == [0.5]
    text = (tmp_path / "new" / "results.csv").read_text()
    assert text.splitlines()[1].startswith("a,x,0.500000,")
    assert (tmp_path / "new" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_failures_only(tmp_path):
    report = Report([Result("broken", "Class", error="why")], ["x"])
    assert report.plot(tmp_path) == []


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    _write(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        _write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_roc_curve_has_the_area_of_upstream():
    generator = torch.Generator().manual_seed(0)
    scores_id = torch.randint(0, 20, (200,), generator=generator).double()
    scores_ood = torch.randint(5, 25, (150,), generator=generator).double()
    fpr, tpr = roc_curve(scores_id, scores_ood)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    metrics = OODMetrics()
    labels = torch.cat([torch.zeros(200), -torch.ones(150)]).long()
    metrics.update(torch.cat([scores_id, scores_ood]), labels)
    assert float(torch.trapezoid(tpr, fpr)) == pytest.approx(metrics.compute()["AUROC"])


def test_ranks_treat_ties_alike():
    low, high = _ranks(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 5.0]))
    assert low.tolist() == [0.375, 0.375] and high.tolist() == [0.375, 0.875]
