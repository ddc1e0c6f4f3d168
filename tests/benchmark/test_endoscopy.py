"""
The benchmarks of endoscopy images, the command line and the script, on generated folders of the
published structure. No image of the data sets themselves is used.
"""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.api import BenchmarkInfo
from pytorch_ood.benchmark import Benchmark
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from pood_plugins import cli, registry
from pood_plugins.benchmark import GastroVisionBenchmark, KvasirV2Benchmark
from pood_plugins.benchmark.folder import ImageFiles
from pood_plugins.dataset import GastroVision, KvasirV2

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = [(KvasirV2Benchmark, KvasirV2), (GastroVisionBenchmark, GastroVision)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three images per class, each class of one color."""
    root = tmp_path_factory.mktemp("endoscopy")
    random = np.random.default_rng(0)
    for _, dataset in BENCHMARKS:
        for name in dataset.COUNTS:
            folder = root / dataset.FOLDER / name
            folder.mkdir(parents=True)
            color = random.integers(0, 200, 3)
            for i in range(3):
                pixels = color + random.integers(0, 50, (32, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.mark.parametrize(("benchmark_class", "dataset"), BENCHMARKS)
def test_contract(root, benchmark_class, dataset):
    benchmark = benchmark_class(root, ToTensor(), verify=False)
    assert isinstance(benchmark, Benchmark)
    info = vars(benchmark_class)["info"]
    assert isinstance(info, BenchmarkInfo) and info.ai_coded and "NERO" in info.paper.title
    assert benchmark.num_classes == len(benchmark.classes) == len(set(benchmark.classes))
    assert benchmark.ood_names == benchmark.near_ood_names == ["abnormal"]
    assert benchmark.far_ood_names == []
    (known,), (unknown,) = benchmark.test_sets(unknown=False), benchmark.test_sets(known=False)
    (mixed,) = benchmark.test_sets()
    assert len(mixed) == len(known) + len(unknown)
    assert known.labels == list(range(benchmark.num_classes))
    assert set(unknown.labels) == {-1}
    assert len(unknown) == 3 * (len(dataset.COUNTS) - benchmark.num_classes)
    assert mixed[0][0].shape == (3, 32, 40) and mixed[len(mixed) - 1][1] == -1
    with pytest.raises(ValueError, match="At least one"):
        benchmark.test_sets(known=False, unknown=False)
    # files are a type that the runner's cache recognises
    sets = [benchmark.train_set(), benchmark.id_validation_set(), known, unknown]
    assert all(isinstance(part, ImageFiles) for part in sets)
    files = [file for part in sets for file in part.files]
    assert len(files) == len(set(files)) == 3 * len(dataset.COUNTS)
    with pytest.raises(ValueError, match="3 images in .* instead of"):
        benchmark_class(root)


def test_images_are_prepared_as_in_the_paper(root):
    """Resized whatever their shape, and normalized."""
    train = KvasirV2Benchmark(root, verify=False).train_set()
    x, _ = train[0]
    assert x.shape == (3, 224, 224)
    (mean, std) = (torch.tensor(v) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    resized = ToTensor()(Image.open(train.files[0]).resize((224, 224), Image.BILINEAR))
    assert torch.allclose(x, (resized - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_by_class(root):
    benchmark = GastroVisionBenchmark(
        root, ToTensor(), by_class=True, eleventh="Mucosal inflammation large bowel", verify=False
    )
    sets = benchmark.test_sets(known=False)
    assert len(sets) == len(benchmark.ood_names) == 16 and "Ulcer" in benchmark.ood_names
    for name, ood in zip(benchmark.ood_names, sets):
        assert {file.parent.name for file in ood.files} == {name} and len(ood) == 3
    assert "Colon diverticula" in benchmark.ood_names
    whole = GastroVisionBenchmark(
        root, ToTensor(), eleventh="Mucosal inflammation large bowel", verify=False
    )
    together = [file for ood in sets for file in ood.files]
    assert together == whole.test_sets(known=False)[0].files


def test_lists(root, tmp_path):
    for fraction, parts in ((0.1, 4), (0.0, 3)):
        benchmark = KvasirV2Benchmark(root, verify=False, validation_fraction=fraction)
        benchmark.write_lists(tmp_path / "lists.csv")
        with open(tmp_path / "lists.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 24 and len({row["part"] for row in rows}) == parts


def test_registry():
    for name, (benchmark_class, _) in zip(("KvasirV2", "GastroVision"), BENCHMARKS):
        assert registry.load(name, "benchmark") is benchmark_class


@pytest.mark.filterwarnings("ignore:The head classifies no training sample correctly")
@pytest.mark.parametrize(
    ("name", "classes", "more"),
    [
        ("KvasirV2", 3, []),
        ("gastrovision", 11, ["--option", "eleventh=Mucosal inflammation large bowel"]),
    ],
)
def test_command(root, tmp_path, capsys, name, classes, more):
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=classes).state_dict(), tmp_path / "weights.pt")
    command = ["benchmark", name, "--root", str(root), "--arch", "resnet18", "--size", "32"]
    command += ["--weights", str(tmp_path / "weights.pt")]
    command += ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
    command += ["--detectors", "NERO,GROOD,MSP,Energy", "--output", str(tmp_path / "out"), *more]
    assert cli.main([*command, "--option", "verify=false"]) == 0
    out = capsys.readouterr().out
    assert "abnormal" in out and "NERO" in out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["near"] == content["ood"] == ["abnormal"]
    assert content["images"] == {"ID": classes, "abnormal": 15 if classes == 3 else 48}
    assert [row["detector"] for row in content["results"] if row["error"]] == []

    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("pood: ") and "instead of" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "script_endoscopy", ROOT / "benchmarks" / "endoscopy.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.filterwarnings("ignore:.* of the bank have a gradient of norm 0")
@pytest.mark.filterwarnings("ignore:The head classifies no training sample correctly")
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_script(script, root, tmp_path, capsys):
    places = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    arguments = ["--data", str(root), "--quick", "--device", "cpu", "--networks", "tiny", *places]
    script.main(arguments)
    out = capsys.readouterr().out
    assert "epoch 1" in out and "| NERO |" in out and script.REMARK in out
    for dataset, images in (("KvasirV2", {"ID": 3, "abnormal": 15}), ("GastroVision", {"ID": 11})):
        content = json.loads((tmp_path / f"out/endoscopy_{dataset.lower()}_tiny.json").read_text())
        assert images.items() <= content["images"].items()
        rows = {row["detector"]: row for row in content["results"]}
        assert {"NERO", "GROOD", "GROOD (mean)", "MSP", "ODIN", "ReAct", "GradNorm"} <= set(rows)
        assert not rows["NERO"]["error"] and not rows["GROOD"]["error"]
        assert content["first_weights"] == "random" and content["settings"]["epochs"] == 1
        assert set(content["comparison"]) == set(script.ROWS) - {"NECO"}
        text = (tmp_path / f"out/endoscopy_{dataset.lower()}_tiny.md").read_text()
        assert "| NERO |" in text and "not the paper's" in text
        weights = torch.load(tmp_path / "work" / dataset / "tiny.pt", weights_only=True)
        script.tiny(content["images"]["ID"]).load_state_dict(weights)
        lists = (tmp_path / "work" / dataset / "split.csv").read_text().splitlines()
        assert len(lists) == 1 + 3 * {"KvasirV2": 8, "GastroVision": 27}[dataset]
    table = (tmp_path / "out" / "endoscopy_tiny.md").read_text()
    assert table.startswith("| Method | KvasirV2, paper | KvasirV2, ours | GastroVision, paper |")

    # training is not done again, unless something is different
    script.main([*arguments, "--datasets", "KvasirV2"])
    assert "epoch" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has other settings"):
        script.main([*arguments, "--eleventh", script.ELEVENTH[1], "--datasets", "GastroVision"])


def make_training(script, root, epochs, **changes):
    settings = script.Settings(
        epochs=epochs, batch_size=2, learning_rate=0.01, validate_every=2, size=32, **changes
    )
    augmentation = script.augmentation(script.Preprocessing(32, (0.5,) * 3, (0.2,) * 3, (32, 32)))
    plain = script.Preprocessing(32, (0.5,) * 3, (0.2,) * 3, (32, 32)).transform
    benchmark = KvasirV2Benchmark(root, plain, verify=False)
    train_set = KvasirV2(root, "train", augmentation, verify=False)
    return settings, train_set, benchmark.id_validation_set()


def test_training_goes_on_after_an_interruption(script, root, tmp_path, monkeypatch):
    settings, *data = make_training(script, root, epochs=3)
    device = torch.device("cpu")

    def train(name):
        model = script.make_network("tiny", 3, settings, None, True)
        return model, script.train(model, *data, settings, device, tmp_path / name)

    whole, history = train("whole.zip")
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert ["accuracy" in line for line in history] == [False, True, True]  # and at the end
    assert not whole.training

    save = script.save_checkpoint

    def interrupted(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("parts.zip")
    torch.rand(3)  # the global generator plays no part
    monkeypatch.setattr(script, "save_checkpoint", save)
    parts, again = train("parts.zip")
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name

    settings = make_training(script, root, epochs=4)[0]
    with pytest.raises(SystemExit, match="has other settings: remove it"):
        train("parts.zip")


def test_the_best_weights_are_kept(script, root, tmp_path, monkeypatch):
    """The earliest of equals."""
    settings, *data = make_training(script, root, epochs=6)
    model = script.make_network("tiny", 3, settings, None, True)
    accuracies, seen = iter([0.5, 0.9, 0.9]), []

    def accuracy(model, loader, device):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr(script, "accuracy", accuracy)
    script.train(model, *data, settings, torch.device("cpu"), tmp_path / "a.zip")
    assert len(seen) == 3
    assert all(torch.equal(seen[1][name], value) for name, value in model.state_dict().items())
    assert not torch.equal(seen[1]["0.weight"], seen[2]["0.weight"])


def test_accuracy(script):
    class Fixed(nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return x

    logits = torch.eye(3)
    loader = [(logits, torch.tensor([0, 1, 1])), (logits[:1], torch.tensor([0]))]
    assert script.accuracy(Fixed().train(), loader, torch.device("cpu")) == 0.75


def test_first_weights(script, tmp_path, monkeypatch):
    """From a file, all but the head; and without file and network, a sentence."""
    settings = script.Settings()
    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = script.make_network("resnet18", 3, settings, tmp_path / "resnet18.pth", False)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert model.fc.out_features == 3
    assert script.given_files([f"resnet18={tmp_path / 'resnet18.pth'}"], ["resnet18", "tiny"])
    assert script.given_files([str(tmp_path / "resnet18.pth")], ["resnet18"])
    for text in ("deit_small=resnet18.pth", "nix.pth", f"{tmp_path / 'resnet18.pth'}"):
        with pytest.raises(SystemExit, match="must be NETWORK=FILE, with one of resnet18, tiny"):
            script.given_files([text], ["resnet18", "tiny"])

    def offline(*arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(script, "load_classifier", offline)
    with pytest.raises(
        SystemExit, match=r"deit_small can't be .*no route.*--init deit_small=FILE"
    ):
        script.make_network("deit_small", 3, settings, None, False)


def test_deit(script):
    pytest.importorskip("timm")
    model = script.make_network("deit_small", 3, script.QUICK, None, True)
    assert model.head.out_features == 3 and model.head.in_features == 384


def test_errors(script, root, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="3 images in .* Other data sets go on alone by --datas"):
        script.main(["--data", str(root), "--datasets", "KvasirV2", "--networks", "tiny"])
    with pytest.raises(SystemExit, match="not the folder of KvasirV2"):
        script.main(["--data", str(tmp_path), "--networks", "tiny", "--quick"])
    monkeypatch.delenv("POOD_DATA", raising=False)
    with pytest.raises(SystemExit):
        script.main([])


def test_rate_of_the_paper(script):
    """The share of OOD images that are not above the ID score at position ⌊0.95 n⌋."""
    known = torch.arange(100.0).flip(0)
    assert script.passing(known, torch.tensor([94.0, 95.0, 95.5, 200.0])) == 0.5
    assert script.passing(torch.tensor([1.0]), torch.tensor([0.0, 2.0])) == 0.5


def test_comparison(script):
    ours = {"KvasirV2": {"NERO": {"AUROC": 1.0, "FPR95": 2.0}}}
    lines = script.comparison("resnet18", ours).splitlines()
    assert "| NERO | 90.76 / 28.84 | 1.00 / 2.00 |" in lines
    assert "| NECO | 89.64 / 47.90 | — |" in lines
    assert len({line.count("|") for line in lines}) == 1
    for datasets in script.PUBLISHED.values():
        assert set(datasets) == set(script.DATASETS)
        assert all(set(rows) == set(script.ROWS) for rows in datasets.values())


def test_documentation_has_the_figures_of_the_script(script):
    """The paper's table is written in two places."""
    text = (ROOT / "docs" / "endoscopy.rst").read_text("utf-8")
    written = re.findall(r"\d\d\.\d\d / \d\d\.\d\d", text)
    expected = [
        f"{auroc:.2f} / {fpr:.2f}"
        for row in script.ROWS
        for network in ("resnet18", "deit_small")
        for dataset in ("KvasirV2", "GastroVision")
        for auroc, fpr in [script.PUBLISHED[network][dataset][row]]
    ]
    assert written == expected
