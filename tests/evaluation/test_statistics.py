"""Bootstrap values are what upstream's metrics say of each resample."""

import math
import warnings

import pytest
import torch
from pytorch_ood.metrics import OODMetrics

from pood_plugins.evaluation import statistics
from pood_plugins.evaluation.statistics import Difference, bootstrap, interval, paired


def draw(size_id, size_ood, rows=1, shift=1.0, seed=0, ties=False):
    """Gaussian scores; rounded to few distinct values for ties within and between the sets."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(rows):
        scores = torch.randn(size_id + size_ood, generator=generator)
        scores[size_id:] += shift
        scores = scores.round() if ties else scores
        pairs.append((scores[:size_id], scores[size_id:]))
    return pairs


def resamples(*arguments):
    weights_id, weights_ood = zip(*statistics._resamples(*arguments))
    return torch.cat(weights_id), torch.cat(weights_ood)


# 20, 40 and 100: TPR is exactly 0.95 at a threshold
@pytest.mark.parametrize("sizes", [(30, 20), (17, 40), (23, 100), (12, 33), (1, 5), (5, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_values_are_those_of_upstream(sizes, ties):
    scores = draw(*sizes, rows=3, ties=ties)
    auroc, fpr95 = bootstrap(scores, n=20, seed=3, stream=1)
    assert auroc.shape == fpr95.shape == (3, 20)
    assert auroc.dtype == fpr95.dtype == torch.float64
    for i, (weights_id, weights_ood) in enumerate(zip(*resamples(20, *sizes, 3, 1))):
        labels = torch.tensor([0] * sizes[0] + [-1] * sizes[1])
        for row, (scores_id, scores_ood) in enumerate(scores):
            drawn_id = scores_id.repeat_interleave(weights_id.long())
            drawn_ood = scores_ood.repeat_interleave(weights_ood.long())
            metrics = OODMetrics()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # AUTC of constant scores
                expected = metrics.update(torch.cat([drawn_id, drawn_ood]), labels).compute()
            assert float(auroc[row, i]) == pytest.approx(expected["AUROC"], abs=1e-6)
            assert float(fpr95[row, i]) == pytest.approx(expected["FPR95TPR"], abs=1e-6)


def test_resamples_draw_with_replacement_from_each_set():
    weights_id, weights_ood = resamples(2000, 30, 30, 0, 0)
    for weights in (weights_id, weights_ood):
        assert weights.shape == (2000, 30) and (weights.sum(1) == 30).all()
        assert weights.mean(0).sub(1).abs().max() < 0.1
        assert float(weights.var()) == pytest.approx(1 - 1 / 30, abs=0.05)
    assert not torch.equal(weights_id, weights_ood)


def test_ood_sets_are_resampled_on_their_own_and_share_the_id_resamples():
    first = resamples(200, 30, 50, 0, 0)
    for size_ood, stream in ((50, 1), (50, 7), (400, 0), (400, 2)):
        other = resamples(200, 30, size_ood, 0, stream)
        assert torch.equal(other[0], first[0])
        if size_ood == 50:
            both = torch.stack([first[1].flatten(), other[1].flatten()])
            assert abs(float(both.corrcoef()[0, 1])) < 0.05
    assert not torch.equal(resamples(200, 30, 50, 1, 0)[0], first[0])


def test_values_depend_on_seed_and_own_scores_only(monkeypatch):
    scores = draw(40, 30, rows=3)
    auroc, fpr95 = bootstrap(scores, n=50, seed=5)
    assert not torch.equal(auroc, bootstrap(scores, n=50, seed=6)[0])
    for chunk in (1, 7 * 70, 2**30):
        monkeypatch.setattr(statistics, "_CHUNK", chunk)
        alone = bootstrap(scores[2:], n=50, seed=5)
        assert torch.equal(alone[0], auroc[2:]) and torch.equal(alone[1], fpr95[2:])
    # the first resamples stay when more are drawn
    assert torch.equal(bootstrap(scores, n=80, seed=5)[0][:, :50], auroc)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(bootstrap(scores, n=50, seed=5)[0], auroc)
    finally:
        torch.set_num_threads(threads)


def test_scores_of_any_type_and_scale():
    [(scores_id, scores_ood)] = draw(40, 30)
    expected = bootstrap([(scores_id, scores_ood)], n=20)
    same = bootstrap([(scores_id.double() * 1e-30, scores_ood.double() * 1e-30)], n=20)
    assert torch.equal(torch.stack(same), torch.stack(expected))
    counts = (torch.tensor([0, 1, 2]), torch.tensor([2, 3], dtype=torch.int32))
    halves = tuple(part.half().requires_grad_() for part in counts)
    assert torch.equal(bootstrap([counts], n=20)[0], bootstrap([halves], n=20)[0])


def test_differences_are_paired():
    [(scores_id, scores_ood)] = draw(200, 200)
    monotone = (scores_id.exp(), scores_ood.exp())  # same ranks, same metrics
    noisy = (scores_id, scores_ood - 0.05)
    auroc, fpr95 = bootstrap([(scores_id, scores_ood), monotone, noisy], n=200)
    assert paired(auroc[0], auroc[1]) == paired(fpr95[0], fpr95[1]) == Difference(0, 0, 0)
    assert not paired(auroc[0], auroc[1]).clear
    # far smaller than the intervals, and clear all the same
    low, high = interval(auroc)
    difference = paired(auroc[0], auroc[2])
    assert low[0] < high[2] and difference.clear
    assert 0 < difference.low < difference.mean < difference.high < float(high[0] - low[0]) / 4
    assert difference.mean == pytest.approx(float(auroc[0].mean() - auroc[2].mean()))
    assert paired(auroc[2], auroc[0]).clear


def test_interval_holds_the_level_in_its_middle():
    values = torch.arange(101.0).double()[torch.randperm(101)].expand(2, 3, 101)
    low, high = interval(values, level=0.9)
    torch.testing.assert_close(low, torch.full((2, 3), 5.0).double())
    torch.testing.assert_close(high, torch.full((2, 3), 95.0).double())


def test_intervals_cover_the_truth():
    """Scores of N(0, 1) and N(1, 1) have known AUROC and FPR95; an interval misses rarely."""

    def below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    truth = (below(1 / math.sqrt(2)), below(1.6448536 - 1))
    values = [torch.stack(bootstrap(draw(150, 150, seed=i), n=300, seed=i)) for i in range(60)]
    values = torch.stack(values)[:, :, 0]  # data set, metric, resample
    for metric, expected in enumerate(truth):
        low, high = interval(values[:, metric])
        covered = ((low <= expected) & (expected <= high)).double().mean()
        assert covered >= 0.85
        # nor are they too wide: a bootstrap spreads as much as data sets differ
        spread = values[:, metric].std(1).mean() / values[:, metric].mean(1).std()
        assert 0.75 < spread < 1.33


GOOD = torch.zeros(3)


@pytest.mark.parametrize(
    "scores, options, match",
    [
        ([], {}, "at least one detector"),
        ([(GOOD, GOOD), (GOOD, torch.zeros(4))], {}, r"same samples .* detector 1 .*\(4,\)"),
        ([(torch.zeros(0), GOOD)], {}, r"at least one ID .* \(\(0,\), \(3,\)\)"),
        ([(GOOD, torch.zeros(0))], {}, r"one OOD, .* \(\(3,\), \(0,\)\)"),
        ([(GOOD, torch.zeros(3, 1))], {}, r"one score per sample.* \(3, 1\)"),
        ([(GOOD, GOOD), (GOOD, torch.tensor([0, math.nan, math.inf]))], {}, "2 scores of det.* 1"),
        ([(GOOD, GOOD)], {"n": 1}, "n >= 2"),
        ([(GOOD, GOOD)], {"stream": -1}, "stream >= 0"),
    ],
)
def test_bad_input(scores, options, match):
    with pytest.raises(ValueError, match=match):
        bootstrap(scores, **options)


def test_bad_values():
    with pytest.raises(ValueError, match=r"one row each.* \(2, 3\)"):
        paired(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"same resamples.* \(3,\) and \(4,\)"):
        paired(torch.zeros(3), torch.zeros(4))
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"between 0 and 1, .* got {level}"):
            interval(torch.zeros(3), level)
