"""
Endoscopy: normal images against abnormal ones, as in the experiments of
:class:`NERO <pood_plugins.detector.NERO>`'s paper.

.. code-block:: console

    $ pood benchmark KvasirV2 --root DIR --arch resnet18 --weights FILE --classes 3 --size 224 \\
        --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
    $ pood benchmark GastroVision --root DIR --arch resnet18 --weights FILE --classes 11 ...

.. code-block:: python

    from pood_plugins.benchmark import KvasirV2Benchmark

    benchmark = KvasirV2Benchmark("data")  # images as the paper prepares them

Which classes are ID, and what of that is inferred, is said in
:mod:`pood_plugins.dataset.endoscopy`. All images of the OOD classes are one set, called
``abnormal``, as in the paper; with ``by_class=True``, each class is one. All count as near-OOD,
being images of the same organs by the same instruments.

There are no validation outliers and no training outliers: every OOD image is for test.
:meth:`~pood_plugins.benchmark.KvasirV2Benchmark.id_validation_set` is to choose a checkpoint by.

Without ``transform``, images are resized to 224 × 224 pixels whatever their shape, as in the
paper, and normalized as for ImageNet. ``pood benchmark`` cuts out the center of a slightly larger
image instead, as for ImageNet.

..  autoclass:: pood_plugins.benchmark.KvasirV2Benchmark
    :members:
    :inherited-members:
    :show-inheritance:

..  autoclass:: pood_plugins.benchmark.GastroVisionBenchmark
    :show-inheritance:
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar

from pytorch_ood.api import BenchmarkInfo, Task
from pytorch_ood.benchmark import Benchmark
from torch.utils.data import ConcatDataset, Dataset

from ..dataset.endoscopy import (
    ELEVENTH,
    PARTS,
    EndoscopyFolder,
    GastroVision,
    KvasirV2,
    write_lists,
)
from ..detector.nero import NERO
from ..model.preprocessing import Preprocessing
from .folder import ImageFiles

_Path = str | os.PathLike[str]

#: of the paper's test images
PREPROCESSING = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))


class _Endoscopy(Benchmark):
    """
    ID and OOD classes of a data set.
    """

    _dataset: ClassVar[Callable[..., EndoscopyFolder]]

    def __init__(
        self, root: _Path, transform: Callable[..., Any] | None, by_class: bool, **arguments: Any
    ) -> None:
        self._root = root
        self._transform = PREPROCESSING.transform if transform is None else transform
        self._arguments = arguments
        self._id_test = self._images(self._part("test"))
        ood = self._part("ood")
        self.classes = ood.classes  #: names of the ID classes, in the order of their labels
        if by_class:
            rows = list(zip(ood.names, ood.files))
            files = {name: [f for n, f in rows if n == name] for name in ood.ood_classes}
            # a folder may be empty if the numbers of images are not verified
            oods = {name: of_class for name, of_class in files.items() if of_class}
        else:
            oods = {"abnormal": ood.files}
        self.ood_names = list(oods)  #: names of the OOD sets
        self.near_ood_names = list(oods)  #: all of them
        self.far_ood_names: list[str] = []  #: none
        self._oods = [
            ImageFiles(files, [-1] * len(files), self._transform) for files in oods.values()
        ]

    def train_set(self) -> Dataset[Any]:
        """
        :return: ID training set, without the images that are held out for validation
        """
        return self._images(self._part("train"))

    def id_validation_set(self) -> Dataset[Any]:
        """
        :return: ID images that are held out from training
        :raises ValueError: if ``validation_fraction`` is 0
        """
        return self._images(self._part("validation"))

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

    def write_lists(self, path: _Path) -> None:
        """
        Writes which image belongs to which part, see
        :func:`~pood_plugins.dataset.endoscopy.write_lists`.

        :param path: csv file to write
        """
        held_out = self._arguments["validation_fraction"] > 0
        parts = [part for part in PARTS if held_out or part != "validation"]
        write_lists(path, [self._part(part) for part in parts])

    def _part(self, part: str) -> EndoscopyFolder:
        return self._dataset(self._root, part, **self._arguments)

    def _images(self, dataset: EndoscopyFolder) -> ImageFiles:
        # a type that the runner's cache knows
        return ImageFiles(dataset.files, dataset.labels, self._transform)


class KvasirV2Benchmark(_Endoscopy):
    """
    Cecum, pylorus and z-line of Kvasir-v2 against its five other classes.
    """

    #: Paper whose experiments these are, and tasks.
    info: ClassVar[BenchmarkInfo] = BenchmarkInfo(
        paper=NERO.info.paper, tasks={Task.CLASSIFICATION}, ai_coded=True
    )
    #: number of classes, which is how many columns the classifier must have
    num_classes: ClassVar[int] = 3
    _dataset = KvasirV2

    def __init__(
        self,
        root: _Path,
        transform: Callable[..., Any] | None = None,
        *,
        seed: int = 0,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        by_class: bool = False,
        verify: bool = True,
    ):
        """
        :param root: the folder ``kvasir-dataset-v2``, or one that holds it
        :param transform: makes a tensor of an RGB image of Pillow; default is the paper's
        :param seed: seed of the split
        :param test_fraction: share of each ID class that is for test
        :param validation_fraction: share of the others that is held out from training
        :param by_class: make each OOD class a set
        :param verify: whether the numbers of images must be the published ones
        :raises ValueError: if the folder is not that of the data set, or an argument is wrong
        """
        super().__init__(
            root,
            transform,
            by_class,
            seed=seed,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            verify=verify,
        )


class GastroVisionBenchmark(_Endoscopy):
    """
    Eleven classes of GastroVision, ten of them normal or anatomical, against its 16 others.
    """

    #: Paper whose experiments these are, and tasks.
    info: ClassVar[BenchmarkInfo] = BenchmarkInfo(
        paper=NERO.info.paper, tasks={Task.CLASSIFICATION}, ai_coded=True
    )
    #: number of classes, which is how many columns the classifier must have
    num_classes: ClassVar[int] = 11
    _dataset = GastroVision

    def __init__(
        self,
        root: _Path,
        transform: Callable[..., Any] | None = None,
        *,
        eleventh: str = ELEVENTH[0],
        seed: int = 0,
        test_fraction: float = 0.2,
        validation_fraction: float = 0.1,
        by_class: bool = False,
        verify: bool = True,
    ):
        """
        :param root: the folder ``Gastrovision``, or one that holds it
        :param transform: makes a tensor of an RGB image of Pillow; default is the paper's
        :param eleventh: the eleventh ID class, see :class:`~pood_plugins.dataset.GastroVision`
        :param seed: seed of the split
        :param test_fraction: share of each ID class that is for test
        :param validation_fraction: share of the others that is held out from training
        :param by_class: make each OOD class a set
        :param verify: whether the numbers of images must be the published ones
        :raises ValueError: if the folder is not that of the data set, or an argument is wrong
        """
        super().__init__(
            root,
            transform,
            by_class,
            eleventh=eleventh,
            seed=seed,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            verify=verify,
        )
