"""The folder benchmark labels images as the folders say, and names what is wrong with them."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.api import BenchmarkInfo
from pytorch_ood.benchmark import Benchmark
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from pood_plugins import evaluation, registry
from pood_plugins.benchmark.folder import FolderBenchmark, ImageFiles
from pood_plugins.model import split_model

RED, BLUE, GREY = (200, 10, 10), (10, 10, 200), (90, 90, 90)


def write(path, color=GREY, mode="RGB", size=8, **options):
    """An image of some texture, so that it is longer than what a decoder reads at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 50, (size, size, 3))
    image = Image.fromarray((np.array(color) + noise).astype(np.uint8))
    image.convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    for part in ("train", "test"):
        for name, color in {"b-dog": BLUE, "a dog": RED, "C": GREY}.items():
            for i in range(3):
                write(tmp_path / part / name / f"{i}.png", color)
    write(tmp_path / "cats" / "1.png", (10, 200, 10))
    write(tmp_path / "cats" / "tabby" / "left" / "2.JPEG", (10, 200, 10))
    write(tmp_path / "noise" / "1.bmp", (200, 200, 200))
    return tmp_path


def make(root, **changes):
    arguments = {
        "train": root / "train",
        "test": root / "test",
        "ood": {"noise": root / "noise", "cats": root / "cats"},
        "near": ["cats"],
    }
    return FolderBenchmark(**{**arguments, **changes})


def labels(dataset):
    return [y for _, y in dataset]


def names(dataset, root):
    return [path.relative_to(root).as_posix() for path in dataset.files]


def test_contract(root):
    benchmark = make(root)
    assert isinstance(benchmark, Benchmark)
    info = vars(FolderBenchmark)["info"]
    assert isinstance(info, BenchmarkInfo) and info.ai_coded
    mixed = benchmark.test_sets()
    known = benchmark.test_sets(unknown=False)
    unknown = benchmark.test_sets(known=False)
    assert len(mixed) == len(unknown) == len(benchmark.ood_names) == 2 and len(known) == 1
    for combined, ood in zip(mixed, unknown):
        assert labels(combined) == labels(known[0]) + labels(ood)
    with pytest.raises(ValueError, match="At least one"):
        benchmark.test_sets(known=False, unknown=False)


def test_near_sets_come_first(root):
    """Whatever the order in ``ood``, and the sets are in the order of their names."""
    benchmark = make(root)
    assert benchmark.near_ood_names == ["cats"] and benchmark.far_ood_names == ["noise"]
    assert benchmark.ood_names == ["cats", "noise"]
    cats, noise = benchmark.test_sets(known=False)
    assert names(cats, root) == ["cats/1.png", "cats/tabby/left/2.JPEG"]
    assert names(noise, root) == ["noise/1.bmp"]
    assert labels(cats) == [-1, -1] and labels(noise) == [-1]
    alone = make(root, near=())
    assert alone.near_ood_names == [] and alone.far_ood_names == ["noise", "cats"]


def test_classes_and_order_are_those_of_torchvision(root):
    benchmark = make(root)
    theirs = ImageFolder(str(root / "train"))
    assert benchmark.classes == theirs.classes == ["C", "a dog", "b-dog"]
    assert benchmark.num_classes == 3
    train = benchmark.train_set()
    assert [(str(path), y) for path, y in zip(train.files, train.labels)] == theirs.samples
    assert labels(train) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_classes_may_be_missing_from_test(root):
    """A label is the position in the training folder."""
    for path in (root / "test" / "a dog").iterdir():
        path.unlink()
    for path in (root / "test" / "C").iterdir():
        path.unlink()
    (root / "test" / "C").rmdir()
    assert labels(make(root).test_sets(unknown=False)[0]) == [2, 2, 2]


def test_order_is_not_that_of_the_file_system(root, monkeypatch):
    write(root / "cats" / "tabby-2" / "0.png")
    write(root / "cats" / "0.PNG")
    expected = ["0.PNG", "1.png", "tabby-2/0.png", "tabby/left/2.JPEG"]
    walk = os.walk

    def backwards(*args, **options):
        for parent, folders, files in walk(*args, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    for order in (walk, backwards):
        monkeypatch.setattr(os, "walk", order)
        benchmark = make(root)
        assert names(benchmark.test_sets(known=False)[0], root / "cats") == expected
        assert benchmark.classes == ["C", "a dog", "b-dog"]


def test_hidden_and_other_files_are_ignored(root):
    before = make(root)
    write(root / "train" / ".checkpoints" / "1.png")
    write(root / "train" / "C" / ".1.png")
    write(root / "train" / "1.png")
    write(root / "cats" / ".thumbnails" / "1.png")
    (root / "cats" / "notes.txt").write_text("no image")
    (root / "cats" / "folder.png").mkdir()
    after = make(root)
    assert after.classes == before.classes
    assert after.train_set().files == before.train_set().files
    for a, b in zip(after.test_sets(known=False), before.test_sets(known=False)):
        assert a.files == b.files


def test_folders_may_be_links(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "cats").rename(elsewhere / "cats")
    (root / "train" / "C").rename(elsewhere / "C")
    (root / "cats").mkdir()
    (root / "cats" / "all").symlink_to(elsewhere / "cats")
    (root / "train" / "C").symlink_to(elsewhere / "C")
    benchmark = make(root)
    assert labels(benchmark.train_set())[:4] == [0, 0, 0, 1]
    assert len(benchmark.test_sets(known=False)[0]) == 2


def test_home_folder_and_text_paths(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    benchmark = FolderBenchmark("~/train", str(root / "test"), {"cats": "~/cats"})
    assert benchmark.train_set().files == make(root).train_set().files
    assert labels(benchmark.test_sets()[0]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("1.png", "L", {}),
        ("1.png", "1", {}),
        ("1.png", "LA", {}),
        ("1.png", "RGBA", {}),
        ("1.png", "P", {}),
        ("1.png", "P", {"transparency": 3}),
        ("1.png", "P", {"transparency": bytes(range(256))}),  # of which Pillow would warn
        ("1.jpg", "L", {}),
        ("1.jpg", "CMYK", {}),
        ("1.webp", "RGBA", {"lossless": True}),
        ("1.tif", "RGB", {}),
    ],
)
def test_images_are_rgb_and_those_of_torchvision(root, name, mode, options):
    path = write(root / "mixed" / name, RED, mode, **options)
    image, label = ImageFiles([path], [4], None)[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 4
    assert 0 <= float(image.min()) and 0.2 < float(image.max()) <= 1
    write(root / "theirs" / "class" / name, RED, mode, **options)
    theirs = ImageFolder(str(root / "theirs"), transform=ToTensor())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(image, theirs[0][0])


def test_transform_gets_rgb_images(root):
    write(root / "noise" / "2.png", mode="L")
    write(root / "noise" / "3.png", mode="RGBA")
    seen = []

    def transform(image):
        seen.append((type(image), image.mode, image.size))
        return torch.zeros(1)

    benchmark = make(root, transform=transform)
    for dataset in [benchmark.train_set(), *benchmark.test_sets()]:
        assert all(torch.equal(image, torch.zeros(1)) for image, _ in dataset)
    assert len(seen) == 9 + 2 * 9 + 2 + 3
    assert set(seen) == {(Image.Image, "RGB", (8, 8))}


def test_errors_of_a_transform_are_not_the_files(root):
    def transform(image):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        make(root, transform=transform).train_set()[0]


def test_data_sets_go_to_worker_processes(root):
    dataset = pickle.loads(pickle.dumps(make(root).train_set()))
    x, y = next(iter(DataLoader(dataset, batch_size=9)))
    assert x.shape == (9, 3, 8, 8) and y.tolist() == labels(dataset)


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.bmp", "photo.tif"])
@pytest.mark.parametrize("keep", [0.7, 0.0])
def test_damaged_images_are_named(root, name, keep):
    """Truncated, and empty."""
    path = write(root / "noise" / name, size=64)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    noise = make(root).test_sets(known=False)[1]
    with pytest.raises(ValueError, match=rf"noise/{name} can't be .* remove or replace it\.$"):
        noise[1]
    assert noise[0][1] == -1


def test_corrupt_and_vanished_images_are_named(root):
    path = root / "train" / "C" / "0.png"
    path.write_text("no image")
    train = make(root).train_set()
    with pytest.raises(ValueError, match="C/0.png can't be .* remove or replace it"):
        train[0]
    path.unlink()
    with pytest.raises(ValueError, match="C/0.png can't be .*No such file"):
        train[0]


def empty(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda r: {"train": r / "nix"}, r"nix can't be read \(No such file.*: correct its path"),
        (lambda r: {"test": r / "nix"}, "nix can't be read"),
        (lambda r: {"ood": {"cats": r / "nix"}}, "nix can't be read"),
        (lambda r: {"train": r / "noise" / "1.bmp"}, r"1.bmp can't be read \(Not a directory"),
        (lambda r: {"train": r / "noise"}, "noise has no class folders: make one folder"),
        (lambda r: {"test": r / "noise"}, "no images .* in class folders of .*noise: add some"),
        (lambda r: {"test": empty(r / "test2")}, "in class folders of .*test2: add some"),
        (lambda r: {"train": empty(r / "train" / "D").parent}, "train/D: add some, or remove"),
        (lambda r: {"test": empty(r / "test" / "bird").parent}, r"train lacks \(bird\): rename"),
        (lambda r: {"test": r / "cats"}, r"cats has class .*train lacks \(tabby\)"),
        (
            lambda r: {"ood": {"cats": empty(r / "none")}},
            r"no images \(.jpg, .*\) in .*none: add some, or leave out the OOD set 'cats'",
        ),
        (lambda r: {"ood": {}, "near": ()}, "no OOD sets: name"),
        (lambda r: {"near": ["cats", "dogs"]}, "near names 'dogs', .* are 'noise', 'cats': give"),
        (lambda r: {"near": "cats"}, "near names 'c', 'a', 't', 's', .*: give a list"),
        (lambda r: {"ood": {"near": r / "cats"}}, "can't be called 'near'.*: rename"),
        (lambda r: {"ood": {"far": r / "cats"}}, "can't be called 'far'"),
        (lambda r: {"ood": {"ID": r / "cats"}}, "can't be called 'ID'"),
    ],
)
def test_errors_say_what_to_do(root, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(root, **changes(root))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_folders_that_cannot_be_read_are_not_skipped(root, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("tabby"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"tabby can't be read \(Permission denied\): .* perm"):
        make(root)


def test_one_label_per_file(root):
    with pytest.raises(ValueError, match="got 1 files and 2 labels"):
        ImageFiles([root / "noise" / "1.bmp"], [0, 1], None)


def test_evaluation(root):
    """A network that tells the three colors of the classes apart, and from green and white."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        network[2].weight.copy_(20 * torch.tensor([[0, 1.5, 0], [1, 0, 0], [0, 0, 1]]))
        network[2].bias.zero_()
    split = split_model(network, example=torch.zeros(2, 3, 8, 8))
    detectors = {
        "MSP": registry.build("MSP", split),
        "KNN": registry.build("KNN", split, k=1),
        "GROOD": registry.build("GROOD", split),
    }
    report = evaluation.run(make(root), detectors, loader_kwargs={"batch_size": 4})
    assert not report.failed, [result.error for result in report.failed]
    assert report.ood_names == ["cats", "noise"]
    assert (report.near_ood_names, report.far_ood_names) == (["cats"], ["noise"])
    assert [result.accuracy for result in report.results] == [1.0] * 3
    for column in ("cats", "noise"):
        assert report.value("KNN", column, "AUROC") == (1.0, None)
