"""The scripts of the CIFAR-10 benchmark, with few images: that they run, and what they write."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch, data_folder, tmp_path):
    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, script)
        spec.loader.exec_module(script)
        given = ["--data", str(data_folder), "--output", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", [name, *given])
        script.main()
        return script

    return run


@pytest.mark.filterwarnings("ignore:MCD compares predictions under dropout")
def test_cifar10(run, tmp_path):
    arguments = ["--quick", "--networks", "resnet20", "--figures", str(tmp_path)]
    script = run("cifar10", *arguments)
    content = json.loads((tmp_path / "cifar10.json").read_text())
    network = content["networks"]["resnet20"]
    assert set(network["missing"]) >= {"TinyImageNet", "SVHN", "Places365"}
    rows = {row["detector"]: row for row in network["rows"]}
    assert {"MSP", "KNN (tuned)", "GROOD (auto)", "GROOD (mix-up layer1)", "ODIN"} <= set(rows)
    assert rows["ODIN"]["images"] == script.QUICK.max_images and rows["MSP"]["images"] is None
    assert "GROOD (outliers)" in network["seen"] and "KNN" not in network["seen"]
    for cell in rows["MSP"]["columns"].values():
        assert cell["AUROC_low"] <= cell["AUROC"] <= cell["AUROC_high"]
    text = (tmp_path / "cifar10_resnet20.md").read_text()
    assert all(line.count("(") and "†" in line for line in text.splitlines() if "(tuned)" in line)
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert len(list(tmp_path.glob("cifar10_*.png"))) == 6

    # what is there is not computed again, and tables are drawn from it
    before = (tmp_path / "cifar10.json").read_bytes()
    (tmp_path / "cifar10.csv").unlink()
    run("cifar10", *arguments)
    assert (tmp_path / "cifar10.json").read_bytes() == before
    assert (tmp_path / "cifar10.csv").exists()


def test_prototype_and_validation_outliers_share_no_superclass(run, tmp_path, data_folder):
    spec = importlib.util.spec_from_file_location("script_rules", SCRIPTS / "cifar10.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    parts = script.PROTOTYPE_SUPERCLASSES, script.VALIDATION_SUPERCLASSES
    assert not set(parts[0]) & set(parts[1])
    data = script.Data(data_folder, script.Settings(), None)
    assert len(data.outliers) == len(data.validation_ood) == 12500
    sizes = {name: len(s) for name, s in zip(data.ood_names, data.test_sets(known=False))}
    assert sizes == {"CIFAR100": 9000, script.UNSEEN: 4494, "MNIST": 10000, "Textures": 1200}


def test_cifar10_resnet18(run, tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--work", str(tmp_path / "work")]
    run("cifar10_resnet18", *arguments)
    content = json.loads((tmp_path / "cifar10_resnet18.json").read_text())
    rows = {row["detector"] for row in content["results"]}
    assert {"KNN", "GROOD", "GROOD (mix-up layer2)", "NERO"} <= rows
    assert content["device"] == "CPU" and content["settings"]["epochs"] == 1
    assert "91.16" in (tmp_path / "cifar10_resnet18.md").read_text()
    assert "epoch 1" in capsys.readouterr().out
