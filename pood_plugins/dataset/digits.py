"""
Small real images that come with scikit-learn, so that a benchmark runs without a network:
handwritten digits, and patches of two photographs. All are grey images of 8 × 8 pixels on one
scale, 0 (black background) to 1.

Items are ``(image, label)`` with an image of shape 1 × 8 × 8 and an integer label, -1 for
outliers. Needs scikit-learn (``pip install 'pood-plugins[benchmark]'``).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pytorch_ood.api import DatasetInfo, Paper, Role, Task
from torch import Tensor
from torch.utils.data import Dataset

_SIZE = 8


class _Images(Dataset[tuple[Tensor, int]]):
    """Images and labels in memory."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Any] | None = None
    ):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.labels[index])


class HandwrittenDigits(_Images):
    """
    Handwritten digits, 8 × 8 pixels with 17 grey levels. The 1,797 images of scikit-learn are the
    test part of the original data set. Of each class, 50 % belong to the part ``"train"``, 20 % to
    ``"validation"``, 30 % to ``"test"``, drawn once and for all.
    """

    #: Licence, source and usual role.
    info: ClassVar[DatasetInfo] = DatasetInfo(
        task=Task.CLASSIFICATION,
        license="CC-BY-4.0",
        roles={Role.IN_DISTRIBUTION, Role.OOD_TEST},
        paper=Paper(
            title="Optical Recognition of Handwritten Digits",
            venue="UCI Machine Learning Repository",
            year=1998,
            url="https://doi.org/10.24432/C50P49",
        ),
        homepage="https://archive.ics.uci.edu/dataset/80",
        ai_coded=True,
    )

    _PARTS: ClassVar[dict[str, tuple[float, float]]] = {
        "all": (0.0, 1.0),
        "train": (0.0, 0.5),
        "validation": (0.5, 0.7),
        "test": (0.7, 1.0),
    }

    def __init__(
        self,
        part: str = "all",
        classes: Sequence[int] = range(10),
        outliers: bool = False,
        transform: Callable[[Tensor], Any] | None = None,
    ):
        """
        :param part: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``
        :param classes: digits to take
        :param outliers: label all images -1, instead of the position of their digit in ``classes``
        :param transform: applied to each image
        :raises ValueError: if the part or a class does not exist
        """
        if part not in self._PARTS:
            raise ValueError(f"part must be one of {', '.join(self._PARTS)}, got {part!r}.")
        if not set(classes) <= set(range(10)):
            raise ValueError(f"classes must be digits from 0 to 9, got {list(classes)}.")
        digits = _scikit_learn("load_digits")()
        images = torch.from_numpy(digits.images).float().div(16)[:, None]
        target = torch.from_numpy(digits.target)

        first, last = self._PARTS[part]
        generator = torch.Generator().manual_seed(0)
        rows, labels = [], []
        for digit in range(10):
            of_class = (target == digit).nonzero()[:, 0]
            of_class = of_class[torch.randperm(len(of_class), generator=generator)]
            if digit in classes:
                rows.append(of_class[int(first * len(of_class)) : int(last * len(of_class))])
                label = -1 if outliers else list(classes).index(digit)
                labels.append(torch.full_like(rows[-1], label))
        super().__init__(images[torch.cat(rows)], torch.cat(labels), transform)


class GreyPatches(_Images):
    """
    Patches of 8 × 8 pixels of one of scikit-learn's two photographs, without overlap, turned to
    grey. All are labeled -1.
    """

    #: Licence and usual role.
    info: ClassVar[DatasetInfo] = DatasetInfo(
        task=Task.CLASSIFICATION,
        license="CC-BY-2.0",
        roles={Role.OOD_TEST, Role.AUXILIARY_OUTLIERS},
        homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
        ai_coded=True,
    )

    def __init__(
        self,
        photograph: str,
        half: str | None = None,
        n: int = 1000,
        seed: int = 0,
        transform: Callable[[Tensor], Any] | None = None,
    ):
        """
        :param photograph: ``"china.jpg"`` (a temple) or ``"flower.jpg"`` (a dahlia), 640 × 427
            pixels
        :param half: ``"left"`` or ``"right"``, two halves without a common pixel; ``None`` takes
            the whole photograph
        :param n: number of patches, drawn without replacement; there are 4,240 in a photograph
        :param seed: seed of the draw
        :param transform: applied to each image
        :raises ValueError: if there are fewer than ``n`` patches, or the half is unknown
        """
        pixels = torch.from_numpy(_scikit_learn("load_sample_image")(photograph).copy())
        # luma of ITU-R BT.601, as Pillow uses
        grey = pixels.float() @ torch.tensor([0.299, 0.587, 0.114]) / 255
        patches = grey.unfold(0, _SIZE, _SIZE).unfold(1, _SIZE, _SIZE)
        middle = patches.shape[1] // 2
        halves = {None: patches, "left": patches[:, :middle], "right": patches[:, middle:]}
        if half not in halves:
            raise ValueError(f"half must be 'left', 'right' or None, got {half!r}.")
        images = halves[half].reshape(-1, 1, _SIZE, _SIZE)
        if not 1 <= n <= len(images):
            raise ValueError(f"n must be between 1 and the {len(images)} patches, got {n}.")
        generator = torch.Generator().manual_seed(seed)
        images = images[torch.randperm(len(images), generator=generator)[:n]].contiguous()
        super().__init__(images, torch.full((n,), -1), transform)


class UniformNoise(_Images):
    """
    Images whose pixels are independent and uniform in :math:`[0, 1]`, labeled -1.
    """

    #: Usual role.
    info: ClassVar[DatasetInfo] = DatasetInfo(
        task=Task.CLASSIFICATION, license=None, roles={Role.OOD_TEST}, ai_coded=True
    )

    def __init__(
        self, n: int = 1000, seed: int = 0, transform: Callable[[Tensor], Any] | None = None
    ):
        """
        :param n: number of images
        :param seed: seed of the noise
        :param transform: applied to each image
        :raises ValueError: if ``n`` is not positive
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand((n, 1, _SIZE, _SIZE), generator=generator)
        super().__init__(images, torch.full((n,), -1), transform)


def _scikit_learn(loader: str) -> Callable[..., Any]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn: pip install 'pood-plugins[benchmark]'"
        ) from error
    load: Callable[..., Any] = getattr(datasets, loader)
    return load
