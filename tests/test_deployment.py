"""
From a trained classifier to decisions about images, with the commands of a user, on digits as PNG
files.
"""

import csv
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pood_plugins import cli, deployment, persistence, registry
from pood_plugins.benchmark.digits import digits_classifier
from pood_plugins.dataset import HandwrittenDigits
from pood_plugins.deployment import Deployed, Row
from pood_plugins.model import split_model
from pood_plugins.threshold import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "script_deployment", ROOT / "benchmarks" / "deployment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(script, tmp_path_factory):
    """Images and weights, as the documentation has them written."""
    folder = tmp_path_factory.mktemp("digits")
    script.prepare(folder)
    return folder


@pytest.fixture
def fit_arguments(script, digits, tmp_path):
    fit, _, _ = script.commands("GROOD", digits)
    return [*fit[: fit.index("--output")], "--output", str(tmp_path / "detector")]


@pytest.fixture(scope="module")
def detector(script, digits):
    """A directory that pood fit wrote."""
    fit, _, _ = script.commands("GROOD", digits)
    assert cli.main(fit) == 0
    return digits / "detector"


def replaced(arguments, **values):
    """The arguments with others, None for without."""
    arguments = list(arguments)
    for name, value in values.items():
        flag = f"--{name}"
        if flag in arguments:
            i = arguments.index(flag)
            del arguments[i : i + 2]
        if value is not None:
            arguments += [flag, *map(str, value if isinstance(value, list) else [value])]
    return arguments


def read(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def model_of(digits):
    model = digits_classifier()
    model.load_state_dict(load_file(digits / "model.safetensors"))
    return model.eval()


# fit

OWN_DIGITS = "pood_plugins.benchmark.digits:digits_classifier"


def test_fit_says_what_it_did(fit_arguments, tmp_path, capsys):
    assert cli.main(fit_arguments) == 0
    printed = capsys.readouterr().out
    assert "GROOD was fitted on 540 images." in printed
    assert "The classifier is right on" in printed and "of 215 ID samples" in printed
    config = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert config["classifier"]["classes"] == list("012345")
    assert config["classifier"]["preprocessing"]["channels"] == 1
    assert config["threshold"]["n_id"] == 215


def test_fitted_detector_is_that_of_the_same_images(detector, digits):
    """The oracle reads nothing from files: the digits as they are, and the detector by itself."""
    deployed = Deployed.load(detector)
    split = split_model(model_of(digits))

    def stack(part):
        pairs = list(HandwrittenDigits(part, range(6)))
        x = (255 * torch.stack([x for x, _ in pairs])).byte().float() / 255  # as PNG has them
        return x, torch.tensor([y for _, y in pairs])

    with torch.no_grad():
        (x, y), (x_validation, _) = stack("train"), stack("validation")
        expected = registry.build("GROOD", split).fit_features(split.encoder(x), y)
        scores = expected.predict(x_validation)
    threshold = calibrate(scores)
    assert deployed.threshold.n_id == 215
    assert deployed.threshold.value == pytest.approx(threshold.value, rel=1e-5)
    assert deployed.threshold.tpr_interval == pytest.approx(threshold.tpr_interval)
    assert torch.equal(deployed.detector(x_validation), scores)


def test_holding_out(fit_arguments, tmp_path, capsys):
    fits = {}
    for seed in (0, 0, 1):
        arguments = replaced(fit_arguments, calibration=None, holdout=0.25, seed=seed)
        assert cli.main(arguments) == 0
        config = json.loads((tmp_path / "detector" / "config.json").read_text())
        fits.setdefault(seed, []).append(config["threshold"])
    assert fits[0][0] == fits[0][1] != fits[1][0]
    # a quarter of each class of about 90
    assert 540 / 4 - 6 <= fits[0][0]["n_id"] <= 540 / 4
    assert f"fitted on {540 - fits[0][0]['n_id']} images" in capsys.readouterr().out
    for holdout in (0.0, 1.0, 0.001):
        assert cli.main(replaced(fit_arguments, calibration=None, holdout=holdout)) == 1
    assert "6 classes have too few images to hold 0% of them out" in capsys.readouterr().err


def test_held_out_images_are_not_fitted_on(monkeypatch, digits, tmp_path):
    seen = {}
    real = deployment._Batches.__iter__

    def iterate(self):
        seen.setdefault(self.description, set()).update(s.name for s in self.dataset.sources)
        return real(self)

    monkeypatch.setattr(deployment._Batches, "__iter__", iterate)
    arguments = replaced(
        ["fit"],
        arch="digits",
        weights=digits / "model.safetensors",
        data=digits / "train",
        output=tmp_path / "detector",
    )
    assert cli.main(arguments) == 0
    assert len(seen["fit"]) + len(seen["calibrate"]) == 540
    assert not seen["fit"] & seen["calibrate"]


def test_outliers(fit_arguments, digits, tmp_path, capsys):
    arguments = replaced(fit_arguments, outliers=digits / "near", fpr=0.05)
    assert cli.main(arguments) == 0
    threshold = persistence.load_threshold(tmp_path / "detector")
    assert threshold.target == "fpr" and threshold.n_ood == 714 and threshold.fpr <= 0.05
    assert "of 714 outlier samples" in capsys.readouterr().out
    for change, message in (
        ({"fpr": 0.05}, "--fpr needs outliers: name some by --outliers"),
        ({"fpr": 0.05, "tpr": 0.9, "outliers": digits / "near"}, "leave one out"),
        ({"holdout": 0.3}, "with --calibration, nothing is held out: leave out --holdout"),
    ):
        assert cli.main(replaced(fit_arguments, **change)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Energy", "NERO", "KNN", "ODIN", "ReAct"])
def test_other_detectors(fit_arguments, digits, tmp_path, name, capsys):
    assert cli.main(replaced(fit_arguments, detector=name)) == 0
    deployed = Deployed.load(tmp_path / "detector")
    rows = list(deployed.score([digits / "test" / "3"]))
    x = torch.stack([HandwrittenDigits("test", [3])[i][0] for i in range(len(rows))])
    x = (255 * x).byte().float() / 255
    expected = deployed.detector(x).float()
    torch.testing.assert_close(torch.tensor([row.score for row in rows]), expected)
    assert sum(row.predicted == "3" for row in rows) > 0.9 * len(rows)


def test_options(fit_arguments, tmp_path):
    assert cli.main([*fit_arguments, "--option", "k=3", "--option", "ood_prototype=mean"]) == 0
    loaded = Deployed.load(tmp_path / "detector").detector
    assert loaded.k == 3 and loaded.ood_prototype == "mean"


def test_npz(digits, fit_arguments, tmp_path):
    def write(part, name, **more):
        pairs = list(HandwrittenDigits(part, range(6)))
        x = np.stack([(255 * x[0]).byte().numpy() for x, _ in pairs])
        np.savez(tmp_path / name, x=x, y=np.array([y for _, y in pairs], np.uint8), **more)
        return tmp_path / name

    names = np.array(["zero", "one", "two", "three", "four", "five"])
    train = write("train", "train.npz", classes=names)
    validation = write("validation", "validation.npz", classes=names)
    assert cli.main(replaced(fit_arguments, data=train, calibration=validation)) == 0
    deployed = Deployed.load(tmp_path / "detector")
    assert deployed.classes == names.tolist()
    rows = list(deployed.score([validation]))
    assert rows[0].file == f"{validation}[0]" and rows[0].predicted == "zero"
    assert deployment.find_classes(write("train", "unnamed.npz")) == list("012345")
    files = list(deployed.score([digits / "validation"]))
    assert sorted(row.score for row in files) == pytest.approx(sorted(row.score for row in rows))


def test_outliers_among_labeled_images_are_not_calibrated_on(digits, fit_arguments, tmp_path):
    pairs = list(HandwrittenDigits("validation", range(6)))
    x = np.stack([(255 * x[0]).byte().numpy() for x, _ in pairs])
    y = np.array([y for _, y in pairs])
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    mixed = tmp_path / "mixed.npz"
    np.savez(mixed, x=np.concatenate([x, noise]), y=np.concatenate([y, np.full(300, -1)]))
    assert cli.main(fit_arguments) == 0
    expected = persistence.load_threshold(tmp_path / "detector")
    assert cli.main(replaced(fit_arguments, calibration=mixed)) == 0
    threshold = persistence.load_threshold(tmp_path / "detector")
    assert threshold.n_id == 215 and threshold.value == pytest.approx(expected.value, rel=1e-5)


def test_images_that_are_fitted_on_are_not_calibrated_on(fit_arguments, digits, tmp_path, capsys):
    (tmp_path / "link").symlink_to(digits / "train")
    for change in (
        {"calibration": digits / "train"},
        {"calibration": tmp_path / "link"},
        {"outliers": digits / "validation" / "3"},
        {"outliers": digits / "train" / "3" / sorted(os.listdir(digits / "train" / "3"))[0]},
    ):
        assert cli.main(replaced(fit_arguments, **change)) == 1
        assert "name others" in capsys.readouterr().err
    assert not (tmp_path / "detector").exists()


def test_a_classifier_that_is_wrong_is_warned_of(fit_arguments, tmp_path, capsys):
    assert cli.main(replaced(fit_arguments, size=32)) == 0
    assert "the classifier is wrong more often than right: check" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "detector")]) == 0
    printed = capsys.readouterr().out
    assert "accuracy:" in printed and "% of what it was calibrated on" in printed


def test_unreadable_images_are_left_out(fit_arguments, digits, tmp_path, capsys):
    train = tmp_path / "train"
    shutil.copytree(digits / "train", train)
    files = sorted(train.glob("2/*.png"))
    files[0].write_bytes(b"no image")
    files[1].write_bytes(files[1].read_bytes()[:40])
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(files[2])
    assert cli.main(replaced(fit_arguments, data=train)) == 1
    captured = capsys.readouterr()
    assert "fitted on 537 images" in captured.out
    assert "3 images were left out" in captured.err and f"{files[0]}: " in captured.err
    assert "more than 8 bits per channel" in captured.err
    assert Deployed.load(tmp_path / "detector").threshold is not None


class TestFitRefuses:
    """Errors of one line, and nothing is written."""

    @pytest.fixture(autouse=True)
    def refused(self, tmp_path, capsys):
        yield
        assert not (tmp_path / "detector").exists()

    def check(self, arguments, message, capsys, status=1):
        assert cli.main(arguments) == status
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"arch": OWN_DIGITS}, "scores silently wrong: give --size, --mean, --std of its tr"),
            ({"std": 0}, "--std must be above 0"),
            ({"channels": 3}, "can't split Sequential"),
            ({"tpr": 95}, "tpr is 95.0: use a fraction such as 0.95"),
            ({"option": "depth=3"}, "GROOD has no argument depth"),
            ({"data": "nowhere"}, "The folder nowhere can't be read"),
            ({"weights": "nowhere"}, "there is no file nowhere"),
            ({"interpolation": "cubic"}, "there is no interpolation 'cubic'"),
            ({"detector": "OpenMax"}, "OpenMax can't be saved"),
        ],
    )
    def test_arguments(self, fit_arguments, change, message, capsys):
        self.check(replaced(fit_arguments, **change), message, capsys)

    def test_unknown_detector(self, fit_arguments, capsys):
        arguments = replaced(fit_arguments, detector="GROD")
        self.check(arguments, "did you mean GROOD", capsys, status=2)

    def test_classes(self, fit_arguments, digits, tmp_path, capsys):
        few = tmp_path / "few"
        for name in "01":
            shutil.copytree(digits / "train" / name, few / name)
        arguments = replaced(fit_arguments, data=few, classes=6)
        self.check(arguments, "the classifier has 6 classes, but", capsys)
        (few / "7").mkdir()
        arguments = replaced(fit_arguments, calibration=few)
        self.check(arguments, "has other classes than", capsys)

    def test_no_images(self, fit_arguments, tmp_path, capsys):
        for i in range(6):
            (tmp_path / "empty" / str(i)).mkdir(parents=True)
        arguments = replaced(fit_arguments, data=tmp_path / "empty")
        self.check(arguments, "has no images in folders: make one folder of images", capsys)

    def test_no_image_that_can_be_read(self, fit_arguments, digits, tmp_path, capsys):
        for i in range(6):
            (tmp_path / "broken" / str(i)).mkdir(parents=True)
            (tmp_path / "broken" / str(i) / "a.png").write_bytes(b"")
        arguments = replaced(fit_arguments, calibration=tmp_path / "broken")
        self.check(arguments, "no image to calibrate can be read", capsys)

    def test_folder_with_other_files(self, fit_arguments, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("all of it")
        arguments = replaced(fit_arguments, output=tmp_path / "mine")
        self.check(arguments, "holds other files (thesis.txt), which would be lost", capsys)


OWN_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    factor = 1.0

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.factor * self.body(x).flatten(1))

class Forgetful(Net):
    count = 0

    def __init__(self, num_classes):
        super().__init__(num_classes)
        Forgetful.count += 1
        self.factor = float(Forgetful.count)
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_networks", None)
    from own_networks import Net

    torch.manual_seed(0)
    save_file(Net(6).state_dict(), tmp_path / "own.safetensors")
    yield tmp_path / "own.safetensors"
    sys.modules.pop("own_networks", None)


def test_own_code_is_not_run_because_a_file_says_so(
    own_code, fit_arguments, digits, tmp_path, capsys
):
    known = {"size": 8, "mean": 0, "std": 1, "channels": 1}
    arguments = replaced(fit_arguments, arch="own_networks:Net", weights=own_code, **known)
    assert cli.main(arguments) == 0
    sys.modules.pop("own_networks")
    score = ["score", "--detector", str(tmp_path / "detector"), "--data", str(digits / "near")]
    score += ["--output", str(tmp_path / "scores.csv")]
    assert cli.main(score) == 1
    assert "if you know and trust it, say so by --arch own_networks:Net" in capsys.readouterr().err
    assert "own_networks" not in sys.modules
    assert cli.main([*score, "--arch", "own_networks:Forgetful"]) == 1
    assert "was made for --arch own_networks:Net, and not" in capsys.readouterr().err
    assert cli.main([*score, "--arch", "own_networks:Net"]) == 0


def test_network_that_does_not_come_back(own_code, fit_arguments, tmp_path, capsys):
    known = {"size": 8, "mean": 0, "std": 1, "channels": 1}
    arguments = replaced(fit_arguments, arch="own_networks:Forgetful", weights=own_code, **known)
    assert cli.main(arguments) == 1
    assert "constructs a network with other logits for the same weights" in capsys.readouterr().err
    assert not (tmp_path / "detector").exists()


# score


def test_scores(detector, digits, tmp_path, capsys):
    output = tmp_path / "deep" / "scores.csv"
    sets = [digits / "test", digits / "noise", digits / "near" / "0000.png"]
    assert (
        cli.main(
            ["score", "--detector", str(detector), "--output", str(output), "--data"]
            + [str(path) for path in sets]
        )
        == 0
    )
    rows = read(output)
    files = [*sorted((digits / "test").glob("*/*.png")), *sorted((digits / "noise").glob("*"))]
    assert [row["file"] for row in rows] == [*map(str, files), str(sets[-1])]
    assert list(rows[0]) == ["file", "score", "decision", "predicted", "error"]
    deployed = Deployed.load(detector)
    n_ood = 0
    for row in rows:
        x = np.asarray(Image.open(row["file"]), dtype=np.float32)[None, None] / 255
        expected = float(deployed.detector(torch.from_numpy(x)))
        assert float(row["score"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row["decision"] == ("OOD" if expected > deployed.threshold.value else "ID")
        n_ood += row["decision"] == "OOD"
        assert row["error"] == ""
    printed = capsys.readouterr().out
    assert f"{len(rows)} images scored, {n_ood} of them OOD." in printed
    # the threshold does what it says
    of_test = [row["decision"] for row in rows if "/test/" in row["file"]]
    lower, upper = deployed.threshold.tpr_interval
    assert lower - 0.05 < of_test.count("ID") / len(of_test) < upper + 0.05
    of_noise = [row["decision"] for row in rows if "/noise/" in row["file"]]
    assert of_noise.count("OOD") > 0.7 * len(of_noise)
    assert [file.name for file in output.parent.iterdir()] == ["scores.csv"]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches(detector, digits, batch_size):
    deployed = Deployed.load(detector)
    rows = list(deployed.score([digits / "test" / "1"], batch_size=batch_size))
    expected = list(deployed.score([digits / "test" / "1"]))
    assert [row.file for row in rows] == [row.file for row in expected]
    assert [r.score for r in rows] == pytest.approx([r.score for r in expected], rel=1e-4)


def test_worker_processes(detector, digits):
    deployed = Deployed.load(detector)
    rows = list(deployed.score([digits / "test" / "1"], workers=2))
    assert rows == list(deployed.score([digits / "test" / "1"]))


@pytest.fixture
def mixed(digits, tmp_path):
    """Images good and bad, and what is said of the bad ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((digits / "test" / "0").iterdir())[:5]
    for i, file in enumerate(good):
        shutil.copy(file, folder / f"good{i}.png")
    whole = good[0].read_bytes()
    Image.new("RGBA", (90, 30), (255, 0, 0, 40)).save(folder / "good5.png")
    Image.new("P", (8, 8)).save(folder / "good6.gif")
    pages = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    pages[0].save(folder / "bad pages.tif", save_all=True, append_images=pages[1:])
    os.mkfifo(folder / "bad pipe.png")
    Image.new("CMYK", (8, 8)).save(folder / "good7.jpg")
    Image.new("1", (1, 300)).save(folder / "good8.bmp")
    (folder / "bad empty.png").write_bytes(b"")
    (folder / "bad text.jpg").write_text("not an image")
    (folder / "bad cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(folder / "bad deep.png")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(folder / "bad float.tif")
    (folder / "bad link.png").symlink_to(folder / "nowhere.png")
    (folder / 'bad, "quoted"\nline.png').write_bytes(b"x")
    (folder / "bad folder.png").mkdir()
    return folder


def test_unreadable_images_are_rows(detector, mixed, tmp_path, capsys):
    output = tmp_path / "scores.csv"
    data = [str(mixed), str(mixed / "missing.png")]
    arguments = ["score", "--detector", str(detector), "--output", str(output), "--data", *data]
    assert cli.main([*arguments, "--batch-size", "3"]) == 1
    rows = {Path(row["file"]).name: row for row in read(output)}
    # a folder with the name of an image is a folder
    bad = {f.name for f in mixed.iterdir() if f.name.startswith("bad") and not f.is_dir()}
    assert {name for name, row in rows.items() if row["error"]} == bad | {"missing.png"}
    for name, row in rows.items():
        assert bool(row["score"]) == bool(row["decision"]) == bool(row["predicted"])
        assert bool(row["score"]) != bool(row["error"]), name
    assert "more than 8 bits per channel" in rows["bad deep.png"]["error"]
    assert "more than 8 bits per channel" in rows["bad float.tif"]["error"]
    captured = capsys.readouterr()
    assert f"{len(rows) - len(bad) - 1} images scored" in captured.out
    assert f"{len(bad) + 1} images have an error in the place of a score" in captured.err


def test_images_that_break_the_network_are_rows(detector, digits, monkeypatch):
    deployed = Deployed.load(detector)
    real = deployed.split.encoder.forward

    def encode(x):
        z = real(x).clone()
        z[x.mean(dim=(1, 2, 3)) > 0.45] = float("nan")
        return z

    monkeypatch.setattr(deployed.split.encoder, "forward", encode)
    files = [
        *sorted((digits / "test" / "0").iterdir())[:3],
        *sorted((digits / "noise").iterdir())[:6],
    ]
    rows = list(deployed.score(files))
    broken = [np.asarray(Image.open(file)).mean() / 255 > 0.45 for file in files]
    assert 0 < sum(broken) < len(files)
    for row, is_broken in zip(rows, broken):
        assert (row.error is not None) == is_broken == (row.score is None)
    assert "rows contain NaN or infinite values" in next(row.error for row in rows if row.error)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_scores_that_are_no_numbers_are_no_decisions(detector, digits, monkeypatch, value):
    deployed = Deployed.load(detector)
    monkeypatch.setattr(
        deployed.detector.__class__,
        "predict_features",
        lambda self, z: torch.full((len(z),), float(value)),
    )
    (row,) = deployed.score([digits / "near" / "0000.png"])
    assert row.decision is None and row.error == f"its score is {value}"


def test_logits_that_are_no_numbers_are_no_decisions(detector, digits):
    deployed = Deployed.load(detector)
    with torch.no_grad():
        deployed.split.head.bias[2] = float("nan")
    (row,) = deployed.score([digits / "near" / "0000.png"])
    assert row.decision is None and row.error == "its score is nan"


def test_output_that_is_no_file_or_an_image(detector, digits, tmp_path, capsys):
    image = tmp_path / "a.png"
    shutil.copy(digits / "near" / "0000.png", image)
    content = image.read_bytes()
    arguments = ["score", "--detector", str(detector), "--data", str(image), "--output"]
    assert cli.main([*arguments, str(image)]) == 1
    assert "is one of the images: name another file" in capsys.readouterr().err
    assert image.read_bytes() == content
    assert cli.main([*arguments, str(tmp_path)]) == 1
    assert "is no file: name one by --output" in capsys.readouterr().err


def test_without_a_threshold(detector, digits, tmp_path, capsys):
    deployed = Deployed.load(detector)
    config = persistence.Saved(detector).config["classifier"]
    persistence.save(deployed.detector, tmp_path / "bare", classifier=config)
    arguments = ["score", "--detector", str(tmp_path / "bare"), "--data", str(digits / "near")]
    assert cli.main([*arguments, "--output", str(tmp_path / "scores.csv")]) == 0
    assert "714 images scored; there is no threshold" in capsys.readouterr().out
    assert {row["decision"] for row in read(tmp_path / "scores.csv")} == {""}


def interrupt_after(n, monkeypatch):
    """The n-th image can't be reached: what was written before is kept."""
    real, calls = deployment.read_image, []

    def read_image(path, cut):
        calls.append(path)
        if len(calls) > n:
            raise KeyboardInterrupt
        return real(path, cut)

    monkeypatch.setattr(deployment, "read_image", read_image)
    return calls


@pytest.mark.parametrize("cut", [0, 1, 10])
def test_an_interrupted_run_goes_on(detector, digits, tmp_path, monkeypatch, cut):
    output = tmp_path / "scores.csv"
    data = ["--data", str(digits / "test" / "0"), str(digits / "test" / "1")]
    arguments = ["score", "--detector", str(detector), "--output", str(output), *data]
    arguments += ["--batch-size", "4"]
    assert cli.main(arguments) == 0
    expected = output.read_bytes()
    output.write_bytes(b"old")
    with monkeypatch.context() as patch:
        interrupt_after(21, patch)
        assert cli.main(arguments) == 130
    assert output.read_bytes() == b"old"
    (partial,) = tmp_path.glob(".scores.csv.*.part")
    if cut:  # the process was killed while it wrote
        os.truncate(partial, partial.stat().st_size - cut)
    with monkeypatch.context() as patch:
        calls = interrupt_after(10**6, patch)
        assert cli.main([*arguments, "--resume"]) == 0
    assert len(calls) == len(expected.splitlines()) - 1 - (20 if cut == 0 else 16)
    assert output.read_bytes() == expected and not partial.exists()


def test_resuming_with_other_images_or_nothing(detector, digits, tmp_path, monkeypatch, capsys):
    output = tmp_path / "scores.csv"
    arguments = ["score", "--detector", str(detector), "--output", str(output), "--batch-size=4"]
    with monkeypatch.context() as patch:
        interrupt_after(9, patch)
        assert cli.main([*arguments, "--data", str(digits / "test" / "0")]) == 130
    other = [*arguments, "--data", str(digits / "test" / "1")]
    assert cli.main([*other, "--resume"]) == 1
    assert "has rows of other images: give the same ones, or start anew" in capsys.readouterr().err
    assert cli.main(other) == 0
    assert cli.main([*other, "--resume"]) == 0  # there is nothing to go on from
    (tmp_path / f".scores.csv.{Deployed.load(detector).identity[:12]}.part").write_text("a,b\n")
    assert cli.main([*other, "--resume"]) == 1
    assert "is no file of scores: remove it" in capsys.readouterr().err
    (partial,) = tmp_path.glob(".scores.csv.*.part")
    header = ",".join(Row._fields)
    partial.write_text(f"{header}\na.png,many,ID,0,\n")
    assert cli.main([*other, "--resume"]) == 1
    assert "is damaged (could not convert" in capsys.readouterr().err
    # killed in the middle of a name with a line break
    partial.write_text(f'{header}\n"a\n')
    assert cli.main([*other, "--resume"]) == 0


def test_file_names_that_are_not_utf8(detector, digits, tmp_path):
    folder = os.fsencode(tmp_path / "names")
    os.mkdir(folder)
    shutil.copy(digits / "near" / "0000.png", folder + b"/\xff\xfe.png")
    output = tmp_path / "scores.csv"
    arguments = ["score", "--detector", str(detector), "--data", os.fsdecode(folder)]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    (row,) = read(output)
    assert os.fsencode(row["file"]).endswith(b"/\xff\xfe.png") and row["score"]


@pytest.mark.parametrize(
    ("data", "message"),
    [("EMPTY", "has no images: name files, or a folder with some"), ("BROKEN", "is damaged or")],
)
def test_data_that_can_not_be_scored(detector, tmp_path, data, message, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK")
    data = tmp_path / ("broken.npz" if data == "BROKEN" else data)
    arguments = ["score", "--detector", str(detector), "--output", str(tmp_path / "scores.csv")]
    assert cli.main([*arguments, "--data", str(data)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "scores.csv").exists()


def test_detector_without_its_classifier(digits, tmp_path, capsys):
    split = split_model(model_of(digits))
    persistence.save(registry.build("Energy", split), tmp_path / "detector")
    arguments = ["score", "--detector", str(tmp_path / "detector"), "--data", str(digits)]
    assert cli.main(arguments) == 1
    assert "holds a detector without its classifier" in capsys.readouterr().err


def test_row():
    assert Row("a.png") == ("a.png", None, None, None, None)


# inspect


def test_inspect(detector, capsys):
    assert cli.main(["inspect", str(detector)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "detector:       pood-plugins:GROOD",
        "bank_ 540 x 32",
        "Sequential, 32 features, 6 classes",
        "classes:        0, 1, 2, 3, 4, 5",
        "size 8, mean [0.0], std [1.0]",
        "of 215 ID samples",
        "All files are what was written.",
    ):
        assert text in printed


def test_inspect_what_is_damaged_or_something_else(detector, tmp_path, capsys):
    copied = tmp_path / "copied"
    shutil.copytree(detector, copied)
    os.truncate(copied / "model.safetensors", 100)
    assert cli.main(["inspect", str(copied)]) == 1
    assert "model.safetensors was changed or damaged" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "is no saved detector, since it has no config.json" in capsys.readouterr().err


def test_inspect_a_bare_detector(digits, tmp_path, capsys):
    split = split_model(model_of(digits))
    persistence.save(registry.build("Energy", split), tmp_path / "detector")
    assert cli.main(["inspect", str(tmp_path / "detector")]) == 0
    printed = capsys.readouterr().out
    assert "threshold:      none" in printed and "arguments:      defaults" in printed


# the script


def test_table(script):
    threshold = {"tpr_interval": [0.91, 0.974], "n_id": 215}
    shares = {"test": 0.95, "near": 0.1, "flower": 0.2, "noise": 0.3}
    accepted = {
        name: {"images": 7, "share": share, "interval": [share - 0.1, 1]}
        for name, share in shares.items()
    }
    record = {"threshold": threshold, "accepted": accepted, "seconds": {"fit": 9, "score": 8}}
    assert (
        "| GROOD | 91.0 to 97.4 | 95.0 [85.0, 100.0] | 10.0 | 20.0 | 30.0 | 9 | 8 |"
        in script.table({"GROOD": record})
    )


def test_prepare_leaves_a_folder_alone(script, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="is not empty"):
        script.prepare(tmp_path)
