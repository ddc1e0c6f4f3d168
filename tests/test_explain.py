"""
``pood explain``: what it says of images, and that its pictures are drawn.
"""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pood_plugins import cli, explain
from pood_plugins.deployment import Deployed
from pood_plugins.detector.nero import Explanation
from pood_plugins.threshold import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "deployment.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("script_deployment_2", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("digits")
    script.prepare(folder)
    for name in ("NERO", "GROOD", "Energy"):
        fit, _, _ = script.commands(name, folder)
        assert cli.main([*fit[:-1], str(folder / name)]) == 0
    return folder


def run(digits, name, output, *data, **options):
    arguments = ["explain", "--detector", str(digits / name), "--output", str(output)]
    for flag, value in options.items():
        arguments += [f"--{flag.replace('_', '-')}", str(value)]
    return cli.main([*arguments, "--data", *map(str, data)])


def read(output):
    with open(output / "explanations.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_nero(digits, tmp_path, capsys):
    data = sorted((digits / "near").iterdir())[:70]
    capsys.readouterr()
    assert run(digits, "NERO", tmp_path, *data, most=3, batch_size=32) == 0
    assert capsys.readouterr().out.startswith("70 images explained.\nTable and 3 pages: ")
    rows = read(tmp_path)
    assert [row["file"] for row in rows] == [str(file) for file in data]
    deployed = Deployed.load(digits / "NERO")
    for row in rows:
        made = (float(row["distance"]) + float(row["bias"])) * float(row["feature_ratio"])
        assert made == pytest.approx(float(row["score"]), rel=1e-5)
        above = float(row["score"]) > deployed.threshold.value
        assert row["decision"] == ("OOD" if above else "ID")
        assert row["nearest_class"] in "012345" and row["predicted"] in "012345"
        neurons = row["top_neurons"].split()
        assert len(neurons) == 10 and all(n[-1] in "+-" and 0 <= int(n[:-1]) < 32 for n in neurons)
        assert not row["error"]
    scores = {row.file: row.score for row in deployed.score(data)}
    assert [float(row["score"]) for row in rows] == pytest.approx(list(scores.values()), rel=1e-3)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    pages = {f"sheets/00{i}.png" for i in (1, 2, 3)}
    assert names == {"contact.png", "scores.png", *pages}
    assert not [path for path in tmp_path.rglob(".*")]


def test_the_most_outlying_images_are_drawn(digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(explain, "plot_nero", lambda *arguments: drawn.append(arguments))
    assert run(digits, "NERO", tmp_path, digits / "near", digits / "test", most=5) == 0
    rows = sorted(read(tmp_path), key=lambda row: -float(row["score"]))
    deployed = Deployed.load(digits / "NERO")
    assert len(drawn) == 5
    for row, (explanation, index, view, path, caption, threshold) in zip(rows, drawn):
        assert index == 0 and threshold == deployed.threshold
        assert float(explanation.score) == pytest.approx(float(row["score"]), rel=1e-6)
        assert caption.startswith(Path(row["file"]).name)
        pixels = np.asarray(Image.open(row["file"])) / 255
        assert torch.allclose(view, torch.from_numpy(pixels).float(), atol=1e-6)
        # the map is of this image, and what it shows adds up
        shown = explanation.relevance[0, explanation.top_neurons[0]].sum()
        assert float(explanation.heat_map.sum()) == pytest.approx(float(shown), rel=1e-2)
        assert explanation.heat_map.shape == (1, 8, 8)


def test_grood(digits, tmp_path):
    data = sorted((digits / "test" / "4").iterdir())[:20]
    assert run(digits, "GROOD", tmp_path, *data, most=2) == 0
    deployed = Deployed.load(digits / "GROOD")
    for row in read(tmp_path):
        x = torch.from_numpy(np.asarray(Image.open(row["file"]), np.float32))[None, None] / 255
        explanation = deployed.detector.explain(x)
        names = row["neighbors"].split("; ")
        assert names == [deployed.fit_on[i] for i in explanation.neighbors[0].tolist()]
        # the gradient of that training image is as far away as is said
        neighbor = torch.from_numpy(np.asarray(Image.open(names[0]), np.float32))[None, None] / 255
        same = deployed.detector.explain(neighbor)
        assert float(same.score) == pytest.approx(0, abs=1e-6)
        assert float(row["probability"]) == pytest.approx(float(explanation.probability), rel=1e-3)
    assert len(list((tmp_path / "sheets").iterdir())) == 2


def test_neighbors_skip_what_could_not_be_read(digits, tmp_path):
    """Positions in the fitted data are those of the images that could be read."""
    import shutil

    train = tmp_path / "train"
    shutil.copytree(digits / "train", train)
    for file in sorted(train.glob("*/*.png"))[::7]:
        file.write_bytes(b"")
    arguments = ["fit", "--arch", "digits", "--weights", str(digits / "model.safetensors")]
    arguments += ["--calibration", str(digits / "validation"), "--data", str(train)]
    assert cli.main([*arguments, "--output", str(tmp_path / "GROOD")]) == 1
    files = [file for file in sorted(train.glob("*/*.png")) if file.stat().st_size][::9]
    assert run(tmp_path, "GROOD", tmp_path / "explained", *files, most=1) == 0
    # those in the bank, which are the ones that the classifier gets right
    in_bank = [row for row in read(tmp_path / "explained") if float(row["score"]) < 1e-6]
    assert len(in_bank) > 0.9 * len(files)
    assert all(row["neighbors"].split("; ")[0] == row["file"] for row in in_bank)


def test_unreadable_images_are_rows(digits, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = digits / "near" / "0000.png"
    assert run(digits, "NERO", tmp_path / "out", broken, good) == 1
    first, second = read(tmp_path / "out")
    assert first["error"] and not first["score"] and second["score"] and not second["error"]
    assert "1 images could not be explained" in capsys.readouterr().err
    assert run(digits, "NERO", tmp_path / "nothing", broken) == 1
    assert [path.name for path in (tmp_path / "nothing").iterdir()] == ["explanations.csv"]


def test_pages_of_another_run_are_removed(digits, tmp_path):
    assert run(digits, "NERO", tmp_path, digits / "near", most=4) == 0
    (tmp_path / "sheets" / "mine.png").write_bytes(b"")
    assert run(digits, "NERO", tmp_path, digits / "near", most=2) == 0
    assert {p.name for p in (tmp_path / "sheets").iterdir()} == {"001.png", "002.png", "mine.png"}


def test_output_among_the_images_and_names_that_are_no_text(digits, tmp_path, capsys):
    import os
    import shutil

    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(digits / "near" / "0000.png", os.fsencode(folder) + b"/\xff$^.png")
    assert run(digits, "NERO", folder / "explained", folder) == 1
    assert "is among the images: name another folder" in capsys.readouterr().err
    for name in ("NERO", "GROOD"):
        assert run(digits, name, tmp_path / name, folder) == 0


def test_detectors_without_explanations(digits, tmp_path, capsys):
    capsys.readouterr()
    assert run(digits, "Energy", tmp_path, digits / "near") == 2
    assert "EnergyBased has no explanations: fit GROOD or NERO" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_networks_without_heat_maps(digits, tmp_path, capsys, monkeypatch):
    real = explain._find_layer

    def find_layer(deployed, item):
        deployed.split.__dict__["stage_names"] = ["stage1"]
        return real(deployed, item)

    monkeypatch.setattr(explain, "_find_layer", find_layer)
    assert run(digits, "NERO", tmp_path, digits / "near" / "0000.png") == 0
    printed = capsys.readouterr().out
    assert "There are no heat maps: The features are not the means of the maps" in printed
    assert (tmp_path / "sheets" / "001.png").exists()


def test_without_matplotlib(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(digits, "NERO", tmp_path, digits / "near") == 1
    assert "pip install" in capsys.readouterr().err
    # data alone are there without it
    assert read(tmp_path)[0]["top_neurons"]


@pytest.mark.parametrize("heat", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["threshold", "no threshold"])
def test_pages_of_any_sample(tmp_path, heat, known):
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.rand(shape, generator=generator) - 0.3

    explanation = Explanation(
        score=numbers(2),
        nearest_class=torch.tensor([1, 0]),
        distances=numbers(2, 3),
        distance=numbers(2),
        bias=torch.zeros(2),
        feature_ratio=numbers(2),
        relevance=numbers(2, 6),
        deviation=numbers(2, 6),
        top_neurons=torch.tensor([[1, 5], [0, 2]]),
        heat_map=numbers(2, 8, 12) if heat else None,
    )
    for view in (torch.rand(8, 12), torch.rand(8, 12, 3)):
        path = tmp_path / "deep" / "page.png"
        threshold = calibrate([0.1, 0.2]) if known else None
        explain.plot_nero(explanation, 1, view, path, "one\ntwo $x^{$", threshold)
        image = np.asarray(Image.open(path).convert("L"))
        assert image.std() > 10


@pytest.mark.parametrize("scores", [[1.0], [2.0] * 9, [0.0, 1.0, 1e30], list(range(100))])
def test_scores_of_any_kind(tmp_path, scores):
    for threshold in (None, calibrate([0.5]), calibrate([1e6])):
        explain.plot_scores(torch.tensor(scores), tmp_path / "scores.png", threshold)
        assert np.asarray(Image.open(tmp_path / "scores.png").convert("L")).std() > 5


@pytest.mark.parametrize("n", [1, 3, 5])
def test_contact_sheets(tmp_path, n):
    explain.plot_contact_sheet([torch.rand(8, 8)] * n, ["a\nb"] * n, tmp_path / "contact.png")
    assert (tmp_path / "contact.png").exists()
