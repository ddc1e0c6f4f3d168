"""
Images in memory as unsigned bytes: the training images of CIFAR-10 take 150 MB, no file is opened
during training, and cropping, flipping and normalizing are done for a whole batch at once, on the
device of the network.

Images come from one of two kinds of files. An *image pack* is a zip of lossless WebP images, each
a strip of some hundred square images one below the other, in the order of their names. In
``meta.npz`` beside them are labels ``y``, and whatever else describes the images. The other kind
is a NumPy ``.npz`` with images ``x`` and labels ``y``. Nothing is unpickled.

.. code-block:: python

    from torchvision.transforms import Compose, Normalize

    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    generator = torch.Generator().manual_seed(0)

    train_set = ImagePack.read("cifar10_train.webp.zip", transform=normalize)
    outliers = ImagePack.read("cifar100_outliers.webp.zip", transform=normalize).relabel(-1)
    digits = ImagePack.read("mnist_test.npz", transform=normalize).relabel(-1).resize(32)

    augment = Compose([RandomCropFlip(generator), normalize])
    loader = PackLoader(
        train_set, 128, shuffle=True, generator=generator, transform=augment, device="cuda"
    )

.. autoclass:: pood_plugins.dataset.ImagePack
    :members:
    :show-inheritance:

.. autoclass:: pood_plugins.dataset.PackLoader

.. autoclass:: pood_plugins.dataset.RandomCropFlip

.. autofunction:: pood_plugins.dataset.read_pack
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..training.checkpoint import reason

__all__ = ["ImagePack", "PackLoader", "RandomCropFlip", "read_pack"]

# bytes that a file may always take in memory, and how many times its own size if that is more
_ROOM, _RATIO = 2**28, 100


def read_pack(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """
    :param path: image pack or ``.npz``
    :return: images ``x``, unsigned bytes of shape :math:`N \\times H \\times W \\times 3` (of an
        ``.npz`` also :math:`N \\times H \\times W`), labels ``y`` of shape :math:`N`, and the
        other arrays of the file
    :raises OSError: if there is no such file or it can't be opened
    :raises ValueError: if the file is damaged or neither of the two kinds, with the reason
    """
    with open(path, "rb") as file:
        try:
            arrays = _read(file)
            missing = {"x", "y"} - arrays.keys()
            if missing:
                raise ValueError(f"it has no array {' and no '.join(sorted(missing))}")
            _check(arrays["x"], arrays["y"])
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise ValueError(
                f"{os.fspath(path)} is damaged or holds no images with labels ({reason(error)}): "
                "copy it again, or name another file"
            ) from error
    return arrays


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    room = _room(file)
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        if not names:
            return load_arrays(file)
        _check_room(sum(info.file_size for info in archive.infolist()), room)
        arrays = load_arrays(io.BytesIO(archive.read("meta.npz")))
        strips: list[np.ndarray] = []
        for name in names:
            with Image.open(io.BytesIO(archive.read(name)), formats=["WEBP"]) as image:
                if strips and image.width != strips[0].shape[1]:
                    raise ValueError(f"{name} has images of another size than {names[0]}")
                room -= 3 * image.width * image.height
                _check_room(0, room)
                strips.append(np.asarray(image.convert("RGB")))
    size = strips[0].shape[1]
    arrays["x"] = np.concatenate([strip.reshape(-1, size, size, 3) for strip in strips])
    return arrays


def load_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """
    :param file: a NumPy ``.npz``
    :return: its arrays by name
    :raises Exception: of any kind if it is damaged, and if it would take much more memory than its
        size lets expect
    """
    with zipfile.ZipFile(file) as archive:
        _check_room(sum(info.file_size for info in archive.infolist()), _room(file))
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that are then refused, or of old ones
        arrays = dict(np.load(file, allow_pickle=False))
    if foreign := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{foreign[0]!r} in it is no array")
    return arrays


def _room(file: BinaryIO) -> int:
    """How many bytes a file may take in memory: images are not compressed to a hundredth."""
    return max(_ROOM, _RATIO * file.seek(0, os.SEEK_END))


def _check_room(size: int, room: int) -> None:
    if size > room:
        raise ValueError(f"what is in it takes more than {room / 1e6:.0f} MB, far too much for it")


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype != np.uint8 or not (x.ndim == 3 or x.ndim == 4 and x.shape[3] == 3):
        raise ValueError(
            f"images must be unsigned bytes of shape N x H x W x 3 or, if grey, N x H x W; x has "
            f"{x.dtype} and shape {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(
            f"there must be one integer label for each of {len(x)} images; y has {y.dtype} and "
            f"shape {y.shape}"
        )
    if y.dtype == np.uint64 and (y > np.iinfo(np.int64).max).any():
        raise ValueError(f"labels must be at most {np.iinfo(np.int64).max}; y has larger ones")


class ImagePack(Dataset[tuple[Tensor, int]]):
    """
    Images and labels in memory, a data set with items ``(image, label)``. An image is a tensor of
    shape :math:`3 \\times H \\times W`, in :math:`[0, 1]` before ``transform``.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, transform: Callable[[Tensor], Tensor] | None = None
    ):
        """
        :param x: unsigned bytes of shape :math:`N \\times H \\times W \\times 3`, or
            :math:`N \\times H \\times W` for grey images, which then have three equal channels
        :param y: labels of shape :math:`N`; labels :math:`< 0` are outliers
        :param transform: applied to *batches* of shape :math:`B \\times 3 \\times H \\times W`.
            Those of torchvision that draw at random make the same choice for all of a batch: use
            :class:`RandomCropFlip`.
        :raises ValueError: if shapes or types do not fit
        """
        x, y = np.asarray(x), np.asarray(y)
        _check(x, y)
        #: images, unsigned bytes of shape :math:`N \times H \times W \times 3`
        self.x = x if x.ndim == 4 else x[..., None].repeat(3, axis=3)
        #: labels of shape :math:`N`
        self.y = y.astype(np.int64)
        self.transform = transform

    @classmethod
    def read(
        cls, *paths: str | os.PathLike[str], transform: Callable[[Tensor], Tensor] | None = None
    ) -> ImagePack:
        """
        :param paths: image packs or ``.npz``; one or more, with images of one size
        :param transform: see the constructor
        :return: their images and labels, in this order
        :raises ValueError: see :func:`read_pack`, or if there is no path or sizes differ
        """
        packs = [cls(arrays["x"], arrays["y"]) for arrays in map(read_pack, paths)]
        sizes = [f"{pack.x.shape[1]} x {pack.x.shape[2]}" for pack in packs]
        if len(set(sizes)) != 1:
            found = ", ".join(f"{os.fspath(p)} has {size}" for p, size in zip(paths, sizes))
            raise ValueError(
                f"images must be of one size, but {found or 'no file is given'}: name files with "
                "images of one size"
            )
        x = np.concatenate([pack.x for pack in packs])
        return cls(x, np.concatenate([pack.y for pack in packs]), transform)

    def subset(self, rows: Sequence[int] | np.ndarray | Tensor) -> ImagePack:
        """
        :param rows: indices, or one boolean per image
        :return: these images
        """
        rows = np.asarray(rows)
        return ImagePack(self.x[rows], self.y[rows], self.transform)

    def relabel(self, label: int) -> ImagePack:
        """
        :param label: new label of all images, -1 for outliers
        :return: the same images with this label
        """
        return ImagePack(self.x, np.full_like(self.y, label), self.transform)

    def resize(self, size: int) -> ImagePack:
        """
        Resizes by bilinear interpolation as Pillow does, and hence OpenOOD, up to one level.

        :param size: new height and width
        :return: the resized images
        """
        parts = [
            F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            for part in torch.from_numpy(self.x).permute(0, 3, 1, 2).split(1024)
        ]
        return ImagePack(torch.cat(parts).permute(0, 2, 3, 1).numpy(), self.y, self.transform)

    def batch(
        self,
        rows: Sequence[int] | np.ndarray | Tensor,
        device: str | torch.device = "cpu",
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        :param rows: indices
        :param device: where to put images and labels, and to transform images
        :param transform: in place of the pack's own
        :return: images of shape :math:`B \\times 3 \\times H \\times W` and labels of shape
            :math:`B`
        """
        rows = np.asarray(rows)
        x = torch.from_numpy(self.x[rows]).to(device).permute(0, 3, 1, 2)
        # not channels last, in which double backward is slow
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        transform = self.transform if transform is None else transform
        return x if transform is None else transform(x), torch.from_numpy(self.y[rows]).to(device)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        # what a DataLoader calls, if it is there, for all of a batch
        x, y = self.batch(indices)
        return list(zip(x, y.tolist()))


class PackLoader:
    """
    Iterates over the batches ``(images, labels)`` of a pack, without worker processes.
    """

    def __init__(
        self,
        pack: ImagePack,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        part: tuple[int, int] = (0, 1),
    ):
        """
        :param pack: images
        :param batch_size: images per batch; the last batch has what is left
        :param shuffle: whether each pass has a new order
        :param generator: CPU generator that draws the order
        :param transform: in place of the pack's own, e.g. with augmentation
        :param device: where to put batches, and to transform them
        :param part: ``(i, n)`` for the batches i, i + n, i + 2n, ... of all; default is all
        :raises ValueError: if the pack is empty or the batch size is not positive
        """
        if len(pack) == 0 or batch_size < 1:
            raise ValueError(
                f"there must be an image and a batch size of at least 1, got {len(pack)} images "
                f"and a batch size of {batch_size}"
            )
        self.pack = pack
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.transform = transform
        self.device = device
        self.part = slice(part[0], None, part[1])

    def __len__(self) -> int:
        return len(range(-(-len(self.pack) // self.batch_size))[self.part])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.pack)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for rows in order.split(self.batch_size)[self.part]:
            yield self.pack.batch(rows, self.device, self.transform)


class RandomCropFlip:
    """
    The usual augmentation of CIFAR, drawn for each image of a batch on its own: black borders on
    all sides, a crop of the original size anywhere, mirrored left to right every second time.
    """

    def __init__(self, generator: torch.Generator | None = None, padding: int = 4):
        """
        :param generator: CPU generator for all random choices
        :param padding: width of the borders
        """
        self.generator = generator
        self.padding = padding

    def __call__(self, x: Tensor) -> Tensor:
        """
        :param x: batch of shape :math:`B \\times C \\times H \\times W`, not yet normalized, as
            black is 0
        :return: batch of the same shape, on the same device
        """
        n, _, height, width = x.shape

        def draw(end: int) -> Tensor:
            return torch.randint(end, (n, 1), generator=self.generator).to(x.device)

        flip = draw(2).bool()
        rows = draw(2 * self.padding + 1) + torch.arange(height, device=x.device)
        columns = draw(2 * self.padding + 1) + torch.arange(width, device=x.device)
        columns = torch.where(flip, columns.flip(1), columns)
        # one indexing for crop and flip: images, rows and columns, with channels last
        images = torch.arange(n, device=x.device)[:, None, None]
        padded = F.pad(x, [self.padding] * 4).permute(0, 2, 3, 1)
        return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
