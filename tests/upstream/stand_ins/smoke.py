"""
Builds every detector that is registered, pytorch-ood's own too, and tries those to be tested.
"""

import inspect
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_ood.api import Detector, LossInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pood_plugins import registry
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
    """For each loss to be tested, what makes it and its arguments for targets of some shape."""
    losses = [cls for cls in CLASSES if isinstance(getattr(cls, "info", None), LossInfo)]
    return {cls: partial(_loss_and_inputs, cls, n_classes) for cls in losses}


def _loss_and_inputs(
    cls: type[nn.Module], n_classes: int, shape: tuple[int, ...]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Arguments are told by their names."""
    sizes = {"n_classes": n_classes, "num_classes": n_classes, "n_dim": 5, "n_embedding": 5}
    # one in so many is an outlier
    targets = torch.arange(torch.Size(shape).numel()).reshape(shape) % (n_classes + 1) - 1
    targets = targets if cls.info.supervised else targets.clamp(min=0)
    logits = torch.randn(shape[0], n_classes, *shape[1:])
    features = torch.randn(shape[0], 5, *shape[1:])
    choices = {"model": nn.Linear(5, n_classes), "logits": logits, "x": features}
    choices.update(dict.fromkeys(("features", "z"), features))
    choices.update(dict.fromkeys(("distances", "distmat"), logits.abs()))
    choices.update(dict.fromkeys(("target", "targets", "y", "labels"), targets))
    loss = cls(**{name: sizes[name] for name in _required(cls, sizes)})
    return loss, tuple(choices[name] for name in _required(cls.forward, choices))


def _required(function: Callable[..., Any], known: dict[str, Any]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    parameters = [p for p in parameters if p.name != "self" and p.kind not in variadic]
    required = [p.name for p in parameters if p.default is p.empty]
    for name in required:
        if name not in known:
            raise LookupError(f"{function.__qualname__} needs {name}, choose from {list(known)}")
    return required


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
