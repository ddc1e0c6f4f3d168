"""Fine-tuning for CIFAR-10, on a folder of the same layout with a few made-up images."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pood_plugins import cli
from pood_plugins.model import resnet20
from pood_plugins.training.cifar10 import FINETUNING, finetune_cifar10, load_cifar10

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, n in {
        "cifar10_train_1of2": 8,
        "cifar10_train_2of2": 8,
        "cifar10_test": 10,
        "cifar100_outliers": 40,
    }.items():
        strip = random.integers(0, 256, (n * 32, 32, 3), dtype=np.uint8)
        image, labels = io.BytesIO(), io.BytesIO()
        Image.fromarray(strip).save(image, "WEBP", lossless=True)
        np.savez(labels, y=np.arange(n) % 10)
        with zipfile.ZipFile(tmp_path / f"{name}.webp.zip", "w") as archive:
            archive.writestr("strip_00000.webp", image.getvalue())
            archive.writestr("meta.npz", labels.getvalue())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(resnet20().state_dict(), tmp_path / "resnet20_cifar10.pt")
    return tmp_path


def test_loads_every_part(folder):
    data = load_cifar10(folder)
    assert (len(data.train), len(data.test), len(data.outliers)) == (16, 10, 40)
    assert set(data.outliers.y.tolist()) == {-1}
    assert not data.split.training
    assert data.split(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_too_few_outliers_for_the_clusters_of_greg_plus(folder):
    with pytest.raises(ValueError, match="candidates"):
        finetune_cifar10(load_cifar10(folder), "greg+", batch_size=8)


@pytest.mark.parametrize("train", sorted(FINETUNING.keys() - {"greg+"}))
def test_the_other_ways_train_and_repeat(folder, train):
    weights = []
    for _ in range(2):
        data = load_cifar10(folder)
        before = data.split.head.weight.detach().clone()
        history = finetune_cifar10(data, train, batch_size=8, progress=False)
        assert len(history) == 2 and not torch.equal(before, data.split.head.weight)
        weights.append(data.split.head.weight.detach())
    assert torch.equal(*weights)


def test_unknown_way_and_argument(folder):
    data = load_cifar10(folder)
    with pytest.raises(LookupError, match="choose ce"):
        finetune_cifar10(data, "none")
    with pytest.raises(LookupError, match="margin_in"):
        finetune_cifar10(data, "ce", margin_in=1.0)


def test_missing_and_damaged_files(folder):
    (folder / "resnet20_cifar10.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="resnet20_cifar10.pt is damaged"):
        load_cifar10(folder)
    (folder / "resnet20_cifar10.pt").unlink()
    with pytest.raises(OSError, match="resnet20_cifar10.pt"):
        load_cifar10(folder)


def test_command(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    arguments = ["finetune", "--benchmark", "cifar10", "--train", "energy", "--output"]
    monkeypatch.setenv("POOD_DATA", str(folder))
    assert cli.main([*arguments, str(output)]) == 0
    assert json.loads((output / "finetune.json").read_text())["benchmark"] == "cifar10"
    assert "ID accuracy" in capsys.readouterr().out
    monkeypatch.delenv("POOD_DATA")
    assert cli.main([*arguments, str(output)]) == 1
    assert "--data" in capsys.readouterr().err
    assert cli.main([*arguments, str(output), "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("pood: ")
