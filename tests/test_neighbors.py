import math
from collections import Counter
from operator import attrgetter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pood_plugins import neighbors
from pood_plugins.neighbors import ScaledRows, kth_distance

pytestmark = pytest.mark.usefixtures("one_thread")

NEIGHBORS = [1, 2, 3, 10, 50]


def sorted_distances(query: Tensor, bank: Tensor) -> Tensor:
    """Distances of shape B x M, ascending, one query at a time by float64 differences."""
    bank = bank.double()
    rows = [(bank - q).square().sum(dim=1).sqrt().sort().values for q in query.double()]
    return torch.stack(rows) if rows else bank.new_empty(0, len(bank))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian():
    return randn(40, 24, seed=1), randn(9000, 24)


def near_duplicates(relative):
    query, bank = gaussian()
    return bank[: len(query)] * (1 + relative * query), bank


def one_cluster(radius):
    query, bank = gaussian()
    return 3 + radius * query, 3 + radius * bank


def exact_duplicates():
    query, bank = gaussian()
    return bank[::200], bank


def bank_of_one_row():
    query, bank = gaussian()
    return torch.cat([query, bank[:1]]), bank[:1].expand(9000, -1).contiguous()


def bank_of_few_rows():
    query, bank = gaussian()
    return torch.cat([query, bank[:4]]), bank[:4].repeat(2000, 1)


def gradient_like():
    # directions times probabilities from 1e-30 to 1
    query, bank = gaussian()
    return (
        normalize(query) * 10 ** (-30 * rand(len(query), 1, seed=2)),
        normalize(bank) * 10 ** (-30 * rand(len(bank), 1, seed=3)),
    )


def scaled(factor):
    query, bank = gaussian()
    return query * factor, bank * factor


def mixed_scales():
    query, bank = gaussian()
    return query * 1e15, torch.cat([bank * 1e-15, bank])


def huge_bank():
    # the squared norms of the bank exceed float32, its products with the queries do not
    query, bank = gaussian()
    return 1e3 * query, 1e25 * bank


def shifted(offset):
    query, bank = gaussian()
    return query + offset, bank + offset


CASES = {
    "gaussian": gaussian(),
    "near-duplicates 1e-5": near_duplicates(1e-5),
    "near-duplicates 2e-7": near_duplicates(2e-7),
    "cluster of radius 1e-5": one_cluster(1e-5),
    "cluster of radius 1e-6": one_cluster(1e-6),
    "exact duplicates": exact_duplicates(),
    "bank of one row": bank_of_one_row(),
    "bank of few rows": bank_of_few_rows(),
    "gradient-like": gradient_like(),
    "tiny": scaled(1e-30),
    "subnormal": scaled(1e-38),
    "huge": scaled(1e30),
    "mixed scales": mixed_scales(),
    "huge bank": huge_bank(),
    "offset 1e2": shifted(1e2),
    "offset 1e4": shifted(1e4),
    "offset 1e6": shifted(1e6),
}


@pytest.fixture
def scans(monkeypatch) -> Counter:
    """Counts the queries that each stage of the search has to answer."""
    rows: Counter = Counter()
    nearest, by_differences = neighbors._nearest, neighbors._by_differences

    def counting_nearest(query, bank, order, norms, k, dtype):
        rows[dtype] += len(query)
        return nearest(query, bank, order, norms, k, dtype)

    def counting_differences(query, bank, k):
        rows["differences"] += len(query)
        return by_differences(query, bank, k)

    monkeypatch.setattr(neighbors, "_nearest", counting_nearest)
    monkeypatch.setattr(neighbors, "_by_differences", counting_differences)
    return rows


@pytest.fixture(params=[True, False], ids=["skipping", "as on a GPU"])
def skips(monkeypatch, request) -> bool:
    """Both ways through the bank, also without a GPU."""
    monkeypatch.setattr(neighbors, "_skips", lambda device: request.param)
    monkeypatch.setattr(neighbors, "_ROWS_GPU", 4096)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_matches_brute_force(case, skips):
    query, bank = CASES[case]
    expected = sorted_distances(query, bank)
    for k in NEIGHBORS:
        distance = kth_distance(query, bank, k)
        assert distance.dtype == torch.float32 and distance.shape == (len(query),)
        # the search is good to 1e-6, the rest is the rounding of subnormal results
        torch.testing.assert_close(distance.double(), expected[:, k - 1], rtol=1e-6, atol=1e-44)


def test_only_exact_duplicates_have_distance_zero():
    query, bank = exact_duplicates()
    assert (kth_distance(query, bank) == 0).all()
    assert (kth_distance(query, bank, k=2) > 0).all()
    query, bank = near_duplicates(2e-7)
    assert (kth_distance(query, bank) > 0).all()


@pytest.mark.parametrize(
    "size",
    [1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 1028, 2047, 2048, 2049, 4095, 4096, 4097, 8193],
)
def test_bank_sizes(size, skips):
    query, bank = randn(7, 5, seed=1), randn(size, 5)
    expected = sorted_distances(query, bank)
    for k in {k for k in [*NEIGHBORS, size - 1, size] if 1 <= k <= size}:
        torch.testing.assert_close(
            kth_distance(query, bank, k).double(), expected[:, k - 1], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("position", [0, 255, 256, 1023, 1024, 4095, 4096, 8191, 8192, 8199])
def test_finds_the_neighbor_wherever_it_is(position, skips):
    bank = 10 + randn(8200, 6)
    bank[position] = 0
    assert kth_distance(torch.zeros(1, 6), bank).item() == 0


def test_one_dimension():
    query, bank = randn(30, 1, seed=1), randn(5000, 1)
    expected = sorted_distances(query, bank)
    for k in NEIGHBORS:
        torch.testing.assert_close(
            kth_distance(query, bank, k).double(), expected[:, k - 1], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("transform", [None, lambda x: x[:, :24]])
def test_no_queries(transform, skips):
    distance = kth_distance(torch.empty(0, 24), randn(5000, 24), k=2, transform=transform)
    assert distance.shape == (0,) and distance.dtype == torch.float32


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(dtype, bank_dtype):
    query, bank = gaussian()
    query, bank = query.to(dtype), bank.to(bank_dtype)
    distance = kth_distance(query, bank, k=3)
    expected = sorted_distances(query, bank)[:, 2]
    if dtype == torch.float64:
        assert distance.dtype == torch.float64
        torch.testing.assert_close(distance, expected, rtol=1e-12, atol=0)
    else:
        assert distance.dtype == torch.float32
        torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


def test_float64_near_duplicates_closer_than_float32_resolves():
    query, bank = randn(20, 8, seed=1).double(), randn(5000, 8).double()
    query = bank[:20] + 1e-11 * query
    expected = sorted_distances(query, bank)[:, 0]
    torch.testing.assert_close(kth_distance(query, bank), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["gaussian", "gradient-like", "cluster of radius 1e-6"])
def test_batch_size_does_not_matter(case):
    # the reported distance is the same sum of squared differences whatever the chunk, so that
    # results are not only close, but equal
    query, bank = CASES[case]
    expected = kth_distance(query, bank, k=2)
    for batch_size in [1, 7, 1000]:
        assert torch.equal(kth_distance(query, bank, k=2, batch_size=batch_size), expected)


def test_transform_runs_on_chunks():
    query, bank = randn(50, 3, seed=1), randn(5000, 6)
    chunks = []

    def transform(x: Tensor) -> Tensor:
        chunks.append(len(x))
        return torch.cat([x, x**2], dim=1)

    distance = kth_distance(query, bank, k=2, batch_size=20, transform=transform)
    expected = sorted_distances(torch.cat([query, query**2], dim=1), bank)[:, 1]
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)
    assert chunks[:3] == [20, 20, 10]


@pytest.mark.usefixtures("skips")
@pytest.mark.parametrize(
    "case, stage",
    [
        ("gaussian", torch.float32),
        ("offset 1e4", torch.float64),
        ("cluster of radius 1e-6", "differences"),
    ],
)
def test_every_stage_is_reached_and_exact(case, stage, scans):
    query, bank = CASES[case]
    distance = kth_distance(query, bank)
    assert scans[stage] > 0 and list(scans)[-1] == stage
    expected = sorted_distances(query, bank)[:, 0]
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


@pytest.fixture
def compared(monkeypatch):
    """Counts the pairs of a query and a row of the bank whose product is computed."""
    pairs = []
    compare = neighbors._Scan.compare

    def counting(scan, start, wanted=None):
        queries = len(scan.norm) if wanted is None else int(wanted.sum())
        pairs.append(queries * min(scan.size, scan.bank.shape[0] - start))
        compare(scan, start, wanted)

    monkeypatch.setattr(neighbors._Scan, "compare", counting)
    return pairs


def test_gradients_skip_most_of_the_bank(compared):
    # directions of ten classes; most training samples have a probability near 0
    classes = normalize(randn(10, 16, seed=3))
    bank = normalize(classes.repeat(2000, 1) + 0.1 * randn(20000, 16)) * rand(20000, 1) ** 4
    query = normalize(randn(500, 16, seed=1)) * rand(500, 1, seed=2)
    query = torch.cat([query, bank[:1500] * 1.01])
    expected = sorted_distances(query[::50], bank)
    for k in [1, 10]:
        compared.clear()
        distance = kth_distance(query, bank, k)
        assert sum(compared) < 0.5 * len(query) * len(bank)
        torch.testing.assert_close(distance[::50].double(), expected[:, k - 1], rtol=1e-6, atol=0)


def test_rows_of_one_norm_are_all_compared_once(compared, skips):
    query, bank = normalize(randn(300, 16, seed=1)), normalize(randn(9000, 16))
    distance = kth_distance(query, bank)
    assert sum(compared) == 300 * 9000
    expected = sorted_distances(query, bank)[:, 0]
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["gaussian", "gradient-like", "near-duplicates 1e-5", "huge"])
def test_scaled_rows(case, skips):
    query, bank = CASES[case]
    packed = ScaledRows.pack(bank)
    assert packed.directions.dtype == torch.float16 and packed.shape == bank.shape
    rows = packed[:]
    norms = bank.double().norm(dim=1)
    torch.testing.assert_close(rows.norm(dim=1), norms, rtol=2e-7, atol=0)
    # a unit vector in half precision has an error below 2^-11 in each entry, relative to it
    assert ((rows - bank).norm(dim=1) <= 2**-11 * norms).all()
    for k in [1, 10]:
        distance = kth_distance(query, packed, k)
        expected = sorted_distances(query, rows)[:, k - 1]
        torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


def test_scaled_rows_of_zeros():
    packed = ScaledRows.pack(torch.zeros(3, 4))
    assert torch.equal(packed[torch.tensor([0, 2])], torch.zeros(2, 4, dtype=torch.float64))
    assert kth_distance(torch.ones(1, 4), packed).item() == 2


@pytest.mark.parametrize("k", NEIGHBORS)
def test_few_queries_of_ordinary_data_need_another_scan(k, scans):
    query, bank = randn(2000, 64, seed=1), randn(10001, 64)
    kth_distance(query, bank, k)
    assert scans[torch.float32] == 2000
    assert scans[torch.float64] <= 20 and scans["differences"] == 0


def test_few_gradients_need_another_scan(scans):
    # probabilities between 1e-6 and 1, and queries that are partly in the bank
    bank = normalize(randn(10000, 64)) * 10 ** (-6 * rand(10000, 1))
    query = torch.cat([bank[:500], normalize(randn(500, 64, seed=1)) * rand(500, 1, seed=2)])
    kth_distance(query, bank)
    assert scans[torch.float64] <= 10 and scans["differences"] == 0


def _set_float32_matmul_precision(value):
    return lambda: torch.set_float32_matmul_precision(value)


def _set_fp32_precision(name, value):
    def reduce():
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("torch has this setting since 2.9")
        setattr(attrgetter(name)(torch), "fp32_precision", value)

    return reduce


@pytest.fixture
def restore_precision():
    names = ("backends", "backends.mkldnn", "backends.mkldnn.matmul", "backends.cuda.matmul")
    there = names if hasattr(torch.backends, "fp32_precision") else ()
    backends = [attrgetter(name)(torch) for name in there]
    before = [backend.fp32_precision for backend in backends]
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip(backends, before):
        backend.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest"
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize(
    "reduce",
    [
        pytest.param(_set_float32_matmul_precision("high"), id="high"),
        pytest.param(_set_float32_matmul_precision("medium"), id="medium"),
        pytest.param(_set_fp32_precision("backends", "tf32"), id="all tf32"),
        pytest.param(_set_fp32_precision("backends.mkldnn", "bf16"), id="mkldnn bf16"),
        pytest.param(
            _set_fp32_precision("backends.mkldnn.matmul", "bf16"), id="mkldnn.matmul bf16"
        ),
        pytest.param(_set_fp32_precision("backends.cuda.matmul", "tf32"), id="cuda.matmul tf32"),
    ],
)
def test_reduced_matmul_precision_is_not_used(reduce, scans, restore_precision):
    query, bank = CASES["near-duplicates 1e-5"]
    expected = sorted_distances(query, bank)[:, 0]
    reduce()
    distance = kth_distance(query, bank)
    assert scans[torch.float32] == 0 and scans[torch.float64] == len(query)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["gaussian", "near-duplicates 1e-5", "offset 1e2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype, case):
    query, bank = CASES[case]
    expected = kth_distance(query, bank)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(kth_distance(query, bank), expected)
        assert torch.is_autocast_enabled("cpu")


def test_global_state_is_left_alone():
    def state():
        return (
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.random.get_rng_state().tolist(),
        )

    query, bank = CASES["cluster of radius 1e-6"]  # goes through every stage
    before = state()
    kth_distance(query, bank)
    assert state() == before


def test_inputs_are_left_alone():
    query, bank = (x.clone() for x in CASES["gaussian"])
    distance = kth_distance(query.requires_grad_(), bank.requires_grad_())
    assert not distance.requires_grad
    assert torch.equal(query, CASES["gaussian"][0]) and torch.equal(bank, CASES["gaussian"][1])


def test_strided_and_inference_inputs():
    query, bank = CASES["gaussian"]
    expected = kth_distance(query, bank)
    assert torch.equal(kth_distance(query.T.contiguous().T, bank.T.contiguous().T), expected)
    with torch.inference_mode():
        query, bank = query.clone(), bank.clone()
    assert torch.equal(kth_distance(query, bank), expected)


@pytest.mark.parametrize(
    "query, bank, arguments, message",
    [
        (randn(3), randn(5, 2), {}, r"B x D and M x D, got \(3,\) and \(5, 2\)\. Flatten"),
        (randn(3, 2), randn(5, 2, 1), {}, r"got \(3, 2\) and \(5, 2, 1\)\. Flatten"),
        (randn(3, 2), randn(5, 4), {}, r"queries have 2 columns, the bank has 4\. Use"),
        (randn(3, 2), randn(5, 2), {"k": 0}, r"k=0 must be between 1 and the 5 rows"),
        (randn(3, 2), randn(5, 2), {"k": 6}, r"k=6 .* Use a smaller k or a larger bank"),
        (randn(3, 2), randn(0, 2), {}, r"the 0 rows of the bank"),
        (
            randn(3, 2),
            randn(5, 2),
            {"batch_size": 0},
            r"batch_size must be an integer of at least 1, got 0\. Leave",
        ),
    ],
)
def test_bad_arguments(query, bank, arguments, message):
    with pytest.raises(ValueError, match=message):
        kth_distance(query, bank, **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_input(value):
    query, bank = randn(30, 4, seed=1), randn(5000, 4)
    query[3, 1] = query[3, 2] = query[17, 0] = value
    for batch_size in [8, 1024]:
        with pytest.raises(ValueError, match=r"2 of 30 rows contain NaN or infinite .* Remove"):
            kth_distance(query, bank, batch_size=batch_size)
    # one broken row does not take part in the answer, but must not be dropped in silence either
    bank[4321, 0] = value
    with pytest.raises(ValueError, match=r"bank contains NaN or infinite values\. Remove"):
        kth_distance(randn(30, 4, seed=1), bank)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_gpu_agrees_with_cpu(case):
    query, bank = CASES[case]
    for k in NEIGHBORS:
        distance = kth_distance(query.cuda(), bank.cuda(), k)
        assert distance.is_cuda
        torch.testing.assert_close(distance.cpu(), kth_distance(query, bank, k), rtol=1e-6, atol=0)
