"""
A benchmark of your own images, from folders.

.. code-block:: console

    $ pood benchmark folder --train data/train --test data/test --near cats=data/cats \\
        --far noise=data/noise --arch resnet18 --weights model.pt

.. code-block:: python

    from pood_plugins import evaluation, registry
    from pood_plugins.benchmark import FolderBenchmark
    from pood_plugins.model import split_model

    benchmark = FolderBenchmark(
        "data/train",
        "data/test",
        ood={"cats": "data/cats", "noise": "data/noise"},
        near=["cats"],
        transform=transform,  # the one that the classifier was tested with
    )
    split = split_model(model.eval())
    detectors = {name: registry.build(name, split) for name in ["GROOD", "NERO", "Energy"]}
    print(evaluation.run(benchmark, detectors).to_markdown())

Training and test folder hold one folder of images per class, as for torchvision's
:class:`~torchvision.datasets.ImageFolder`. OOD folders hold images at any depth.

.. code-block:: text

    data/train/beagle/001.jpg      label 0
    data/train/poodle/001.jpg      label 1
    data/test/poodle/002.jpg       label 1
    data/cats/tabby/left/003.jpg   label -1

.. warning::

    The class folders of the training folder, in alphabetical order, must be the columns of the
    classifier, in that order. Nothing but the ID accuracy in the table tells if they are not.
    Alphabetical means that ``10`` comes before ``2``, and capital before small letters.

The order of the images is the same on every file system. Hidden files and folders are ignored, and
so are files without one of the extensions in ``torchvision.datasets.folder.IMG_EXTENSIONS``.
Images are converted to RGB as ``ImageFolder`` does, which cuts grey levels of 16-bit images at
255: convert such images to 8 bits first. Batches need images of one size: if yours differ, pass a
``transform`` that resizes them.

..  autoclass:: pood_plugins.benchmark.FolderBenchmark
    :members:
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.folder.ImageFiles
    :show-inheritance:
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pytorch_ood.api import BenchmarkInfo, Task
from pytorch_ood.benchmark import Benchmark, CIFAR10_OpenOOD
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import ToTensor

from ..training.checkpoint import reason

_Path = str | os.PathLike[str]
_Files = dict[str, list[Path]]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """
    Image files and their labels. Items are ``(image, label)``.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        transform: Callable[..., Any] | None = None,
    ):
        """
        :param files: paths of images
        :param labels: one per file, -1 for outliers
        :param transform: makes a tensor of an RGB image of Pillow, default is
            :class:`~torchvision.transforms.ToTensor`
        :raises ValueError: if there is not one label per file
        """
        if len(files) != len(labels):
            raise ValueError(
                f"Each file needs one label, got {len(files)} files and {len(labels)} labels."
            )
        self.files = list(files)
        self.labels = list(labels)
        self.transform = ToTensor() if transform is None else transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        :raises ValueError: if the file can't be read as an image
        """
        return self.transform(read_image(self.files[index])), self.labels[index]


class FolderBenchmark(Benchmark):
    """
    Images from folders: a training and a test folder with one folder per class, and OOD folders.
    """

    #: Source of the protocol, near- and far-OOD sets against one ID test set, and tasks.
    info: ClassVar[BenchmarkInfo] = BenchmarkInfo(
        paper=CIFAR10_OpenOOD.info.paper, tasks={Task.CLASSIFICATION}, ai_coded=True
    )

    def __init__(
        self,
        train: _Path,
        test: _Path,
        ood: Mapping[str, _Path],
        near: Sequence[str] = (),
        transform: Callable[..., Any] | None = None,
    ):
        """
        :param train: folder with one folder of ID training images per class
        :param test: folder with one folder of ID test images per class; classes may be missing
        :param ood: folders of OOD images by the name of the set
        :param near: names of the near-OOD sets, which come first; all others are far-OOD
        :param transform: see :class:`~pood_plugins.benchmark.folder.ImageFiles`
        :raises ValueError: if a folder can't be read or has no images, a class of the test folder
            is none of the training folder, there are no OOD sets, or their names don't fit
        """
        _check_names(ood, near)
        self.near_ood_names = [name for name in ood if name in near]  #: OOD sets like ID data
        self.far_ood_names = [name for name in ood if name not in near]  #: all other OOD sets
        self.ood_names = self.near_ood_names + self.far_ood_names  #: all OOD sets

        train_files, test_files = files_by_class(train), files_by_class(test)
        _check_classes(train, test, train_files, test_files)
        self.classes = list(train_files)  #: names of the classes, in the order of their labels
        self._train = self._labeled(train_files, transform)
        self._id_test = self._labeled(test_files, transform)
        self._oods = []
        for name in self.ood_names:
            files = find_images(ood[name])
            if not files:
                raise _no_images(ood[name], f"add some, or leave out the OOD set {name!r}")
            self._oods.append(ImageFiles(files, [-1] * len(files), transform))

    @property
    def num_classes(self) -> int:
        """Number of classes, which is how many columns the classifier must have."""
        return len(self.classes)

    def train_set(self) -> Dataset[Any]:
        """
        :return: ID training set
        """
        return self._train

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        """
        :param known: include ID
        :param unknown: include OOD
        :return: with both, one data set per entry of ``ood_names``, ID test set first; with
            ``unknown`` only, the OOD sets; with ``known`` only, the ID test set
        :raises ValueError: if both are false
        """
        if known and unknown:
            return [ConcatDataset([self._id_test, ood]) for ood in self._oods]
        if known:
            return [self._id_test]
        if unknown:
            return list(self._oods)
        raise ValueError("At least one of `known` or `unknown` must be True")

    def _labeled(self, by_class: _Files, transform: Callable[..., Any] | None) -> ImageFiles:
        of_class = [by_class.get(name, []) for name in self.classes]
        files = [file for files in of_class for file in files]
        labels = [label for label, files in enumerate(of_class) for _ in files]
        return ImageFiles(files, labels, transform)


def _check_names(ood: Mapping[str, _Path], near: Sequence[str]) -> None:
    if not ood:
        raise ValueError("There are no OOD sets: name the folder of at least one.")
    for name in ("ID", "near", "far"):
        if name in ood:
            raise ValueError(
                f"An OOD set can't be called {name!r}, as results use this name: rename it."
            )
    unknown = [name for name in near if name not in ood]
    if unknown:
        raise ValueError(
            f"near names {', '.join(map(repr, unknown))}, but the OOD sets are "
            f"{', '.join(map(repr, ood))}: give a list of some of these."
        )


def _check_classes(train: _Path, test: _Path, train_files: _Files, test_files: _Files) -> None:
    if not train_files:
        raise ValueError(f"{train} has no class folders: make one folder of images per class.")
    for name, files in train_files.items():
        if not files:
            raise _no_images(Path(train, name), "add some, or remove the folder")
    unknown = [name for name in test_files if name not in train_files]
    if unknown:
        raise ValueError(
            f"{test} has class folders that {train} lacks ({', '.join(unknown)}): rename or "
            "remove them, or make them an OOD set."
        )
    if not any(test_files.values()):
        raise _no_images(f"class folders of {test}", "add some, named as in the training folder")


def _no_images(where: _Path, remedy: str) -> ValueError:
    return ValueError(f"There are no images ({', '.join(IMG_EXTENSIONS)}) in {where}: {remedy}.")


def files_by_class(folder: _Path) -> _Files:
    """
    :param folder: with one folder per class
    :return: images of each class, in the order of the classes
    :raises ValueError: if a folder can't be read
    """
    _, names, _ = next(_walk(folder))
    return {name: find_images(Path(folder, name)) for name in sorted(names)}


def find_images(folder: _Path) -> list[Path]:
    """
    :param folder: any folder
    :return: images at any depth, in an order that does not depend on the file system
    :raises ValueError: if a folder can't be read
    """
    found = [
        Path(parent, name)
        for parent, _, names in _walk(folder)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    ]
    return sorted(found, key=Path.as_posix)


def _walk(folder: _Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders at any depth that are not hidden. One that can't be read is not skipped."""

    def fail(error: OSError) -> None:
        raise ValueError(
            f"The folder {error.filename} can't be read ({error.strerror}): correct its path or "
            "its permissions."
        ) from error

    # folders may be links, as for ImageFolder: large data sets are often put together by links
    for parent, folders, names in os.walk(Path(folder).expanduser(), True, fail, True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, folders, names


def read_image(path: Path, cut: bool = True) -> Image.Image:
    """
    :param path: image file
    :param cut: do as ``ImageFolder`` does, which cuts grey levels of more than 8 bits at 255 and
        takes the first of several pages or frames, and do not refuse such images
    :return: RGB image
    :raises ValueError: if the file can't be read as an image, with its name and the reason
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("No such file")
        with Image.open(path) as image:
            # photographs of telephones are MPO, with a small picture after the first
            if not cut and image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} pages or frames")
            if not cut and image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits per channel, mode {image.mode}")
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise ValueError("it is PostScript, which is a program")
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                # Pillow itself only warns, up to twice as many
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, and "
                    f"PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS}"
                )
            image.load()  # opening alone does not notice that a file is truncated
            # RGB has no place for it, and Pillow would warn of that for some palettes
            image.info.pop("transparency", None)
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except Exception as error:  # what a damaged file raises depends on its format
        raise ValueError(
            f"{path} can't be read as an image ({reason(error)}): remove or replace it."
        ) from error
