r"""
GReg+ does not train on random outliers: each step draws a larger pool of candidates, clusters
their features, and keeps from every cluster the candidates with the lowest and the highest energy.
The former look most like ID data, and the energy term of :class:`pood_plugins.loss.GRegLoss`
corrects them; the latter are detected already, and its gradient term smooths the score around
them. The clusters keep the choice diverse.

Of candidates with features :math:`z_i` and energies :math:`S_i = -\log \sum_c e^{f_c(x_i)}`,
k-means divides the points :math:`z_i / \lVert z_i \rVert_2` into clusters :math:`K_1, \dots, K_k`,
and selected are

.. math::
    \bigcup_j \Big\{ \arg\min_{i \in K_j} S_i, \; \arg\max_{i \in K_j} S_i \Big\}.

Paper and released code
-----------------------

====================  ======================  =========================  ========================
Step                  Paper                   Released code              Here
====================  ======================  =========================  ========================
candidates in a step  not in the parts that   384 for 64 ID samples, on  ``candidates_per_step``
                      we know                 CIFAR                      of ``finetune``: 384
clusters              as many as ID samples   the same, at most 64       ``n_clusters``: 64
features              of unit length          the same, or others        of unit length, or as
                                                                         they are
number of outliers    what the clusters give  twice the ID samples,      what is asked for,
                                              random ones fill up        random ones fill up
lowest energy         energy term only        both terms, the margins    both terms, the margins
                                              decide                     decide
highest energy        gradient term only      likewise, an option        likewise, ``two_way``
ranks of energy       –                       an option                  ``energy_window``
optimizer             SGD; Adam for ImageNet  Adam                       that of ``finetune``
====================  ======================  =========================  ========================

Costs
-----

A step has a forward pass over all :math:`N` candidates, without gradients, and k-means of their
:math:`D` features: :math:`O(NkD)` for each iteration of each restart, and
:math:`O(NkD \log k)` to begin with; :math:`O(N (D + k))` numbers in memory. That is on top of the
training step, and independent of the size of the outlier set.

When not to use it
------------------

- **Few outliers.** If the pool is hardly larger than what is selected, all are selected.
- **Forward passes that are dear.** Most of the candidates are looked at and not trained with.

Reference
---------

..  autoclass:: pood_plugins.training.EnergyClusterSampler
    :members:

.. autofunction:: pood_plugins.training.outliers.k_means

"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def k_means(
    z: Tensor,
    k: int,
    n_init: int = 3,
    generator: torch.Generator | None = None,
    max_iter: int = 100,
) -> Tensor:
    """
    Clusters points by Lloyd's algorithm, seeded by greedy k-means++, on the device of the points.

    :param z: points of shape :math:`N \\times D`
    :param k: number of clusters, at most :math:`N`; some stay empty if fewer points are distinct
    :param n_init: number of restarts; the one with the lowest sum of squared distances counts
    :param generator: CPU generator for the seeds
    :param max_iter: most iterations of a restart, which otherwise ends when no point moves
    :return: cluster of each point, in :math:`[0, k)`, of shape :math:`N`
    """
    # bfloat16 would blur the centers, and an offset would cost digits of the distances
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() - z.float().mean(dim=0)
        restarts = [_lloyd(z, _seed_centers(z, k, generator), max_iter) for _ in range(n_init)]
    inertias = torch.stack([inertia for _, inertia in restarts])
    return restarts[int(inertias.argmin())][0]


def _seed_centers(z: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    # Of a few points drawn in proportion to their squared distance to the nearest center, take the
    # best. The draw takes the shortest of exponential waiting times with these rates: in contrast
    # to cumulative sums, this is deterministic on GPU.
    n_trials = min(2 + int(math.log(k)), len(z))
    waiting_times = torch.empty(k, len(z)).exponential_(generator=generator).to(z.device)
    centers = [z[waiting_times[0].argmin()]]
    rates = (z - centers[0]).square().sum(dim=1)
    for times in waiting_times[1:]:
        trials = z[(times / rates).topk(n_trials, largest=False).indices]
        trial_rates = torch.minimum(rates.unsqueeze(1), torch.cdist(z, trials).square())
        best = trial_rates.sum(dim=0).argmin()
        centers.append(trials[best])
        rates = trial_rates[:, best]
    return torch.stack(centers)


def _lloyd(z: Tensor, centers: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    k = len(centers)
    labels = torch.full((len(z),), -1, device=z.device)
    for _ in range(max_iter):
        distances, nearest = torch.cdist(z, centers).min(dim=1)
        if torch.equal(labels, nearest):
            break
        labels = nearest
        # a product, since scattered additions are not deterministic on GPU
        members = F.one_hot(labels, k).to(z.dtype)
        sizes = members.sum(dim=0)
        means = members.T @ z / sizes.unsqueeze(1)
        # empty clusters start again, each at another one of the points that fit worst
        empty = sizes == 0
        worst = z[distances.topk(k).indices[empty.cumsum(dim=0) - 1]]
        centers = torch.where(empty.unsqueeze(1), worst, means)
    return labels, distances.square().sum()


class EnergyClusterSampler:
    """
    Selects the outliers of a training step as in GReg+, from the paper *Gradient-Regularized
    Out-of-Distribution Detection*.

    The candidates are clustered by k-means in feature space. Each cluster contributes the sample
    with the lowest energy :math:`-\\log \\sum_c e^{f_c(x)}` and, with ``two_way``, the one with
    the highest. Random other candidates fill up to the number asked for; if the clusters
    contribute more, random ones of theirs are left out.

    Compute features and logits in evaluation mode. In the paper there are as many clusters as ID
    samples in a batch; the released code has at most 64, and selects 128 of 384 candidates for 64
    ID samples.

    .. rubric:: Examples

    .. code-block:: python

        import torch
        from pood_plugins.training import EnergyClusterSampler

        candidates = torch.randn(384, 192)
        encoder = torch.nn.Sequential(torch.nn.Linear(192, 32), torch.nn.ReLU())
        head = torch.nn.Linear(32, 5)
        sampler = EnergyClusterSampler()

        with torch.no_grad():
            features = encoder(candidates)
            outliers = candidates[sampler.select(features, head(features), n=128)]
    """

    def __init__(
        self,
        n_clusters: int = 64,
        n_init: int = 3,
        representation: str = "normalized",
        two_way: bool = True,
        energy_window: tuple[int, int] | None = None,
        seed: int = 0,
    ):
        """
        :param n_clusters: number of clusters
        :param n_init: restarts of k-means
        :param representation: ``normalized`` scales features to unit length, ``raw`` does not
        :param two_way: whether each cluster contributes its highest energy, too
        :param energy_window: ranks ``(start, end)``, counted from 0 at the lowest energy, outside
            of which candidates are left out; as in a slice, ``end`` is excluded and may exceed
            the number of candidates
        :param seed: seed of all random choices; calls of :meth:`select` continue one sequence
        :raises ValueError: if a count is below 1, the window is empty, or the representation is
            unknown
        """
        for name, count in (("n_clusters", n_clusters), ("n_init", n_init)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if representation not in ("normalized", "raw"):
            raise ValueError(
                f"representation must be 'normalized' or 'raw', got {representation!r}"
            )
        if energy_window is not None and not 0 <= energy_window[0] < energy_window[1]:
            raise ValueError(
                "energy_window must be ranks (start, end) with 0 <= start < end, got "
                f"{energy_window}"
            )
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.representation = representation
        self.two_way = two_way
        self.energy_window = energy_window
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def select(self, features: Tensor, logits: Tensor, n: int) -> Tensor:
        """
        Selects ``n`` different candidates.

        :param features: features of the candidates, of shape :math:`N \\times D`
        :param logits: their logits, of shape :math:`N \\times C`
        :param n: how many to select
        :return: indices of shape ``n``, in random order, on the device of the features
        :raises ValueError: if shapes do not fit, values are not finite, or fewer candidates than
            ``n`` or ``n_clusters`` are in the energy window
        """
        _check_candidates(features, logits)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        energy = -logits.float().logsumexp(dim=1)
        window = slice(*self.energy_window) if self.energy_window else slice(None)
        candidates = energy.argsort(stable=True)[window]
        needed = max(n, self.n_clusters)
        if len(candidates) < needed:
            raise ValueError(
                f"{len(candidates)} candidates are too few to select {n} with {self.n_clusters} "
                f"clusters; {needed} are needed within energy_window = {self.energy_window}: pass "
                "more candidates, or lower n or n_clusters"
            )
        z = features[candidates].float()
        if self.representation == "normalized":
            z = F.normalize(z)
        clusters = k_means(z, self.n_clusters, self.n_init, self._generator)
        # random order, but what the clusters contribute comes first
        priority = torch.rand(len(candidates), generator=self._generator).to(z.device)
        priority[_extremes(clusters, self.two_way)] += 1
        return candidates[priority.topk(n).indices]

    def state_dict(self) -> dict[str, Tensor]:
        """
        :return: position in the sequence of random choices, to continue it after an interruption
        """
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """
        :param state_dict: what :meth:`state_dict` returned
        """
        self._generator.set_state(state_dict["generator"].cpu())


def _extremes(clusters: Tensor, two_way: bool) -> Tensor:
    # first and last member of each cluster; the candidates are in ascending order of energy
    order = clusters.argsort(stable=True)
    boundary = clusters[order].diff() != 0
    edge = boundary.new_ones(1)
    lowest = order[torch.cat([edge, boundary])]
    highest = order[torch.cat([boundary, edge])]
    return torch.cat([lowest, highest]) if two_way else lowest


def _check_candidates(features: Tensor, logits: Tensor) -> None:
    if features.dim() != 2 or logits.dim() != 2 or len(features) != len(logits):
        raise ValueError(
            "features and logits must be of shape N x D and N x C for the same N candidates, got "
            f"{tuple(features.shape)} and {tuple(logits.shape)}"
        )
    n_bad = int((~(features.isfinite().all(dim=1) & logits.isfinite().all(dim=1))).sum())
    if n_bad:
        raise ValueError(
            f"{n_bad} of {len(features)} candidates have features or logits that are not finite; "
            "check the model and its inputs"
        )
