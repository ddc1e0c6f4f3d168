"""
From scores to decisions. A threshold is calibrated on scores of ID samples that neither the
detector nor the classifier was fitted on:

.. code-block:: python

    from pood_plugins.threshold import calibrate

    threshold = calibrate(detector(validation_images), tpr=0.95)
    print(threshold)  # what is known of the share of ID samples that it accepts
    rejected = threshold(detector(images))  # True = OOD

Positive means ID here, as in the *FPR at 95 % TPR* of the literature: the true-positive rate (TPR)
is the share of ID samples that are accepted, the false-positive rate (FPR) that of outliers
accepted by mistake.

What n samples tell
-------------------

The threshold for a TPR is an order statistic: of :math:`n` sorted scores, the one with the rank
:math:`m = \\lceil n \\cdot \\mathrm{TPR} \\rceil`. Whatever the distribution of the scores, if it
is continuous, the TPR on further samples of the same kind then follows a beta distribution with
parameters :math:`m` and :math:`n + 1 - m`, of which :attr:`Threshold.tpr_interval` are the
quantiles. Among scores that tie with the threshold, as many as there are are accepted: the TPR may
be higher, and the FPR lower, up to the interval of the share that is counted. Rates that are
merely counted have the interval of Clopper and Pearson.

Scores of one image differ in their last digits with the images that share its batch, and a
threshold is the score of one image: images that score within these digits of it may be decided
either way.

.. warning::

    The intervals are about samples of the kind that was calibrated with. They say nothing of
    another camera, another hospital or another year, and nothing at all if the scores are those of
    the training samples: nearest-neighbor detectors such as GROOD know these by heart.

.. autofunction:: pood_plugins.threshold.calibrate

.. autoclass:: pood_plugins.threshold.Threshold
    :members:
    :special-members: __call__
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    _Scores = Tensor | np.ndarray | Sequence[float]

__all__ = ["Threshold", "calibrate"]


@dataclass(frozen=True)
class Threshold:
    """
    A threshold for outlier scores, and what is known of it. Made by :func:`calibrate`.
    """

    #: the largest score that is accepted as ID
    value: float
    #: ``"tpr"`` or ``"fpr"``: the rate that was asked for
    target: str
    #: number of ID scores
    n_id: int
    #: share of these that is accepted
    tpr: float
    #: where the share of further ID samples lies, with probability ``confidence``
    tpr_interval: tuple[float, float]
    #: number of outlier scores, 0 if none were given
    n_ood: int = 0
    #: share of these that is accepted by mistake, None if none were given
    fpr: float | None = None
    #: where the share of further outliers of their kind lies
    fpr_interval: tuple[float, float] | None = None
    #: of the intervals, each by itself
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a threshold must be a finite number, got {self.value}")
        for rate, interval in ((self.tpr, self.tpr_interval), (self.fpr, self.fpr_interval)):
            if rate is not None and interval is not None:
                low, high = interval
                if not 0 <= low <= high <= 1 or not 0 <= rate <= 1:
                    raise ValueError(f"rates must be fractions, got {rate}, {low} and {high}")

    def __call__(self, scores: _Scores) -> Tensor:
        """
        :param scores: outlier scores of any shape
        :return: mask of the same shape and on the same device, True = OOD
        :raises ValueError: if a score is NaN, of which nothing can be said
        """
        scores = torch.as_tensor(scores, dtype=torch.float64).detach()
        if bool(scores.isnan().any()):
            raise ValueError(
                f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: check the "
                "inputs that they belong to"
            )
        return scores > self.value

    def __str__(self) -> str:
        lines = [
            f"OOD above {self.value:.6g}",
            _statement("ID", self.tpr, self.tpr_interval, self.n_id, self.confidence),
        ]
        if self.fpr is not None and self.fpr_interval is not None:
            lines.append(
                _statement("outlier", self.fpr, self.fpr_interval, self.n_ood, self.confidence)
            )
        return "\n".join(lines)


def calibrate(
    scores_id: _Scores,
    tpr: float = 0.95,
    *,
    scores_ood: _Scores | None = None,
    fpr: float | None = None,
    confidence: float = 0.95,
) -> Threshold:
    """
    Find the threshold that accepts a given share of ID samples or, if ``fpr`` is given, no more
    than a given share of outliers.

    :param scores_id: scores of ID samples that nothing was fitted on
    :param tpr: share of the ID samples to accept, in (0, 1]; not used if ``fpr`` is given
    :param scores_ood: scores of outliers that nothing was fitted on; what is found out about the
        FPR holds for their kind only
    :param fpr: share of the outliers to accept at most, in [0, 1)
    :param confidence: of the intervals, in (0, 1)
    :return: the threshold
    :raises ValueError: if there are no scores or some are not finite, a rate is out of range, or
        ``fpr`` is given without outliers
    """
    for name, rate, allowed in (
        ("tpr", tpr, 0 < tpr <= 1),
        ("fpr", fpr, fpr is None or 0 <= fpr < 1),
        ("confidence", confidence, 0 < confidence < 1),
    ):
        if not allowed:
            raise ValueError(f"{name} is {rate}: use a fraction such as 0.95, not a percentage")
    known = _sorted(scores_id, "ID")
    unknown = None if scores_ood is None else _sorted(scores_ood, "outlier")
    known_rank = unknown_rank = None
    # a product such as 0.95 * 20 may be off by its rounding
    if fpr is None:
        known_rank = max(1, math.ceil(tpr * len(known) - 1e-9))
        value = float(known[known_rank - 1])
    elif unknown is None:
        raise ValueError("fpr needs scores of outliers: pass scores_ood, or give a tpr")
    else:
        # just below the first outlier that must not be accepted
        unknown_rank = math.floor(fpr * len(unknown) + 1e-9) + 1
        value = math.nextafter(float(unknown[unknown_rank - 1]), -math.inf)
    rate, interval = _accepted(known, value, known_rank, confidence)
    of_outliers = {}
    if unknown is not None:
        mistaken, fpr_interval = _accepted(unknown, value, unknown_rank, confidence)
        of_outliers = {"n_ood": len(unknown), "fpr": mistaken, "fpr_interval": fpr_interval}
    return Threshold(
        value=value,
        target="tpr" if fpr is None else "fpr",
        n_id=len(known),
        tpr=rate,
        tpr_interval=interval,
        confidence=confidence,
        **of_outliers,  # type: ignore[arg-type]
    )


def _sorted(scores: _Scores, kind: str) -> Tensor:
    flat = torch.as_tensor(scores, dtype=torch.float64).detach().cpu().flatten()
    if len(flat) == 0:
        raise ValueError(f"there are no {kind} scores: pass those of some {kind} samples")
    broken = int((~flat.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(flat)} {kind} scores are not finite: check the inputs that they "
            "belong to"
        )
    return flat.sort().values


def _accepted(
    scores: Tensor, value: float, rank: int | None, confidence: float
) -> tuple[float, tuple[float, float]]:
    """
    :param scores: sorted scores
    :param value: the largest that is accepted
    :param rank: of the order statistic that ``value`` was read from, if it was one of these scores
    :return: share of the scores that is accepted, and interval for others
    """
    from scipy.stats import beta

    n, count = len(scores), int((scores <= value).sum())
    tail = (1 - confidence) / 2
    # Clopper and Pearson
    lower = beta.ppf(tail, count, n - count + 1) if count > 0 else 0.0
    upper = beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
    if rank is not None:
        low, high = beta.ppf([tail, 1 - tail], rank, n + 1 - rank)
        # it is that score or just below; ties make the share larger in the first case, and smaller
        # in the second, by as much as is only counted
        if count >= rank:
            lower, upper = low, high if count == rank else upper
        else:
            lower, upper = low if count == rank - 1 else lower, high
    return count / n, (float(lower), float(upper))


def _statement(
    kind: str, rate: float, interval: tuple[float, float], n: int, confidence: float
) -> str:
    lower, upper = interval
    return (
        f"accepts {rate:.1%} of {n} {kind} samples and, with {confidence:.0%} confidence, "
        f"{lower:.1%} to {upper:.1%} of others like them"
    )
