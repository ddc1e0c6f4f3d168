"""
Kvasir-v2 and GastroVision on generated folders of the published structure: parts, labels, split
lists and what is said of a wrong folder. No image of the data sets themselves is used.
"""

import csv
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.api import DatasetInfo
from torchvision.transforms import ToTensor

from pood_plugins.dataset import GastroVision, KvasirV2
from pood_plugins.dataset.endoscopy import ELEVENTH, PARTS, write_lists

pytestmark = pytest.mark.usefixtures("one_thread")


def write_folders(root, dataset, images=5, folder=None):
    """Empty files by the names of images."""
    for name in dataset.COUNTS:
        of_class = root / (folder or dataset.FOLDER) / name
        of_class.mkdir(parents=True)
        for i in range(images if isinstance(images, int) else images[name]):
            (of_class / f"{i:04}.jpg").touch()
    return root


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Folders that seem to hold as many files as are published."""
    for dataset in (KvasirV2, GastroVision):
        write_folders(tmp_path, dataset, 0)

    def find_images(folder):
        count = {**KvasirV2.COUNTS, **GastroVision.COUNTS}[folder.name]
        return [folder / f"{i:04}.jpg" for i in range(count)]

    monkeypatch.setattr("pood_plugins.benchmark.folder.find_images", find_images)
    return tmp_path


@pytest.fixture
def small(tmp_path):
    for dataset in (KvasirV2, GastroVision):
        write_folders(tmp_path, dataset)
    return tmp_path


def parts_of(dataset, root, **arguments):
    return {part: dataset(root, part, **arguments) for part in PARTS}


@pytest.mark.parametrize(
    ("dataset", "sizes"),
    [
        (KvasirV2, {"train": 2160, "validation": 240, "test": 600, "ood": 5000}),
        (GastroVision, {"train": 3434, "validation": 377, "test": 948, "ood": 3241}),
    ],
)
def test_sizes(published, dataset, sizes):
    """The numbers of the documentation, and no image is in two parts."""
    parts = parts_of(dataset, published)
    assert {name: len(part) for name, part in parts.items()} == sizes
    files = [file for part in parts.values() for file in part.files]
    assert len(set(files)) == len(files) == sum(dataset.COUNTS.values()) == 8000
    for part in parts.values():
        assert len(part.labels) == len(part.names) == len(part.files)
        assert all(file.parent.name == name for file, name in zip(part.files, part.names))
        expected = [-1] if part.part == "ood" else list(range(len(part.classes)))
        assert sorted(set(part.labels)) == expected


def test_each_class_is_divided_alike(published):
    for part, expected in (("train", 720), ("validation", 80), ("test", 200)):
        labels = torch.tensor(KvasirV2(published, part).labels)
        assert labels.bincount().tolist() == [expected] * 3
    rectum = {
        part: GastroVision(published, part).names.count("Retroflex rectum") for part in PARTS
    }
    assert rectum == {"train": 49, "validation": 5, "test": 13, "ood": 0}


def test_classes(small):
    kvasir = KvasirV2(small, verify=False)
    assert kvasir.classes == ["normal-cecum", "normal-pylorus", "normal-z-line"]
    assert kvasir.ood_classes[0] == "dyed-lifted-polyps" and len(kvasir.ood_classes) == 5
    gastro = GastroVision(small, "ood", verify=False)
    assert len(gastro.classes) == 11 and len(gastro.ood_classes) == 16
    assert "Colon diverticula" in gastro.classes and gastro.classes == sorted(gastro.classes)
    assert "Mucosal inflammation large bowel" in set(gastro.names)
    for dataset in (KvasirV2, GastroVision):
        assert isinstance(dataset.info, DatasetInfo) and dataset.info.ai_coded
        assert dataset.info.license and dataset.info.paper and dataset.info.homepage


def test_the_eleventh_class_leaves_the_others_alone(published):
    """Both choices give the published number of OOD images."""
    first, second = (parts_of(GastroVision, published, eleventh=name) for name in ELEVENTH)
    assert len(first["ood"]) == len(second["ood"]) == 3241
    for part in ("train", "validation", "test"):
        different = set(first[part].files) ^ set(second[part].files)
        assert different and {file.parent.name for file in different} == set(ELEVENTH)
    with pytest.raises(ValueError, match="'Colon diverticula' or 'Mucosal .*: 'Ulcer'"):
        GastroVision(published, eleventh="Ulcer")


def test_split_depends_on_seed_and_names_only(tmp_path, monkeypatch):
    """Not on the place of the folder, the order of its files, or other classes' images."""
    one = write_folders(tmp_path / "one", KvasirV2, 20)
    other = write_folders(tmp_path / "other", KvasirV2, 20)
    (other / KvasirV2.FOLDER / "normal-cecum" / "0021.jpg").touch()
    (other / KvasirV2.FOLDER / "polyps" / "0021.jpg").touch()
    walk = os.walk

    def backwards(*args, **options):
        for parent, folders, files in walk(*args, **options):
            yield parent, folders[::-1], sorted(files, reverse=True)

    def names(root, seed):
        parts = parts_of(KvasirV2, root, seed=seed, verify=False)
        return {
            name: [f"{f.parent.name}/{f.name}" for f in part.files if "cecum" not in f.parent.name]
            for name, part in parts.items()
            if name != "ood"
        }

    expected = names(one, 0)
    monkeypatch.setattr(os, "walk", backwards)
    assert names(other, 0) == expected
    assert names(one, 1) != expected


def test_split_is_the_documented_one(tmp_path):
    """Held fast, since lists of other people depend on it."""
    root = write_folders(tmp_path, KvasirV2, 10)
    test = [int(file.stem) for file in KvasirV2(root, "test", verify=False).files]
    assert test == [0, 9, 1, 5, 3, 9]
    validation = [int(file.stem) for file in KvasirV2(root, "validation", verify=False).files]
    assert validation == [7, 9, 1]


def test_fractions(published):
    whole = KvasirV2(published, validation_fraction=0.0)
    assert len(whole) == 2400
    held_out = KvasirV2(published, "validation")
    assert set(whole.files) == {*KvasirV2(published).files, *held_out.files}
    with pytest.raises(ValueError, match="part 'validation': validation_fraction is 0"):
        KvasirV2(published, "validation", validation_fraction=0)
    assert len(KvasirV2(published, "test", test_fraction=0.29)) == 3 * 290


def test_items(tmp_path):
    root = write_folders(tmp_path, KvasirV2)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    for file in KvasirV2(root, "test", verify=False).files:
        Image.fromarray(pixels).save(file)
    image, label = KvasirV2(root, "test", verify=False)[0]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and label == 0
    transformed = KvasirV2(root, "test", ToTensor(), verify=False)
    x, label = pickle.loads(pickle.dumps(transformed))[len(transformed) - 1]
    assert x.shape == (3, 12, 16) and label == 2
    with pytest.raises(ValueError, match="jpg can't be read as an image"):
        KvasirV2(root, "ood", verify=False)[0]


@pytest.mark.parametrize("inside", ["", "Gastrovision", "Gastrovision/Gastrovision"])
def test_root_may_hold_the_folder(tmp_path, inside):
    """The archive holds it twice."""
    write_folders(tmp_path, GastroVision, folder="Gastrovision/Gastrovision")
    dataset = GastroVision(tmp_path / inside, verify=False)
    assert dataset.folder == tmp_path / "Gastrovision" / "Gastrovision"


def test_names_of_copies(small):
    folder = small / "Gastrovision"
    (folder / "Barrett's esophagus").rename(folder / "Barretts esophagus")
    (folder / "Small bowel_terminal ileum").rename(folder / "small bowel terminal ileum")
    dataset = GastroVision(small, verify=False)
    assert "Small bowel_terminal ileum" in dataset.names
    assert "small bowel terminal ileum" in {file.parent.name for file in dataset.files}


def test_lists(small, tmp_path):
    parts = parts_of(GastroVision, small, verify=False)
    path = tmp_path / "new" / "lists.csv"
    write_lists(path, list(parts.values()))
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 * 5 and list(rows[0]) == ["file", "part", "class", "label"]
    for row in rows:
        assert (small / "Gastrovision" / row["file"]).is_file()
        assert row["file"].startswith(f"{row['class']}/")
    in_test = [row["file"] for row in rows if row["part"] == "test"]
    assert in_test == [f.relative_to(parts["test"].folder).as_posix() for f in parts["test"].files]
    other = GastroVision(small, "test", seed=1, verify=False)
    with pytest.raises(ValueError, match="images are in two parts, such as .*same seed"):
        write_lists(path, [parts["train"], other])


def without(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: without(f / "polyps"), "no folder 'polyps'. To correct it, unpack"),
        (lambda f: (f / "lumen").mkdir(), "an unknown folder 'lumen'"),
        (lambda f: (f / "Polyps ").mkdir(), "an unknown folder 'Polyps '"),
        (
            lambda f: (f / "polyps" / "0001.jpg").unlink(),
            "4 images in 'polyps' instead of 5",
        ),
        (lambda f: (f / "polyps" / "x.png").touch(), "6 images in 'polyps' .*verify=False"),
    ],
)
def test_difference_from_what_is_published(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(KvasirV2, "COUNTS", dict.fromkeys(KvasirV2.COUNTS, 5))
    root = write_folders(tmp_path, KvasirV2)
    KvasirV2(root)
    change(root / KvasirV2.FOLDER)
    with pytest.raises(ValueError, match=message) as caught:
        KvasirV2(root)
    text = str(caught.value)
    assert str(root / KvasirV2.FOLDER) in text and "\n" not in text and text.endswith(".")
    # numbers need not be those published, but classes must
    if "images in" in text:
        KvasirV2(root, verify=False)
    else:
        assert "verify=False" not in text
        with pytest.raises(ValueError, match=message):
            KvasirV2(root, verify=False)


def test_many_differences_are_cut_short(small):
    with pytest.raises(ValueError, match="5 images in 'Accessory tools' .*; and 19 more diff"):
        GastroVision(small)


def test_other_files_are_ignored(small):
    before = KvasirV2(small, verify=False).files
    folder = small / KvasirV2.FOLDER
    (folder / ".cache").mkdir()
    (folder / "readme.txt").touch()
    (folder / "polyps" / ".hidden.jpg").touch()
    (folder / "polyps" / "Thumbs.db").touch()
    assert KvasirV2(small, verify=False).files == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: KvasirV2(r / "nix"),
            "There is no folder .*nix: name the one that holds kvasir",
        ),
        (lambda r: KvasirV2(r / "Gastrovision"), "not the folder of KvasirV2: .*Unpack"),
        (lambda r: GastroVision(r / "kvasir-dataset-v2"), "not the folder of GastroVision"),
        (lambda r: KvasirV2(r, "training"), "train, validation, test, ood, got 'training'"),
        (lambda r: KvasirV2(r, test_fraction=0), "test_fraction must be .* below 1, got 0"),
        (lambda r: KvasirV2(r, test_fraction=1.0), "test_fraction must be"),
        (lambda r: KvasirV2(r, validation_fraction=-0.1), "validation_fraction must be"),
        (
            lambda r: KvasirV2(r, test_fraction=0.9, verify=False),
            "'normal-cecum' has 5 images, too few",
        ),
    ],
)
def test_errors_say_what_to_do(small, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(small)
    assert "\n" not in str(caught.value)


def test_empty_folders(tmp_path):
    root = write_folders(
        tmp_path, KvasirV2, {name: 3 * ("normal" in name) for name in KvasirV2.COUNTS}
    )
    assert len(KvasirV2(root, verify=False)) == 3
    with pytest.raises(ValueError, match="no images for the part 'ood': its folders are empty"):
        KvasirV2(root, "ood", verify=False)
    with pytest.raises(ValueError, match="0 images in 'esophagitis' instead of 1,000"):
        KvasirV2(root)
