"""Tables, files and pictures say what the results say."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from pytorch_ood.metrics import OODMetrics

from pood_plugins.evaluation import Report, plots
from pood_plugins.evaluation.plots import _ranks, roc_curve
from pood_plugins.evaluation.report import METRICS, Result, _write
from pood_plugins.evaluation.statistics import bootstrap

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_values_that_are_not_there(report):
    wrong = [("nobody", "x", "AUROC"), ("a", "SVHN", "AUROC"), ("a", "x", "accuracy")]
    for detector, column, metric in wrong:
        with pytest.raises(KeyError):
            report.value(detector, column, metric)
    report.near_ood_names = []
    with pytest.raises(KeyError, match="near"):
        report.value("a", "near", "AUROC")


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


# sets and parts of sets


def test_remarks_in_all_forms(report, tmp_path):
    report.notes = {"x": "3 of 5 images", "z": "cropped"}
    report.missing = {"SVHN": "no list", "LSUN": "2 images missing"}
    remarks = [
        "Near-OOD: x. Far-OOD: y, z.",
        "x: 3 of 5 images. z: cropped.",
        "Missing: SVHN (no list); LSUN (2 images missing).",
    ]
    assert report.remarks == remarks
    assert report.to_text().endswith("\n" + "\n".join(remarks) + "\n")
    assert report.to_markdown().endswith("|\n\n" + "\n\n".join(remarks) + "\n")
    report.to_json(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["missing"] == report.missing and content["notes"] == report.notes
    combined = Report.combine([report, report])
    assert combined.remarks == remarks


def test_remarks_only_where_there_is_something_to_say(report):
    assert report.remarks == []
    assert report.to_markdown().endswith("|\n") and not report.to_text().endswith("\n\n")
    report.notes, report.near_ood_names = {"y": "few"}, []
    assert report.remarks == ["Near-OOD: none. Far-OOD: y, z.", "y: few."]
    report.notes, report.missing = {}, {"SVHN": "no list"}
    assert report.remarks == ["Near-OOD: none. Far-OOD: y, z.", "Missing: SVHN (no list)."]


def test_a_part_of_the_images_is_marked_and_never_best(tmp_path):
    report = make({"part": dict(x=0.9, y=0.9, z=0.9), "all": dict(x=0.5, y=0.5, z=0.5)})
    report.results[0].images = 1500
    header, _, part, whole = report.to_markdown().splitlines()
    assert part.startswith("| part [1,500 images] | 90.0 / 90.0 |") and "**" not in part
    assert whole.startswith("| all | **50.0** / **50.0** |")
    assert "part [1,500 images]" in report.to_text() and "*90.0" not in report.to_text()
    report.to_json(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert [r["images"] for r in content["results"]] == [1500, None]
    assert list(report.frame["images"][:4]) == [1500] * 4


def test_only_parts_of_the_images():
    report = make({"part": dict(x=0.9, y=0.9, z=0.9)})
    report.results[0].images = 10
    assert "**" not in report.to_markdown()


def test_combined_parts_stay_parts():
    first, second = (make({"a": dict(x=0.5, y=0.6, z=0.8)}) for _ in range(2))
    for report in (first, second):
        report.results[0].images, report.results[0].baseline = 10, True
    combined = Report.combine([first, second])
    assert combined.results[0].images == 10 and combined.results[0].baseline
    assert "**" not in combined.to_markdown() and "[10 images]" in combined.to_markdown()
    second.results[0].images = None
    with pytest.raises(ValueError, match="numbers of images"):
        Report.combine([first, second])


# intervals


def draw(separation, n=120, seed=0):
    """Scores of ID and OOD samples whose means are that many standard deviations apart."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return scores[0], scores[1] + separation


def auroc(scores_id, scores_ood):
    return float((scores_ood[:, None] > scores_id).double().mean())


def row(name, *separations, **attributes):
    """A row with scores for x, y and z, and their metrics."""
    first = attributes.pop("seed", 0)
    result = Result(name, "Class", **{"baseline": True, **attributes})
    for seed, (ood, separation) in enumerate(zip("xyz", separations)):
        scores = draw(separation, n=result.images or 120, seed=first + seed)
        threshold = scores[1].sort().values[6]  # 5 % of 120 are below
        metrics = dict.fromkeys(METRICS, auroc(*scores))
        result.add(
            ood, {**metrics, "FPR95": float((scores[0] >= threshold).double().mean())}, *scores
        )
    return result


def resampled(*rows):
    report = Report(rows, ["x", "y", "z"], near_ood_names=["x"], far_ood_names=["y", "z"])
    report.bootstrap(n=300)
    return report


def compared():
    """One row clearly better than the best baseline, one alike, one clearly worse, and others."""
    return resampled(
        row("best", 1.0, 1.0, 1.0),
        row("second", 0.0, 0.0, 0.0),
        row("better", 2.5, 2.5, 2.5, baseline=False),
        row("alike", 1.0, 1.0, 1.0, baseline=False, seed=30),
        row("worse", 0.2, 0.2, 0.2, baseline=False),
        row("part", 3.0, 3.0, 3.0, images=60),
        Result("broken", "Class", error="ValueError: why", baseline=True),
    )


def test_intervals_contain_the_value():
    report = compared()
    for result in report.results[:-1]:
        for column in report.columns + ["near"]:
            for metric in ("AUROC", "FPR95"):
                low, high = report.interval(result.detector, column, metric)
                value, _ = report.value(result.detector, column, metric)
                assert 0 <= low <= value <= high <= 1
                assert low < high


def test_intervals_of_means():
    """The near mean is over one set; the far mean over two that share their ID samples."""
    report = resampled(row("a", 1.0, 0.5, 2.0))
    assert report.interval("a", "near", "AUROC") == report.interval("a", "x", "AUROC")
    scores = report.results[0].scores
    parts = [bootstrap([scores["xyz"[i]]], n=300, stream=i)[0][0] for i in (1, 2)]
    expected = torch.stack(parts).mean(dim=0).quantile(torch.tensor([0.025, 0.975]).double())
    assert report.interval("a", "far", "AUROC") == pytest.approx(tuple(expected.tolist()))
    widths = []
    for column in ("y", "far"):
        low, high = report.interval("a", column, "AUROC")
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_intervals_repeat_and_depend_on_the_seed():
    first, second, other = (resampled(row("a", 1.0, 1.0, 1.0)) for _ in range(3))
    other.bootstrap(n=300, seed=1)
    intervals = [report.interval("a", "far", "AUROC") for report in (first, second, other)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_no_intervals_before_bootstrap(report):
    with pytest.raises(KeyError):
        report.interval("a", "x", "AUROC")
    with pytest.raises(KeyError, match="AUPR-IN"):
        resampled(row("a", 1.0, 1.0, 1.0)).interval("a", "x", "AUPR-IN")
    assert "AUROC_low" not in report.frame.columns and "vs" not in report.to_markdown()


def test_best_baseline():
    report = compared()
    # neither the better row that is no baseline, nor that of few images, nor the one that failed
    assert report.best_baseline("x") == report.best_baseline("far") == "best"
    report.results[1].metrics["y"]["AUROC"] = report.results[1].metrics["z"]["AUROC"] = 0.99
    assert report.best_baseline("far") == "second" and report.best_baseline("x") == "best"
    report.near_ood_names = []
    assert report.best_baseline("near") is None
    for result in report.results:
        result.baseline = False
    assert report.best_baseline("x") is None


def test_differences_have_a_sign():
    report = compared()
    for column in ("x", "near", "far"):
        better, alike, worse = (report.difference(r, column) for r in ("better", "alike", "worse"))
        assert 0 < better.low < better.mean < better.high and better.clear
        assert alike.low < 0 < alike.high and not alike.clear
        assert worse.low < worse.mean < worse.high < 0 and worse.clear
        value = {r: report.value(r, column, "AUROC")[0] for r in ("best", "better", "worse")}
        assert better.mean == pytest.approx(value["better"] - value["best"], abs=0.01)
        assert worse.mean == pytest.approx(value["worse"] - value["best"], abs=0.01)
        # nothing to compare: with itself, on other images, or without scores
        assert [report.difference(r, column) for r in ("best", "part", "broken")] == [None] * 3


def test_differences_are_marked_in_tables():
    report = compared()
    header, _, *lines, blank, remark = report.to_markdown().splitlines()
    assert (blank, remark) == ("", "broken failed: ValueError: why")
    assert "| near vs best | far vs best | ID accuracy |" in header
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[5:7] for line in lines}
    for name, sign in {"better": "▲ +", "worse": "▼ -", "second": "▼ -", "alike": "≈ "}.items():
        assert all(cell.startswith(sign) for cell in cells[name]), (name, cells[name])
    difference = report.difference("better", "near")
    mean, low, high = (100 * v for v in (difference.mean, difference.low, difference.high))
    assert cells["better"][0] == f"▲ {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    assert cells["best"] == cells["part [60 images]"] == cells["broken"] == ["", ""]
    text = report.to_text().splitlines()
    assert [line for line in text if "▲" in line] == [line for line in text if "better" in line]
    assert sum("≈" in line for line in text) == 1 and sum("▼" in line for line in text) == 2
    # failed rows have as many cells as the others
    assert len({line.count("|") for line in [header, *lines]}) == 1


def test_tables_without_baseline():
    report = resampled(row("mine", 1.0, 1.0, 1.0, baseline=False))
    assert " vs " not in report.to_markdown()
    assert not any(sign in report.to_text() for sign in "▲▼≈")
    assert report.interval("mine", "far", "AUROC")[0] > 0.5


def test_statistics_in_files(tmp_path):
    report = compared()
    report.to_csv(tmp_path / "results.csv")
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert header.split(",") == [
        *["detector", "dataset", "AUROC", "AUPR-IN", "AUPR-OUT", "FPR95"],
        *["AUROC_low", "AUROC_high", "FPR95_low", "FPR95_high", "best_baseline"],
        *["AUROC_difference", "AUROC_difference_low", "AUROC_difference_high"],
        *["images", "accuracy", "fit_seconds", "score_seconds", "error"],
    ]
    assert lines[-1] == "broken" + "," * 18 + "ValueError: why"
    lines = report.frame.set_index(["detector", "dataset"])
    for column in report.columns:
        better, best = lines.loc["better", column], lines.loc["best", column]
        assert better["AUROC_low"] < better["AUROC"] < better["AUROC_high"]
        assert better["best_baseline"] == "best" and better["AUROC_difference_low"] > 0
        assert best["best_baseline"] is None or best["best_baseline"] != best["best_baseline"]
        assert math.isnan(best["AUROC_difference"])
    report.to_json(tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    statistics = results[2]["statistics"]["far"]
    assert (statistics["AUROC_low"], statistics["AUROC_high"]) == (
        report.interval("better", "far", "AUROC")
    )
    assert statistics["AUROC_difference"] == report.difference("better", "far").mean
    assert results[0]["statistics"]["far"]["AUROC_difference"] is None
    assert "statistics" not in results[-1] and results[-1]["error"] == "ValueError: why"


def test_combined_reports_are_not_resampled():
    combined = Report.combine([compared(), compared()])
    with pytest.raises(ValueError, match="before combining"):
        combined.bootstrap()
    assert "AUROC_low" not in combined.frame.columns


def test_reports_of_failures_can_be_resampled():
    report = resampled(Result("broken", "Class", error="why"))
    assert report.best_baseline("x") is None and report.difference("broken", "x") is None
    assert "failed" in report.to_text()


# pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = plots._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def test_intervals_are_drawn(figures, tmp_path):
    report = compared()
    paths = report.plot(tmp_path)
    assert [path.name for path in paths] == ["roc.png", "scores.png", "intervals.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in paths)
    axes = figures[-1].axes
    assert [axis.get_title() for axis in axes] == ["x", "y", "z"]
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["second", "worse", "best", "alike", "better", "part"]  # the failed one is not
    marks = [line for line in axes[0].lines if line.get_marker() != "None"]
    assert [line.get_marker() for line in marks] == [
        plots._ARROW,
        plots._ARROW,
        "o",
        "D",
        "D",
        "o",
    ]
    filled = [line.get_fillstyle() == "full" for line in marks]
    assert filled == [True, True, False, False, True, False]
    ends = axes[0].lines[0].get_xdata()
    assert tuple(ends) == pytest.approx(
        tuple(100 * end for end in report.interval("second", "x", "AUROC"))
    )
    (best,) = [line for line in axes[0].lines if line.get_linestyle() == "--"]
    assert best.get_xdata()[0] == pytest.approx(100 * report.value("best", "x", "AUROC")[0])


def test_intervals_without_baseline(figures, tmp_path):
    report = resampled(
        row("mine", 1.0, 1.0, 1.0, baseline=False), Result("broken", "Class", error="why")
    )
    plots.plot_intervals(report, tmp_path / "intervals.png")
    assert (tmp_path / "intervals.png").read_bytes().startswith(b"\x89PNG")
    assert len(figures[0].axes[0].lines) == 2  # the interval and its mark


def test_names_with_dollars_are_no_formulas(figures, tmp_path):
    report = resampled(row("$x^{$", 1.0, 1.0, 1.0), row("$", 2.0, 1.0, 1.0))
    report.plot(tmp_path)
    labels = [label.get_text() for label in figures[-1].axes[0].get_yticklabels()]
    assert sorted(labels) == [r"\$", r"\$x^{\$"]


def test_rows_left_of_the_axis_are_marked_at_its_edge(figures, tmp_path):
    good = [row(f"row {i}", 2.0 + i / 10, 2.0, 2.0) for i in range(3)]
    report = resampled(row("guess", -0.5, 2.0, 2.0), *good)
    plots.plot_intervals(report, tmp_path / "intervals.png")
    first, second = figures[0].axes[:2]
    left, _ = first.get_xlim()
    assert 100 * report.value("guess", "x", "AUROC")[0] < left
    arrows = [line for line in first.lines if line.get_marker() == plots._ARROW]
    assert len(arrows) == 1 and not arrows[0].get_clip_on()
    assert list(arrows[0].get_xdata()) == [left] and list(arrows[0].get_ydata()) == [0]
    assert arrows[0].get_fillstyle() == "full"  # it is clearly worse
    assert not any(line.get_marker() == plots._ARROW for line in second.lines)
    for line in first.lines:
        if line.get_marker() == "o":
            assert line.get_xdata()[0] >= left


def roc_names(figure):
    legend = figure.legends[0]
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


def test_few_curves_are_all_drawn(figures, tmp_path):
    rows = [row(f"row {i}", 1.0, 1.0, 1.0) for i in range(12)]
    plots.plot_roc(rows, ["x", "y"], tmp_path / "roc.png")
    assert roc_names(figures[0]) == ([r.detector for r in rows], "")
    assert [len(axis.lines) for axis in figures[0].axes] == [12, 12]


def test_of_many_curves_the_most_telling_are_drawn(figures, tmp_path):
    baselines = [row(f"base {i}", 1.0, i / 10, 1.0) for i in range(14)]
    mine = [row(f"mine {i}", 0.0, 0.0, 0.0, baseline=False) for i in range(3)]
    plots.plot_roc([*baselines[:7], *mine, *baselines[7:]], ["x", "y"], tmp_path / "roc.png")
    names, title = roc_names(figures[0])
    best = [f"base {i}" for i in range(13, 4, -1)]
    assert names == ["mine 0", "mine 1", "mine 2", *best]
    assert title == "12 of 17 detectors, the table has all"
    assert [len(axis.lines) for axis in figures[0].axes] == [12, 12]
    many = [row(f"mine {i}", 1.0, 1.0, 1.0, baseline=False) for i in range(15)]
    plots.plot_roc([*baselines[-1:], *many], ["x"], tmp_path / "roc.png")
    assert roc_names(figures[1])[0] == [f"mine {i}" for i in range(12)]
