"""
Rows of a table: detectors by the names that people give on the command line.

A row is any detector of the :mod:`registry <pood_plugins.registry>`, or GROOD with another source
of its OOD prototype:

===========================  ======================================================================
``GROOD``                    mix-up at the penultimate layer
``GROOD (mean)``             mean of the class prototypes
``GROOD (noise)``            :func:`~pood_plugins.detector.noise_prototype`, of images normalized
                             as the classifier's are
``GROOD (early mix-up)``     :func:`~pood_plugins.detector.mixup_prototype` at the split's early
                             layer; two passes over the training images
``GROOD (mix-up LAYER)``     the same after the module called so, e.g. ``layer1``
``GROOD (outliers)``         mean of the benchmark's training outliers, if it has any
``GROOD (auto)``             the setting that validation data chose on CIFAR-10:
                             ``temperature="auto", k=10, mixup=0.0, n_synthetic=1.0``
===========================  ======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_ood.api import Detector, FeaturesDetector, GradientDetector, LogitsDetector
from pytorch_ood.benchmark import Benchmark
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import registry
from ..dataset.packs import ImagePack, PackLoader
from ..detector import mixup_prototype, noise_prototype
from ..model.split import SplitModel, split_model

#: images of each test set that slow detectors score if not told otherwise
SLOW = {"GradNorm": 1000, "GradUncertainty": 1000, "MCD": 1000}


def uses_features(detector_class: type[Detector]) -> bool:
    """
    :return: whether the detector works on logits or pooled features, which all rows share, and
        needs no forward pass of its own
    """
    return issubclass(detector_class, (LogitsDetector, FeaturesDetector)) and not issubclass(
        detector_class, GradientDetector
    )


class RowBuilder:
    """
    Builds the detectors of a table for one classifier.
    """

    def __init__(
        self,
        split: SplitModel,
        benchmark: Benchmark,
        *,
        shape: tuple[int, int, int] | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 256,
    ):
        """
        :param split: the classifier
        :param benchmark: where training images and outliers come from
        :param shape: shape of an image, for noise
        :param normalize: normalization of images in :math:`[0, 1]`, for noise
        :param batch_size: for passes over images
        """
        self.split = split
        self.benchmark = benchmark
        self.shape = shape
        self.normalize = normalize
        self.batch_size = batch_size

    def build(self, name: str) -> tuple[str, Detector]:
        """
        :param name: row
        :return: the row's name as tables show it, which is ``distribution:Name`` if several
            distributions have a detector of that name, and its detector
        :raises LookupError: if there is no such detector
        :raises ImportError: if the class can't be imported
        :raises ValueError: if it can't be built from this classifier and benchmark
        """
        variant = re.fullmatch(r"grood\s*\((.*)\)", name.strip(), re.IGNORECASE)
        if variant:
            source = variant[1].strip()
            settings = self._settings(source if source.startswith("mix-up ") else source.lower())
            # by this name, as the bare one may come to stand for pytorch-ood's, too
            detector = registry.build("pood-plugins:GROOD", self.split, **settings)
            return f"GROOD ({source})", detector
        info = registry.get_info(name)
        unique = info.name in registry.list_detectors()
        row = registry.display_name(info.name) if unique else info.qualified_name
        return row, registry.build(info.qualified_name, self.split)

    def build_all(self, images: bool) -> tuple[dict[str, Detector], dict[str, str]]:
        """
        :param images: whether to include detectors that need images, of which some take 20
            forward passes and more
        :return: detectors by row, and why the others can't be built
        """
        rows: dict[str, Detector] = {}
        refused = {}
        names = registry.list_detectors()
        variants = ["GROOD (auto)", "GROOD (mean)", "GROOD (noise)"]
        variants += ["GROOD (outliers)"] if hasattr(self.benchmark, "outlier_set") else []
        variants += ["GROOD (early mix-up)"] if images else []
        for name in [*names, *variants]:
            try:
                if name in names and not images and not uses_features(registry.load(name)):
                    continue
                row, detector = self.build(name)
            except (ImportError, ValueError) as error:
                refused[name] = str(error)
                continue
            rows[row] = detector
        return rows, refused

    def _settings(self, source: str) -> dict[str, Any]:
        split = self.split
        if source == "mean":
            return {"ood_prototype": "mean"}
        if source == "auto":
            return {"temperature": "auto", "k": 10, "mixup": 0.0, "n_synthetic": 1.0}
        if source == "noise":
            if self.shape is None:
                raise ValueError("noise needs the shape of an image")
            prototype = noise_prototype(
                split.encoder, split.head, self.shape, normalize=self.normalize
            )
            return {"ood_prototype": prototype}
        if source == "outliers":
            if not hasattr(self.benchmark, "outlier_set"):
                raise ValueError(f"{type(self.benchmark).__name__} has no training outliers")
            with torch.no_grad():
                z = [split.encoder(x) for x, _ in self._batches(self.benchmark.outlier_set())]
            return {"ood_prototype": torch.cat(z).mean(dim=0)}
        if source == "early mix-up" or source.startswith("mix-up "):
            if source.startswith("mix-up "):
                split = split_model(split.model, early=source.removeprefix("mix-up ").strip())
            if split.early is None or split.late is None:
                raise ValueError("the classifier can't be cut at an early layer")
            loader = self._batches(self.benchmark.train_set())
            prototype = mixup_prototype(split.early, split.late, split.head, loader)
            return {"ood_prototype": prototype}
        raise LookupError(
            f"GROOD has no OOD prototype {source!r}: choose mean, auto, noise, outliers, "
            "early mix-up or mix-up LAYER"
        )

    def _batches(self, dataset: Dataset[Any]) -> Any:
        device = self.split.head.weight.device
        if isinstance(dataset, ImagePack):
            return PackLoader(dataset, self.batch_size, device=device)
        return _OnDevice(DataLoader(dataset, batch_size=self.batch_size), device)


class _OnDevice:
    def __init__(self, loader: Iterable[Sequence[Tensor]], device: torch.device):
        self.loader = loader
        self.device = device

    def __iter__(self) -> Any:
        for x, y in self.loader:
            yield x.to(self.device), y
