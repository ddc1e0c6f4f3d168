"""The script that tests explanations, with few images: that it runs, and what it computes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "explanations.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("script_explanations", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, folder, *arguments):
    given = ["--output", str(folder), "--figures", str(folder), *arguments]
    monkeypatch.setattr(sys, "argv", ["explanations", *given])
    script.main()


def test_digits(script, monkeypatch, tmp_path):
    run(script, monkeypatch, tmp_path, "--quick", "--networks", "digits")
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert [entry["ood"] for entry in content["curves"]] == ["digits 6-9", "flower", "noise"]
    for entry in content["curves"]:
        assert entry["neurons"][0] == 0 and entry["neurons"][-1] == 32
        for population in script.POPULATIONS:
            for ablation in script.ABLATIONS:
                for name in script.STATISTICS:
                    check(script, entry[population][ablation][name], name)
    assert {row["given"] for row in content["cost"]} > {"images", "features"}

    table = (tmp_path / "explanations.md").read_text()
    assert len({line.count("|") for line in table.splitlines() if "|" in line}) == 1
    assert (tmp_path / "explanations_digits.png").stat().st_size < 150_000

    # table and figures come from what was stored
    (tmp_path / "explanations.md").unlink()
    run(script, monkeypatch, tmp_path, "--draw")
    assert (tmp_path / "explanations.md").read_text() == table


def check(script, summary, name):
    curves = summary["curves"]
    for choice in script.CHOICES:
        mean, seeds = curves[choice]["mean of seeds"], curves[choice]["seeds"]
        assert len(seeds) == 3
        assert all(low <= high for low, high in zip(mean["low"], mean["high"]))
        for curve in (mean, *seeds):
            assert min(curve["value"]) >= 0
            # nothing is replaced, and then everything
            if name != "share flagged":
                assert curve["value"][0] == pytest.approx(1, rel=1e-4)
            all_replaced = [curves[c]["mean of seeds"]["value"][-1] for c in script.CHOICES]
            assert all_replaced == pytest.approx([all_replaced[0]] * 3, rel=1e-3, abs=1e-6)
    areas = summary["areas"]
    difference = areas["random - top deviation"]["value"]
    apart = areas["random"]["value"] - areas["top deviation"]["value"]
    assert difference == pytest.approx(apart, rel=1e-3, abs=1e-3)


def test_without_data(script, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("POOD_DATA", raising=False)
    run(script, monkeypatch, tmp_path, "--quick", "--networks", "resnet20")
    assert "resnet20 needs the data" in capsys.readouterr().out


def test_counts(script):
    assert script.counts(32) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert script.counts(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_median_is_that_of_the_resample(script):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(9, 3, generator=generator).double()
    weights = script.resample(9, 50, 0)
    assert (weights[0] == 1).all() and (weights.sum(dim=1) == 9).all()
    medians = script.weighted_median(values, weights)
    means = script.weighted_mean(values, weights)
    for weight, middle, mean in zip(weights.long(), medians, means):
        repeated = values.repeat_interleave(weight, dim=0)
        assert middle == repeated.median()
        assert mean == pytest.approx(float(repeated.mean()))


@pytest.fixture
def fitted(script, blobs):
    split = torch.nn.Module()
    split.encoder, split.head = torch.nn.Identity(), blobs.head
    return script.Fitted.on(split, blobs.z, blobs.y, blobs.z_in)


def test_score_of_the_relevance_that_is_there(script, fitted, blobs):
    with torch.no_grad():
        relevance = script.relevance_of(fitted.detector, blobs.z_out)
        score = script.score_of(fitted.detector, *relevance, blobs.z_out)
    expected = fitted.detector.predict_features(blobs.z_out)
    torch.testing.assert_close(score.float(), expected, rtol=1e-5, atol=0)


def test_replaced_neurons_one_by_one(script, fitted, blobs):
    z = blobs.z_out[:10]
    ablated = script.ablate(fitted, z, draws=2, seed=0)
    detector = fitted.detector
    explanation = detector.explain_features(z, n_neurons=z.shape[1])
    at = ablated.neurons.index(3)
    for i, row in enumerate(z):
        c = int(explanation.nearest_class[i])
        assert detector.classes_[c] == c
        mean = blobs.z[blobs.y == c].mean(dim=0)
        for choice, deviation in (
            (script.TOP, explanation.deviation[i]),
            (script.PLAIN, row - mean),
        ):
            moved = row.clone()
            for d in sorted(range(len(row)), key=lambda d: -abs(float(deviation[d])))[:3]:
                moved[d] = mean[d]
            expected = float(detector.predict_features(moved[None]))
            found = float(ablated.scores["features"][choice][at, i, 0])
            assert found == pytest.approx(expected, rel=1e-5)


def test_verdict(script):
    neurons = [0, 1, 2, 3, 4, 6, 8]

    def verdict(separated, reverse=()):
        return script.verdict({"separated at": separated, "reversed at": reverse}, neurons)

    assert verdict([1, 2, 3, 4]) == verdict([1, 2, 3, 4, 6]) == "yes"
    assert verdict([6]) == "no"
    assert verdict([1, 3, 4], [2]) == "no, at 1, 3–4; worse at 2"
