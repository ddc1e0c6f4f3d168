"""
Image packs: files that the tests write themselves, against Pillow and loops over images.
"""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.benchmark import Benchmark
from torch.utils.data import DataLoader
from torchvision.transforms import Normalize
from torchvision.transforms.functional import normalize

from pood_plugins import evaluation, registry
from pood_plugins.dataset import ImagePack, PackLoader, RandomCropFlip, read_pack
from pood_plugins.loss import GRegLoss
from pood_plugins.model import resnet20, split_model
from pood_plugins.training import finetune

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(n, size=32, seed=0):
    """Smooth images, with labels 0, 1, 2, ..."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((size, size))) for image in small]
    return np.stack(large), np.arange(n) % 10


def write_pack(path, x, y, strip=3, **meta):
    with zipfile.ZipFile(path, "w") as archive:
        for start in range(0, len(x), strip):
            content = io.BytesIO()
            image = Image.fromarray(x[start : start + strip].reshape(-1, x.shape[2], 3))
            image.save(content, "WEBP", lossless=True)
            archive.writestr(f"strip_{start:05d}.webp", content.getvalue())
        content = io.BytesIO()
        np.savez(content, y=y, **meta)
        archive.writestr("meta.npz", content.getvalue())


@pytest.fixture
def pack():
    return ImagePack(*images(7), transform=Normalize(MEAN, STD))


# files


def test_pack_is_read_bit_by_bit(tmp_path):
    x, y = images(8)
    write_pack(tmp_path / "a.webp.zip", x, y.astype(np.uint8), superclass=y // 2)
    arrays = read_pack(tmp_path / "a.webp.zip")
    assert arrays.keys() == {"x", "y", "superclass"}
    assert arrays["x"].dtype == np.uint8 and np.array_equal(arrays["x"], x)
    assert np.array_equal(arrays["y"], y)
    assert np.array_equal(arrays["superclass"], y // 2)


def test_npz(tmp_path):
    x, y = images(5)
    np.savez(tmp_path / "color.npz", x=x, y=y, names=np.array(list("abcde")))
    np.savez(tmp_path / "grey.npz", x=x[..., 0], y=y)
    assert list(read_pack(tmp_path / "color.npz")["names"]) == list("abcde")
    assert np.array_equal(ImagePack.read(tmp_path / "color.npz").x, x)
    grey = ImagePack.read(tmp_path / "grey.npz")
    assert grey.x.shape == x.shape
    for channel in range(3):
        assert np.array_equal(grey.x[..., channel], x[..., 0])


def test_several_files_are_one_pack(tmp_path):
    x, y = images(5)
    write_pack(tmp_path / "1.webp.zip", x[:3], y[:3])
    np.savez(tmp_path / "2.npz", x=x[3:], y=y[3:])
    pack = ImagePack.read(tmp_path / "1.webp.zip", tmp_path / "2.npz")
    assert np.array_equal(pack.x, x)
    assert np.array_equal(pack.y, y)


def test_transform_is_kept_in_reading(tmp_path):
    x, y = images(2)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    image, label = ImagePack.read(tmp_path / "a.npz", transform=lambda batch: batch + 7)[1]
    assert label == 1 and image.min() >= 7


def damaged(path, kind):
    x, y = images(8)
    if kind == "no archive":
        path.write_bytes(b"\x00" * 300)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        np.savez(path, x=x, y=np.array([{}] * 8, dtype=object))
    elif kind == "no labels":
        np.savez(path, x=x)
    elif kind == "no images":
        np.savez(path, y=y)
    elif kind == "float images":
        np.savez(path, x=x / 255, y=y)
    elif kind == "float labels":
        np.savez(path, x=x, y=y / 2)
    elif kind == "too few labels":
        write_pack(path, x, y[:7])
    elif kind == "labels above all integers":
        np.savez(path, x=x, y=np.array([0] * 7 + [2**63], dtype=np.uint64))
    elif kind == "file that is no array":
        np.savez(path, x=x, y=y)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("names.txt", b"a, b, c")
    elif kind == "far too much for its size":
        np.savez_compressed(path, x=np.zeros((3 * 10**5, 32, 32), np.uint8), y=y)
    elif kind == "no meta":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("strip_00000.webp", b"")
    else:
        write_pack(path, x, y)
        content = bytearray(path.read_bytes())
        if kind == "truncated":
            del content[len(content) // 2 :]
        elif kind == "flipped bits":
            for i in range(200, 260):
                content[i] ^= 0xFF
        path.write_bytes(content)
        if kind == "lost strip":
            write_pack(path, x[:6], y)
        elif kind == "no webp":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("strip_00009.webp", b"no image at all")


@pytest.mark.parametrize(
    "kind",
    [
        "no archive",
        "empty",
        "pickle",
        "no labels",
        "no images",
        "float images",
        "float labels",
        "too few labels",
        "labels above all integers",
        "file that is no array",
        "far too much for its size",
        "no meta",
        "truncated",
        "flipped bits",
        "lost strip",
        "no webp",
    ],
)
def test_damaged_files(tmp_path, kind):
    path = tmp_path / "pack.npz"
    damaged(path, kind)
    with pytest.raises(ValueError, match=r"pack\.npz is damaged or holds no .* name another file"):
        read_pack(path)


def test_strips_of_two_widths(tmp_path):
    # of which the second has as many pixels as one image of the first's size
    x, y = images(1)
    write_pack(tmp_path / "a.zip", x, y)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        content = io.BytesIO()
        Image.fromarray(x.reshape(64, 16, 3)).save(content, "WEBP", lossless=True)
        archive.writestr("strip_00001.webp", content.getvalue())
    with pytest.raises(ValueError, match="strip_00001.webp has images of another size"):
        read_pack(tmp_path / "a.zip")


def test_files_with_images_of_several_sizes(tmp_path):
    for size in (8, 9):
        x, y = images(2, size)
        np.savez(tmp_path / f"{size}.npz", x=x, y=y)
    with pytest.raises(ValueError, match=r"8\.npz has 8 x 8, .*9\.npz has 9 x 9: name files"):
        ImagePack.read(tmp_path / "8.npz", tmp_path / "9.npz")
    with pytest.raises(ValueError, match="no file is given: name files"):
        ImagePack.read()


def test_constant_images_may_be_small_files(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 32, 32), np.uint8), y=[0] * 1000)
    assert len(ImagePack.read(tmp_path / "a.npz")) == 1000


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pack(tmp_path / "nowhere.npz")


# data set


def test_items_and_batches_are_normalized_images(pack):
    batch_x, batch_y = pack.batch([4, 1])
    assert batch_x.shape == (2, 3, 32, 32) and batch_x.dtype == torch.float32
    assert batch_x.is_contiguous()
    for row, x, y in zip([4, 1], batch_x, batch_y):
        scaled = torch.from_numpy(pack.x[row].astype(np.float32) / 255).permute(2, 0, 1)
        torch.testing.assert_close(x, normalize(scaled, MEAN, STD))
        assert int(y) == pack.y[row]
        item_x, item_y = pack[row]
        assert torch.equal(item_x, x)
        assert item_y == int(y) and isinstance(item_y, int)


def test_as_data_set_of_a_data_loader(pack):
    loader = DataLoader(pack, batch_size=3)
    x, y = (torch.cat(parts) for parts in zip(*loader))
    assert len(loader) == 3
    assert torch.equal(x, pack.batch(range(7))[0])
    assert torch.equal(y, torch.from_numpy(pack.y))


def test_subset_and_relabel(pack):
    subset = pack.subset([5, 0, 2])
    assert np.array_equal(subset.x, pack.x[[5, 0, 2]])
    assert np.array_equal(subset.y, [5, 0, 2])
    assert np.array_equal(pack.subset(pack.y > 4).y, [5, 6])
    assert np.array_equal(pack.subset(torch.tensor([1, 1])).y, [1, 1])
    outliers = pack.relabel(-1)
    assert np.array_equal(outliers.y, [-1] * 7) and outliers.x is pack.x
    assert np.array_equal(pack.y, range(7))
    assert all(part.transform is pack.transform for part in (subset, outliers, pack.resize(8)))


@pytest.mark.parametrize(("size", "new_size"), [(28, 32), (64, 32), (50, 32), (32, 32)])
def test_resize_against_pillow(size, new_size):
    x, y = images(4, size)
    resized = ImagePack(x, y).resize(new_size)
    expected = [
        np.asarray(Image.fromarray(image).resize((new_size, new_size), Image.Resampling.BILINEAR))
        for image in x
    ]
    difference = resized.x.astype(int) - np.stack(expected).astype(int)
    assert resized.x.dtype == np.uint8 and resized.x.shape == (4, new_size, new_size, 3)
    assert abs(difference).max() <= 1
    assert np.array_equal(resized.y, y)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.zeros((2, 4, 4, 3)), [0, 1], "unsigned bytes.*float64"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], r"N x H x W x 3.*\(2, 3, 4, 4\)"),
        (np.zeros((2, 4), np.uint8), [0, 1], r"N x H x W.*\(2, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), [0], r"each of 2 images.*\(1,\)"),
        (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0], "integer label.*float64"),
        (np.zeros((2, 4, 4), np.uint8), [[0], [1]], r"\(2, 1\)"),
    ],
)
def test_images_that_do_not_fit(x, y, match):
    with pytest.raises(ValueError, match=match):
        ImagePack(x, y)


# loader


def test_loader_in_order(pack):
    loader = PackLoader(pack, 3)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(y) for _, y in batches] == [3, 3, 1]
    assert torch.cat([y for _, y in batches]).tolist() == list(range(7))
    assert torch.equal(torch.cat([x for x, _ in batches]), pack.batch(range(7))[0])


def test_loader_shuffles_by_its_generator():
    pack = ImagePack(*images(40))
    pack.y = np.arange(40)

    def passes(seed):
        loader = PackLoader(pack, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([y for _, y in loader]).tolist() for _ in range(2)]

    state = torch.get_rng_state()
    first, second = passes(0)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != list(range(40))
    assert passes(0) == [first, second] != passes(1)


def test_images_keep_their_labels_when_shuffled():
    x = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 2, 2, 3))
    loader = PackLoader(ImagePack(x, np.arange(40)), 7, shuffle=True)
    for images_, labels in loader:
        assert torch.equal((images_[:, 0, 0, 0] * 255).round().long(), labels)


def test_loader_transform_replaces_that_of_the_pack(pack):
    ((x, _),) = PackLoader(pack, 7, transform=lambda batch: batch - 5)
    plain = torch.from_numpy(pack.x).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(x, plain - 5)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0), (4, -1)])
def test_nothing_to_load(n, batch_size):
    pack = ImagePack(np.zeros((n, 4, 4), np.uint8), np.zeros(n, int))
    with pytest.raises(ValueError, match=f"got {n} images and a batch size of {batch_size}"):
        PackLoader(pack, batch_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_loader_transforms_on_the_device(pack):
    def augment(seed):
        generator = torch.Generator().manual_seed(seed)
        return RandomCropFlip(generator)

    ((x, y),) = PackLoader(pack, 7, transform=augment(0), device="cuda")
    ((expected, _),) = PackLoader(pack, 7, transform=augment(0))
    assert x.is_cuda and y.is_cuda
    torch.testing.assert_close(x.cpu(), expected)


# augmentation


def crops_and_flips(image, padding):
    """All 2 × (2 · padding + 1)² results that there can be."""
    height, width = image.shape[1:]
    padded = torch.zeros(3, height + 2 * padding, width + 2 * padding)
    padded[:, padding:-padding, padding:-padding] = image
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield crop
            yield crop.flip(2)


def test_every_crop_and_flip_occurs_and_nothing_else():
    padding, n = 1, 720
    image = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    augment = RandomCropFlip(torch.Generator().manual_seed(1), padding)
    augmented = augment(image.expand(n, 3, 5, 6))
    assert augmented.shape == (n, 3, 5, 6)
    options = torch.stack(list(crops_and_flips(image, padding)))
    matches = (augmented[:, None] == options[None]).flatten(2).all(dim=2)
    assert matches.sum(dim=1).eq(1).all()
    # 40 of each kind are expected, with a standard deviation of 6.1
    counts = matches.sum(dim=0)
    assert counts.min() > 40 - 4 * 6.1 and counts.max() < 40 + 4 * 6.1


def test_images_of_a_batch_are_augmented_each_from_itself():
    batch = torch.arange(1.0, 9.0)[:, None, None, None].expand(8, 3, 6, 6)
    augmented = RandomCropFlip(torch.Generator().manual_seed(0), padding=2)(batch)
    for value, image in zip(range(1, 9), augmented):
        assert set(image.unique().tolist()) <= {0.0, float(value)}
        assert (image == value).sum() >= 3 * 4 * 4


def test_augmentation_repeats_with_its_generator():
    batch = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        RandomCropFlip(torch.Generator().manual_seed(seed))(batch) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# in use


class _Packs(Benchmark):
    ood_names = ["dark"]

    def __init__(self):
        transform = Normalize(MEAN, STD)
        self.known = ImagePack(*images(24), transform=transform)
        self.unknown = ImagePack(self.known.x // 8, self.known.y, transform).relabel(-1)

    def train_set(self):
        return self.known

    def test_sets(self, known=True, unknown=True):
        if known and unknown:
            return [self.known + self.unknown]
        return [self.known] if known else [self.unknown]


def test_in_an_evaluation():
    split = split_model(resnet20().eval())
    benchmark = _Packs()
    report = evaluation.run(
        benchmark, {"Energy": registry.build("Energy", split)}, loader_kwargs={"batch_size": 10}
    )
    assert not report.failed
    with torch.no_grad():
        known, unknown = (
            -split(pack.batch(range(24))[0]).logsumexp(dim=1)
            for pack in (benchmark.known, benchmark.unknown)
        )
    expected = (unknown[:, None] > known).double().mean()
    assert report.value("Energy", "dark", "AUROC")[0] == pytest.approx(float(expected), abs=1e-6)


def test_in_fine_tuning():
    def train():
        split = split_model(_tiny())
        generator = torch.Generator().manual_seed(0)
        transform = RandomCropFlip(generator)
        id_loader, outlier_loader = (
            PackLoader(pack, 4, shuffle=True, generator=generator, transform=transform)
            for pack in (ImagePack(*images(8)), ImagePack(*images(6, seed=1)).relabel(-1))
        )
        history = finetune(split, id_loader, outlier_loader, GRegLoss(), epochs=2)
        return history, split.head.weight.detach()

    history, weight = train()
    assert len(history) == 4
    assert not torch.equal(weight, _tiny()[-1].weight)
    again, again_weight = train()
    assert again == history and torch.equal(again_weight, weight)


def _tiny():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model
