"""
Properties of the detectors and of the search, on random problems that hypothesis chooses.
"""

import pytest
import test_grood
import test_neighbors
import test_nero
import torch
from hypothesis import given
from hypothesis import strategies as st

from pood_plugins.detector import GROOD, NERO, nero_relevance
from pood_plugins.neighbors import kth_distance

pytestmark = pytest.mark.usefixtures("one_thread")


@given(seed=st.integers(0, 1000), source=st.sampled_from(["outliers", "mean", "tensor", "mixup"]))
def test_grood_order_of_the_training_data_does_not_matter(seed, source):
    head, z, labels = test_grood.problem(seed=seed)
    source = test_grood.randn(6, seed=seed) if source == "tensor" else source
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    queries = test_grood.randn(20, 6, seed=seed + 1)
    scores = [
        GROOD(None, head, ood_prototype=source, n_synthetic=len(z))
        .fit_features(z[rows], labels[rows])
        .predict_features(queries)
        for rows in (torch.arange(len(z)), order)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-7)


@given(
    seed=st.integers(0, 10000),
    dimension=st.integers(1, 40),
    n_classes=st.integers(1, 12),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_nero_conservation(seed, dimension, n_classes, scale):
    z = scale * test_nero.randn(8, dimension, seed=seed).double()
    weight = test_nero.randn(n_classes, dimension, seed=seed + 1).double()
    bias = test_nero.randn(n_classes, seed=seed + 2).double()
    relevance, bias_relevance = nero_relevance(z, weight, bias)
    # dividing by a logit amplifies the rounding of its summands
    unfloored = ((z @ weight.T + bias).abs() > 1e-4 * max(1, scale)).all(dim=1)
    total = (relevance.sum(dim=1) + bias_relevance)[unfloored]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 1000), dead=st.integers(0, 6), copies=st.integers(0, 6))
def test_nero_order_of_the_training_data_does_not_matter(seed, dead, copies):
    # relevance of deficient rank: its null space has no directions of its own. The queries
    # reach into it, so that a component from there would show.
    head, z, labels = test_nero.problem(n=60, dimension=20, seed=seed)
    z[:, :dead] = 0
    z[:, dead : dead + copies] = z[:, 19:]
    head.weight[:, dead : dead + copies] = head.weight[:, 19:]
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    queries = test_nero.randn(10, 20, seed=seed + 1).abs()
    scores = [
        NERO(None, head, n_components=1.0)
        .fit_features(z[rows], labels[rows])
        .predict_features(queries)
        for rows in (torch.arange(len(z)), order)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=0)


# coordinates on a coarse grid make ties and duplicates likely, the exponent moves the scale
grids = st.integers(1, 4).flatmap(
    lambda dimension: st.tuples(
        *[
            st.lists(
                st.lists(st.integers(-3, 3), min_size=dimension, max_size=dimension),
                min_size=1,
                max_size=size,
            )
            for size in (8, 90)
        ],
        st.integers(-36, 30),
        st.integers(1, 90),
    )
)


@given(grids)
def test_neighbors_on_any_grid(problem):
    query, bank, exponent, k = problem
    query, bank = (torch.tensor(x, dtype=torch.float64) * 10.0**exponent for x in (query, bank))
    query, bank, k = query.float(), bank.float(), min(k, len(bank))
    distance = kth_distance(query, bank, k, batch_size=3)
    expected = test_neighbors.sorted_distances(query, bank)[:, k - 1]
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=1e-44)


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 60),
    size=st.integers(60, 700),
    spread=st.sampled_from([1.0, 1e-3, 1e-6]),
)
def test_neighbors_properties(seed, k, size, spread):
    query, bank = (
        1 + spread * test_neighbors.randn(5, 8, seed=seed),
        1 + spread * test_neighbors.randn(size, 8, seed=seed + 1),
    )
    distance = kth_distance(query, bank, k)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    # the order of the bank does not matter, a farther neighbor is not closer, and a larger bank
    # brings no neighbor farther away
    torch.testing.assert_close(kth_distance(query, bank[order], k), distance, rtol=1e-6, atol=0)
    assert (kth_distance(query, bank, min(k + 1, size)) >= distance * (1 - 1e-6)).all()
    larger = torch.cat([bank, 1 + spread * test_neighbors.randn(50, 8, seed=seed + 2)])
    assert (kth_distance(query, larger, k) <= distance * (1 + 1e-6)).all()
