"""
Exact nearest neighbors in torch: Euclidean distances to the :math:`k`-th nearest row of a bank, on
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
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

__all__ = ["kth_distance"]

#: rows of the bank per matrix product: the product of 1024 queries stays in the cache of a CPU
_BANK_ROWS = 4096
#: groups kept in addition to the :math:`k` that the answer needs, so that the certificate has room
_EXTRA_GROUPS = 3
#: entries of the float64 differences held at once, 32 MiB
_DIFFERENCES = 1 << 22
#: relative slack of the certificate on squared distances; half of it is the error of a distance
_SLACK = 1e-6


def kth_distance(
    query: Tensor,
    bank: Tensor,
    k: int = 1,
    batch_size: int = 1024,
    transform: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """
    Euclidean (not squared) distance of each query to its :math:`k`-th nearest row of the bank.

    The relative error is below :math:`10^{-6}`, also for near-duplicates. One device-to-host read
    is made per call, and one more for each of the rare rescans.

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
    _check(query, bank, k, batch_size, transform)
    prepare = transform or (lambda x: x)
    distance = query.new_empty(query.shape[0], dtype=torch.float64)
    finite = torch.ones_like(distance, dtype=torch.bool)
    pending = torch.arange(query.shape[0], device=query.device)

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        squared_norms = torch.cat([_squared_norm(b) for b in bank.split(_BANK_ROWS)])
        bank_finite = torch.isfinite(squared_norms).all()

        for dtype in [torch.float32, torch.float64] if _float32_is_exact() else [torch.float64]:
            certain = torch.ones_like(pending, dtype=torch.bool)
            for rows, chunk in zip(pending.split(batch_size), certain.split(batch_size)):
                x = query[rows]
                finite[rows] = torch.isfinite(x).all(dim=1)
                distance[rows], chunk[:] = _scan(prepare(x), bank, squared_norms, k, dtype)

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
            for rows in pending.split(batch_size):
                distance[rows] = _by_differences(prepare(query[rows]), bank, k)

    return distance if query.dtype == torch.float64 else distance.float()


def _check(
    query: Tensor, bank: Tensor, k: int, batch_size: int, transform: Optional[Callable]
) -> None:
    if query.dim() != 2 or bank.dim() != 2:
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
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def _float32_is_exact() -> bool:
    """Whether float32 matrix products are computed in float32, and not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised when the backends were configured one by one
        return False


def _squared_norm(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=1)


def _scan(
    query: Tensor, bank: Tensor, squared_norms: Tensor, k: int, dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """
    :return: distances of shape :math:`B` and whether each is certainly the :math:`k`-th smallest
    """
    rows, dimension = bank.shape
    # larger k need more groups, whose rows are all re-ranked: keep their number about constant
    group = max(1, 16 >> (k - 1).bit_length())
    keep = k + _EXTRA_GROUPS
    # bound of the relative rounding error of a dot product, with room for the conversions
    unit = (dimension + 8) * torch.finfo(dtype).eps / 2

    query = query.double()
    query_squared = query.square().sum(dim=1)
    # left @ right.T = 2<q, b> - |b|^2 + rounding bound >= |q|^2 - |q - b|^2
    left = torch.cat(
        [2 * query, 2 * unit * query_squared.sqrt()[:, None], -torch.ones_like(query[:, :1])],
        dim=1,
    ).to(dtype)

    # the best groups so far: an upper bound of their closeness, and their rows
    best = left.new_empty(len(query), 0)
    members = torch.empty((len(query), 0, group), dtype=torch.long, device=query.device)
    for start in range(0, rows, _BANK_ROWS):
        b = bank[start : start + _BANK_ROWS].to(dtype)
        squared = squared_norms[start : start + _BANK_ROWS, None]
        right = torch.cat([b, squared.sqrt().to(dtype), ((1 - unit) * squared).to(dtype)], dim=1)
        product = left @ right.T
        stride = -(-b.shape[0] // group)
        if stride * group > b.shape[0]:
            padding = (0, stride * group - b.shape[0])
            product = torch.nn.functional.pad(product, padding, value=float("-inf"))
        closeness = product.view(len(query), group, stride).amax(dim=1)
        closeness, first = closeness.topk(min(keep, stride), dim=1)
        offsets = start + stride * torch.arange(group, device=query.device)
        best = torch.cat([best, closeness], dim=1)
        members = torch.cat([members, first[:, :, None] + offsets], dim=1)
        best, index = best.topk(min(keep, best.shape[1]), dim=1)
        members = members.gather(1, index[:, :, None].expand(-1, -1, group))

    kth = _rerank(query, bank, members.flatten(1), k)

    if -(-rows // group) <= keep:  # every row was re-ranked
        return kth.sqrt(), torch.ones_like(kth, dtype=torch.bool)
    lower = query_squared - best[:, -1].double() - (dimension + 8) * torch.finfo(dtype).tiny
    largest = torch.finfo(dtype).max / 8
    no_overflow = (query_squared < largest) & (squared_norms.max() < largest)
    return kth.sqrt(), (kth == 0) | (no_overflow & (kth * (1 - _SLACK) <= lower))


def _rerank(query: Tensor, bank: Tensor, candidates: Tensor, k: int) -> Tensor:
    """
    :return: squared distances of shape :math:`B`, float64, to the :math:`k`-th nearest candidate.
        Candidates beyond the end of the bank are padding.
    """
    rows, dimension = bank.shape
    step = max(1, _DIFFERENCES // (candidates.shape[1] * dimension))
    kth = []
    for q, index in zip(query.split(step), candidates.split(step)):
        difference = bank[index.clamp(max=rows - 1)].double() - q[:, None]
        squared = difference.square_().sum(dim=2).masked_fill_(index >= rows, float("inf"))
        kth.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(kth)


def _by_differences(query: Tensor, bank: Tensor, k: int) -> Tensor:
    """
    :return: distances of shape :math:`B`, float64, to the :math:`k`-th nearest row, by differences
        alone
    """
    query = query.double()
    nearest = query.new_empty(query.shape[0], 0)
    for b in bank.split(_BANK_ROWS):
        distance = torch.cdist(query, b.double(), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = torch.cat([nearest, distance], dim=1)
        nearest = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False).values
    return nearest[:, -1]
