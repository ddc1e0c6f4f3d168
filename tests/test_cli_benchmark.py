"""
``pood benchmark`` on images, in this process: generated data, small networks. Every mistake is one
line that begins with ``pood:``.
"""

import csv
import io
import json
import re
import shutil
import sys
import zipfile
from contextlib import redirect_stdout
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Normalize

from pood_plugins import cli, registry
from pood_plugins.model import resnet20

pytestmark = pytest.mark.usefixtures("one_thread")

N = 20
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PREPARED = ["--size", "32", "--mean", *map(str, MEAN), "--std", *map(str, STD)]
NETWORKS = """
import torch
from torch import nn

n_seen = 0

class Counting(nn.Conv2d):
    def forward(self, x):
        global n_seen
        n_seen += len(x)
        return super().forward(x)

def small(num_classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            Counting(3, 6, 3, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
        )

def seven():
    return small(7)

def headless():
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


# data


def make_arrays():
    """ID images are variants of ten patterns, with labels 0, 1, 2, ..., and the others are not."""
    random = np.random.default_rng(0)

    def images(n, low, high, patterns=0, size=32, channels=(3,)):
        small = patterns + random.integers(low, high, (n, 4, 4, *channels))
        images = [Image.fromarray(image.astype(np.uint8)) for image in small]
        return np.stack([np.asarray(image.resize((size, size))) for image in images])

    patterns = random.integers(0, 200, (10, 4, 4, 3))
    return {
        "train": images(5 * N, 0, 50, np.tile(patterns, (N // 2, 1, 1, 1))),
        "test": images(N, 0, 50, np.tile(patterns, (N // 10, 1, 1, 1))),
        "cifar100": images(N, 0, 250),
        "texture": images(N, 100, 160),
        "mnist": images(N, 0, 256, size=28, channels=()),
    }


def write_lists(root, arrays):
    """TinyImageNet has no list, Places365 an empty one, and of SVHN an image is missing."""
    lists = root / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    files = {
        "train": "train_cifar10.txt",
        "test": "test_cifar10.txt",
        "cifar100": "test_cifar100.txt",
        "mnist": "test_mnist.txt",
        "texture": "test_texture.txt",
    }
    for name, file in files.items():
        (root / name).mkdir()
        lines = []
        for i, image in enumerate(arrays[name]):
            Image.fromarray(image).save(root / name / f"{i}.png")
            lines.append(f"{name}/{i}.png {i % 10 if name in ('train', 'test') else -1}\n")
        (lists / file).write_text("".join(lines))
    (lists / "test_svhn.txt").write_text("test/0.png -1\nsvhn/1.png -1\n")
    (lists / "test_places365.txt").write_text("")


def write_packs(root, arrays):
    root.mkdir()
    for name, x in {
        "cifar10_test": arrays["test"],
        "cifar100_test": arrays["cifar100"],
        "cifar10_train_1of2": arrays["train"][:N],
        "cifar10_train_2of2": arrays["train"][N:],
    }.items():
        with zipfile.ZipFile(root / f"{name}.webp.zip", "w") as archive:
            content = io.BytesIO()
            Image.fromarray(x.reshape(-1, 32, 3)).save(content, "WEBP", lossless=True)
            archive.writestr("strip_00000.webp", content.getvalue())
            content = io.BytesIO()
            np.savez(content, y=np.arange(len(x)) % 10)  # N is a multiple of 10
            archive.writestr("meta.npz", content.getvalue())
    for name in ("mnist", "texture"):
        file = {"mnist": "mnist_test.npz", "texture": "dtd10_32.npz"}[name]
        np.savez(root / file, x=arrays[name], y=np.zeros(N, int))
    rows = {"cifar10_test": np.arange(N), "cifar100_as_ood_test": np.arange(N)}
    np.savez(root / "openood_index.npz", **rows, cifar10_val=np.arange(3))


@pytest.fixture(scope="module")
def arrays():
    return make_arrays()


@pytest.fixture(scope="module")
def place(tmp_path_factory, arrays):
    """
    A folder with the data as a tree and as packs, with a module, and with weights: any for
    resnet20, and for the small network such that it tells the classes apart.
    """
    place = tmp_path_factory.mktemp("place")
    write_lists(place / "tree", arrays)
    write_packs(place / "packs", arrays)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(resnet20(10).state_dict(), place / "cifar10.pt")
        torch.save(resnet20(100).state_dict(), place / "cifar100.pt")
    (place / "generated_networks.py").write_text(NETWORKS)
    exec(NETWORKS, module := {})
    model = module["small"]()
    x = Normalize(MEAN, STD)(torch.from_numpy(arrays["train"]).permute(0, 3, 1, 2) / 255)
    with torch.no_grad():
        centers = torch.stack([model[:-1](x[label::10]).mean(dim=0) for label in range(10)])
        model[-1].weight.copy_(20 * centers)
        model[-1].bias.copy_(-10 * centers.square().sum(dim=1))
    torch.save(model.state_dict(), place / "small.pt")
    return place


@pytest.fixture(autouse=True)
def networks(place, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))  # without anyone's lists
    yield
    sys.modules.pop("generated_networks", None)


BASE = ["benchmark", "cifar10-openood"]
SMALL = ["--arch", "generated_networks:small", *PREPARED]


def resnet(place, *more):
    """The arguments that name resnet20 and its weights."""
    return ["--arch", "resnet20", "--weights", str(place / "cifar10.pt"), *more]


def good(place):
    """The same of the network that tells the classes apart."""
    return [*SMALL, "--weights", str(place / "small.pt")]


@pytest.fixture
def no_pictures(monkeypatch):
    """These take most of the time."""
    from pood_plugins.evaluation import Report

    monkeypatch.setattr(Report, "plot", lambda *_: [])


@pytest.fixture(scope="module")
def first(place):
    """The folder that a run has written, and its output."""
    output = place / "first"
    with redirect_stdout(io.StringIO()) as out:
        arguments = ["--detectors", "MSP,energy, KNN,GROOD", "--output", str(output)]
        assert cli.main([*BASE, "--root", str(place / "tree"), *resnet(place), *arguments]) == 0
    return output, out.getvalue()


def record(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(folder):
    """The text of each cell of results.csv but for the times, and the header."""
    lines = rows(folder)
    assert lines
    return [
        {name: text for name, text in line.items() if not name.endswith("_seconds")}
        for line in lines
    ]


def metrics(folder):
    return {result["detector"]: result["metrics"] for result in record(folder)["results"]}


# what a run gives


def test_figures_are_those_of_the_network(place, arrays, first):
    """MSP and Energy from the arrays themselves, and AUROC by comparing all pairs of scores."""
    model = resnet20(10).eval()
    model.load_state_dict(torch.load(place / "cifar10.pt", weights_only=True))
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def logits(x):
        images = [
            Image.fromarray(image).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
            for image in x
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            return model(normalize(pixels)).double()

    scores = {"MSP": lambda z: -z.softmax(1).max(1)[0], "Energy": lambda z: -z.logsumexp(1)}
    known = logits(arrays["test"])
    found = metrics(first[0])
    for name, array in (("CIFAR100", "cifar100"), ("MNIST", "mnist"), ("Textures", "texture")):
        unknown = logits(arrays[array])
        for detector, score in scores.items():
            expected = (score(unknown)[:, None] > score(known)).double().mean()
            (value,) = found[detector][name]["AUROC"]
            assert value == pytest.approx(float(expected), abs=0.006)
    accuracy = (known.argmax(1) == torch.arange(N) % 10).double().mean()
    for result in record(first[0])["results"]:
        assert result["accuracy"] == [float(accuracy)]


def test_files_and_output(first):
    folder, out = first
    assert {path.name for path in folder.iterdir()} == {
        *("results.csv", "results.json", "results.md"),
        *("roc.png", "scores.png", "intervals.png"),
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.size > (200, 200)
    lines = out.splitlines()
    for detector in ("MSP", "Energy", "KNN", "GROOD"):
        assert sum(line.startswith(f"{detector} ") for line in lines) == 1
        assert f"| {detector} | " in (folder / "results.md").read_text()
    assert lines[-1] == f"Report: {folder}"
    columns = ["CIFAR100", "MNIST", "Textures", "far"]
    assert [line["dataset"] for line in rows(folder)] == 4 * columns
    written = record(folder)
    assert written["benchmark"] == "cifar10-openood" and written["arch"] == "resnet20"
    assert written["weights"] == "cifar10.pt" and not written["packed"]
    assert "Resize(size=32" in written["preprocessing"]
    assert "mean=(0.485, 0.456, 0.406)" in written["preprocessing"]
    assert (written["near"], written["far"]) == (["CIFAR100"], ["MNIST", "Textures"])


def test_missing_sets_are_named(place, first):
    folder, out = first
    svhn = place / "tree" / "svhn" / "1.png"
    missing = {
        "TinyImageNet": "no list test_tin.txt",
        "SVHN": f"1 of 2 images are not there, e.g. {svhn}",
        "Places365": "the list test_places365.txt is empty",
        "ID validation": "no list val_cifar10.txt",
        "OOD validation": "no list val_tin.txt",
    }
    written = record(folder)
    assert written["missing"] == missing
    assert written["notes"]["MNIST"] == "20 of 70,000 images"
    markdown = (folder / "results.md").read_text()
    for name, reason in missing.items():
        assert f"{name} ({reason})" in out and f"{name} ({reason})" in markdown
    assert "MNIST: 20 of 70,000 images" in out


def test_same_table_from_packs(place, first, tmp_path, no_pictures):
    """Up to rounding where images are resized, and otherwise to the last digit."""
    arguments = ["--detectors", "MSP,energy, KNN,GROOD", "--output", str(tmp_path)]
    assert cli.main([*BASE, "--root", str(place / "packs"), *resnet(place), *arguments]) == 0
    assert record(tmp_path)["packed"] and record(tmp_path)["missing"]["SVHN"] == "in no pack"
    packed, unpacked = metrics(tmp_path), metrics(first[0])
    assert list(packed) == list(unpacked)
    for detector, by_set in packed.items():
        assert list(by_set) == ["CIFAR100", "MNIST", "Textures"]
        for name, values in by_set.items():
            for metric, (value,) in values.items():
                near = 0.051 if name == "MNIST" else 1e-6
                assert value == pytest.approx(unpacked[detector][name][metric][0], abs=near)


def test_another_run_gives_the_same(place, first, tmp_path, no_pictures):
    arguments = ["--detectors", "MSP,energy, KNN,GROOD", "--output", str(tmp_path)]
    assert cli.main([*BASE, "--root", str(place / "tree"), *resnet(place), *arguments]) == 0
    assert without_times(tmp_path) == without_times(first[0])


def test_features_cache(place, tmp_path, no_pictures):
    """The second run gives the same and reads no image through the network."""
    arguments = [*BASE, "--root", str(place / "tree"), *SMALL, "--detectors", "MSP,KNN,ODIN"]
    n_seen = []
    for name, cache in (("plain", []), ("cold", ["cache"]), ("warm", ["cache"])):
        options = [f"--features-cache={tmp_path / folder}" for folder in cache]
        assert cli.main([*arguments, *options, "--output", str(tmp_path / name)]) == 0
        n_seen.append(sys.modules.pop("generated_networks").n_seen)
    assert without_times(tmp_path / "cold") == without_times(tmp_path / "plain")
    assert without_times(tmp_path / "warm") == without_times(tmp_path / "cold")
    # what is left is what splitting takes
    assert n_seen[1] == n_seen[0] >= 7 * N + n_seen[2] and n_seen[2] < 2 * N


@pytest.mark.filterwarnings("default")
def test_all_detectors(place, tmp_path, capsys, no_pictures):
    arguments = [*BASE, "--root", str(place / "tree"), *good(place), "--detectors", "all"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    written = record(tmp_path)
    left_out = written["left_out"]
    assert left_out.keys() == {"MCM", "WeightedEBO"}
    assert "needs text_embeddings, but" in left_out["MCM"]
    names = [result["detector"] for result in written["results"]]
    assert len(names) == len(set(names)) > 25
    variants = {"GROOD (auto)", "GROOD (mean)", "GROOD (noise)", "GROOD (early mix-up)"}
    assert {*variants, "MSP", "ODIN", "MCD", "ViM", "NERO"} < set(names)
    installed = {registry.display_name(name) for name in registry.list_detectors()}
    assert set(names) | left_out.keys() == installed | variants
    error = capsys.readouterr().err
    assert error.startswith("pood: warning: MCD compares predictions under dropout")
    assert [line.split()[1] for line in error.splitlines()[1:]] == ["MCM", "WeightedEBO"]
    assert error.count(" is left out: ") == 2


def test_default_detectors_need_no_images(place, tmp_path, no_pictures):
    arguments = [*BASE, "--root", str(place / "tree"), *good(place)]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    names = {result["detector"] for result in record(tmp_path)["results"]}
    assert {"MSP", "KNN", "GROOD", "GROOD (auto)"} < names
    assert not names & {"ODIN", "MCD", "GradNorm", "GROOD (early mix-up)"}


def test_max_images(place, tmp_path, capsys, no_pictures):
    arguments = [*BASE, "--root", str(place / "tree"), *SMALL, "--detectors", "MSP,ODIN"]
    assert cli.main([*arguments, "--max-images", "5", "--output", str(tmp_path / "5")]) == 0
    assert "ODIN [5 images] " in capsys.readouterr().out
    assert [result["images"] for result in record(tmp_path / "5")["results"]] == [None, 5]
    assert cli.main([*arguments, "--max-images", "20", "--output", str(tmp_path / "20")]) == 0
    assert [result["images"] for result in record(tmp_path / "20")["results"]] == [None, None]
    part, whole = metrics(tmp_path / "5"), metrics(tmp_path / "20")
    assert part["MSP"] == whole["MSP"] and part["ODIN"] != whole["ODIN"]
    share = part["ODIN"]["CIFAR100"]["AUROC"][0] * 5 * 5
    assert share == pytest.approx(round(share))


def test_failed_detectors_are_named(place, tmp_path, capsys, no_pictures):
    root = copied(place, tmp_path, "tree")
    change_list(root, "train_cifar10.txt", lambda lines: lines[:49])  # KNN needs 50
    arguments = [*BASE, "--root", str(root), *SMALL, "--detectors", "KNN,MSP"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert (
        captured.err
        == "pood: KNN failed: ValueError: k=50 exceeds the number of ID samples (49)\n"
    )
    failed, good = record(tmp_path / "out")["results"]
    assert failed["error"].startswith("ValueError: k=50") and good["error"] is None
    assert good["metrics"].keys() == {"CIFAR100", "MNIST", "Textures"}


def test_key_of_pytorch_ood(place, tmp_path, monkeypatch, no_pictures):
    """Its preprocessing is used, for files and for packs, and for the noise of GROOD."""
    import pytorch_ood.model

    from pood_plugins.evaluation import rows as module

    def recorded(*arguments, normalize):
        normalizations.append(normalize)
        return noise_prototype(*arguments, normalize=normalize)

    normalizations, noise_prototype = [], module.noise_prototype
    monkeypatch.setattr(module, "noise_prototype", recorded)
    model = import_module("generated_networks").small()
    model.load_state_dict(torch.load(place / "small.pt", weights_only=True))
    monkeypatch.setattr(pytorch_ood.model, "load_model", lambda _: model)
    key = ["--weights", "wrn-40-2/cifar10/crossentropy"]
    mean, std = ([str(x / 255) for x in v] for v in ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]))
    known = [*good(place), "--mean", *mean, "--std", *std]
    for root in ("tree", "packs"):
        for name, classifier in (("key", key), ("known", known)):
            arguments = [*BASE, "--root", str(place / root), *classifier]
            arguments += ["--detectors", "MSP,GROOD (noise)", "--output", str(tmp_path / name)]
            assert cli.main(arguments) == 0
        assert without_times(tmp_path / "key") == without_times(tmp_path / "known")
    assert record(tmp_path / "key")["weights"] == key[1]
    assert len(normalizations) == 4
    for normalize in normalizations:
        assert [str(x) for x in normalize.mean] == mean and [str(x) for x in normalize.std] == std


def test_folders(arrays, tmp_path, capsys, no_pictures):
    for part, x in (("train", arrays["train"]), ("test", arrays["test"])):
        for i, image in enumerate(x):
            path = tmp_path / part / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for name in ("cifar100", "mnist", "texture"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(arrays[name]):
            Image.fromarray(image).save(tmp_path / name / f"{i}.jpg")
    folders = [f"--train={tmp_path / 'train'}", f"--test={tmp_path / 'test'}"]
    folders += [f"--far=grey={tmp_path / 'mnist'}", f"--far=flat={tmp_path / 'texture'}"]
    folders += [f"--near=other={tmp_path / 'cifar100'}"]
    arguments = ["benchmark", "folder", *folders, *SMALL, "--detectors", "MSP,KNN"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    written = record(tmp_path / "out")
    assert (written["near"], written["far"]) == (["other"], ["grey", "flat"])
    assert written["images"] == {"ID": 20, "other": 20, "grey": 20, "flat": 20}
    assert written["missing"] == {} and "Missing" not in capsys.readouterr().out
    columns = ["other", "grey", "flat", "far"]
    assert [line["dataset"] for line in rows(tmp_path / "out")] == 2 * columns


REGISTERED = """
import torch
from pytorch_ood.benchmark import Benchmark
from torch.utils.data import TensorDataset

class Generated(Benchmark):
    ood_names = ["dark"]
    made = []

    def __init__(self, root, n, download=True, scale=0.5, transform=None):
        self.made.append((root, n, download, scale, transform))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(n, 3, 32, 32, generator=generator)
        self.scale = scale

    def train_set(self):
        return TensorDataset(self.x, torch.arange(len(self.x)) % 10)

    def test_sets(self, known=True, unknown=True):
        dark = TensorDataset(self.scale * self.x, torch.full((len(self.x),), -1))
        if known and unknown:
            return [self.train_set() + dark]
        return [self.train_set()] if known else [dark]
"""


@pytest.fixture
def generated(tmp_path, monkeypatch):
    """A distribution with a benchmark, as it would be installed."""
    site = tmp_path / "site"
    info = site / "generated-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "generated_benchmark.py").write_text(REGISTERED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: generated\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pytorch_ood.benchmarks]\nGenerated = generated_benchmark:Generated\n"
    )
    monkeypatch.syspath_prepend(site)
    yield ["benchmark", "Generated", *SMALL, "--classes", "10", "--detectors", "MSP"]
    sys.modules.pop("generated_benchmark", None)


def test_registered_benchmark(generated, tmp_path, no_pictures):
    root = ["--root", str(tmp_path)]
    output = ["--output", str(tmp_path / "out")]
    assert cli.main([*generated, *root, "--option", "n=7", *output]) == 0
    written = record(tmp_path / "out")
    assert written["benchmark"] == "Generated" and written["images"] == {"ID": 7, "dark": 7}
    assert [line["dataset"] for line in rows(tmp_path / "out")] == ["dark"]
    more = ["--option", "n=9", "--option", "scale=0.25", "--download", "--option", "root=a=b"]
    assert cli.main([*generated, *root, *more, *output]) == 0
    first, second = sys.modules["generated_benchmark"].Generated.made
    assert first[:4] == (tmp_path, 7, False, 0.5)  # nothing is fetched unasked
    assert second[:4] == ("a=b", 9, True, 0.25)
    assert "Resize(size=32" in repr(first[4])


def test_values_of_options():
    values = {"1": 1, "0.5": 0.5, "True": True, "false": False, "null": None, "[1, 2]": [1, 2]}
    texts = {text: text for text in ("data", "/a/b=c", "1.2.3", "007", "nix null")}
    for text, value in {**values, **texts}.items():
        arguments = cli._parser().parse_args([*BASE, "--option", f"key={text}"])
        ((key, found),) = arguments.option
        assert key == "key" and found == value and type(found) is type(value)


@pytest.fixture
def trained(monkeypatch):
    """Epochs of each network that the digits benchmark has trained or fine-tuned."""
    from pood_plugins.evaluation import digits

    epochs = {"train_classifier": [], "finetune_classifier": []}

    def watch(name):
        original = getattr(digits, name)

        def watched(*given, **settings):
            epochs[name].append(settings.get("epochs"))
            return original(*given, **settings)

        monkeypatch.setattr(digits, name, watched)

    for name in epochs:
        watch(name)
    return epochs


REMARK = "Quick run: one network, trained for 2 epochs; no result to report."


def test_quick_run_says_that_it_is_no_result(trained, tmp_path, capsys, no_pictures):
    arguments = ["benchmark", "digits", "--quick", "--html", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert trained == {"train_classifier": [2], "finetune_classifier": []}
    out = capsys.readouterr().out
    assert REMARK in out.splitlines() and "Mean ±" not in out
    assert REMARK in (tmp_path / "results.md").read_text().splitlines()
    assert "no result to report" in (tmp_path / "report.html").read_text()
    written = record(tmp_path)
    assert written["quick"] and written["seeds"] == [0]
    assert "no result to report" in written["notes"]["Quick run"]
    assert list(metrics(tmp_path)) == ["MSP", "Energy", "KNN", "NERO", "GROOD"]


def test_quick_run_of_other_rows(trained, tmp_path, capsys, no_pictures):
    arguments = ["benchmark", "digits", "--quick", "--detectors", "MSP,GReg -> Energy"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert trained == {"train_classifier": [2], "finetune_classifier": [2]}
    assert list(metrics(tmp_path)) == ["MSP", "GReg → Energy"]
    assert REMARK in capsys.readouterr().out


def test_other_runs_of_digits_say_nothing_of_it(trained, tmp_path, capsys, no_pictures):
    arguments = ["benchmark", "digits", "--seeds", "1", "--detectors", "MSP"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert trained["train_classifier"] == [None]
    assert not record(tmp_path)["quick"] and record(tmp_path)["notes"] == {}
    assert "Quick" not in capsys.readouterr().out


# what goes wrong


def fails(capsys, tmp_path, status, message, arguments):
    """One line on the standard error that begins with pood: and matches, and nothing else."""
    output = tmp_path / "no-output"
    assert cli.main([*arguments, "--output", str(output)]) == status
    captured = capsys.readouterr()
    assert re.match(rf"pood: .*{message}", captured.err), captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert "Traceback" not in captured.err and "object at 0x" not in captured.err
    assert captured.out == "" and not output.exists()


def copied(place, tmp_path, name):
    return shutil.copytree(place / name, tmp_path / name)


def change_list(root, file, change):
    path = root / "benchmark_imglist" / "cifar10" / file
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


@pytest.mark.parametrize(
    ("status", "message", "given"),
    [
        (1, "there is no architecture: name it by --arch", ["--root=TREE"]),
        (1, "no architecture", ["--root=TREE", "--weights=PLACE/cifar10.pt"]),
        (1, "no weights for resnet20: name .* --weights", ["--root=TREE", "--arch=resnet20"]),
        (1, "no folder with the images: name it by --root", ["RESNET"]),
        (1, "give --size, --mean, --std of", ["--root=TREE", "--arch=generated_networks:small"]),
        (
            1,
            "preprocessing of this .* scores silently wrong: give --mean, --std of its training",
            ["--root=TREE", "--arch=generated_networks:small", "--size=32"],
        ),
        (1, "--mean must be 3 numbers", ["--root=TREE", "SMALL", "--mean", "1", "2"]),
        (1, "--std must be above 0, and finite", ["--root=TREE", "SMALL", "--std", "0"]),
        (1, r"there is no folder .*/nix: name the one that", ["--root=PLACE/nix", "RESNET"]),
        (1, r"there is no folder .*10.pt: name", ["--root=PLACE/cifar10.pt", "RESNET"]),
        (1, r"no image lists of OpenOOD \(cifar10/\*.txt\) in", ["--root=PLACE/lost", "RESNET"]),
        (1, "no image lists of", ["--root=TREE", "RESNET", "--option=imglists=PLACE/nix"]),
        (
            1,
            r"does not hold weights of resnet56: \d+ m",
            ["--root=TREE", "RESNET", "--arch=resnet56"],
        ),
        (
            1,
            r"cifar100.pt does not hold weights of resnet20 for these classes: linear.weight has "
            r"shape \(100, 64\) there, and \(10, 64\) in the network",
            ["--root=TREE", "RESNET", "--weights=PLACE/cifar100.pt"],
        ),
        (
            1,
            "the classifier has 100 classes, but cifar10-openood has 10: choose weights",
            ["--root=TREE", "RESNET", "--weights=PLACE/cifar100.pt", "--classes=100"],
        ),
        (
            1,
            "the classifier has 7 classes, but cifar10-openood has 10: choose weights",
            ["--root=TREE", "SMALL", "--arch=generated_networks:seven"],
        ),
        (1, "no file .*nix.pt: name", ["--root=TREE", "RESNET", "--weights=PLACE/nix.pt"]),
        (1, "neither a file nor a key of", ["--root=TREE", "--weights=wrn-40-2/cifar10/nix"]),
        (1, "damaged or no state dict", ["--root=TREE", "RESNET", "--weights=TREE/test/0.png"]),
        (
            1,
            "its output comes neither from an nn.Linear nor",
            ["--root=TREE", "SMALL", "--arch=generated_networks:headless"],
        ),
        (2, "no architecture is called 'resnet21'", ["--root=TREE", "RESNET", "--arch=resnet21"]),
        (2, "can't be imported .*'nix'", ["--root=TREE", "SMALL", "--arch=nix.nets:make"]),
        (2, "no detector is called 'MSPP': did you", ["--root=TREE", "SMALL", "--detectors=MSPP"]),
        (2, "no detector is called ''", ["--root=TREE", "SMALL", "--detectors=MSP,,KNN"]),
        (
            2,
            "GROOD has no OOD prototype 'nix'",
            ["--root=TREE", "SMALL", "--detectors=GROOD (nix)"],
        ),
        (1, "has no training outliers", ["--root=TREE", "SMALL", "--detectors=GROOD (outliers)"]),
        (1, "MCM needs text_embeddings", ["--root=TREE", "SMALL", "--detectors=MCM"]),
        (
            1,
            "PartialCIFAR10 has no option nix: it has d",
            ["--root=TREE", "SMALL", "--option=nix=1"],
        ),
        (1, "has no option root: leave it out", ["--root=TREE", "SMALL", "--option=root=a"]),
        (1, "does not use ImageNet", ["--root=TREE", "SMALL", "--option=image_net_root=a"]),
        (1, "PackedCIFAR10 has no option download", ["--root=PACKS", "SMALL", "--download"]),
        (
            1,
            "have 32 pixels, but this classifier takes 64",
            ["--root=PACKS", "SMALL", "--size=64"],
        ),
    ],
)
def test_wrong_arguments(place, tmp_path, capsys, status, message, given):
    (place / "lost").mkdir(exist_ok=True)
    arguments = []
    for argument in given:
        if argument in ("RESNET", "SMALL"):
            arguments += resnet(place) if argument == "RESNET" else SMALL
        else:
            for word, folder in {"TREE": "PLACE/tree", "PACKS": "PLACE/packs"}.items():
                argument = argument.replace(word, folder)
            arguments.append(argument.replace("PLACE", str(place)))
    fails(capsys, tmp_path, status, message, [*BASE, *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--option", "imglists"],
        ["--option", "=a"],
        ["--near", "cats"],
        ["--size", "0"],
        ["--mean", "grey"],
        ["--classes", "-1"],
        ["--workers", "-1"],
        ["--max-images", "0"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*BASE, *SMALL, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "usage: pood benchmark" in error and f"argument {arguments[0]}: " in error


def test_unknown_benchmark(capsys, tmp_path):
    for name in ("cifar11-openood", "folders"):
        arguments = ["benchmark", name, "--root", str(tmp_path), *SMALL]
        message = (
            rf"no benchmark is called '{name}': .*; or one of digits, folder, cifar10-openood"
        )
        fails(capsys, tmp_path, 2, message, arguments)


def test_missing_lists_and_images(place, tmp_path, capsys):
    root = copied(place, tmp_path, "tree")
    lists = root / "benchmark_imglist" / "cifar10"
    arguments = [*BASE, "--root", str(root), *SMALL, "--detectors", "MSP"]
    for file in ("test_cifar100.txt", "test_mnist.txt", "test_texture.txt"):
        (lists / file).unlink()
    message = "holds no OOD set of PartialCIFAR10 .CIFAR100, no list test_cifar100.txt; Tiny"
    fails(capsys, tmp_path, 1, message, arguments)
    (root / "test" / "3.png").unlink()
    message = (
        "ID test set of PartialCIFAR10, 1 of 20 images are not there, e.g. .*test/3.png: name"
    )
    fails(capsys, tmp_path, 1, message, arguments)
    change_list(root, "test_cifar10.txt", lambda lines: [*lines[:4], "test/4.png"])
    fails(capsys, tmp_path, 1, "line 5 of .*test_cifar10.txt is 'test/4.png', not a", arguments)
    (lists / "test_cifar10.txt").unlink()
    fails(capsys, tmp_path, 1, "ID test set .*, no list test_cifar10.txt: name ano", arguments)


@pytest.mark.parametrize(
    ("file", "detector", "workers"),
    [
        ("test/0.png", "MSP", "0"),  # the one that is looked at before all others
        ("test/7.png", "MSP", "0"),
        ("test/7.png", "ODIN", "0"),
        ("mnist/19.png", "MSP", "0"),
        ("mnist/19.png", "MSP", "1"),
        ("train/3.png", "KNN", "0"),
    ],
)
def test_corrupt_images(place, tmp_path, capsys, file, detector, workers):
    path = copied(place, tmp_path, "tree") / file
    path.write_bytes(path.read_bytes()[:60])
    arguments = [*BASE, "--root", str(tmp_path / "tree"), *SMALL, "--workers", workers]
    message = f"{path} can't be read as an image .*: remove or replace it"
    fails(capsys, tmp_path, 1, message, [*arguments, "--detectors", detector])


def test_damaged_packs(place, tmp_path, capsys):
    root = copied(place, tmp_path, "packs")
    arguments = [*BASE, "--root", str(root), *SMALL]
    for file in ("mnist_test.npz", "openood_index.npz"):
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: len(content) // 2])
        fails(capsys, tmp_path, 1, f"{file} is (missing or )?damaged .*: .*copy", arguments)
    np.savez(
        root / "openood_index.npz", cifar10_test=[99], cifar10_val=[0], cifar100_as_ood_test=[0]
    )
    fails(capsys, tmp_path, 1, "openood_index.npz is damaged or belongs to other packs", arguments)


def test_errors_of_folders(place, tmp_path, capsys):
    tree = place / "tree"
    for name in ("0", "1"):
        shutil.copytree(tree / "texture", tmp_path / "train" / name)
    train, test = [f"--train={tmp_path / 'train'}"], [f"--test={tmp_path / 'train'}"]
    near, far = [f"--near=a={tree / 'cifar100'}"], [f"--far=a={tree / 'mnist'}"]
    for message, arguments in {
        "the folder benchmark needs --train DIR": [*test, *near],
        "the folder benchmark needs --test DIR": [*train, *near],
        "no OOD sets: name the folder of at least one": [*train, *test],
        "folder .*nix can't be read": [*train, "--test=nix", *near],
        "no images .*leave out the OOD set 'b'": [*train, *test, f"--far=b={tmp_path / 'none'}"],
        "two OOD sets are called a: give each its own name": [*train, *test, *near, *far],
        "has 3 classes, but folder has 2": [*train, *test, *near, "--classes=3"],
    }.items():
        (tmp_path / "none").mkdir(exist_ok=True)
        fails(capsys, tmp_path, 1, message, ["benchmark", "folder", *SMALL, *arguments])


def test_errors_of_registered_benchmarks(generated, tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    for message, arguments in {
        r"Generated can't be made \(.*'n'\): give --option KEY=VALUE": root,
        "Generated has no option nix: it has root, n, download, ": ["--option=nix=1", *root],
        "Generated has no option transform: leave": ["--option=transform=1", *root],
        "there is a label 9, but the classifier has 4 classes": [
            "--classes=4",
            *root,
            "--option=n=11",
        ],
    }.items():
        fails(capsys, tmp_path, 1, message, [*generated, *arguments])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["digits", "--arch", "resnet20"], "digits has no use for --arch: leave it out"),
        (["digits", "--features-cache", "x"], "digits has no use for --features-cache"),
        (["folder", "--root", "x"], "folder has no use for --root"),
        (["folder", "--option", "a=b"], "folder has no use for --option"),
        (["folder", "--download"], "folder has no use for --download"),
        (["cifar10-openood", "--train", "greg"], "cifar10-openood has no use for --train"),
        (["cifar10-openood", "--near", "a=b"], "cifar10-openood has no use for --near"),
        (["imagenet-openood", "--seeds", "2"], "imagenet-openood has no use for --seeds"),
        (["cifar10-openood", "--quick"], "cifar10-openood has no use for --quick: leave it out"),
        (["folder", "--quick"], "folder has no use for --quick: leave it out"),
        (["KvasirV2", "--quick"], "KvasirV2 has no use for --quick: leave it out"),
        (["digits", "--quick", "--seeds", "2"], "--quick trains one network: leave out --seeds"),
    ],
)
def test_arguments_without_use_are_refused(given, message, capsys):
    assert cli.main(["benchmark", *given]) == 2
    assert capsys.readouterr().err.startswith(f"pood: {message}")


def test_output_that_cannot_be_written_is_refused_before_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    given = ["benchmark", "digits", "--output", str(tmp_path / "file" / "deeper")]
    assert cli.main(given) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pood: nothing can be written to {tmp_path / 'file'}")
