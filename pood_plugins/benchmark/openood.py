"""
The benchmarks of OpenOOD v1.5 on whatever part of the data you have.

.. code-block:: console

    $ pood benchmark cifar10-openood --root data --arch resnet20 --weights resnet20.pt

pytorch-ood's own classes, such as :class:`pytorch_ood.benchmark.CIFAR10_OpenOOD`, read OpenOOD's
image lists, and raise an error if any list is missing. The classes here are the same benchmarks,
with the same lists, names and order, but for what is missing: they hold the OOD sets that are
there in full, and say in ``missing`` what is not, and why. Nothing is averaged away: near- and
far-OOD means name the sets that they are taken over.

===================  ======================  =====================================================
Command              Class                   OOD sets: near; far
===================  ======================  =====================================================
cifar10-openood      ``PartialCIFAR10``      CIFAR100, TinyImageNet; MNIST, SVHN, Textures,
                                             Places365
cifar100-openood     ``PartialCIFAR100``     CIFAR10, TinyImageNet; as above
imagenet200-openood  ``PartialImageNet200``  SSBHard, NINCO; iNaturalist, Textures, OpenImagesO
imagenet-openood     ``PartialImageNet``     as above
===================  ======================  =====================================================

A set is there if its list is and all images of the list are. The ID test set must be there.
Without the ID training set only detectors without fitting can be evaluated, and without the
validation sets ``validation_set`` is an error.

Lists are looked for in ``imglists`` if that is given, otherwise in ``benchmark_imglist`` below or
beside the root folder, where OpenOOD puts it, and where pytorch-ood puts them,
``$TORCH_HOME/hub/openood_benchmark_imglist/benchmark_imglist``. With ``download=True``, everything
is fetched first by pytorch-ood's own code.

Images in packs
---------------

:class:`PackedCIFAR10` is the CIFAR-10 benchmark on :mod:`image packs <pood_plugins.dataset.packs>`
in memory, transformed on the network's device, a batch at a time. :func:`openood` chooses it if
the root folder holds ``openood_index.npz``, the rows of OpenOOD's lists:

===============================================  ==================================================
``openood_index.npz``                            ``cifar10_test``, ``cifar10_val``,
                                                 ``cifar100_as_ood_test``: rows of the packs
``cifar10_test.webp.zip``                        CIFAR-10 test images, for ID test and validation
``cifar10_train_{1,2}of2.webp.zip``              CIFAR-10 training images
``cifar100_test.webp.zip``                       CIFAR-100 test images
``mnist_test.npz``, ``dtd10_32.npz``             MNIST and Textures
===============================================  ==================================================

..  autofunction:: pood_plugins.benchmark.openood.openood

..  autoclass:: pood_plugins.benchmark.openood.PartialCIFAR10
    :members:
    :inherited-members:
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.openood.PartialCIFAR100
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.openood.PartialImageNet200
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.openood.PartialImageNet
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.openood.PackedCIFAR10
    :members:
    :show-inheritance:
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_ood.api import BenchmarkInfo, Task
from pytorch_ood.benchmark import (
    Benchmark,
    CIFAR10_OpenOOD,
    CIFAR100_OpenOOD,
    ImageNet200_OpenOOD,
    ImageNet_OpenOOD,
)
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..dataset.packs import ImagePack, load_arrays
from ..training.checkpoint import reason, short
from .folder import ImageFiles

__all__ = [
    "PackedCIFAR10",
    "PartialCIFAR10",
    "PartialCIFAR100",
    "PartialImageNet",
    "PartialImageNet200",
    "openood",
]

_Path = str | os.PathLike[str]

#: Number of images that OpenOOD v1.5 lists for an OOD set of CIFAR, where a smaller set may pass
#: for it.
_SIZES = {"CIFAR100": 9000, "CIFAR10": 9000, "MNIST": 70000, "Textures": 5640}
_INDEX = "openood_index.npz"


class _Partial(Benchmark):
    """
    What is there of a benchmark: sets by their names, in the order of upstream's ``ood_names``.
    """

    #: number of classes, which is how many columns the classifier must have
    num_classes: int
    #: OOD sets that resemble ID data, of those that are there
    near_ood_names: list[str]
    #: OOD sets of another kind, of those that are there
    far_ood_names: list[str]
    #: all OOD sets that are there, in OpenOOD's order
    ood_names: list[str]
    #: what is not there, by the name of the set, with the reason
    missing: dict[str, str]
    #: what is to be said of sets that are there, e.g. that images are left out, by their names
    notes: dict[str, str]

    #: upstream's class, which says what there could be
    _whole: type[Any]
    #: number of images of its OOD sets, where a smaller set may pass for them
    _sizes: Mapping[str, int] = {}

    def _arrange(self, where: _Path, sets: Mapping[str, Dataset[Any] | str]) -> None:
        """
        :param where: where the data are, for the error
        :param sets: data set or the reason why it is missing by its name, ``"ID test"``,
            ``"ID training"``, ``"ID validation"``, ``"OOD validation"`` or that of an OOD set
        """
        self._sets = {name: data for name, data in sets.items() if not isinstance(data, str)}
        self.missing = {name: why for name, why in sets.items() if isinstance(why, str)}
        names = [name for name, _ in self._whole._ood_imglists]
        self.ood_names = [name for name in names if name in self._sets]
        self.near_ood_names = [n for n in self.ood_names if n in self._whole._near_ood]
        self.far_ood_names = [n for n in self.ood_names if n in self._whole._far_ood]
        name = type(self).__name__
        if "ID test" in self.missing:
            raise ValueError(
                f"{where} does not hold the ID test set of {name}, {self.missing['ID test']}: "
                "name another root folder, or download the data"
            )
        if not self.ood_names:
            reasons = "; ".join(f"{name}, {self.missing[name]}" for name in names)
            raise ValueError(f"{where} holds no OOD set of {name} ({reasons}): add one")
        self.notes = {}
        for name in self.ood_names:
            there, whole = len(self._sets[name]), self._sizes.get(name)  # type: ignore[arg-type]
            if whole is not None and there != whole:
                self.notes[name] = f"{there:,} of {whole:,} images"

    def train_set(self) -> Dataset[Any]:
        """
        :return: ID training set
        :raises ValueError: if it is missing
        """
        return self._get("ID training")

    def validation_set(self) -> Dataset[Any]:
        """
        :return: ID and OOD validation sets of OpenOOD, OOD samples labeled -1
        :raises ValueError: if one of them is missing
        """
        return ConcatDataset([self._get("ID validation"), self._get("OOD validation")])

    def id_validation_set(self) -> Dataset[Any]:
        """
        :return: ID validation set
        :raises ValueError: if it is missing
        """
        return self._get("ID validation")

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        """
        :param known: include ID
        :param unknown: include OOD
        :return: with both, one data set per entry of ``ood_names``, ID test set first; with
            ``unknown`` only, the OOD sets; with ``known`` only, the ID test set
        :raises ValueError: if both are false
        """
        id_test, oods = self._get("ID test"), [self._get(name) for name in self.ood_names]
        if known and unknown:
            return [ConcatDataset([id_test, ood]) for ood in oods]
        if known:
            return [id_test]
        if unknown:
            return oods
        raise ValueError("At least one of `known` or `unknown` must be True")

    def _get(self, name: str) -> Dataset[Any]:
        if name in self.missing:
            raise ValueError(f"The {name} set is missing, {self.missing[name]}: add it")
        return self._sets[name]


class _FromLists(_Partial):
    def __init__(
        self,
        root: _Path,
        transform: Callable[..., Any] | None = None,
        *,
        download: bool = False,
        imglists: _Path | None = None,
        image_net_root: _Path | None = None,
    ):
        """
        :param root: folder that the paths in the image lists begin at
        :param transform: makes a tensor of an RGB image of Pillow; default is
            :class:`~torchvision.transforms.ToTensor`
        :param download: fetch lists and images that are missing; needs gdown and a network
        :param imglists: folder with the image lists, in place of the usual ones
        :param image_net_root: where to find the training images of ImageNet, which are then
            linked into the root folder; only for the benchmarks on ImageNet
        :raises ValueError: if there is no ID test set or no OOD set, or a list is broken
        """
        whole, root = self._whole, Path(root).expanduser()
        if not download and not root.is_dir():
            raise ValueError(f"there is no folder {root}: name the one that holds the images")
        if image_net_root is not None:
            if not hasattr(whole, "_link_imagenet"):
                raise ValueError(f"{type(self).__name__} does not use ImageNet: no image_net_root")
            image_net = Path(image_net_root).expanduser().resolve()  # for a link, not relative
            if not (image_net / "train").is_dir():
                raise ValueError(f"no folder {image_net / 'train'}: correct image_net_root")
            whole._link_imagenet(str(root), str(image_net))
        if download:
            from pytorch_ood.benchmark.img.openood import _ensure_imglists

            whole._download(whole, str(root))
            imglists = imglists or _ensure_imglists(True)
        lists = _find_lists(root, imglists, whole._subdir)
        wanted = {
            "ID test": whole._test_id_imglist,
            **dict(whole._ood_imglists),
            "ID training": whole._train_imglist,
            "ID validation": whole._val_id_imglist,
            "OOD validation": whole._val_ood_imglist,
        }
        sets = {name: _read_list(lists / file, root, transform) for name, file in wanted.items()}
        self._arrange(root, sets)


class PartialCIFAR10(_FromLists):
    """
    The CIFAR-10 benchmark of OpenOOD v1.5, :class:`pytorch_ood.benchmark.CIFAR10_OpenOOD`, on the
    OOD sets that are there.
    """

    #: Paper and tasks.
    info = BenchmarkInfo(
        paper=CIFAR10_OpenOOD.info.paper, tasks={Task.CLASSIFICATION}, ai_coded=True
    )
    num_classes = 10
    _whole = CIFAR10_OpenOOD
    _sizes = _SIZES


class PartialCIFAR100(_FromLists):
    """
    :class:`pytorch_ood.benchmark.CIFAR100_OpenOOD` on the OOD sets that are there.
    """

    #: Paper and tasks.
    info = PartialCIFAR10.info
    num_classes = 100
    _whole = CIFAR100_OpenOOD
    _sizes = _SIZES


class PartialImageNet200(_FromLists):
    """
    :class:`pytorch_ood.benchmark.ImageNet200_OpenOOD` on the OOD sets that are there.
    """

    #: Paper and tasks.
    info = PartialCIFAR10.info
    num_classes = 200
    _whole = ImageNet200_OpenOOD


class PartialImageNet(_FromLists):
    """
    :class:`pytorch_ood.benchmark.ImageNet_OpenOOD` on the OOD sets that are there.
    """

    #: Paper and tasks.
    info = PartialCIFAR10.info
    num_classes = 1000
    _whole = ImageNet_OpenOOD


class PackedCIFAR10(_Partial):
    """
    The CIFAR-10 benchmark of OpenOOD v1.5 on
    :class:`image packs <pood_plugins.dataset.ImagePack>`.
    """

    #: Paper and tasks.
    info = PartialCIFAR10.info
    num_classes = 10
    _whole = CIFAR10_OpenOOD
    _sizes = _SIZES

    def __init__(self, root: _Path, transform: Callable[[Tensor], Tensor] | None = None):
        """
        :param root: folder with the packs
        :param transform: for batches of images, see :class:`~pood_plugins.dataset.ImagePack`
        :raises ValueError: if there is no ID test set or no OOD set, or a file is damaged
        """
        root = Path(root).expanduser()
        try:
            with open(root / _INDEX, "rb") as file:  # which numpy leaves open if it is damaged
                index = load_arrays(file)
            known = {name: index[f"cifar10_{name}"] for name in ("test", "val")}
            cifar100 = index["cifar100_as_ood_test"]
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise ValueError(
                f"{root / _INDEX} is missing or damaged ({reason(error)}): name another root "
                "folder, or copy the file again"
            ) from error

        def read(*names: str) -> ImagePack | str:
            absent = [name for name in names if not (root / name).exists()]
            if absent:
                return f"no {', '.join(absent)}"
            return ImagePack.read(*(root / name for name in names), transform=transform)

        def rows(pack: ImagePack | str, of: np.ndarray) -> ImagePack | str:
            try:
                if of.ndim != 1 or of.dtype.kind not in "iu" or (of < 0).any():
                    raise IndexError("it holds something else than numbers of rows")
                return pack if isinstance(pack, str) else pack.subset(of)
            except IndexError as error:
                raise ValueError(
                    f"{root / _INDEX} is damaged or belongs to other packs ({error}): copy the "
                    "files again"
                ) from error

        def outliers(pack: ImagePack | str) -> ImagePack | str:
            return pack if isinstance(pack, str) else pack.relabel(-1)

        def enlarged(pack: ImagePack | str) -> ImagePack | str:
            return pack if isinstance(pack, str) else pack.resize(32)

        cifar10 = read("cifar10_test.webp.zip")
        sets = {
            "ID test": rows(cifar10, known["test"]),
            **{name: "in no pack" for name, _ in self._whole._ood_imglists},
            "CIFAR100": outliers(rows(read("cifar100_test.webp.zip"), cifar100)),
            "MNIST": outliers(enlarged(read("mnist_test.npz"))),
            "Textures": outliers(read("dtd10_32.npz")),
            "ID training": read("cifar10_train_1of2.webp.zip", "cifar10_train_2of2.webp.zip"),
            "ID validation": rows(cifar10, known["val"]),
            "OOD validation": "in no pack",
        }
        self._arrange(root, sets)


_CLASSES: dict[str, type[_FromLists]] = {
    "cifar10-openood": PartialCIFAR10,
    "cifar100-openood": PartialCIFAR100,
    "imagenet200-openood": PartialImageNet200,
    "imagenet-openood": PartialImageNet,
}

#: number of classes of the benchmarks that :func:`openood` knows, by name
OPENOOD_CLASSES = {name: benchmark.num_classes for name, benchmark in _CLASSES.items()}


def openood(
    name: str, root: _Path, transform: Callable[..., Any] | None = None, **options: Any
) -> _Partial:
    """
    :param name: ``cifar10-openood``, ``cifar100-openood``, ``imagenet200-openood`` or
        ``imagenet-openood``
    :param root: folder with the images, or with packs
    :param transform: makes a tensor of an RGB image of Pillow. For packs it gets batches of
        tensors in :math:`[0, 1]` instead.
    :param options: further arguments for the class
    :return: the benchmark
    :raises LookupError: if the name is unknown
    :raises ValueError: if data are missing that must be there, or the class has no such argument
    """
    if name not in _CLASSES:
        raise LookupError(f"no benchmark of OpenOOD is called {name!r}: {', '.join(_CLASSES)}")
    chosen: Any = PackedCIFAR10 if is_packed(name, root) else _CLASSES[name]
    choices = list(inspect.signature(chosen).parameters)[2:]
    unknown = [option for option in options if option not in choices]
    if unknown:
        raise ValueError(
            f"{chosen.__name__} has no option {', '.join(unknown)}: it has "
            f"{', '.join(choices) or 'none'}"
        )
    benchmark: _Partial = chosen(root, transform, **options)
    return benchmark


def is_packed(name: str, root: _Path) -> bool:
    """
    :return: whether :func:`openood` reads packs from this folder, whose transform gets batches
    """
    return name == "cifar10-openood" and (Path(root).expanduser() / _INDEX).exists()


def _find_lists(root: Path, imglists: _Path | None, folder: str) -> Path:
    hub = Path(torch.hub.get_dir()) / "openood_benchmark_imglist" / "benchmark_imglist"
    usual = [root / "benchmark_imglist", root.parent / "benchmark_imglist", hub]
    tried = [Path(imglists).expanduser()] if imglists is not None else usual
    for candidate in tried:
        if (candidate / folder).is_dir():
            return candidate / folder
    raise ValueError(
        f"no image lists of OpenOOD ({folder}/*.txt) in {', '.join(map(str, tried))}: name their "
        "folder by imglists, or download them"
    )


def _read_list(path: Path, root: Path, transform: Callable[..., Any] | None) -> ImageFiles | str:
    """The images of a list, or the reason why they are not to be had."""
    if not path.exists():
        return f"no list {path.name}"
    files, labels = [], []
    for file, label in _entries(path):
        files.append(root / file)
        labels.append(label)
    absent = [file for file in files if not _exists(file)]
    if not files:
        return f"the list {path.name} is empty"
    if absent:
        example = short(absent[0], 300)
        return f"{len(absent):,} of {len(files):,} images are not there, e.g. {example}"
    return ImageFiles(files, labels, transform)


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # its name is one that no file can have
        return False


def _entries(path: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}): copy the list again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            file, label = line.rsplit(maxsplit=1)  # names of files may hold spaces
            if abs(int(label)) >= 2**63:  # no tensor has it
                raise ValueError
            yield file.strip(), int(label)
        except ValueError:
            raise ValueError(
                f"line {number} of {path} is {short(repr(line))}, not a path and a label: copy "
                "the list again"
            ) from None
