"""
Builds every detector that is registered, pytorch-ood's own too, and tries those to be tested.
"""

import unittest
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_ood.api import Detector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pood_plugins import registry
from pood_plugins.loss import GRegLoss
from pood_plugins.model import SplitModel, split_model

from ..helpers import ClassificationModel

N_CLASSES = 3
Builder = tuple[str, Callable[[], Detector]]

#: classes to be tested, of a plugin or a patch: see run.py
CLASSES: set[type] = set()
# name -> arguments that are no part of a classifier
ARGUMENTS: dict[str, dict[str, Any]] = {
    "MCM": {"text_embeddings": torch.eye(N_CLASSES, 8)},
    "WeightedEBO": {"weights": torch.ones(N_CLASSES)},
}


def loss_inputs(n_classes: int) -> dict[type, Callable[[Any], tuple[nn.Module, tuple]]]:
    """For each loss of a plugin, what makes it and its arguments for targets of some shape."""

    def greg(shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
        targets = torch.arange(shape[0]) % (n_classes + 1) - 1  # one in four is an outlier
        return GRegLoss(), (nn.Linear(5, n_classes), torch.randn(shape[0], 5), targets)

    return {GRegLoss: greg}


class TestAllDetectorsSmoke(unittest.TestCase):
    def _classification_detector_registry(self) -> list[Builder]:
        split = split_model(ClassificationModel(), example=torch.zeros(2, 10))
        return self._builders(split, tested=True)

    def _image_detector_registry(self) -> list[Builder]:
        network = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, N_CLASSES),
        )
        return self._builders(split_model(network, example=torch.zeros(2, 3, 8, 8)), tested=False)

    def _builders(self, split: SplitModel, tested: bool) -> list[Builder]:
        return [
            (name, partial(registry.build, name, split, **ARGUMENTS.get(name, {})))
            for name, info in registry.list_plugins("detector").items()
            if (info.load() in CLASSES) == tested
        ]

    def test_all_classification_detectors_smoke(self) -> None:
        torch.manual_seed(0)
        x: Tensor = torch.randn(24, 10)
        loader = DataLoader(TensorDataset(x, torch.arange(24) % N_CLASSES), batch_size=6)
        for name, build in self._classification_detector_registry():
            with self.subTest(name):
                detector = build()
                if detector.requires_fit:
                    self.assertIs(detector.fit(loader), detector)
                scores = detector(torch.randn(8, 10))
                self.assertEqual(scores.shape, (8,))
                self.assertTrue(scores.isfinite().all())
