"""
Fine-tuning a ResNet-20 for CIFAR-10 with CIFAR-100 outliers: what ``pood finetune --benchmark
cifar10 --data DIR`` runs. Nothing is downloaded. The folder holds

==================================================================  =============================
``resnet20_cifar10.pt``                                             weights to begin with
``cifar10_train_1of2.webp.zip``, ``cifar10_train_2of2.webp.zip``    ID training images
``cifar10_test.webp.zip``                                           ID test images
``cifar100_outliers.webp.zip``                                      training outliers
==================================================================  =============================

in the layout of :mod:`pood_plugins.dataset.packs`. Images are cropped and flipped at random.

..  autofunction:: pood_plugins.training.cifar10.load_cifar10

..  autofunction:: pood_plugins.training.cifar10.finetune_cifar10
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.transforms import Compose, Normalize

from ..dataset.packs import ImagePack, PackLoader, RandomCropFlip
from ..model.resnet_cifar import resnet20
from ..model.split import SplitModel, split_model
from .variants import finetune_variant

_NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

#: Learning rate and arguments of the loss for each way to fine-tune, chosen on validation data by
#: ``benchmarks/greg_cifar10.py``, for 32 ID images and as many outliers in a step.
FINETUNING: dict[str, dict[str, float]] = {
    "ce": {"learning_rate": 0.003},
    "oe": {"learning_rate": 0.001},
    "energy": {"learning_rate": 0.001, "margin_in": -28.1, "margin_out": -6.0, "alpha": 0.1},
    "greg": {"learning_rate": 0.001, "margin_in": -28.1, "margin_out": -6.0, "beta": 10.0},
    "greg+": {"learning_rate": 0.001, "margin_in": -28.1, "margin_out": -6.0, "beta": 10.0},
}


class CIFAR10(NamedTuple):
    """A classifier and its data."""

    split: SplitModel  #: the classifier
    train: ImagePack  #: ID training images
    test: ImagePack  #: ID test images
    outliers: ImagePack  #: training outliers, labeled -1


def load_cifar10(folder: str | os.PathLike[str]) -> CIFAR10:
    """
    :param folder: where weights and images lie
    :return: classifier and data
    :raises OSError: if a file is missing
    :raises ValueError: if a file is damaged, or the weights are those of another network
    """
    folder = Path(folder)

    def read(*names: str) -> ImagePack:
        return ImagePack.read(*(folder / name for name in names), transform=_NORMALIZE)

    model = resnet20()
    weights = folder / "resnet20_cifar10.pt"
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(
            f"{weights} is damaged or holds no weights of a ResNet-20: copy it again"
        ) from error
    return CIFAR10(
        split_model(model.eval()),
        train=read("cifar10_train_1of2.webp.zip", "cifar10_train_2of2.webp.zip"),
        test=read("cifar10_test.webp.zip"),
        outliers=read("cifar100_outliers.webp.zip").relabel(-1),
    )


def finetune_cifar10(
    data: CIFAR10,
    train: str = "greg",
    seed: int = 0,
    epochs: int = 1,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    **arguments: Any,
) -> list[dict[str, float]]:
    """
    :param data: the classifier, changed in place, and its data
    :param train: way to fine-tune: ``ce``, ``oe``, ``energy``, ``greg`` or ``greg+``
    :param seed: seed of batches, crops and flips, and of GReg+'s choice of outliers
    :param epochs: number of passes over the 50,000 training images; one takes some minutes on CPU
    :param batch_size: number of ID images in a step; as many outliers, or twice as many for GReg+
    :param device: where to train
    :param arguments: ``learning_rate`` and arguments of the loss, with defaults from validation
        data; ``checkpoint``, ``resume`` and ``progress`` as for
        :func:`pood_plugins.training.finetune`
    :return: history of the training
    :raises LookupError: if there is no such way to fine-tune, or its loss has no such argument
    """
    run = {k: arguments.pop(k) for k in ("checkpoint", "resume", "progress") if k in arguments}
    settings = {"learning_rate": 1e-3, **FINETUNING.get(train, {}), **arguments}

    def loader(pack: ImagePack) -> Any:
        generator = torch.Generator().manual_seed(seed)
        augment = Compose([RandomCropFlip(generator), _NORMALIZE])
        return PackLoader(
            pack, batch_size, shuffle=True, generator=generator, transform=augment, device=device
        )

    return finetune_variant(
        data.split,
        loader(data.train),
        loader(data.outliers),
        train,
        learning_rate=settings.pop("learning_rate"),
        hyperparameters=settings,
        seed=seed,
        epochs=epochs,
        device=device,
        **run,
    )
