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

from torch import nn

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
