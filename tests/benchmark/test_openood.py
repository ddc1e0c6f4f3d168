"""
OpenOOD's benchmarks on what is there: generated trees and packs, against pytorch-ood's own classes
where everything is there, and against the arrays that the images were made of.
"""

import io
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.api import BenchmarkInfo
from pytorch_ood.benchmark import (
    Benchmark,
    CIFAR10_OpenOOD,
    CIFAR100_OpenOOD,
    ImageNet200_OpenOOD,
    ImageNet_OpenOOD,
)
from pytorch_ood.benchmark.img import openood as upstream
from torch.utils.data import DataLoader
from torchvision.transforms import Normalize, ToTensor

from pood_plugins.benchmark import openood as from_package
from pood_plugins.benchmark.openood import (
    OPENOOD_CLASSES,
    PackedCIFAR10,
    PartialCIFAR10,
    PartialCIFAR100,
    PartialImageNet,
    PartialImageNet200,
    is_packed,
    openood,
)
from pood_plugins.dataset import read_pack

PAIRS = {
    PartialCIFAR10: CIFAR10_OpenOOD,
    PartialCIFAR100: CIFAR100_OpenOOD,
    PartialImageNet200: ImageNet200_OpenOOD,
    PartialImageNet: ImageNet_OpenOOD,
}
#: lists of CIFAR-10 by the name of the set
LISTS = {
    "ID test": "test_cifar10.txt",
    "CIFAR100": "test_cifar100.txt",
    "TinyImageNet": "test_tin.txt",
    "MNIST": "test_mnist.txt",
    "SVHN": "test_svhn.txt",
    "Textures": "test_texture.txt",
    "Places365": "test_places365.txt",
    "ID training": "train_cifar10.txt",
    "ID validation": "val_cifar10.txt",
    "OOD validation": "val_tin.txt",
}
OODS = ["CIFAR100", "TinyImageNet", "MNIST", "SVHN", "Textures", "Places365"]


@pytest.fixture(autouse=True)
def torch_home(tmp_path, monkeypatch):
    """No lists of this machine are found, and nothing is ever fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return tmp_path / "torch_home" / "hub" / "openood_benchmark_imglist" / "benchmark_imglist"


def write_image(path, seed, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, format="PNG")


def write_tree(root, lists, whole=CIFAR10_OpenOOD):
    """All sets of a benchmark, each of three images, and their lists."""
    files = [whole._train_imglist, whole._val_id_imglist, whole._test_id_imglist]
    oods = [whole._val_ood_imglist, *(file for _, file in whole._ood_imglists)]
    (lists / whole._subdir).mkdir(parents=True)
    for number, file in enumerate([*files, *oods]):
        lines = []
        for i in (2, 0, 1):
            name = f"{file[:-4]}/class {i % 2}/{i}.png".replace(" ", "_")
            write_image(root / name, 3 * number + i, "L" if "mnist" in file else "RGB")
            lines.append(f"{name} {-1 if file in oods else 3 * i + 1}\n")
        (lists / whole._subdir / file).write_text("".join(lines))


@pytest.fixture
def root(tmp_path):
    write_tree(tmp_path / "images", tmp_path / "benchmark_imglist")
    return tmp_path / "images"


def lines_of(root, name, change=None):
    """The lines of a list of CIFAR-10, changed if a function says how."""
    path = root.parent / "benchmark_imglist" / "cifar10" / LISTS[name]
    lines = path.read_text().splitlines()
    if change is not None:
        path.write_text("".join(f"{line}\n" for line in change(lines)))
    return lines


def remove(root, *names):
    for name in names:
        (root.parent / "benchmark_imglist" / "cifar10" / LISTS[name]).unlink()


def labels(dataset):
    return [label for _, label in dataset]


def assert_equal(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for (image, label), (their_image, their_label) in zip(mine, theirs):
        assert torch.equal(image, their_image)
        assert label == their_label and isinstance(label, int)


# all there


@pytest.mark.parametrize("ours", PAIRS)
def test_whole_benchmark_is_that_of_pytorch_ood(tmp_path, torch_home, ours):
    write_tree(tmp_path, torch_home, PAIRS[ours])
    theirs = PAIRS[ours](str(tmp_path), ToTensor(), download=False)
    mine = ours(tmp_path)
    assert mine.missing == {}
    assert mine.ood_names == theirs.ood_names
    assert_equal(mine.train_set(), theirs.train_set())
    assert_equal(mine.validation_set(), theirs.validation_set())
    assert_equal(mine.id_validation_set(), theirs.val_in)
    for known, unknown in ((True, True), (True, False), (False, True)):
        sets = mine.test_sets(known, unknown), theirs.test_sets(known, unknown)
        assert len(sets[0]) == len(sets[1])
        for mine_set, their_set in zip(*sets):
            assert_equal(mine_set, their_set)


@pytest.mark.parametrize("ours", PAIRS)
def test_near_and_far_are_the_published_ones(tmp_path, torch_home, ours):
    write_tree(tmp_path, torch_home, PAIRS[ours])
    benchmark = ours(tmp_path)
    if ours in (PartialCIFAR10, PartialCIFAR100):
        other = "CIFAR100" if ours is PartialCIFAR10 else "CIFAR10"
        near, far = [other, "TinyImageNet"], ["MNIST", "SVHN", "Textures", "Places365"]
    else:
        near, far = ["SSBHard", "NINCO"], ["iNaturalist", "Textures", "OpenImagesO"]
    assert (benchmark.near_ood_names, benchmark.far_ood_names) == (near, far)
    assert benchmark.ood_names == near + far
    classes = {PartialCIFAR10: 10, PartialCIFAR100: 100, PartialImageNet200: 200}
    assert benchmark.num_classes == classes.get(ours, 1000)


def test_contract(root):
    benchmark = PartialCIFAR10(root)
    assert isinstance(benchmark, Benchmark)
    for whole in (PartialCIFAR10, PackedCIFAR10, PartialImageNet):
        assert isinstance(whole.info, BenchmarkInfo) and whole.info.ai_coded
    mixed = benchmark.test_sets()
    (known,), unknown = benchmark.test_sets(unknown=False), benchmark.test_sets(known=False)
    assert len(mixed) == len(unknown) == 6
    assert labels(known) == [7, 1, 4]
    for combined, ood in zip(mixed, unknown):
        assert labels(combined) == [7, 1, 4, -1, -1, -1]
        assert torch.equal(combined[3][0], ood[0][0])
    with pytest.raises(ValueError, match="At least one of `known` or `unknown`"):
        benchmark.test_sets(known=False, unknown=False)


def test_transform_gets_rgb_images(root):
    seen = set()

    def transform(image):
        seen.add((image.mode, image.size))
        return torch.zeros(1)

    benchmark = PartialCIFAR10(str(root), transform)
    for dataset in [benchmark.train_set(), benchmark.validation_set(), *benchmark.test_sets()]:
        assert all(torch.equal(image, torch.zeros(1)) for image, _ in dataset)
    assert seen == {("RGB", (7, 5))}


def test_worker_processes_read_the_same(root):
    (known,) = PartialCIFAR10(root).test_sets(unknown=False)
    x, y = next(iter(DataLoader(known, batch_size=3)))
    assert y.tolist() == labels(known) and torch.equal(x[1], known[1][0])


# only a part there


@pytest.mark.parametrize("name", OODS)
def test_missing_list_leaves_out_one_set(root, name):
    """Whichever it is, the others keep their order, images and groups."""
    before = PartialCIFAR10(root)
    remove(root, name)
    benchmark = PartialCIFAR10(root)
    rest = [other for other in OODS if other != name]
    assert benchmark.missing == {name: f"no list {LISTS[name]}"}
    assert benchmark.ood_names == rest
    assert benchmark.near_ood_names == [n for n in ("CIFAR100", "TinyImageNet") if n != name]
    assert benchmark.far_ood_names == rest[len(benchmark.near_ood_names) :]
    whole = dict(zip(before.ood_names, before.test_sets(known=False)))
    for other, dataset in zip(rest, benchmark.test_sets(known=False)):
        assert dataset.files == whole[other].files
    assert len(benchmark.test_sets()) == 5


def test_set_with_missing_images_is_left_out_in_full(root):
    """Figures of a part would pass for those of the whole."""
    svhn, mnist = ([line.rpartition(" ")[0] for line in lines_of(root, n)] for n in OODS[3:1:-1])
    (root / svhn[1]).unlink()
    for file in mnist:
        (root / file).unlink()
    benchmark = PartialCIFAR10(root)
    assert list(benchmark.missing) == ["MNIST", "SVHN"]
    assert benchmark.missing["SVHN"] == f"1 of 3 images are not there, e.g. {root / svhn[1]}"
    assert benchmark.missing["MNIST"] == f"3 of 3 images are not there, e.g. {root / mnist[0]}"
    assert benchmark.far_ood_names == ["Textures", "Places365"]
    assert benchmark.ood_names == ["CIFAR100", "TinyImageNet", "Textures", "Places365"]
    assert "SVHN" not in benchmark.notes and "MNIST" not in benchmark.notes


@pytest.mark.parametrize("lines", [[], ["", "# nothing", "  "]])
def test_empty_list_is_a_reason(root, lines):
    lines_of(root, "Textures", lambda _: lines)
    assert PartialCIFAR10(root).missing == {"Textures": "the list test_texture.txt is empty"}


def test_near_or_far_may_be_gone(root):
    remove(root, "CIFAR100", "TinyImageNet")
    benchmark = PartialCIFAR10(root)
    assert benchmark.near_ood_names == [] and len(benchmark.far_ood_names) == 4
    remove(root, "MNIST", "SVHN", "Textures")
    benchmark = PartialCIFAR10(root)
    assert benchmark.ood_names == benchmark.far_ood_names == ["Places365"]
    assert list(benchmark.missing) == OODS[:5]


def test_smaller_sets_are_noted(root, tmp_path, torch_home):
    assert PartialCIFAR10(root).notes == {
        "CIFAR100": "3 of 9,000 images",
        "MNIST": "3 of 70,000 images",
        "Textures": "3 of 5,640 images",
    }
    lines_of(root, "CIFAR100", lambda lines: 3000 * lines)
    lines_of(root, "Textures", lambda lines: 400 * lines)
    assert PartialCIFAR10(root).notes == {
        "MNIST": "3 of 70,000 images",
        "Textures": "1,200 of 5,640 images",
    }
    write_tree(tmp_path / "other", torch_home, CIFAR100_OpenOOD)
    assert PartialCIFAR100(tmp_path / "other").notes["CIFAR10"] == "3 of 9,000 images"


def test_no_size_of_cifar_is_expected_of_imagenet(tmp_path, torch_home):
    """Its Textures are fewer, without the classes that ImageNet has."""
    write_tree(tmp_path, torch_home, ImageNet_OpenOOD)
    assert PartialImageNet(tmp_path).notes == {}


def test_training_and_validation_may_be_missing(root):
    remove(root, "ID training", "OOD validation")
    benchmark = PartialCIFAR10(root)
    assert benchmark.ood_names == OODS
    assert list(benchmark.missing) == ["ID training", "OOD validation"]
    with pytest.raises(ValueError, match="The ID training set is missing, no list train_cifar10"):
        benchmark.train_set()
    with pytest.raises(ValueError, match="The OOD validation set is missing, no list val_tin.txt"):
        benchmark.validation_set()
    assert labels(benchmark.id_validation_set()) == [7, 1, 4]
    (root / lines_of(root, "ID validation")[0].split()[0]).unlink()
    with pytest.raises(ValueError, match="The ID validation set is missing, 1 of 3 images"):
        PartialCIFAR10(root).id_validation_set()


# lists


def test_lists_are_found_in_the_usual_places(tmp_path, torch_home):
    """The nearest first: below the root folder, beside it, where pytorch-ood puts them."""
    root = tmp_path / "data" / "images"
    places = [root / "benchmark_imglist", root.parent / "benchmark_imglist", torch_home]
    for n in (3, 2, 1):  # so many images has the ID test set by the list of each place
        write_tree(root, places[n - 1])
        path = places[n - 1] / "cifar10" / LISTS["ID test"]
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))
        assert len(PartialCIFAR10(root).test_sets(unknown=False)[0]) == n
    # a folder without this benchmark's lists is none
    (places[0] / "cifar10").rename(places[0] / "cifar100")
    assert len(PartialCIFAR10(root).test_sets(unknown=False)[0]) == 2


def test_lists_by_argument(root, tmp_path, monkeypatch):
    write_tree(root, tmp_path / "mine")
    path = tmp_path / "mine" / "cifar10" / LISTS["ID test"]
    path.write_text(path.read_text().splitlines()[0])
    monkeypatch.setenv("HOME", str(tmp_path))
    for imglists in (tmp_path / "mine", str(tmp_path / "mine"), "~/mine"):
        benchmark = PartialCIFAR10("~/images", imglists=imglists)
        assert labels(benchmark.test_sets(unknown=False)[0]) == [7]
    with pytest.raises(ValueError, match=r"no image lists of OpenOOD \(cifar10/\*.txt\) in .*nix"):
        PartialCIFAR10(root, imglists=tmp_path / "nix")


def test_names_with_spaces_and_other_separators(root):
    write_image(root / "a b" / "1 2.png", 50)
    write_image(root / "ü.png", 51)
    lines_of(root, "Textures", lambda _: ["a b/1 2.png -1", "  ü.png\t-1  ", "# a", ""])
    lines_of(root, "MNIST", lambda lines: [f"{line}\r" for line in lines])
    benchmark = PartialCIFAR10(root)
    assert benchmark.missing == {}
    mnist, textures = benchmark.test_sets(known=False)[2], benchmark.test_sets(known=False)[4]
    assert labels(mnist) == [-1, -1, -1] and labels(textures) == [-1, -1]
    assert textures.files == [root / "a b" / "1 2.png", root / "ü.png"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("test_tin/0.png", "TinyImageNet"),
        ("test_tin/0.png cat", "TinyImageNet"),
        ("7", "TinyImageNet"),
        ("test_cifar10/0.png 1.5", "ID test"),
        ("nothing", "ID training"),
    ],
)
def test_broken_line_is_named(root, line, name):
    lines_of(root, name, lambda lines: ["", lines[0], line, lines[1]])
    with pytest.raises(ValueError, match=rf"line 3 of .*{LISTS[name]} is '{line}', not a path"):
        PartialCIFAR10(root)


@pytest.mark.parametrize("label", [2**63, -(2**63), "9" * 5000])
def test_label_that_no_tensor_has(root, label):
    lines_of(root, "MNIST", lambda lines: [lines[0].rsplit(" ", 1)[0] + f" {label}"])
    with pytest.raises(ValueError, match="line 1 of .*test_mnist.txt .*copy the list") as caught:
        PartialCIFAR10(root)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "\x00", "\x1b[2J"])
def test_names_that_no_file_has(root, name):
    lines_of(root, "MNIST", lambda lines: [f"{name} 1"])
    reason = PartialCIFAR10(root).missing["MNIST"]
    assert reason.startswith("1 of 1 images are not there") and len(reason) < 400
    assert reason.isprintable()


def test_list_that_is_a_folder(root):
    path = root.parent / "benchmark_imglist" / "cifar10" / LISTS["SVHN"]
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"test_svhn.txt is damaged \(.*: copy the list again"):
        PartialCIFAR10(root)


def test_list_that_is_no_text(root):
    path = root.parent / "benchmark_imglist" / "cifar10" / LISTS["SVHN"]
    path.write_bytes(b"\xff\xfe" + bytes(range(256)))
    with pytest.raises(ValueError, match=r"test_svhn.txt is damaged \(.*: copy the list again"):
        PartialCIFAR10(root)


def test_download_is_that_of_pytorch_ood(tmp_path, torch_home, monkeypatch):
    """Everything that is not there, once."""
    fetched = []

    def fetch(id, output, quiet):
        fetched.append(id)
        with zipfile.ZipFile(output, "w") as archive:
            if id == upstream._IMGLIST_GDRIVE_ID:
                for file in LISTS.values():
                    name = file.split("_")[1].removesuffix(".txt")
                    archive.writestr(f"benchmark_imglist/cifar10/{file}", f"{name}/1.png 0")
            else:
                archive.write(tmp_path / "1.png", "1.png")

    write_image(tmp_path / "1.png", 0)
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=fetch))
    for _ in range(2):
        benchmark = PartialCIFAR10(tmp_path / "new" / "images", download=True)
        assert benchmark.missing == {} and benchmark.ood_names == OODS
    names = ["cifar10", "cifar100", "tin", "mnist", "svhn", "texture", "places365"]
    expected = [upstream._OPENOOD_GDRIVE_IDS[name] for name in names]
    assert fetched == [*expected, upstream._IMGLIST_GDRIVE_ID]


# errors


def test_wrong_root(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nix: name the one that holds the"):
        PartialCIFAR10(tmp_path / "nix")
    write_image(tmp_path / "file.png", 0)
    with pytest.raises(ValueError, match="there is no folder .*file.png"):
        PartialCIFAR10(tmp_path / "file.png")


def test_no_lists(tmp_path, torch_home):
    root = tmp_path / "data" / "images"
    root.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no image lists .*: name their folder by imglists") as e:
        PartialCIFAR100(root)
    places = [root / "benchmark_imglist", tmp_path / "data" / "benchmark_imglist", torch_home]
    assert "(cifar100/*.txt)" in str(e.value)
    assert f"in {', '.join(map(str, places))}:" in str(e.value)


def test_no_id_test_set(root):
    (root / lines_of(root, "ID test")[2].split()[0]).unlink()
    with pytest.raises(
        ValueError, match="does not hold the ID test set of PartialCIFAR10, 1 of 3 images"
    ):
        PartialCIFAR10(root)
    remove(root, "ID test")
    with pytest.raises(ValueError, match="no list test_cifar10.txt: name another root folder"):
        PartialCIFAR10(root)


def test_no_ood_set(root):
    remove(root, *OODS[1:])
    lines_of(root, "CIFAR100", lambda _: [])
    with pytest.raises(ValueError, match="images holds no OOD set of PartialCIFAR10") as caught:
        PartialCIFAR10(root)
    for name in OODS[1:]:
        assert f"{name}, no list {LISTS[name]}" in str(caught.value)
    assert "CIFAR100, the list test_cifar100.txt is empty" in str(caught.value)


def test_corrupt_image_is_named_on_access(root):
    path = root / lines_of(root, "MNIST")[1].split()[0]
    path.write_bytes(path.read_bytes()[:40])
    mnist = PartialCIFAR10(root).test_sets(known=False)[2]
    with pytest.raises(ValueError, match=rf"{path} can't be read as an image .*: remove or repl"):
        mnist[1]
    assert mnist[2][1] == -1


# ImageNet


def test_training_images_of_imagenet_are_linked(tmp_path, torch_home, monkeypatch):
    root = tmp_path / "images"
    write_tree(root, torch_home, ImageNet_OpenOOD)
    write_image(tmp_path / "imagenet" / "train" / "n1" / "1.JPEG", 90)
    write_image(tmp_path / "imagenet" / "train" / "n2" / "2.JPEG", 91)
    train = "imagenet_1k/train/n2/2.JPEG 1\nimagenet_1k/train/n1/1.JPEG 0\n"
    (torch_home / "imagenet" / "train_imagenet.txt").write_text(train)
    without = PartialImageNet(root)
    assert list(without.missing) == ["ID training"]
    assert without.missing["ID training"].startswith("2 of 2 images are not there")

    monkeypatch.chdir(tmp_path)  # a link by a relative path would lead nowhere
    mine = PartialImageNet(root, image_net_root="imagenet")
    theirs = ImageNet_OpenOOD(str(root), ToTensor(), str(tmp_path / "imagenet"), download=False)
    assert mine.missing == {} and labels(mine.train_set()) == [1, 0]
    assert_equal(mine.train_set(), theirs.train_set())
    again = PartialImageNet(root, image_net_root=tmp_path / "imagenet")
    assert again.train_set().files == mine.train_set().files


def test_errors_with_image_net_root(root, tmp_path, torch_home):
    with pytest.raises(ValueError, match="PartialCIFAR10 does not use ImageNet: no image_net_"):
        PartialCIFAR10(root, image_net_root=tmp_path)
    write_tree(tmp_path / "other", torch_home, ImageNet200_OpenOOD)
    with pytest.raises(ValueError, match="no folder .*nix/train: correct image_net_root"):
        PartialImageNet200(tmp_path / "other", image_net_root=tmp_path / "nix")
    assert not (tmp_path / "other" / "imagenet_1k").exists()


# packs


def write_pack(path, x, y):
    with zipfile.ZipFile(path, "w") as archive:
        for start in range(0, len(x), 3):
            content = io.BytesIO()
            strip = Image.fromarray(x[start : start + 3].reshape(-1, x.shape[2], 3))
            strip.save(content, "WEBP", lossless=True)
            archive.writestr(f"strip_{start:05d}.webp", content.getvalue())
        content = io.BytesIO()
        np.savez(content, y=y)
        archive.writestr("meta.npz", content.getvalue())


@pytest.fixture
def packs(tmp_path):
    """Small packs, and the arrays in them."""
    random = np.random.default_rng(0)
    root, arrays = tmp_path / "packs", {}
    root.mkdir()
    for name, n in {"cifar10_test": 8, "cifar100_test": 7, "train_1": 5, "train_2": 4}.items():
        x = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[name] = x, random.integers(0, 10, n)
        file = f"cifar10_{name}of2" if name.startswith("train") else name
        write_pack(root / f"{file}.webp.zip", *arrays[name])
    for name, shape in {"mnist_test": (3, 28, 28), "dtd10_32": (6, 32, 32, 3)}.items():
        x = random.integers(0, 256, shape, dtype=np.uint8)
        arrays[name] = x, random.integers(0, 10, len(x))
        np.savez(root / f"{name}.npz", x=x, y=arrays[name][1])
    write_index(root)
    return root, arrays


INDEX = {"cifar10_test": [6, 1, 2, 7], "cifar10_val": [0, 4], "cifar100_as_ood_test": [5, 3, 0]}


def write_index(root, **changes):
    rows = {name: np.array(value) for name, value in {**INDEX, **changes}.items()}
    np.savez(root / "openood_index.npz", **rows)


def test_packs_hold_the_rows_of_the_lists(packs):
    root, arrays = packs
    benchmark = PackedCIFAR10(root)
    assert isinstance(benchmark, Benchmark) and benchmark.num_classes == 10
    assert benchmark.ood_names == ["CIFAR100", "MNIST", "Textures"]
    assert benchmark.near_ood_names == ["CIFAR100"]
    assert benchmark.far_ood_names == ["MNIST", "Textures"]
    assert benchmark.missing == dict.fromkeys(
        ["TinyImageNet", "SVHN", "Places365", "OOD validation"], "in no pack"
    )
    assert benchmark.notes == {
        "CIFAR100": "3 of 9,000 images",
        "MNIST": "3 of 70,000 images",
        "Textures": "6 of 5,640 images",
    }
    (known,) = benchmark.test_sets(unknown=False)
    cifar100, mnist, textures = benchmark.test_sets(known=False)
    x, y = arrays["cifar10_test"]
    for dataset, rows in ((known, [6, 1, 2, 7]), (benchmark.id_validation_set(), [0, 4])):
        assert np.array_equal(dataset.x, x[rows]) and np.array_equal(dataset.y, y[rows])
    assert np.array_equal(cifar100.x, arrays["cifar100_test"][0][[5, 3, 0]])
    assert np.array_equal(textures.x, arrays["dtd10_32"][0])
    for image, original in zip(mnist.x, arrays["mnist_test"][0], strict=True):
        enlarged = Image.fromarray(original).resize((32, 32), Image.Resampling.BILINEAR)
        difference = image.astype(int) - np.asarray(enlarged).astype(int)[..., None]
        assert abs(difference).max() <= 1
    for dataset, n in ((cifar100, 3), (mnist, 3), (textures, 6)):
        assert dataset.y.tolist() == [-1] * n
    for part in (0, 1):
        expected = np.concatenate([arrays["train_1"][part], arrays["train_2"][part]])
        assert np.array_equal((benchmark.train_set().x, benchmark.train_set().y)[part], expected)
    assert labels(benchmark.test_sets()[0]) == [*y[[6, 1, 2, 7]].tolist(), -1, -1, -1]
    with pytest.raises(ValueError, match="The OOD validation set is missing, in no pack: add it"):
        benchmark.validation_set()


def test_packs_are_transformed(packs):
    root, arrays = packs
    transform = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    benchmark = openood("cifar10-openood", str(root), transform)
    (known,) = benchmark.test_sets(unknown=False)
    image = torch.from_numpy(arrays["cifar10_test"][0][6]).permute(2, 0, 1) / 255
    torch.testing.assert_close(known[0][0], transform(image))
    sets = [
        benchmark.train_set(),
        benchmark.id_validation_set(),
        *benchmark.test_sets(known=False),
    ]
    assert all(dataset.transform is transform for dataset in sets)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("cifar100_test.webp.zip", "CIFAR100"),
        ("mnist_test.npz", "MNIST"),
        ("dtd10_32.npz", "Textures"),
        ("cifar10_train_1of2.webp.zip", "ID training"),
        ("cifar10_train_2of2.webp.zip", "ID training"),
    ],
)
def test_missing_and_damaged_packs(packs, file, name):
    root, _ = packs
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged or holds no images"):
        PackedCIFAR10(root)
    (root / file).unlink()
    benchmark = PackedCIFAR10(root)
    assert benchmark.missing[name] == f"no {file}"
    assert benchmark.ood_names == [n for n in ("CIFAR100", "MNIST", "Textures") if n != name]
    if name == "ID training":
        with pytest.raises(ValueError, match=f"ID training set is missing, no {file}"):
            benchmark.train_set()


def test_packs_that_must_be_there(packs):
    root, _ = packs
    for file in ("cifar100_test.webp.zip", "mnist_test.npz", "dtd10_32.npz"):
        (root / file).unlink()
    with pytest.raises(ValueError, match="no OOD set .*SVHN, in no pack.*no dtd10_32.npz"):
        PackedCIFAR10(root)
    (root / "cifar10_test.webp.zip").unlink()
    with pytest.raises(ValueError, match="ID test set of PackedCIFAR10, no cifar10_test.webp.zip"):
        PackedCIFAR10(root)


def test_damaged_index(packs):
    root, _ = packs
    path = root / "openood_index.npz"
    content = path.read_bytes()
    for damage in (content[:100], b"", b"no archive"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="openood_index.npz is missing or damaged"):
            openood("cifar10-openood", root)
    np.savez(path, cifar10_test=[0], cifar10_val=[1])
    with pytest.raises(ValueError, match="openood_index.npz is missing .*cifar100_as_ood_test"):
        PackedCIFAR10(root)
    path.unlink()
    with pytest.raises(ValueError, match="openood_index.npz is missing .*: name another root"):
        PackedCIFAR10(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"cifar10_test": [0, 8]},
        {"cifar100_as_ood_test": [7]},
        {"cifar10_val": [0.5]},
        {"cifar10_test": [0, -1]},
        {"cifar10_test": [[0, 1]]},
        {"cifar10_test": 0},
    ],
)
def test_index_of_other_packs(packs, changes):
    root, _ = packs
    write_index(root, **changes)
    with pytest.raises(ValueError, match=r"openood_index.npz .* belongs to other packs \("):
        PackedCIFAR10(root)


# by name


def test_by_name(root, packs, tmp_path, torch_home):
    assert from_package is openood
    assert tuple(OPENOOD_CLASSES) == (
        "cifar10-openood",
        "cifar100-openood",
        "imagenet200-openood",
        "imagenet-openood",
    )
    for name, (ours, theirs) in zip(OPENOOD_CLASSES, PAIRS.items()):
        write_tree(tmp_path / name, tmp_path / name / "benchmark_imglist", theirs)
        assert type(openood(name, tmp_path / name)) is ours
        assert is_packed(name, packs[0]) is (name == "cifar10-openood")
    assert type(openood("cifar10-openood", packs[0])) is PackedCIFAR10
    assert not is_packed("cifar10-openood", root)
    # packs are no images of another benchmark
    with pytest.raises(ValueError, match="no image lists"):
        openood("cifar100-openood", packs[0])


def test_options_by_name(root, packs, tmp_path):
    lists = tmp_path / "benchmark_imglist"
    lists = lists.rename(tmp_path / "mine")
    assert openood("cifar10-openood", root, imglists=lists).ood_names == OODS
    with pytest.raises(ValueError, match="PartialCIFAR10 has no option lists: it has downl"):
        openood("cifar10-openood", root, lists=lists)
    with pytest.raises(ValueError, match="PackedCIFAR10 has no option download: it has none"):
        openood("cifar10-openood", packs[0], download=True)


def test_unknown_name(root):
    with pytest.raises(LookupError, match="'cifar11-openood': cifar10-openood, cifar100-openood"):
        openood("cifar11-openood", root)


# the real images


@pytest.fixture(scope="module")
def real(data_folder):
    return PackedCIFAR10(data_folder)


def test_sizes_of_the_real_packs(real):
    (known,) = real.test_sets(unknown=False)
    assert len(known) == 9000 and len(real.id_validation_set()) == 1000
    assert len(real.train_set()) == 50000
    assert [len(dataset) for dataset in real.test_sets(known=False)] == [9000, 10000, 1200]
    assert real.ood_names == ["CIFAR100", "MNIST", "Textures"]
    assert real.notes == {
        "MNIST": "10,000 of 70,000 images",
        "Textures": "1,200 of 5,640 images",
    }
    assert np.bincount(real.train_set().y).tolist() == [5000] * 10
    assert np.bincount(known.y).sum() == 9000 and set(known.y) == set(range(10))
    assert all(set(dataset.y) == {-1} for dataset in real.test_sets(known=False))


def test_real_test_and_validation_images_are_all_of_cifar10(real, data_folder):
    """Each once: the two lists do not overlap."""
    whole = read_pack(data_folder / "cifar10_test.webp.zip")
    (known,) = real.test_sets(unknown=False)
    parts = [known, real.id_validation_set()]
    images = [image.tobytes() for part in parts for image in part.x]
    assert sorted(images) == sorted(image.tobytes() for image in whole["x"])
    of_image = {image.tobytes(): label for image, label in zip(whole["x"], whole["y"])}
    y = np.concatenate([part.y for part in parts])
    assert [of_image[image] for image in images] == y.tolist()
