"""
Ways to fine-tune, by the names that the command and the tables use:

==========  =====================================================================================
``ce``      cross-entropy of ID samples alone: what more training does without outliers
``oe``      outlier exposure, :class:`pytorch_ood.loss.OutlierExposureLoss`
``energy``  energy-regularized training, :class:`pytorch_ood.loss.EnergyRegularizedLoss`
``greg``    GReg, :class:`pood_plugins.loss.GRegLoss`
``greg+``   GReg+, the same with outliers from :class:`pood_plugins.training.EnergyClusterSampler`
==========  =====================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..model.split import SplitModel
from .finetune import finetune
from .outliers import EnergyClusterSampler

#: names in tables
DISPLAY_NAMES = {"ce": "CE", "oe": "OE", "energy": "Energy", "greg": "GReg", "greg+": "GReg+"}


def make_criterion(train: str, **hyperparameters: float) -> nn.Module:
    """
    :param train: name of the way to fine-tune
    :param hyperparameters: arguments of its loss; those that are left out have the loss's defaults
    :return: the loss
    :raises LookupError: if there is no such way to fine-tune, or no such argument
    """
    from pytorch_ood.loss import EnergyRegularizedLoss, OutlierExposureLoss

    from ..loss import GRegLoss

    margins = ("alpha", "margin_in", "margin_out")
    losses: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
        "ce": (nn.CrossEntropyLoss, ()),
        "oe": (OutlierExposureLoss, ("alpha",)),
        "energy": (EnergyRegularizedLoss, margins),
        "greg": (GRegLoss, (*margins, "beta")),
        "greg+": (GRegLoss, (*margins, "beta")),
    }
    if train not in losses:
        raise LookupError(f"no way to fine-tune is called {train!r}: choose {', '.join(losses)}")
    loss, allowed = losses[train]
    for name in hyperparameters:
        if name not in allowed:
            choices = ", ".join(allowed) or "none"
            raise LookupError(f"{train} has no hyperparameter {name}: it has {choices}")
    return loss(**hyperparameters)


def finetune_variant(
    split: SplitModel,
    id_loader: DataLoader[Any],
    outlier_loader: DataLoader[Any],
    train: str,
    *,
    learning_rate: float,
    hyperparameters: dict[str, float],
    seed: int = 0,
    **arguments: Any,
) -> list[dict[str, float]]:
    """
    Fine-tunes a classifier in one of these ways, by SGD with Nesterov momentum 0.9 and weight
    decay
    :math:`10^{-4}`.

    :param split: the classifier, changed in place
    :param id_loader: ID training data
    :param outlier_loader: training outliers; ``ce`` uses none
    :param train: name of the way to fine-tune
    :param learning_rate: learning rate at the start
    :param hyperparameters: arguments of the loss
    :param seed: seed of GReg+'s choice of outliers
    :param arguments: further arguments of :func:`pood_plugins.training.finetune`
    :return: history of the training
    :raises LookupError: as :func:`make_criterion`
    """
    return finetune(
        split,
        id_loader,
        None if train == "ce" else outlier_loader,
        make_criterion(train, **hyperparameters),
        optimizer=torch.optim.SGD(
            split.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True
        ),
        sampler=EnergyClusterSampler(seed=seed) if train == "greg+" else None,
        **arguments,
    )
