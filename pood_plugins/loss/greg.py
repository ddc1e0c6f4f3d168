r"""
GReg adds the gradient of the energy score with respect to the input to energy-regularized
training: where the score barely changes around a sample, small changes of the input cannot carry
the sample across the decision threshold. Training needs auxiliary outliers; at test time nothing
changes: score with :class:`pytorch_ood.detector.EnergyBased`.

It is the method of *Gradient-Regularized Out-of-Distribution Detection* by Sharifi, Entesari,
Safaei, Patel and Fazlyab (`ECCV 2024 <https://arxiv.org/abs/2404.12368>`__), with
`released code <https://github.com/o4lc/Greg-OOD>`__.

Why a small gradient helps
--------------------------

Let :math:`S(x) = -\log \sum_c e^{f_c(x)}` be the energy of an input :math:`x` with logits
:math:`f(x)`, low for ID data, and :math:`\gamma` the threshold. To first order,

.. math::
    |S(x + \delta) - S(x)| \leq \lVert \nabla_x S(x) \rVert_2 \, \lVert \delta \rVert_2,

so :math:`x` keeps its side while
:math:`\lVert \delta \rVert_2 < |\gamma - S(x)| \, / \, \lVert \nabla_x S(x) \rVert_2`. The energy
term of the loss (:math:`\mathcal{L}_S`, see :class:`.GRegLoss`) enlarges the numerator, the
gradient term (:math:`\mathcal{L}_{\nabla S}`) shrinks the denominator. Farther away, what bounds
the change of :math:`S` is the largest gradient on the way, which nothing here looks at.

Which samples are smoothed
--------------------------

Only those on the right side of their margin: ID samples with :math:`S(x) \leq m_{in}` and
outliers with :math:`S(x) \geq m_{out}`. The energy term pulls on the others. Turning the
comparison for the outliers around raises no error, but smooths the very outliers that the energy
term still has to move.

Two scales
----------

A batch has :math:`n_{in}` ID samples and :math:`n_{out}` outliers, :math:`B` in all. One backward
pass gives the gradients of all of them, by differentiating hinges whose slope is the indicator of
the right side:

.. math::
    J = -\frac{1}{n_{in}} \sum_{in} \max(0, m_{in} - S(x_i))
    + \frac{1}{n_{out}} \sum_{out} \max(0, S(x_i) - m_{out})

.. math::
    \frac{\partial J}{\partial x_i} =
    \begin{cases}
    \frac{1}{n_{in}} \, \mathbb{I}[S(x_i) \leq m_{in}] \, \nabla_x S(x_i) & \text{ID} \\
    \frac{1}{n_{out}} \, \mathbb{I}[S(x_i) \geq m_{out}] \, \nabla_x S(x_i) & \text{outlier}
    \end{cases}

The *sum* of their norms is the mean over the ID samples plus the mean over the outliers, the
equation of the paper: ``scale="paper"``. The released code takes their *mean*, which is smaller by
:math:`B`; as this is what the authors trained, ``scale="released"`` is the default. Equal losses
need

.. math::
    \beta_{paper} = \beta_{released} / B

so that the authors' :math:`\beta = 1`, with 64 ID samples and 64 outliers, is 1/128 in terms of
the equation, and the strength of ``released`` depends on the batch size.

Paper and released code
-----------------------

==================  =========================  =========================  =======================
Step                Paper                      Released code              Here
==================  =========================  =========================  =======================
gradient term       sum of two means           mean over the batch        both, by ``scale``
norm                of each sample, over all   as in the paper            as in the paper
                    pixels
forward passes      not stated                 two: normalization layers  one
                                               update twice
margins             not in the parts that we   -25 and -7                 as released
                    know
weights α, β        0.1 and 1                  0.1 and 1, in its          as released
                                               commands
adaptive weight     –                          an option                  left out
==================  =========================  =========================  =======================

**Batch normalization.** ID samples and outliers go through the network in one batch. In training
mode its statistics tie the samples together: the gradient with respect to one input contains its
effect on the scores of all others, and even a sample that is not smoothed itself has one. Then
``released`` is still what the authors trained, and ``paper`` still :math:`B` times that, but
gradients of single samples, as in the equation, exist only where samples do not interact
(evaluation mode, group or layer normalization).

Costs
-----

A step has a forward pass, a backward pass to the inputs that is itself recorded, and a backward
pass through both. So it takes a multiple of the time and memory of a step without gradient term;
both grow with batch and network as those do. Attention runs without its fused kernels, which have
no second derivative. At test time nothing is added.

When not to use it
------------------

- **No outliers, or none like those to come.** What is learned from one kind need not carry over
  to another.
- **Margins that do not fit the energies of the network.** Beyond them is where samples are
  smoothed: if none is there, the gradient term is 0, and the energy term may cost accuracy. Take
  them from the energies of some ID samples and outliers.
- **Inputs that have no gradient**, such as token ids.
- **Compiled networks.** torch can't differentiate them twice, so they are refused.

Reference
---------

..  autoclass:: pood_plugins.loss.GRegLoss
    :members:
    :inherited-members: Module
    :show-inheritance:

.. autofunction:: pood_plugins.loss.greg.gradient_norms

"""

import logging
import math
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from pytorch_ood.api import LossInfo, Paper, Representation, Task
from pytorch_ood.loss.crossentropy import cross_entropy
from pytorch_ood.utils import is_known
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)


def gradient_norms(
    score: Tensor,
    x: Tensor,
    targets: Tensor,
    margin_in: float = math.inf,
    margin_out: float = -math.inf,
    create_graph: bool = True,
) -> Tensor:
    """
    Norms :math:`\\lVert \\partial J / \\partial x_i \\rVert_2` of the input gradients of

    .. math::
        J = -\\frac{1}{n_{in}} \\sum_{y_i \\geq 0} \\max(0, m_{in} - S(x_i))
        + \\frac{1}{n_{out}} \\sum_{y_i < 0} \\max(0, S(x_i) - m_{out})

    Their sum is the gradient term of the paper, their mean that of the released code.

    :param score: scores :math:`S` of shape :math:`B`, low for ID samples, computed from ``x``
    :param x: inputs that require a gradient, of shape :math:`B \\times \\dots`
    :param targets: labels of shape :math:`B`; labels :math:`< 0` are outliers
    :param margin_in: margin :math:`m_{in}`; by default, no ID sample is left out
    :param margin_out: margin :math:`m_{out}`; by default, no outlier is left out
    :param create_graph: whether the norms can be differentiated
    :return: norms of shape :math:`B`
    :raises ValueError: if autograd finds no way from ``score`` to ``x``
    """
    known = is_known(targets)
    well_placed = torch.where(known, score <= margin_in, score >= margin_out)
    n_in = known.sum()
    n_same_side = torch.where(known, n_in, known.numel() - n_in)
    gradient = None
    if score.requires_grad:
        # dJ/dS: where a hinge of J is active, its slope is +1 on either side
        (gradient,) = torch.autograd.grad(
            score,
            x,
            well_placed.to(score.dtype) / n_same_side,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    if gradient is None:
        raise ValueError(
            "The outputs of the model have no gradient with respect to its inputs; remove no_grad "
            "and detach from its forward pass, and freeze layers with requires_grad_(False)"
        )
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1).to(score.dtype), dim=1)
    return norms


class GRegLoss(nn.Module):
    """
    Implements GReg from the paper *Gradient-Regularized Out-of-Distribution Detection*.

    The loss is

    .. math::
        \\mathcal{L}_{CE} + \\alpha \\mathcal{L}_{S} + \\beta \\mathcal{L}_{\\nabla S}

    with the cross-entropy of the ID samples and, for the energy
    :math:`S(x) = -\\log \\sum_c e^{f_c(x)}` as score,

    .. math::
        \\begin{aligned}
        \\mathcal{L}_{S} = \\; &
        \\mathbb{E}_{x \\sim \\mathcal{D}_{in}} \\left[ \\max(0, S(x) - m_{in})^2 \\right] \\\\
        + \\; &
        \\mathbb{E}_{x \\sim \\mathcal{D}_{out}} \\left[ \\max(0, m_{out} - S(x))^2 \\right] \\\\
        \\mathcal{L}_{\\nabla S} = \\; &
        \\mathbb{E}_{x \\sim \\mathcal{D}_{in}}
        \\left[ \\mathbb{I}[S(x) \\leq m_{in}] \\, \\lVert \\nabla_x S(x) \\rVert_2 \\right] \\\\
        + \\; &
        \\mathbb{E}_{x \\sim \\mathcal{D}_{out}}
        \\left[ \\mathbb{I}[S(x) \\geq m_{out}] \\, \\lVert \\nabla_x S(x) \\rVert_2 \\right]
        \\end{aligned}

    The expectations are means over the ID samples and over the outliers of the batch. This is
    ``scale="paper"``; ``scale="released"`` divides :math:`\\mathcal{L}_{\\nabla S}` by the batch
    size. With ``beta=0`` the loss is :class:`pytorch_ood.loss.EnergyRegularizedLoss`.

    With ``score="oe"``, :math:`S` is the cross-entropy between the uniform distribution and the
    prediction, :math:`\\mathcal{L}_{S}` its mean over the outliers (outlier exposure), and
    :math:`\\mathcal{L}_{\\nabla S}` has no indicators, as there are no margins. The paper reports
    results for such a combination, but its formula was not seen: this is a reading of it.

    .. note::
        The loss calls the model itself, once, in the mode that the model is in. ID samples and
        outliers share one batch. Compiled models are refused: they have no second derivative.

    .. note::
        With automatic mixed precision, call the loss inside ``autocast`` and ``backward()``
        outside. Its terms are computed from logits in float32.

    .. rubric:: Examples

    .. code-block:: python

        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from pood_plugins.loss import GRegLoss

        id_data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(0, 5, (64,)))
        outlier_data = TensorDataset(torch.rand(64, 3, 8, 8), torch.full((64,), -1))
        id_loader = DataLoader(id_data, batch_size=16, shuffle=True)
        outlier_loader = DataLoader(outlier_data, batch_size=16, shuffle=True)

        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
        )
        criterion = GRegLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

        model.train()
        for epoch in range(2):
            for (x, y), (outliers, labels) in zip(id_loader, outlier_loader):
                loss = criterion(model, torch.cat([x, outliers]), torch.cat([y, labels]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    """

    #: Paper, task and inputs of this loss.
    info = LossInfo(
        paper=Paper(
            title="Gradient-Regularized Out-of-Distribution Detection",
            venue="ECCV",
            year=2024,
            url="https://arxiv.org/abs/2404.12368",
            code="https://github.com/o4lc/Greg-OOD",
        ),
        tasks={Task.CLASSIFICATION},
        inputs={Representation.LOGITS, Representation.INPUTS},
        supervised=True,
        ai_coded=True,
    )

    # defaults: commands and margins of the released code
    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        margin_in: float = -25.0,
        margin_out: float = -7.0,
        scale: str = "released",
        score: str = "energy",
    ):
        """
        :param alpha: weight :math:`\\alpha` of the energy term
        :param beta: weight :math:`\\beta` of the gradient term
        :param margin_in: margin energy :math:`m_{in}` of ID samples; unused if ``score`` is ``oe``
        :param margin_out: margin energy :math:`m_{out}` of outliers; unused if ``score`` is ``oe``
        :param scale: ``released`` for the gradient term of the released code, ``paper`` for that
            of the paper, which is larger by the batch size
        :param score: ``energy``, or ``oe`` for outlier exposure
        :raises ValueError: if a weight is negative or not finite, a margin is not a number, or
            ``scale`` or ``score`` is unknown
        """
        super(GRegLoss, self).__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite weight of at least 0, got {weight}")
        if math.isnan(margin_in) or math.isnan(margin_out):
            raise ValueError(f"margins must be numbers, got {margin_in} and {margin_out}")
        if scale not in ("released", "paper"):
            raise ValueError(f"scale must be 'released' or 'paper', got {scale!r}")
        if score not in ("energy", "oe"):
            raise ValueError(f"score must be 'energy' or 'oe', got {score!r}")
        if margin_in > margin_out:
            log.warning(
                "margin_in (%s) is above margin_out (%s), although ID samples have the lower "
                "energy. Are they swapped?",
                margin_in,
                margin_out,
            )
        self.alpha = alpha
        self.beta = beta
        self.margin_in = margin_in
        self.margin_out = margin_out
        self.scale = scale
        self.score = score

    def forward(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """
        Calculates the weighted sum of the three terms.

        :param model: classifier that maps ``x`` to logits of shape :math:`B \\times C`
        :param x: inputs of shape :math:`B \\times \\dots`; they receive no gradient
        :param targets: labels of shape :math:`B`; labels :math:`< 0` are outliers
        :return: scalar loss
        :raises ValueError: see :meth:`terms`
        """
        return self.terms(model, x, targets)["loss"]

    def terms(self, model: nn.Module, x: Tensor, targets: Tensor) -> Dict[str, Tensor]:
        """
        Calculates the loss together with its parts, at no extra cost. Under ``no_grad`` and
        ``inference_mode`` the values are the same, without a graph.

        :param model: classifier that maps ``x`` to logits of shape :math:`B \\times C`
        :param x: inputs of shape :math:`B \\times \\dots`; they receive no gradient
        :param targets: labels of shape :math:`B`; labels :math:`< 0` are outliers
        :return: the scalars ``cross_entropy``, ``energy`` and ``gradient``, not weighted and zero
            without samples to average, their weighted sum ``loss``, and the ``logits``. With
            ``beta=0``, ``gradient`` is a value without a graph.
        :raises ValueError: if ``model`` is compiled or no Module, shapes or types do not fit, a
            label exceeds the number of classes, or the model's outputs do not depend on ``x``
        """
        _check_inputs(model, x, targets)
        with_graph = torch.is_grad_enabled()
        create_graph = with_graph and self.beta > 0
        with torch.inference_mode(False), torch.enable_grad():
            # a copy, since tensors that were made in inference mode cannot require a gradient
            x = x.detach().clone().requires_grad_()
            targets = targets.long()
            with _twice_differentiable() if create_graph else nullcontext():
                logits = model(x)
            _check_logits(logits, targets)
            terms = self._terms(logits, x, targets, create_graph)
        return terms if with_graph else {name: term.detach() for name, term in terms.items()}

    def _terms(
        self, logits: Tensor, x: Tensor, targets: Tensor, create_graph: bool
    ) -> Dict[str, Tensor]:
        known = is_known(targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_partition = logits.logsumexp(dim=1)
        if self.score == "energy":
            score = -log_partition
            margins = (self.margin_in, self.margin_out)
            energy = _mean((score - self.margin_in).relu().pow(2), known)
            energy = energy + _mean((self.margin_out - score).relu().pow(2), ~known)
        else:
            score = log_partition - logits.mean(dim=1)
            margins = (math.inf, -math.inf)
            energy = _mean(score, ~known)
        norms = gradient_norms(score, x, targets, *margins, create_graph=create_graph)
        gradient = norms.mean() if self.scale == "released" else norms.sum()
        nll = cross_entropy(logits, targets)
        return {
            "cross_entropy": nll,
            "energy": energy,
            "gradient": gradient,
            "loss": nll + self.alpha * energy + self.beta * gradient,
            "logits": logits,
        }


class _Hardsigmoid(TorchFunctionMode):
    # the derivative of hardsigmoid cannot be differentiated, that of relu6 can
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.hardsigmoid:
            return func(*args, **kwargs)
        y = F.relu6(args[0] + 3) / 6
        return args[0].copy_(y) if kwargs.get("inplace") else y


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    # imported here, so that a torch without it can still import the package's other losses
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # both apply to modules and functions alike, and leave the model untouched
    with sdpa_kernel(SDPBackend.MATH), _Hardsigmoid():
        yield


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    # zero (keeping the graph) if the batch has no such samples
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def _check_inputs(model: nn.Module, x: Tensor, targets: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            "This loss calls the model itself: use criterion(model, x, targets) with a Module as "
            f"model, got {_describe(model)}"
        )
    if any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
        for module in model.modules()
    ):
        raise ValueError(
            "Models compiled by torch.compile have no second derivative; pass the original model"
        )
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and len(x) > 0):
        raise ValueError(
            "x must be a non-empty batch of floating-point inputs, of shape B x ..., got "
            f"{_describe(x)}"
        )
    if not (isinstance(targets, Tensor) and targets.shape == x.shape[:1]):
        raise ValueError(
            f"targets must hold one label for each of {len(x)} inputs, got {_describe(targets)}"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be integers, got {targets.dtype}; use targets.long()")


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    if not (isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(targets)):
        raise ValueError(
            f"The model must return logits of shape {len(targets)} x classes for {len(targets)} "
            f"inputs, got {_describe(logits)}; wrap models that return more than the logits"
        )
    largest = int(targets.max())
    if largest >= logits.shape[1]:
        raise ValueError(
            f"Label {largest} exceeds the {logits.shape[1]} classes of the model; labels must be "
            f"below {logits.shape[1]}, or negative for outliers"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
