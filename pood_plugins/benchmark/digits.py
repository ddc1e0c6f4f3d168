"""
A benchmark of real images that needs neither a download nor a GPU, and takes seconds. It is small
on purpose: good to try a method, to test a change and to teach; not to rank methods for a paper.

=================  =========================================================  =============
Part               Images, all 8 × 8 grey                                     Number
=================  =========================================================  =============
ID                 handwritten digits 0 to 5: training, validation, test      540, 215, 328
near-OOD           handwritten digits 6 to 9                                  714
far-OOD            patches of a photograph (a flower); uniform noise          1000; 1000
training outliers  patches of the left half of another photograph (a temple)  1000
validation OOD     patches of the right half of that photograph               1000
=================  =========================================================  =============

The training outliers share no pixel with the validation outliers and no photograph with the test
sets.

..  autoclass:: pood_plugins.benchmark.Digits
    :members:
    :show-inheritance:

..  autofunction:: pood_plugins.benchmark.digits.digits_classifier

..  autofunction:: pood_plugins.benchmark.digits.train_classifier

..  autofunction:: pood_plugins.benchmark.digits.finetune_classifier

Data
----

..  automodule:: pood_plugins.dataset.digits

..  autoclass:: pood_plugins.dataset.HandwrittenDigits

..  autoclass:: pood_plugins.dataset.GreyPatches

..  autoclass:: pood_plugins.dataset.UniformNoise
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from pytorch_ood.api import BenchmarkInfo, Task
from pytorch_ood.benchmark import Benchmark
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..dataset.digits import GreyPatches, HandwrittenDigits, UniformNoise
from ..model.split import SplitModel
from ..training.variants import finetune_variant

_ID_CLASSES = range(6)

#: Learning rate and arguments of the loss for each way to fine-tune, chosen on the validation data
#: of other networks than the tables show, by ``benchmarks/greg_digits.py``.
FINETUNING: dict[str, dict[str, float]] = {
    "ce": {"learning_rate": 0.001},
    "oe": {"learning_rate": 0.01},
    "energy": {"learning_rate": 0.01, "margin_in": -10.0, "margin_out": -2.0},
    "greg": {"learning_rate": 0.01, "margin_in": -10.0, "margin_out": -2.0, "beta": 1.0},
    "greg+": {"learning_rate": 0.01, "margin_in": -10.0, "margin_out": -2.0, "beta": 1.0},
}


class Digits(Benchmark):
    """
    Handwritten digits 0 to 5 against other digits (near-OOD), patches of a photograph and noise
    (far-OOD).

    .. code-block:: python

        benchmark = Digits()
        model = train_classifier(benchmark, seed=0)
        detector = EnergyBased(model)
        results = benchmark.evaluate(detector, loader_kwargs={"batch_size": 256})
    """

    #: Source of the ID data, and tasks.
    info: ClassVar[BenchmarkInfo] = BenchmarkInfo(
        paper=HandwrittenDigits.info.paper, tasks={Task.CLASSIFICATION}, ai_coded=True
    )

    near_ood_names: ClassVar[list[str]] = ["digits 6-9"]  #: OOD sets that resemble ID data
    far_ood_names: ClassVar[list[str]] = ["flower", "noise"]  #: OOD sets of another kind

    def __init__(self, transform: Callable[[Tensor], Tensor] | None = None):
        """
        :param transform: applied to every image, a tensor of shape 1 × 8 × 8 in :math:`[0, 1]`
        """
        self.ood_names = [*self.near_ood_names, *self.far_ood_names]
        self._transform = transform
        self._id_test = self._digits("test")
        self._oods = [
            HandwrittenDigits(classes=range(6, 10), outliers=True, transform=transform),
            GreyPatches("flower.jpg", transform=transform),
            UniformNoise(transform=transform),
        ]

    def train_set(self) -> Dataset[Any]:
        """
        :return: ID training set, 540 digits with labels 0 to 5
        """
        return self._digits("train")

    def validation_set(self) -> Dataset[Any]:
        """
        :return: ID validation set and validation OOD (label -1). The only data to choose
            hyper-parameters by.
        """
        ood = GreyPatches("china.jpg", half="right", transform=self._transform)
        return ConcatDataset([self._digits("validation"), ood])

    def outlier_set(self) -> Dataset[Any]:
        """
        :return: training outliers, labeled -1: for methods that use example outliers
        """
        return GreyPatches("china.jpg", half="left", transform=self._transform)

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

    def _digits(self, part: str) -> HandwrittenDigits:
        return HandwrittenDigits(part, _ID_CLASSES, transform=self._transform)


def digits_classifier(width: int = 32, num_classes: int = 6) -> nn.Sequential:
    """
    A small convolutional network with BatchNorm: three stages, global average pooling, one linear
    layer.

    :param width: number of channels, and of penultimate features
    :param num_classes: number of logits
    :return: network for inputs of shape :math:`B \\times 1 \\times 8 \\times 8`
    """

    def stage(inputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    return nn.Sequential(
        OrderedDict(
            stage1=stage(1),
            stage2=stage(width),
            stage3=stage(width),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(width, num_classes),
        )
    )


def train_classifier(
    benchmark: Digits, seed: int = 0, epochs: int = 20, device: str | torch.device = "cpu"
) -> nn.Sequential:
    """
    Trains :func:`digits_classifier` with Adam and keeps the epoch with the best accuracy on the ID
    validation data (the earliest of equals). No outlier is used, neither for training nor for the
    choice.

    :param benchmark: where training and validation data come from
    :param seed: seed of initialization and batches; the caller's random state is left alone
    :param epochs: number of passes over the training set
    :param device: where to train
    :return: the classifier, in eval mode
    """
    x, y = _stack(benchmark.train_set(), device)
    x_validation, y_validation = _stack(benchmark.validation_set(), device)
    known = y_validation >= 0
    x_validation, y_validation = x_validation[known], y_validation[known]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_classifier().to(device)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        best, best_accuracy = deepcopy(model.state_dict()), -1.0
        for _ in range(epochs):
            model.train()
            for batch in torch.randperm(len(x), generator=order).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            scheduler.step()
            model.eval()
            with torch.no_grad():
                correct = model(x_validation).argmax(dim=1) == y_validation
            accuracy = float(correct.float().mean())
            if accuracy > best_accuracy:
                best, best_accuracy = deepcopy(model.state_dict()), accuracy
    model.load_state_dict(best)
    return model.eval()


def finetune_classifier(
    benchmark: Digits,
    split: SplitModel,
    train: str = "greg",
    seed: int = 0,
    epochs: int = 5,
    *,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    **settings: float,
) -> list[dict[str, float]]:
    """
    Fine-tunes a classifier in place, with the training outliers of the benchmark: SGD with
    Nesterov momentum, and batches of 64 digits and 64 outliers, or 128 for GReg+.

    :param benchmark: where training data and outliers come from
    :param split: the classifier
    :param train: way to fine-tune: ``ce``, ``oe``, ``energy``, ``greg`` or ``greg+``
    :param seed: seed of the batches and of GReg+'s choice of outliers
    :param epochs: number of passes over the training set
    :param device: as for :func:`pood_plugins.training.finetune`, like the next three
    :param checkpoint: file for the state of the training
    :param resume: whether to go on from the checkpoint
    :param progress: whether to show progress
    :param settings: ``learning_rate`` and arguments of the loss. Defaults are what the validation
        data chose.
    :return: history of the training
    :raises LookupError: if there is no such way to fine-tune, or its loss has no such argument
    """
    settings = {"learning_rate": 1e-3, **FINETUNING.get(train, {}), **settings}
    order = torch.Generator().manual_seed(seed)
    id_loader, outlier_loader = (
        DataLoader(dataset, batch_size=64, shuffle=True, generator=order)
        for dataset in (benchmark.train_set(), benchmark.outlier_set())
    )
    return finetune_variant(
        split,
        id_loader,
        outlier_loader,
        train,
        learning_rate=settings.pop("learning_rate"),
        hyperparameters=settings,
        seed=seed,
        epochs=epochs,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def _stack(dataset: Dataset[Any], device: str | torch.device) -> tuple[Tensor, Tensor]:
    # with a generator of its own, since iterating draws a number from one
    loader = DataLoader(dataset, batch_size=256, generator=torch.Generator())
    x, y = (torch.cat(batches).to(device) for batches in zip(*loader))
    return x, y
