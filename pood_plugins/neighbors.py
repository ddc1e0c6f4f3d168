"""
Exact nearest neighbors in torch: the :math:`k` nearest rows of a bank by Euclidean distance, on
the CPU or a GPU, in memory that does not depend on the number of queries.

How it stays exact
------------------

All squared distances
:math:`\\lVert q \\rVert^2 + \\lVert b \\rVert^2 - 2 \\langle q, b \\rangle` are one matrix
product, but in float32 its rounding error exceeds the distance itself for near-duplicates. The
product therefore only *proposes* neighbors:

1. **Scan.** The matrix product is computed with a rigorous bound of its rounding error added to
   every entry, so that it never overestimates a distance. Rows of the bank are compared in groups;
   the groups with the smallest values are kept.
2. **Re-rank.** All rows of the kept groups are compared by their differences, in float64.
3. **Certify.** If the re-ranked distance is not larger than the lower bound of everything that was
   not kept, no closer row was missed. This holds for nearly all queries. The others are scanned
   again in float64, and what even this cannot certify (more near-duplicates than candidates) by
   differences alone.

The result thus does not depend on the precision of the matrix product. Reduced precision (TF32 or
bfloat16, see :func:`torch.set_float32_matmul_precision`) would break the error bound; where it is
enabled, the scan starts in float64, and autocasting is switched off for the scan. No global
setting is changed.

How it skips work
-----------------

On the CPU, the bank is scanned in blocks of rows with similar norm. The distance of a query to all
rows of a block is at least the gap between its norm and theirs, so a query skips every block whose
gap exceeds what it has found so far. It begins with the block of its own norm. Where norms vary
little beside the distances, nothing is skipped and nothing is lost; gradients of
:class:`~pood_plugins.detector.GROOD` have norms from nearly 0 to 1. On a GPU nothing is skipped:
each decision would have to wait for it.

..  autofunction:: pood_plugins.neighbors.kth_distance

..  autofunction:: pood_plugins.neighbors.nearest_rows

..  autoclass:: pood_plugins.neighbors.ScaledRows
    :members:
"""

import math
from typing import Callable, Dict, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ScaledRows", "kth_distance", "nearest_rows"]

#: queries in a matrix product, and rows of the bank: on a CPU, it stays in the cache
_QUERIES, _ROWS, _ROWS_GPU = 1408, 1024, 16384
#: groups kept in addition to the :math:`k` that the answer needs, so that the certificate has room
_EXTRA_GROUPS = 2
#: entries of prepared rows that are kept for the way back, 128 MiB
_PREPARED = 1 << 25
#: entries of the float64 differences held at once, 2 MiB
_DIFFERENCES = 1 << 18
#: relative slack of the certificate on squared distances; half of it is the error of a distance
_SLACK = 1e-6


class ScaledRows:
    """
    Rows of a bank at half the memory: unit vectors in half precision, and the length of each in
    single precision. Half precision alone ends at 6e-8; this way, a row of norm 1e-30 keeps its
    direction.
    """

    def __init__(self, directions: Tensor, lengths: Tensor):
        """
        :param directions: of shape :math:`M \\times D`, floating point
        :param lengths: factors of the directions, of shape :math:`M`
        """
        self.directions = directions
        self.lengths = lengths
        self.shape = directions.shape

    @classmethod
    def pack(cls, rows: Tensor) -> "ScaledRows":
        """
        :param rows: of shape :math:`M \\times D`, floating point
        :return: the rows in half precision, with the norm they had
        """
        rows = rows.double()
        tiny = torch.finfo(torch.float64).tiny
        norms = rows.norm(dim=1)
        directions = (rows / norms.clamp(min=tiny)[:, None]).half()
        # rounding has changed the norms of the directions
        lengths = norms / directions.double().norm(dim=1).clamp(min=tiny)
        return cls(directions, lengths.float())

    def __getitem__(self, index: Union[Tensor, slice]) -> Tensor:
        """
        :param index: which rows
        :return: these rows, float64
        """
        return self.directions[index].double() * self.lengths[index].double()[:, None]


def kth_distance(
    query: Tensor,
    bank: Union[Tensor, ScaledRows],
    k: int = 1,
    batch_size: int = 16384,
    transform: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """
    Euclidean (not squared) distance of each query to its :math:`k`-th nearest row of the bank.

    The relative error is below :math:`10^{-6}`, also for near-duplicates. One device-to-host read
    is made per call on a GPU, and one more for each of the rare rescans.

    :param query: queries of shape :math:`B \\times D`, floating point
    :param bank: rows to search, of shape :math:`M \\times D`, on the device of the queries
    :param k: which neighbor, from 1 (nearest) to :math:`M`
    :param batch_size: queries processed at once; memory grows with it
    :param transform: maps a chunk of queries to what is searched for, so that it never has to
        exist for all queries at once. ``query`` may then have any width, the result must have
        :math:`D` columns.
    :return: distances of shape :math:`B`, float64 if ``query`` is float64, otherwise float32
    :raises ValueError: if shapes do not fit, ``k`` or ``batch_size`` is out of range, or queries
        or bank contain NaN or infinite values
    """
    return nearest_rows(query, bank, k, batch_size, transform)[0][:, -1].contiguous()


def nearest_rows(
    query: Tensor,
    bank: Union[Tensor, ScaledRows],
    k: int = 1,
    batch_size: int = 16384,
    transform: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tuple[Tensor, Tensor]:
    """
    The :math:`k` nearest rows of each query, as :func:`kth_distance` finds them. Which of several
    rows at the same distance are taken is arbitrary.

    :param query: see :func:`kth_distance`, like the other arguments
    :return: Euclidean distances, ascending, and positions of the rows in the bank, both of shape
        :math:`B \\times k`
    :raises ValueError: as :func:`kth_distance`
    """
    _check(query, bank, k, batch_size, transform)
    prepare = transform or (lambda x: x)
    distance = query.new_empty(query.shape[0], k, dtype=torch.float64)
    found = torch.empty_like(distance, dtype=torch.long)
    finite = torch.ones_like(distance[:, 0], dtype=torch.bool)
    pending = torch.arange(query.shape[0], device=query.device)

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        norms = torch.cat(
            [_norm(bank[i : i + _QUERIES]) for i in range(0, bank.shape[0], _QUERIES)]
        )
        bank_finite = torch.isfinite(norms.square()).all()
        norms, order = norms.sort()

        for dtype in [torch.float32, torch.float64] if _float32_is_exact() else [torch.float64]:
            certain = torch.ones_like(pending, dtype=torch.bool)
            for rows, chunk in zip(pending.split(batch_size), certain.split(batch_size)):
                x = query[rows]
                finite[rows] = torch.isfinite(x).all(dim=1)
                x = torch.cat([prepare(part) for part in x.split(_QUERIES)])
                distance[rows], found[rows], chunk[:] = _nearest(x, bank, order, norms, k, dtype)

            # the only device-to-host read: which rows are broken, which need another scan
            state = torch.stack([finite[pending], certain, bank_finite.expand_as(certain)]).cpu()
            broken = int((~state[0]).sum())
            if broken:
                raise ValueError(
                    f"{broken} of {query.shape[0]} rows contain NaN or infinite values. Remove or "
                    "repair them first, e.g. keep z[z.isfinite().all(dim=1)]."
                )
            if not state[2].all():
                raise ValueError(
                    "The bank contains NaN or infinite values. Remove these rows first, e.g. keep "
                    "bank[bank.isfinite().all(dim=1)]."
                )
            if state[1].all():
                break
            pending = pending[(~state[1]).nonzero()[:, 0].to(pending.device)]
        else:
            for rows in pending.split(_QUERIES):
                distance[rows], found[rows] = _by_differences(prepare(query[rows]), bank, k)

    return distance if query.dtype == torch.float64 else distance.float(), found


def _check(
    query: Tensor,
    bank: Union[Tensor, ScaledRows],
    k: int,
    batch_size: int,
    transform: Optional[Callable[[Tensor], Tensor]],
) -> None:
    if query.dim() != 2 or len(bank.shape) != 2:
        raise ValueError(
            f"Expected queries and bank of shape B x D and M x D, got {tuple(query.shape)} and "
            f"{tuple(bank.shape)}. Flatten them first, e.g. with z.flatten(1)."
        )
    if transform is None and query.shape[1] != bank.shape[1]:
        raise ValueError(
            f"The queries have {query.shape[1]} columns, the bank has {bank.shape[1]}. "
            "Use features of the same layer for both."
        )
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(
            f"k={k} must be between 1 and the {bank.shape[0]} rows of the bank. "
            "Use a smaller k or a larger bank."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size must be an integer of at least 1, got {batch_size!r}. Leave it out, or "
            "lower it only as far as memory asks for."
        )


def _float32_is_exact() -> bool:
    """Whether float32 matrix products are computed in float32, and not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised when the backends were configured one by one
        return False


def _skips(device: torch.device) -> bool:
    """Whether to skip blocks, which needs to look at intermediate results."""
    return device.type == "cpu"


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norm


def _nearest(
    query: Tensor,
    bank: Union[Tensor, ScaledRows],
    order: Tensor,
    norms: Tensor,
    k: int,
    dtype: torch.dtype,
) -> Tuple[Tensor, Tensor, Tensor]:
    """
    :param order: rows of the bank by ascending norm
    :param norms: in this order
    :return: distances and rows of shape :math:`B \\times k`, and whether these are certainly the
        nearest, of shape :math:`B`
    """
    rows, dimension = bank.shape
    norm, by_norm = torch.cat([_norm(x) for x in query.split(_QUERIES)]).sort()
    query = query[by_norm]
    scan = _Scan(query, norm, bank, order, norms, k, dtype)
    starts = list(enumerate(range(0, rows, scan.size)))
    if scan.skips:
        first = torch.arange(0, rows, scan.size)
        last = (first + scan.size).clamp(max=rows) - 1
        lowest, highest = norms[first], norms[last]
        home = torch.searchsorted(lowest, norm, right=True).sub_(1).clamp_(min=0)
        # from the block of its own norm, each query goes down as far as needed, and then up
        for block, start in reversed(starts):
            scan.compare(start, (home >= block) & (norm - highest[block] < scan.upper))
        for block, start in starts:
            scan.compare(start, (home < block) & (lowest[block] - norm < scan.upper))
    else:
        for _, start in starts:
            scan.compare(start)

    largest = math.sqrt(torch.finfo(dtype).max / 8)
    no_overflow = (norm < largest) & (norms[-1] < largest)

    def rerank(chosen: Tensor, keep: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Among so many groups: the next one tells whether these were enough."""
        candidates = scan.candidates(chosen, keep)
        distance, found = _rerank(query[chosen], bank, order, candidates, k)
        kth = distance[:, -1]
        lower = norm[chosen].square() - scan.best[chosen, keep].double()
        lower -= (dimension + 8) * torch.finfo(dtype).tiny
        enough = no_overflow[chosen] & (kth.square() * (1 - _SLACK) <= lower)
        return distance, found, (kth == 0) | enough

    distance, found, certain = rerank(scan.queries, k if scan.skips else k + _EXTRA_GROUPS - 1)
    if scan.skips and not certain.all():
        again = (~certain).nonzero()[:, 0]
        distance[again], found[again], certain[again] = rerank(again, k + _EXTRA_GROUPS - 1)
    back = by_norm.argsort()
    return distance[back], found[back], certain[back]


class _Scan:
    """The groups of rows that are closest to each query, among the blocks compared so far."""

    def __init__(
        self,
        query: Tensor,
        norm: Tensor,
        bank: Union[Tensor, ScaledRows],
        order: Tensor,
        norms: Tensor,
        k: int,
        dtype: torch.dtype,
    ):
        self.bank, self.order, self.norms = bank, order, norms
        self.k, self.dtype = k, dtype
        self.skips = _skips(query.device)
        rows, dimension = bank.shape
        # larger k need more groups, whose rows are all re-ranked: keep their number about constant
        self.group = max(1, 4 >> (k.bit_length() // 5))
        size = min(rows, _ROWS if self.skips else _ROWS_GPU)
        #: rows of the bank in a block, a multiple of the group
        self.size = -(-size // self.group) * self.group
        # bound of the relative rounding error of a dot product, with room for the conversions
        self.unit = (dimension + 8) * torch.finfo(dtype).eps / 2

        self.norm = norm
        self.queries = torch.arange(len(query), device=query.device)
        # left @ right.T = 2<q, b> - |b|^2 + rounding bound >= |q|^2 - |q - b|^2
        bound = (2 * self.unit * self.norm[:, None]).to(dtype)
        one = torch.ones_like(bound)
        self.left = torch.cat([2 * query.to(dtype), bound, -one], dim=1)

        keep = k + _EXTRA_GROUPS
        #: the best groups so far: an upper bound of their closeness |q|^2 - |q - b|^2
        self.best = one.new_full((len(query), keep), float("-inf"))
        #: and the first of their rows, in the order of the norms; beyond the end is nothing
        self.first = torch.full_like(self.best, rows, dtype=torch.long)
        # memory of the products and their factors, used again and again: to get it anew for each
        # takes longer than some products
        most = min(len(query), _QUERIES)
        self.product = one.new_empty(most, self.size)
        self.factor = one.new_empty(most, dimension + 2)
        self.prepared: Dict[int, Tensor] = {}
        #: upper bound of the distance to the k-th nearest row
        self.upper = torch.full_like(self.norm, float("inf"))

    def rows(self, start: int) -> Tensor:
        """Rows of a block, with what makes their products with the queries bounds."""
        if start in self.prepared:
            return self.prepared[start]
        b = self.bank[self.order[start : start + self.size]].to(self.dtype)
        norms = self.norms[start : start + self.size, None]
        squared = (1 - self.unit) * norms.square()
        right = torch.cat([b, norms.to(self.dtype), squared.to(self.dtype)], dim=1)
        if len(right) < self.size:  # infinitely far rows
            right = F.pad(right, (0, 0, 0, self.size - len(right)))
            right[len(b) :, -1] = float("inf")
        if len(self.prepared) * right.numel() < _PREPARED:
            self.prepared[start] = right
        return right

    def compare(self, start: int, wanted: Optional[Tensor] = None) -> None:
        """
        Compares queries with the rows of a block.

        :param wanted: mask of the queries, of shape :math:`B`; default is all
        """
        low, high, chosen = 0, len(self.best), None
        if wanted is not None:
            chosen = wanted.nonzero()[:, 0]
            if len(chosen) == 0:
                return  # before the rows are made ready
            low, high = int(chosen[0]), int(chosen[-1]) + 1
            if len(chosen) > 0.9 * (high - low):
                chosen = None  # to pick them would cost more than it saves
        if chosen is None:
            chosen = self.queries[low:high]
            factors = self.left[low:high].split(_QUERIES)
        else:
            factors = [None] * -(-len(chosen) // _QUERIES)
        right = self.rows(start)
        stride = self.size // self.group
        keep = self.best.shape[1]
        for rows, factor in zip(chosen.split(_QUERIES), factors):
            n = len(rows)
            if factor is None:
                factor = torch.index_select(self.left, 0, rows, out=self.factor[:n])
            product = torch.mm(factor, right.T, out=self.product[:n])
            closeness = product.view(n, self.group, stride).amax(dim=1)
            if wanted is not None:  # most queries find nothing new here
                better = (closeness.amax(dim=1) > self.best[rows, -1]) & wanted[rows]
                closeness, rows = closeness[better], rows[better]
            best, index = torch.cat([self.best[rows], closeness], dim=1).topk(keep, dim=1)
            before = self.first[rows].gather(1, index.clamp(max=keep - 1))
            self.first[rows] = torch.where(index < keep, before, index + (start - keep))
            self.best[rows] = best
            if wanted is not None:
                # Closeness is too large by at most twice the rounding bound of that row, whose
                # norm is at most |q| + |q - b|: 2 |q| + 2 distance is more than enough.
                norm = self.norm[rows]
                squared = (norm.square() - best[:, self.k - 1].double()).clamp_(min=0)
                distance = squared.sqrt()
                error = 8 * self.unit * (2 * norm + distance) * (norm + distance)
                self.upper[rows] = (squared + error).sqrt()

    def candidates(self, queries: Tensor, keep: int) -> Tensor:
        """
        :return: rows of the best groups of some queries, in the order of the norms, of shape
            queries x candidates
        """
        stride = self.size // self.group
        offsets = stride * torch.arange(self.group, device=self.first.device)
        return (self.first[queries, :keep, None] + offsets).flatten(1)


def _rerank(
    query: Tensor, bank: Union[Tensor, ScaledRows], order: Tensor, candidates: Tensor, k: int
) -> Tuple[Tensor, Tensor]:
    """
    :return: distances, float64, and rows of the :math:`k` nearest candidates, both of shape
        :math:`B \\times k`. Candidates beyond the end of the bank are padding.
    """
    rows, dimension = bank.shape
    step = max(1, _DIFFERENCES // (candidates.shape[1] * dimension))
    distances, found = [], []
    for q, index in zip(query.split(step), candidates.split(step)):
        in_bank = order[index.clamp(max=rows - 1)]
        b = bank[in_bank.flatten()].view(*index.shape, dimension)
        # a difference of two float32 numbers is rounded once, and that is good enough
        dtype = torch.promote_types(torch.promote_types(b.dtype, q.dtype), torch.float32)
        difference = b.to(dtype) - q[:, None].to(dtype)
        distance = _norm(difference).masked_fill_(index >= rows, float("inf"))
        nearest = distance.topk(k, dim=1, largest=False)
        distances.append(nearest.values)
        found.append(in_bank.gather(1, nearest.indices))
    return torch.cat(distances), torch.cat(found)


def _by_differences(
    query: Tensor, bank: Union[Tensor, ScaledRows], k: int
) -> Tuple[Tensor, Tensor]:
    """
    :return: distances, float64, and rows of the :math:`k` nearest rows, both of shape
        :math:`B \\times k`, by differences alone
    """
    query = query.double()
    distances = query.new_empty(query.shape[0], 0)
    found = torch.empty_like(distances, dtype=torch.long)
    for start in range(0, bank.shape[0], _ROWS):
        b = bank[start : start + _ROWS].double()
        distance = torch.cdist(query, b, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.arange(start, start + len(b), device=query.device).expand_as(distance)
        distances, found = torch.cat([distances, distance], 1), torch.cat([found, rows], 1)
        distances, index = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
        found = found.gather(1, index)
    return distances, found
