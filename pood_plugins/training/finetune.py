"""
Fine-tunes a trained classifier, with auxiliary outliers or without them. Cross-entropy, outlier
exposure, energy-regularized training, GReg and GReg+ differ in criterion and sampler only:

.. code-block:: python

    from pood_plugins import split_model
    from pood_plugins.loss import GRegLoss
    from pood_plugins.training import EnergyClusterSampler, finetune

    split = split_model(model)
    finetune(split, id_loader, outlier_loader, GRegLoss(), epochs=20)  # GReg
    sampler = EnergyClusterSampler()
    finetune(split, id_loader, outlier_loader, GRegLoss(), epochs=20, sampler=sampler)  # GReg+

Afterwards, score with :class:`pytorch_ood.detector.EnergyBased`, or build any other detector on
the model, in evaluation mode.

**Batches.** ID samples and outliers share one batch and hence the statistics of BatchNorm, as in
the released code of GReg. An epoch is one pass over the ID loader. The outlier loader starts anew
with every epoch and whenever it ends, so have it shuffle. Without a sampler, each step takes one
batch from it. With a sampler, each step draws ``candidates_per_step`` outliers, whatever the
loader's batch size, and selects twice as many as there are ID samples, as the released code does.

**Optimizer.** Unless others are given: SGD with Nesterov momentum 0.9 and weight decay
:math:`10^{-4}`, as in the released code of GReg, and a learning rate that falls from 0.001 to
:math:`10^{-6}`, as half a cosine over all steps. The paper's learning rate is not known; 0.001 is
that of energy-regularized training, which GReg extends. (The 1 to be found in places is a factor.
Taken as learning rate, it ends in NaN.) The released code trains GReg+ with Adam: pass it.

**Interruptions.** With ``checkpoint``, the state is written before the first and after every
epoch, into one file. With ``resume=True``, training goes on after the last complete epoch. On CPU,
it then ends with the very weights of an uninterrupted run, if random transforms draw from torch's
generators (others are not stored) and workers of loaders do not persist.

.. autofunction:: pood_plugins.training.finetune

.. autoclass:: pood_plugins.training.DivergenceError
    :show-inheritance:
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from ..model.split import SplitModel
from .checkpoint import load_checkpoint, save_checkpoint
from .outliers import EnergyClusterSampler

log = logging.getLogger(__name__)

_OUTLIER = -1


class DivergenceError(RuntimeError):
    """
    Training came to a loss, a gradient or a weight that is not finite.
    """


def finetune(
    split: SplitModel,
    id_loader: DataLoader[Any],
    outlier_loader: DataLoader[Any] | None,
    criterion: nn.Module,
    *,
    epochs: int,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    sampler: EnergyClusterSampler | None = None,
    candidates_per_step: int = 384,
    device: str | torch.device | None = None,
    clip_norm: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    amp: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """
    Fine-tunes a classifier in place. It trains in training mode; afterwards, all modules are in
    the modes they were in.

    :param split: the classifier, see :func:`pood_plugins.model.split_model`
    :param id_loader: yields inputs and labels :math:`\\geq 0`; has a length
    :param outlier_loader: yields inputs and labels :math:`< 0`; ``None`` for criteria that take no
        outliers
    :param criterion: loss, called with logits and targets, where outliers have the target -1. Or,
        like :class:`pood_plugins.loss.GRegLoss`, a loss with a method ``terms(model, x, targets)``
        that returns a dictionary of ``loss`` and, if it likes, other scalars.
    :param epochs: number of passes over the ID loader, including those before an interruption
    :param optimizer: optimizer of parameters of the classifier; see above for the default
    :param scheduler: schedule of the optimizer's learning rate, advanced after every step, not
        after every epoch. Default is half a cosine, from the optimizer's learning rate down to
        :math:`10^{-6}`.
    :param sampler: selects outliers among candidates, as in GReg+
    :param candidates_per_step: number of candidates for the sampler
    :param device: where to train; the classifier is moved there. Default is where it is.
    :param clip_norm: the largest norm of the gradient with respect to all parameters; longer
        gradients are scaled down to it
    :param checkpoint: file for the state of the training; replaced unless ``resume`` is set
    :param resume: whether to go on from ``checkpoint``. If that does not exist yet, training
        starts from the beginning, with a warning. Otherwise everything is as it was then: weights,
        optimizer, schedule, random choices (also of torch's global generator) and history.
    :param amp: whether to use automatic mixed precision, with bfloat16, or with float16 and scaled
        gradients on GPUs that lack it
    :param progress: whether to show progress if the output is a terminal
    :return: for each step, also before an interruption, ``epoch`` and ``step``, counted from 1,
        ``learning_rate``, ``loss``, the terms of the criterion or else the ``cross_entropy`` of
        the ID samples, and the ``gradient_norm`` with respect to all parameters, before clipping
    :raises ValueError: if arguments, batches or the checkpoint do not fit
    :raises DivergenceError: if the loss or its gradient is not finite, which leaves the classifier
        as it was before this step, or a weight is not at the end of an epoch. The checkpoint is
        that of the last complete epoch.
    """
    _check_arguments(split, criterion, epochs, candidates_per_step, clip_norm, checkpoint, resume)
    _check_use_of_outliers(criterion, outlier_loader, sampler)
    n_steps = epochs * _n_batches(id_loader)
    device = split.head.weight.device if device is None else torch.device(device)
    split.to(device)
    criterion.to(device)
    if optimizer is None:
        trained = [parameter for parameter in split.parameters() if parameter.requires_grad]
        optimizer = SGD(trained, lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    if scheduler is None:
        scheduler = CosineAnnealingLR(optimizer, n_steps, eta_min=1e-6)
    _check_optimizer(optimizer, scheduler, split)

    float16 = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    generators = _generators(id_loader, outlier_loader)
    run = _Run(
        split,
        criterion,
        optimizer,
        scheduler,
        sampler,
        clip_norm=clip_norm or math.inf,
        device=device,
        dtype=(torch.float16 if float16 else torch.bfloat16) if amp else None,
        scaler=torch.amp.GradScaler(device.type, enabled=amp and float16),
        generators=generators,
        settings={
            "epochs": epochs,
            "steps per epoch": len(id_loader),
            "criterion": _describe(criterion, vars(criterion)),
            "optimizer": _describe(optimizer, optimizer.defaults),
            "scheduler": type(scheduler).__name__,
            "sampler": _describe(sampler, vars(sampler)) if sampler else None,
            "candidates_per_step": candidates_per_step if sampler else None,
            "clip_norm": clip_norm,
            "amp": amp,
            "generators of loaders": len(generators),
        },
    )
    if checkpoint is not None and resume and os.path.exists(checkpoint):
        run.load(checkpoint)
    elif checkpoint is not None:
        if resume:
            log.warning("%s does not exist yet: training starts from the beginning", checkpoint)
        run.save(checkpoint)

    bar = tqdm(
        total=n_steps,
        initial=len(run.history),
        desc="fine-tuning",
        disable=None if progress else True,
    )
    with bar, _modes_kept(split):
        split.train()
        while run.epochs < epochs:
            outliers = _outliers(outlier_loader, candidates_per_step if sampler else None)
            for x, targets in _id_batches(id_loader, split.head.out_features):
                bar.set_postfix(run.step(x, targets, next(outliers, None)), refresh=False)
                bar.update()
            run.end_epoch()
            if checkpoint is not None:
                run.save(checkpoint)
    return run.history


@dataclass
class _Run:
    """A training run: its steps, and its state to and from a checkpoint."""

    split: SplitModel
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    sampler: EnergyClusterSampler | None
    clip_norm: float
    device: torch.device
    dtype: torch.dtype | None  #: of automatic mixed precision
    scaler: torch.amp.GradScaler
    generators: list[torch.Generator]  #: of the loaders
    settings: dict[str, Any]  #: what must not change between a checkpoint and going on from it
    epochs: int = 0  #: complete ones
    history: list[dict[str, float]] = field(default_factory=list)

    def step(self, x: Tensor, targets: Tensor, outliers: Tensor | None) -> dict[str, float]:
        """
        :param x: ID samples
        :param targets: their labels
        :param outliers: outliers, or candidates if there is a sampler
        :return: the loss, its terms, and the norm of its gradient
        """
        x, targets = x.to(self.device), targets.to(self.device)
        if outliers is not None:
            outliers = self._select(outliers.to(self.device), 2 * len(x))
            x = _join(x, outliers)
            targets = torch.cat([targets, targets.new_full((len(outliers),), _OUTLIER)])

        buffers = [buffer.clone() for buffer in self.split.buffers()]
        self.optimizer.zero_grad()
        with self._autocast():
            terms = _loss_terms(self.criterion, self.split.model, x, targets)
        self.scaler.scale(terms["loss"]).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        terms["gradient_norm"] = clip_grad_norm_(parameters, self.clip_norm)

        # all in one transfer from the device
        scalars = torch.stack([term.detach().float() for term in terms.values()]).tolist()
        values = dict(zip(terms, scalars))
        finite = all(map(math.isfinite, scalars))
        # with float16, the scaler leaves out a step with such a gradient, and lowers the scale
        skipped = not finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        row = {
            "epoch": self.epochs + 1,
            "step": len(self.history) + 1,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            **values,
        }
        if not math.isfinite(values["loss"]) or not (finite or skipped):
            for buffer, before in zip(self.split.buffers(), buffers):
                buffer.copy_(before)
            raise _divergence(row["epoch"], row["step"], values)
        self.history.append(row)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not skipped:
            self.scheduler.step()
        return values

    def end_epoch(self) -> None:
        # what the last step has done, no loss has shown yet
        for name, parameter in self.split.model.named_parameters():
            if not parameter.isfinite().all():
                raise _divergence(self.epochs + 1, len(self.history), {name: math.nan})
        self.epochs += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        random = {
            "torch": torch.get_rng_state(),
            "loaders": [generator.get_state() for generator in self.generators],
        }
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "settings": self.settings,
            "epochs": self.epochs,
            "history": self.history,
            "random": random,
            "model": self.split.model.state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }
        save_checkpoint(path, state)

    def load(self, path: str | os.PathLike[str]) -> None:
        state = load_checkpoint(path)
        model = self.split.model
        if _shapes(state["model"]) != _shapes(model.state_dict()):
            raise ValueError(
                f"{path} holds the weights of another model than this {type(model).__name__}"
            )
        changes = [
            f"{name} was {state['settings'].get(name)}, now {value}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if changes:
            raise ValueError(
                f"{path} belongs to another training: {'; '.join(changes)}. Give the same "
                "arguments, or do not resume"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        model.load_state_dict(state["model"])
        self.epochs, self.history = state["epochs"], state["history"]
        random = state["random"]
        torch.set_rng_state(random["torch"])
        for generator, generator_state in zip(self.generators, random["loaders"]):
            generator.set_state(generator_state)
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "sampler": self.sampler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def _select(self, candidates: Tensor, n: int) -> Tensor:
        if self.sampler is None:
            return candidates
        if n > len(candidates):
            raise ValueError(
                f"{n} outliers, twice the number of ID samples, cannot be selected from "
                f"{len(candidates)} candidates: raise candidates_per_step"
            )
        with _modes_kept(self.split), self._autocast():
            self.split.eval()
            features = self.split.encoder(candidates)
            logits = self.split.head(features)
        if not logits.isfinite().all():
            values = {"logits of candidates": math.nan}
            raise _divergence(self.epochs + 1, len(self.history) + 1, values)
        return candidates[self.sampler.select(features, logits, n)]


def _divergence(epoch: int, step: int, values: Mapping[str, float]) -> DivergenceError:
    terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return DivergenceError(
        f"training diverged in epoch {epoch}, step {step}: {terms}. Lower the learning rate or "
        "set clip_norm, and check that all inputs are finite"
    )


def _loss_terms(
    criterion: nn.Module, model: nn.Module, x: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    terms: Any = getattr(criterion, "terms", None)
    if terms is not None:
        values = terms(model, x, targets)
        scalars = {name: value for name, value in values.items() if value.dim() == 0}
        return {"loss": values["loss"], **scalars}
    logits = model(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = criterion(logits, targets)
    if loss.dim() > 0:
        raise ValueError(
            f"{type(criterion).__name__} returns a loss of shape {tuple(loss.shape)}; a single "
            "number is needed, as with reduction='mean'"
        )
    nll = F.cross_entropy(logits.detach(), targets, ignore_index=_OUTLIER)
    return {"loss": loss, "cross_entropy": nll}


def _id_batches(loader: DataLoader[Any], n_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in loader:
        x, targets = _unpack(batch, "id_loader")
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= n_classes:
            raise ValueError(
                f"id_loader yields labels from {lowest} to {highest}, but the classifier knows "
                f"0 to {n_classes - 1}; outliers belong into outlier_loader"
            )
        yield x, targets


def _outliers(loader: DataLoader[Any] | None, size: int | None) -> Iterator[Tensor]:
    """Outliers without end: in the batches of the loader or, if that is given, of a size."""
    pool = None
    while loader is not None:
        n_outliers = 0
        for batch in loader:
            x, targets = _unpack(batch, "outlier_loader")
            if targets.max() >= 0:
                raise ValueError(
                    f"outlier_loader yields label {int(targets.max())}; outliers have labels "
                    "below 0: give their dataset target_transform=pytorch_ood.utils.ToUnknown()"
                )
            n_outliers += len(x)
            if size is None:
                yield x
                continue
            pool = x if pool is None else torch.cat([pool, x])
            while len(pool) >= size:
                yield pool[:size]
                pool = pool[size:]
        if n_outliers < (size or 1):
            raise ValueError(
                f"outlier_loader has {n_outliers} outliers"
                + (f", but candidates_per_step is {size}" if size else "")
            )


def _unpack(batch: Any, name: str) -> tuple[Tensor, Tensor]:
    if not (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(item, Tensor) for item in batch)
        and batch[1].shape == batch[0].shape[:1]
        and len(batch[1]) > 0
        and not batch[1].is_floating_point()
    ):
        raise ValueError(f"{name} must yield pairs of a batch of inputs and their integer labels")
    return batch[0], batch[1].long()


def _join(x: Tensor, outliers: Tensor) -> Tensor:
    if x.shape[1:] != outliers.shape[1:] or x.dtype != outliers.dtype:
        raise ValueError(
            f"ID samples ({x.dtype}, {tuple(x.shape[1:])}) and outliers ({outliers.dtype}, "
            f"{tuple(outliers.shape[1:])}) differ: give both the same transform"
        )
    return torch.cat([x, outliers])


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (getattr(t, "shape", None), getattr(t, "dtype", None))
        for name, t in state_dict.items()
    }


def _generators(*loaders: DataLoader[Any] | None) -> list[torch.Generator]:
    """Generators that the loaders and their samplers were given, each once."""
    holders = [
        holder
        for loader in loaders
        for holder in (
            loader,
            getattr(loader, "sampler", None),
            getattr(loader, "batch_sampler", None),
        )
    ]
    generators = [getattr(holder, "generator", None) for holder in holders]
    return list(dict.fromkeys(g for g in generators if isinstance(g, torch.Generator)))


def _describe(thing: object, attributes: Mapping[str, Any]) -> str:
    """Class and plain public attributes, by which to tell whether settings changed."""
    plain = [
        f"{name}={value!r}"
        for name, value in attributes.items()
        if isinstance(value, (bool, int, float, str, tuple))
        and not name.startswith("_")
        and name != "training"
    ]
    return f"{type(thing).__name__}({', '.join(plain)})"


def _n_batches(loader: DataLoader[Any]) -> int:
    try:
        n = len(loader)
    except TypeError:
        raise ValueError(
            "id_loader has no length, which learning rates are scheduled by"
        ) from None
    if n == 0:
        raise ValueError("id_loader is empty")
    return n


def _check_arguments(
    split: SplitModel,
    criterion: nn.Module,
    epochs: int,
    candidates_per_step: int,
    clip_norm: float | None,
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
) -> None:
    if not isinstance(split, SplitModel):
        raise ValueError(
            f"finetune needs a SplitModel, not {type(split).__name__}: pass split_model(model)"
        )
    if not isinstance(criterion, nn.Module):
        raise ValueError(f"criterion must be a loss such as GRegLoss(), got {criterion!r}")
    for name, count in (("epochs", epochs), ("candidates_per_step", candidates_per_step)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}")
    if resume and checkpoint is None:
        raise ValueError("resume needs a checkpoint: name the file")


def _check_use_of_outliers(
    criterion: nn.Module,
    outlier_loader: DataLoader[Any] | None,
    sampler: EnergyClusterSampler | None,
) -> None:
    info = getattr(criterion, "info", None)  # of losses of pytorch-ood and its plugins
    name = type(criterion).__name__
    if outlier_loader is None:
        if sampler is not None or (info is not None and info.supervised):
            which = name if sampler is None else "the sampler"
            raise ValueError(f"{which} needs outliers: pass an outlier_loader")
    elif isinstance(criterion, nn.CrossEntropyLoss) or (info is not None and not info.supervised):
        raise ValueError(f"{name} takes no outliers: pass None as outlier_loader")
    elif isinstance(getattr(outlier_loader, "sampler", None), SequentialSampler):
        log.warning("outlier_loader does not shuffle: every epoch begins with the same outliers")


def _check_optimizer(optimizer: Optimizer, scheduler: LRScheduler, split: SplitModel) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(parameter) in held for parameter in split.parameters()):
        raise ValueError(
            "the optimizer holds no parameter of the classifier: make it from split.parameters()"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer: pass both")
