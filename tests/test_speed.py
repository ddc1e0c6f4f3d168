"""The script that measures speed, with tiny sizes: what it measures, and what it writes."""

import importlib
import json
import os
import sys
from pathlib import Path
from statistics import median

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
PARTS = ["grood", "neighbors", "nero", "forward", "growth", "loader", "benchmark", "skipping"]
REAL = "features of ResNet-20 on CIFAR-10"

# of faiss, when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:builtin type [Ss]wig")


@pytest.fixture
def speed(monkeypatch):
    # not as a script: the processes that the part on growth starts import it by its name
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delenv("POOD_DATA", raising=False)
    return importlib.import_module("speed")


@pytest.fixture
def run(speed, monkeypatch, tmp_path):
    def run(*arguments):
        given = ["--quick", "--repeat", "3", "--output", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", ["speed", *given])
        speed.main()
        return json.loads((tmp_path / "speed.json").read_text())["parts"]

    return run


def rows_of(part):
    """Rows with the titles of their groups."""
    return [(g["title"], name, row) for g in part["groups"] for name, row in g["rows"].items()]


def test_all_parts(run, tmp_path):
    data = os.environ.get("POOD_DATA")
    parts = run(*(["--data", data] if data else []))
    assert list(parts) == PARTS
    for name, part in parts.items():
        assert part["quick"] and part["repeat"] == 3 and part["versions"]["torch"]
        assert {"commit", "measured", "threads", "processor", "duration"} <= part.keys()
        text = (tmp_path / f"speed_{name}.md").read_text()
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1 and "no measurements" in text
        assert text.strip() in (tmp_path / "speed.md").read_text()
        real = REAL if name != "benchmark" else "the CIFAR-10 benchmark"
        assert (real in part["left_out"]) == (not data and name not in ("growth", "loader"))
        assert (f"{real} left out" in text) == (real in part["left_out"])
    assert (tmp_path / "speed_growth.png").stat().st_size > 1000

    groods = {"GROOD", "GROOD (auto)", "GROOD (float16 bank)"}
    cases = 2 if data else 1
    assert len(parts["grood"]["groups"]) == 2 * cases
    for group in parts["grood"]["groups"]:
        assert groods | {"autograd loop"} <= group["rows"].keys()
        scans = [name for name in group["rows"] if name.startswith("full scan")]
        assert len(scans) == (8 if "score" in group["title"] else 0)
        for name, bound in group.get("lower_bounds", {}).items():
            assert bound in group["rows"][name]["ratios"]

    assert len(parts["neighbors"]["groups"]) == 2 * cases
    for group in parts["neighbors"]["groups"]:
        others = {"scikit-learn, brute", "scikit-learn, default", "torch.cdist and topk"}
        others |= {"pytorch-ood's KNN", "pytorch-ood's NNGuide"}
        if "faiss" not in parts["neighbors"]["left_out"]:
            others.add("faiss IndexFlatL2")
        assert set(group["rows"]) == {"kth_distance"} | others
        assert all(list(group["rows"][name]["ratios"]) == ["kth_distance"] for name in others)
    assert parts["neighbors"]["threads_by_library"]["torch"] == parts["neighbors"]["threads"]

    nero = {name for _, name, _ in rows_of(parts["nero"])}
    assert nero == {"NERO", "loop", "PCA", "loop and PCA"}
    forward = {name.split(",")[0] for _, name, _ in rows_of(parts["forward"])}
    assert forward == {"GROOD", "NERO", "forward pass"}
    assert [g["title"][:9] for g in parts["forward"]["groups"]] == ["ResNet-20", "ResNet-50"]

    for name in ("grood", "neighbors", "nero", "forward", "skipping"):
        for group in parts[name]["groups"]:
            for row in group["rows"].values():
                seconds = row["seconds"]
                assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
                for other, ratio in row["ratios"].items():
                    of = group["rows"][other]["seconds"]["median"]
                    assert ratio["ratio"] == pytest.approx(seconds["median"] / of)
                    assert ratio["median"] == median(ratio["by_round"])
                    assert len(ratio["by_round"]) == 3

    assert len(parts["skipping"]["groups"]) == 2 * cases
    assert all(0 < group["share_compared"] <= 1 for group in parts["skipping"]["groups"])

    rows = parts["loader"]["rows"]
    assert [row["passes"] for row in rows] == [1, 2, 2, 2]
    assert [row["bank"] for row in rows] == [600, 150, 600, 150]
    if data:
        rows = parts["benchmark"]["rows"]
        assert rows[0]["share"] == 1 and len(rows) == 5 and rows[-1]["required"] == 0.05
        assert rows[-1]["seconds"] == rows[1]["seconds"] + rows[2]["seconds"]

    growth = parts["growth"]
    sizes = [(r["bank"], r["queries"], r["bank_dtype"]) for r in growth["rows"]]
    half = [(600, 10, "float16")]
    assert sizes == [*((n, 10, "float32") for n in (300, 600)), (600, 20, "float32"), *half]
    for row in growth["rows"]:
        memory = {"fit_peak_mib", "score_peak_mib", "held_mib"}
        assert memory <= row.keys() and memory == row["default_malloc"].keys()
        assert 0 < row["fit"]["min"] <= row["fit"]["median"] <= row["fit"]["max"]
    assert [row["dimension"] for row in growth["exponents"]] == [16]


def test_parts_are_kept_and_missing_data_are_said(run, tmp_path):
    where = ["--data", str(tmp_path / "nowhere")]
    before = run(*where, "--parts", "nero")
    assert "does not exist" in before["nero"]["left_out"][REAL]
    assert all(title.startswith("synthetic") for title, _, _ in rows_of(before["nero"]))
    after = run("--parts", "neighbors")
    assert after["nero"] == before["nero"] and list(after) == ["neighbors", "nero"]
    assert "no folder" in after["neighbors"]["left_out"][REAL]

    (tmp_path / "resnet20_cifar10.pt").touch()
    reason = run("--data", str(tmp_path), "--parts", "nero")["nero"]["left_out"][REAL]
    assert "lacks" in reason and "mnist_test.npz" in reason and "resnet20" not in reason
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()
    assert reason in (tmp_path / "speed_nero.md").read_text()


def test_wrong_answers_are_not_timed(run, speed, monkeypatch):
    right = speed.GROOD.predict_features
    wrong = lambda self, z: 1.01 * right(self, z)  # noqa: E731
    monkeypatch.setattr(speed.GROOD, "predict_features", wrong)
    with pytest.raises(SystemExit, match="GROOD: the score is wrong"):
        run("--parts", "grood")
    with pytest.raises(SystemExit):
        run("--parts", "unknown")
