"""
Images of the gastrointestinal tract, Kvasir-v2 and GastroVision, split into in-distribution and
OOD as in the experiments of :class:`NERO <pood_plugins.detector.NERO>`'s paper, as far as these
are known. Nothing is downloaded: the folders are those of the published archives.

=================  ==========================================  ==================================
\\                  Kvasir-v2                                   GastroVision
=================  ==========================================  ==================================
Folder             ``kvasir-dataset-v2``, 8 class folders of   ``Gastrovision``, 27 class
                   1,000 images                                folders, 8,000 images
ID                 3 classes, 3,000 images: the landmarks      11 classes, 4,759 images: 10 normal
                   cecum, pylorus and z-line                   or anatomical ones (4,730), and
                                                               one more (29)
ID training        2,400, of them 240 for validation           3,811, of them 377 for validation
ID test            600                                         948
OOD                5 other classes, 5,000 images               16 other classes, 3,241 images
=================  ==========================================  ==================================

**What is known and what is inferred.** The released code of NERO names no class. It says that 3
classes of Kvasir-v2 and 11 of GastroVision are ID, and 200 test images of each ID class of
Kvasir-v2 can be told from it.

- *Sizes of the OOD sets*, inferred: the published false positive rates are multiples of 1/5000
  and 1/3241, and of no other number in reach.
- *Which classes are ID*, inferred: other papers of the same group call normal anatomy ID and what
  is abnormal OOD. For Kvasir-v2 this gives the three classes whose names begin with ``normal``,
  and the sizes fit.
- *The eleventh class of GastroVision*, a guess. Ten classes are normal or anatomical; they are
  29 images short of 4,759, and two classes have 29 images, ``Colon diverticula`` and ``Mucosal
  inflammation large bowel``. The first is the default, only because the data set's repository
  lists it after the landmarks and not among the findings of clinical significance. The argument
  ``eleventh`` chooses the other.
- *How GastroVision's ID images are divided*, not known: a fifth of each class is for test here, as
  with Kvasir-v2.
- *Which images are for test*, not known for either: they are drawn here.
- *Validation.* The released code chooses its checkpoint on the ID test images. Here, a tenth of
  the training images of each class is held out for that, and ID test images choose nothing.

**Split lists.** The images of a class are put in order by the SHA-256 hash of seed, class and file
name, separated by newlines. The first are for test, the next for validation, and the rest for
training. So lists depend on nothing else, neither on the file system nor on a package's version or
other classes. :func:`write_lists` writes them to a file.

Items are ``(image, label)``: an RGB image of Pillow or what ``transform`` makes of it, and the
position of the class in ``classes``, or -1 for OOD. The classes are in alphabetical order, as for
torchvision's :class:`~torchvision.datasets.ImageFolder`. Several images may show
one patient, and no list says which: these splits are not by patient.

..  autoclass:: pood_plugins.dataset.endoscopy.EndoscopyFolder
    :members:

..  autoclass:: pood_plugins.dataset.KvasirV2
    :members:
    :show-inheritance:

..  autoclass:: pood_plugins.dataset.GastroVision
    :members:
    :show-inheritance:

..  autofunction:: pood_plugins.dataset.endoscopy.write_lists
"""

import csv
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pytorch_ood.api import DatasetInfo, Paper, Role, Task
from torch.utils.data import Dataset

from ..training.checkpoint import replacing

_Path = str | os.PathLike[str]

PARTS = ("train", "validation", "test", "ood")
#: classes of GastroVision with the 29 images that its ten normal classes are short of
ELEVENTH = ("Colon diverticula", "Mucosal inflammation large bowel")
_MOST_DIFFERENCES = 8


class EndoscopyFolder(Dataset[tuple[Any, int]]):
    """
    What both data sets have in common: one folder of images per class, some classes ID.
    """

    #: Licence, paper and roles.
    info: ClassVar[DatasetInfo]
    #: published number of images of each class
    COUNTS: ClassVar[Mapping[str, int]]
    #: name of the folder in the published archive
    FOLDER: ClassVar[str]

    #: names of the ID classes, in the order of their labels
    classes: list[str]
    #: names of the OOD classes
    ood_classes: list[str]
    #: the folder with the class folders
    folder: Path
    #: which images these are
    part: str
    #: images of this part, class by class
    files: list[Path]
    #: one label per file, -1 for OOD
    labels: list[int]
    #: name of the class of each file, also of OOD
    names: list[str]

    def __init__(
        self,
        root: _Path,
        part: str,
        id_classes: Sequence[str],
        transform: Callable[..., Any] | None,
        seed: int,
        test_fraction: float,
        validation_fraction: float,
        verify: bool,
    ):
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}.")
        for name, value in (
            ("test_fraction", test_fraction),
            ("validation_fraction", validation_fraction),
        ):
            if not 0 <= value < 1 or (value == 0 and name == "test_fraction"):
                raise ValueError(f"{name} must be a fraction below 1, got {value}.")
        self.part = part
        self.transform = transform
        self.classes = sorted(id_classes)
        self.ood_classes = [name for name in sorted(self.COUNTS) if name not in id_classes]
        self.folder = self._find_folder(Path(root).expanduser())
        of_class = self._read_classes(verify)

        self.files, self.labels, self.names = [], [], []
        for name in self.ood_classes if part == "ood" else self.classes:
            files = of_class[name]
            if part != "ood":
                divided = self._divide(name, files, seed, test_fraction, validation_fraction)
                files = divided[part]
            self.files += files
            self.names += [name] * len(files)
            self.labels += [-1 if part == "ood" else self.classes.index(name)] * len(files)
        if not self.files:
            why = "validation_fraction is 0" if part == "validation" else "its folders are empty"
            raise ValueError(f"{self.folder} has no images for the part {part!r}: {why}.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """
        :raises ValueError: if the file can't be read as an image
        """
        from ..benchmark.folder import read_image  # not above: benchmarks import data sets

        image = read_image(self.files[index])
        return image if self.transform is None else self.transform(image), self.labels[index]

    def rows(self) -> Iterator[tuple[str, str, str, int]]:
        """
        :return: for each image its path in the folder, its part, the name of its class (as
            published) and its label
        """
        for file, name, label in zip(self.files, self.names, self.labels):
            yield file.relative_to(self.folder).as_posix(), self.part, name, label

    @classmethod
    def _find_folder(cls, root: Path) -> Path:
        """
        The folder with the class folders: the root, or one in it that is called as published,
        which may hold another that is called so, as archives are packed.
        """
        if not root.is_dir():
            raise ValueError(
                f"There is no folder {root}: name the one that holds {cls.FOLDER}, or that folder."
            )
        known = {_key(name) for name in cls.COUNTS}
        folder: Path | None = root
        while folder is not None:
            children = sorted(child for child in folder.iterdir() if child.is_dir())
            # not any: the two data sets have some names in common
            n_known = sum(_key(child.name) in known for child in children)
            if 2 * n_known > sum(not child.name.startswith(".") for child in children):
                return folder
            called = [c for c in children if c.name.casefold() == cls.FOLDER.casefold()]
            folder = called[0] if called else None
        some = ", ".join(sorted(cls.COUNTS)[:3])
        raise ValueError(
            f"{root} is not the folder of {cls.__name__}: it has neither {cls.FOLDER} nor class "
            f"folders ({some}, ...) in it. Unpack the published archive, and name its folder."
        )

    def _read_classes(self, verify: bool) -> dict[str, list[Path]]:
        from ..benchmark.folder import find_images  # as above

        folders, extra = {}, []
        published = {_key(name): name for name in self.COUNTS}
        # a folder that is named as published goes before others that resemble it
        for child in sorted(self.folder.iterdir(), key=lambda c: (c.name not in self.COUNTS, c)):
            if not child.is_dir() or child.name.startswith("."):
                continue
            found = published.get(_key(child.name))
            if found is None or found in folders:
                extra.append(child.name)
            else:
                folders[found] = child
        differences = [f"no folder {name!r}" for name in self.COUNTS if name not in folders]
        differences += [f"an unknown folder {name!r}" for name in extra]
        images = {name: find_images(folder) for name, folder in folders.items()}
        if verify:
            differences += [
                f"{len(images[name]):,} images in {name!r} instead of {count:,}"
                for name, count in self.COUNTS.items()
                if name in images and len(images[name]) != count
            ]
        if differences:
            shown = differences[:_MOST_DIFFERENCES]
            if len(differences) > len(shown):
                shown.append(f"and {len(differences) - len(shown)} more differences")
            remedy = "unpack the published archive again, and leave its class folders as they are"
            if all(name in images for name in self.COUNTS) and not extra:
                remedy += ", or pass verify=False to use the images that are there"
            raise ValueError(
                f"{self.folder} is not {type(self).__name__} as published: {'; '.join(shown)}. "
                f"To correct it, {remedy}."
            )
        return images

    @staticmethod
    def _divide(
        name: str, files: list[Path], seed: int, test_fraction: float, validation_fraction: float
    ) -> dict[str, list[Path]]:
        def order(file: Path) -> bytes:
            return hashlib.sha256(
                f"{seed}\n{name}\n{file.name}".encode(errors="surrogateescape")
            ).digest()

        drawn = sorted(files, key=lambda file: (order(file), file.as_posix()))
        n_test = _count(test_fraction, len(drawn))
        n_validation = _count(validation_fraction, len(drawn) - n_test)
        n_held_out = n_test + n_validation
        if n_held_out >= len(drawn):
            raise ValueError(
                f"The class {name!r} has {len(drawn)} images, too few for training, validation "
                "and test: add some, or lower the fractions."
            )
        parts = {
            "test": drawn[:n_test],
            "validation": drawn[n_test:n_held_out],
            "train": drawn[n_held_out:],
        }
        return {part: sorted(files, key=Path.as_posix) for part, files in parts.items()}


class KvasirV2(EndoscopyFolder):
    """
    Kvasir in its second version: 8,000 images in 8 classes. ID are ``normal-cecum`` (label 0),
    ``normal-pylorus`` (1) and ``normal-z-line`` (2).

    The licence is the one that others relay: free for research and education, to be cited, and
    nothing else without written permission. The page of the data itself was not seen.
    """

    #: Licence, paper and usual roles.
    info: ClassVar[DatasetInfo] = DatasetInfo(
        task=Task.CLASSIFICATION,
        license="research and education only; any other use by prior written permission",
        roles={Role.IN_DISTRIBUTION, Role.OOD_TEST},
        paper=Paper(
            title=(
                "KVASIR: A Multi-Class Image Dataset for Computer Aided Gastrointestinal Disease "
                "Detection"
            ),
            venue="MMSys",
            year=2017,
            url="https://doi.org/10.1145/3083187.3083212",
        ),
        homepage="https://datasets.simula.no/kvasir/",
        ai_coded=True,
    )

    COUNTS: ClassVar[Mapping[str, int]] = {
        "dyed-lifted-polyps": 1000,
        "dyed-resection-margins": 1000,
        "esophagitis": 1000,
        "normal-cecum": 1000,
        "normal-pylorus": 1000,
        "normal-z-line": 1000,
        "polyps": 1000,
        "ulcerative-colitis": 1000,
    }
    FOLDER: ClassVar[str] = "kvasir-dataset-v2"

    def __init__(
        self,
        root: _Path,
        part: str = "train",
        transform: Callable[..., Any] | None = None,
        *,
        seed: int = 0,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        verify: bool = True,
    ):
        """
        :param root: the folder ``kvasir-dataset-v2``, or one that holds it
        :param part: ``"train"``, ``"validation"`` or ``"test"`` of the ID classes, or ``"ood"``
        :param transform: applied to each RGB image of Pillow
        :param seed: seed of the split
        :param test_fraction: share of each ID class that is for test
        :param validation_fraction: share of the others that is held out from training; with 0.0,
            training has the 2,400 images of the paper
        :param verify: whether the numbers of images must be the published ones
        :raises ValueError: if class folders are missing or unknown, numbers of images differ, a
            class has too few images, or an argument is wrong
        """
        normal = [name for name in self.COUNTS if name.startswith("normal-")]
        super().__init__(
            root, part, normal, transform, seed, test_fraction, validation_fraction, verify
        )


class GastroVision(EndoscopyFolder):
    """
    GastroVision: 8,000 images in 27 classes of very different size, of which 11 are ID.

    The licence is the one that others relay; the page of the data was not seen. Class folders are
    found whether or not they differ from the published names in capitals, spaces and punctuation,
    as in copies on other sites.
    """

    #: Licence, paper and usual roles.
    info: ClassVar[DatasetInfo] = DatasetInfo(
        task=Task.CLASSIFICATION,
        license="CC-BY-4.0",
        roles={Role.IN_DISTRIBUTION, Role.OOD_TEST},
        paper=Paper(
            title=(
                "GastroVision: A Multi-class Endoscopy Image Dataset for Computer Aided "
                "Gastrointestinal Disease Detection"
            ),
            venue="ML4MHD (ICML workshop)",
            year=2023,
            url="https://arxiv.org/abs/2307.08140",
            code="https://github.com/DebeshJha/GastroVision",
        ),
        homepage="https://osf.io/84e7f/",
        ai_coded=True,
    )

    COUNTS: ClassVar[Mapping[str, int]] = {
        "Accessory tools": 1266,
        "Angiectasia": 17,
        "Barrett's esophagus": 95,
        "Blood in lumen": 171,
        "Cecum": 113,
        "Colon diverticula": 29,
        "Colon polyps": 820,
        "Colorectal cancer": 139,
        "Duodenal bulb": 205,
        "Dyed-lifted-polyps": 141,
        "Dyed-resection-margins": 246,
        "Erythema": 15,
        "Esophageal varices": 7,
        "Esophagitis": 107,
        "Gastric polyps": 65,
        "Gastroesophageal_junction_normal z-line": 330,
        "Ileocecal valve": 200,
        "Mucosal inflammation large bowel": 29,
        "Normal esophagus": 140,
        "Normal mucosa and vascular pattern in the large bowel": 1467,
        "Normal stomach": 969,
        "Pylorus": 393,
        "Resected polyps": 92,
        "Resection margins": 25,
        "Retroflex rectum": 67,
        "Small bowel_terminal ileum": 846,
        "Ulcer": 6,
    }
    FOLDER: ClassVar[str] = "Gastrovision"
    #: the ID classes that are normal or anatomical
    NORMAL: ClassVar[Sequence[str]] = (
        "Cecum",
        "Duodenal bulb",
        "Gastroesophageal_junction_normal z-line",
        "Ileocecal valve",
        "Normal esophagus",
        "Normal mucosa and vascular pattern in the large bowel",
        "Normal stomach",
        "Pylorus",
        "Retroflex rectum",
        "Small bowel_terminal ileum",
    )

    def __init__(
        self,
        root: _Path,
        part: str = "train",
        transform: Callable[..., Any] | None = None,
        *,
        eleventh: str = ELEVENTH[0],
        seed: int = 0,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        verify: bool = True,
    ):
        """
        :param root: the folder ``Gastrovision``, or one that holds it
        :param part: ``"train"``, ``"validation"`` or ``"test"`` of the ID classes, or ``"ood"``
        :param transform: applied to each RGB image of Pillow
        :param eleventh: the ID class besides the normal ones, ``"Colon diverticula"`` or
            ``"Mucosal inflammation large bowel"``; which one the paper has is not known
        :param seed: seed of the split
        :param test_fraction: share of each ID class that is for test; the paper's is not known
        :param validation_fraction: share of the others that is held out from training
        :param verify: whether the numbers of images must be the published ones
        :raises ValueError: if class folders are missing or unknown, numbers of images differ, a
            class has too few images, or an argument is wrong
        """
        if eleventh not in ELEVENTH:
            raise ValueError(f"eleventh must be {' or '.join(map(repr, ELEVENTH))}: {eleventh!r}.")
        super().__init__(
            root,
            part,
            [*self.NORMAL, eleventh],
            transform,
            seed,
            test_fraction,
            validation_fraction,
            verify,
        )


def write_lists(path: _Path, datasets: Sequence[EndoscopyFolder]) -> None:
    """
    Writes which image belongs to which part, so that others can use the same split.

    :param path: csv file to write, with the columns ``file`` (path in the folder of the data set),
        ``part``, ``class`` and ``label``
    :param datasets: parts of one data set
    :raises ValueError: if an image is in two of them
    """
    rows = [row for dataset in datasets for row in dataset.rows()]
    twice = [file for file, n in Counter(file for file, *_ in rows).items() if n > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} images are in two parts, such as {twice[0]}: make all parts of one "
            "data set, with the same seed and fractions."
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "part", "class", "label"])
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _key(name: str) -> str:
    """What copies of a data set leave as it is in the name of a folder."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _count(fraction: float, n: int) -> int:
    # 0.29 * 100 is less than 29
    return 0 if fraction == 0 else max(1, math.floor(fraction * n + 1e-9))
