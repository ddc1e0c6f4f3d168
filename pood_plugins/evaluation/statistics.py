"""
How far a figure would move with another draw of the test samples: bootstrap values of AUROC and
FPR95, intervals, and paired differences of detectors, so that nobody reads noise as progress.

A resample draws as many ID and as many OOD samples as there are, with replacement, each from their
own. All detectors see the same resamples: what makes a resample easy cancels in the difference of
two detectors, which is often clear where their intervals overlap.

.. code-block:: python

    auroc, fpr95 = bootstrap([(mine_id, mine_ood), (baseline_id, baseline_ood)])
    low, high = interval(auroc)  # one interval per detector
    paired(auroc[0], auroc[1]).clear  # is mine really better, or worse?

OOD sets share their ID set. With one seed, and one ``stream`` per OOD set, each set is resampled
on its own while all see the same ID samples, so the sets' mean values are those of the mean:

.. code-block:: python

    sets = [bootstrap(scores, stream=i)[0] for i, scores in enumerate(scores_by_set)]
    near = torch.stack(sets).mean(dim=0)

The networks are held fixed; combine reports of several to see what another training run changes.
Where a detector separates ID from OOD samples without error, its interval is a point.

The method is the percentile bootstrap of Efron and Tibshirani, *An Introduction to the Bootstrap*
(1993), chapters 8 (several samples) and 13 (percentile intervals).

..  autofunction:: pood_plugins.evaluation.statistics.bootstrap
..  autofunction:: pood_plugins.evaluation.statistics.interval
..  autofunction:: pood_plugins.evaluation.statistics.paired
..  autoclass:: pood_plugins.evaluation.statistics.Difference
    :members:
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# resamples times samples at once; memory peaks at some 50 MiB (measured), scores aside
_CHUNK = 2**19


@dataclass(frozen=True)
class Difference:
    """Difference of two detectors over the same resamples."""

    mean: float  #: mean over the resamples
    low: float  #: lower end of the interval
    high: float  #: upper end of the interval

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    scores: Sequence[tuple[Tensor, Tensor]], *, n: int = 1000, seed: int = 0, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """
    AUROC and FPR95 of each detector on the same resamples, as
    :class:`pytorch_ood.metrics.OODMetrics` defines them. A detector's values do not depend on the
    other detectors or the number of threads.

    :param scores: for each of :math:`R` detectors, scores of the ID samples (shape :math:`N`) and
        of the OOD samples (shape :math:`M`), larger = more outlying; same samples in same order
    :param n: number of resamples
    :param seed: determines the ID resamples and, with the stream, the OOD resamples
    :param stream: number of the OOD set, for sets that share the ID samples
    :return: AUROC (higher is better) and FPR95 (lower is better), both :math:`R \\times n`,
        float64, on the CPU
    :raises ValueError: if there is no detector, ID or OOD sample, if shapes differ between
        detectors, a score is not finite, ``n`` is below 2 or ``stream`` negative
    """
    if n < 2 or stream < 0:
        raise ValueError(f"Pass n >= 2, better 1000, and stream >= 0, got {n} and {stream}.")
    if not scores:
        raise ValueError("There are no scores: pass those of at least one detector.")
    shapes = [
        (tuple(scores_id.shape), tuple(scores_ood.shape)) for scores_id, scores_ood in scores
    ]
    if any(len(shape) != 1 or shape[0] == 0 for shape in shapes[0]):
        raise ValueError(
            f"Pass one score per sample, at least one ID and one OOD, got shapes {shapes[0]}."
        )
    for row, pair in enumerate(scores):
        if shapes[row] != shapes[0]:
            raise ValueError(
                "Score the same samples with all detectors: "
                f"detector {row} has scores of shapes {shapes[row]}, detector 0 {shapes[0]}."
            )
        if wrong := sum(int((~part.isfinite()).sum()) for part in pair):
            raise ValueError(
                f"{wrong} scores of detector {row} are not finite: repair it or leave it out."
            )
    ranks = [_ranks(*(part.detach().cpu().double() for part in pair)) for pair in scores]
    (size_id,), (size_ood,) = shapes[0]
    parts = [
        torch.stack([_metrics(rank, *weights) for rank in ranks], dim=1)
        for weights in _resamples(n, size_id, size_ood, seed, stream)
    ]
    auroc, fpr95 = torch.cat(parts, dim=2)
    return auroc, fpr95


def interval(values: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """
    Percentile interval.

    :param values: bootstrap values, shape :math:`\\dots \\times n`
    :param level: share of the values between the ends, which are interpolated linearly
    :return: lower and upper ends, both of shape :math:`\\dots`
    :raises ValueError: if the level does not lie between 0 and 1
    """
    if not 0 < level < 1:
        raise ValueError(f"The level must lie between 0 and 1, e.g. 0.95, got {level}.")
    low, high = values.quantile(values.new_tensor([(1 - level) / 2, (1 + level) / 2]), dim=-1)
    return low, high


def paired(values: Tensor, reference: Tensor, level: float = 0.95) -> Difference:
    """
    Whether two detectors differ by more than another draw of the test samples would explain.

    :param values: bootstrap values of one detector, shape :math:`n`
    :param reference: those of another on the same resamples (same samples, seed and stream)
    :param level: see :func:`interval`
    :return: ``values - reference``; positive is better for AUROC and worse for FPR95
    :raises ValueError: if the shapes differ or are not :math:`n`, or for a bad level
    """
    if values.ndim != 1 or values.shape != reference.shape:
        raise ValueError(
            "Pass one row each, of values on the same resamples, "
            f"got shapes {tuple(values.shape)} and {tuple(reference.shape)}."
        )
    low, high = interval(values - reference, level)
    return Difference(float((values - reference).mean()), float(low), float(high))


def _resamples(
    n: int, size_id: int, size_ood: int, seed: int, stream: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of resamples as weights: how often each ID and each OOD sample was drawn."""
    # one generator each, so that the ID weights depend on neither the stream nor the OOD set's
    # size; their seeds are drawn, for torch ignores all but the lower 32 bits of a seed
    seeds = torch.randint(2**32, (stream + 2,), generator=torch.Generator().manual_seed(seed))
    generator_id, generator_ood = (torch.Generator().manual_seed(int(seeds[i])) for i in (0, -1))
    chunk = max(1, _CHUNK // (size_id + size_ood))
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        yield _weights(count, size_id, generator_id), _weights(count, size_ood, generator_ood)


def _weights(count: int, size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(size, (count, size), generator=generator)
    weights = torch.zeros(count, size, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, weights.new_ones(()).expand(drawn.shape))


def _ranks(scores_id: Tensor, scores_ood: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ID ascending, OOD descending; how many ID scores are below and at most each OOD score."""
    scores_id, order_id = scores_id.sort()
    scores_ood, order_ood = scores_ood.sort(descending=True)
    below = torch.searchsorted(scores_id, scores_ood)
    upto = torch.searchsorted(scores_id, scores_ood, right=True)
    return order_id, order_ood, below, upto


def _metrics(ranks: tuple[Tensor, ...], weights_id: Tensor, weights_ood: Tensor) -> Tensor:
    """AUROC and FPR95 per resample, stacked. All sums are of integers and exact in float64."""
    order_id, order_ood, below, upto = ranks
    size_id, size_ood = len(order_id), len(order_ood)
    passed = pad(weights_id.index_select(1, order_id).cumsum(1), (1, 0))
    drawn = weights_ood.index_select(1, order_ood)
    # an ID sample below an OOD sample counts twice, a tied one once
    wins = passed.index_select(1, below).add_(passed.index_select(1, upto)).mul_(drawn).sum(1)
    # the first OOD sample by which 95 % are found; those tied with it have the same threshold
    first = (drawn.cumsum(1) < 0.95 * size_ood).sum(1)
    flagged = size_id - passed.gather(1, below[first, None])[:, 0]
    return torch.stack([wins / (2 * size_id * size_ood), flagged / size_id])
