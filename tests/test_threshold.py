"""
Thresholds: counted by hand, and their confidence statements by simulation and by the binomial
distribution, which says the same as the beta distribution in another way.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from pood_plugins.threshold import Threshold, calibrate

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


def test_by_hand():
    threshold = calibrate(torch.arange(1.0, 21.0), tpr=0.95)
    assert threshold.value == 19 and threshold.tpr == 0.95 and threshold.n_id == 20
    assert threshold.target == "tpr" and threshold.n_ood == 0 and threshold.fpr is None
    assert threshold([18, 19, 19.5, 100]).tolist() == [False, False, True, True]


def test_by_hand_with_outliers():
    known, unknown = torch.arange(10.0), torch.tensor([4.0, 7, 8, 20, 21])
    threshold = calibrate(known, scores_ood=unknown, fpr=0.4)
    # 4 and 7 may be accepted, 8 may not
    assert 7 < threshold.value < 8 and threshold.fpr == 0.4 and threshold.tpr == 0.8
    assert threshold.target == "fpr" and threshold.n_ood == 5
    assert calibrate(known, scores_ood=unknown, fpr=0.39).value < 7
    assert calibrate(known, scores_ood=unknown, fpr=0.0).value < 4
    by_tpr = calibrate(known, 0.9, scores_ood=unknown)
    assert by_tpr.value == 8 and by_tpr.fpr == 0.6 and by_tpr.target == "tpr"


@given(SCORES, st.floats(0.01, 1.0))
def test_smallest_threshold_that_accepts_the_share(scores, tpr):
    threshold = calibrate(scores, tpr)
    needed = tpr * len(scores) - 1e-9
    assert threshold.value in scores
    assert sum(score <= threshold.value for score in scores) >= needed
    assert sum(score < threshold.value for score in scores) < needed
    assert threshold.tpr == sum(score <= threshold.value for score in scores) / len(scores)
    assert int(threshold(scores).sum()) == len(scores) - round(threshold.tpr * len(scores))


@given(SCORES, SCORES, st.floats(0.0, 0.99))
def test_largest_threshold_that_accepts_no_more_outliers(known, unknown, fpr):
    threshold = calibrate(known, scores_ood=unknown, fpr=fpr)
    allowed = fpr * len(unknown) + 1e-9
    above = math.nextafter(threshold.value, math.inf)
    assert sum(score <= threshold.value for score in unknown) <= allowed
    assert sum(score <= above for score in unknown) > allowed


def test_interval_by_the_binomial_distribution():
    """The m-th of n scores exceeds the quantile q if fewer than m scores are below it."""
    for n, tpr, confidence in ((50, 0.9, 0.95), (1000, 0.95, 0.9), (10, 1.0, 0.95)):
        threshold = calibrate(range(n), tpr, confidence=confidence)
        lower, upper = threshold.tpr_interval
        m = math.ceil(tpr * n - 1e-9)
        tail = (1 - confidence) / 2
        # the share that is accepted is below q if m or more scores are
        assert binom.sf(m - 1, n, lower) == pytest.approx(tail, rel=1e-6)
        assert binom.sf(m - 1, n, upper) == pytest.approx(1 - tail, rel=1e-6)


@pytest.mark.parametrize("n", [20, 200])
def test_interval_by_simulation(n):
    generator = np.random.default_rng(0)
    hits_tpr = hits_fpr = 0
    repetitions = 1500
    for _ in range(repetitions):
        # the share below a threshold is the threshold itself, for uniform scores
        threshold = calibrate(generator.random(n), 0.9, confidence=0.9)
        hits_tpr += threshold.tpr_interval[0] <= threshold.value <= threshold.tpr_interval[1]
        threshold = calibrate([0.5], scores_ood=generator.random(n), fpr=0.1, confidence=0.9)
        hits_fpr += threshold.fpr_interval[0] <= threshold.value <= threshold.fpr_interval[1]
    assert hits_tpr / repetitions == pytest.approx(0.9, abs=0.03)
    assert hits_fpr / repetitions == pytest.approx(0.9, abs=0.03)


def test_interval_of_what_is_counted():
    """Of Clopper and Pearson: shares at which as few, or as many, would be rare."""
    unknown = torch.tensor([0.0] * 3 + [9.0] * 17)
    threshold = calibrate(torch.ones(50), scores_ood=unknown)
    lower, upper = threshold.fpr_interval
    assert threshold.fpr == 3 / 20
    assert binom.sf(2, 20, lower) == pytest.approx(0.025, rel=1e-6)
    assert binom.cdf(3, 20, upper) == pytest.approx(0.025, rel=1e-6)
    assert calibrate([1.0], scores_ood=[2.0]).fpr_interval[0] == 0
    assert calibrate([1.0], scores_ood=[0.0]).fpr_interval[1] == 1
    by_fpr = calibrate(torch.tensor([0.0] * 3 + [9.0] * 17), scores_ood=[5.0], fpr=0)
    assert by_fpr.tpr_interval == pytest.approx((lower, upper))


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda s: torch.tensor(s).half()])
def test_kinds_of_scores(make):
    scores = [0.5, 0.25, 1.0, 2.0]
    threshold = calibrate(make(scores), 0.75)
    assert threshold.value == 1.0
    mask = threshold(make(scores))
    assert mask.dtype == torch.bool and mask.tolist() == [False, False, False, True]
    assert threshold(torch.zeros(2, 3)).shape == (2, 3)


def test_float32_scores_at_the_threshold():
    scores = torch.rand(101, generator=torch.Generator().manual_seed(0))
    threshold = calibrate(scores, 1.0)
    assert not threshold(scores).any()
    assert threshold(scores.max().nextafter(torch.tensor(2.0))[None]).all()


def test_infinite_scores_are_decided_and_nan_is_not():
    threshold = calibrate([1.0, 2.0])
    assert threshold([math.inf, -math.inf]).tolist() == [True, False]
    with pytest.raises(ValueError, match="1 of 2 scores are NaN: check the inputs"):
        threshold([math.nan, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tpr": 95}, "tpr is 95: use a fraction such as 0.95, not a percentage"),
        ({"tpr": 0.0}, "tpr is 0.0"),
        ({"tpr": math.nan}, "tpr is nan"),
        ({"fpr": 1.0, "scores_ood": [1.0]}, "fpr is 1.0"),
        ({"fpr": -0.1, "scores_ood": [1.0]}, "fpr is -0.1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"fpr": 0.1}, "fpr needs scores of outliers: pass scores_ood"),
        ({"scores_ood": []}, "no outlier scores"),
        ({"scores_ood": [math.inf]}, "1 of 1 outlier scores are not finite"),
    ],
)
def test_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate([1.0, 2.0], **arguments)


def test_scores_that_calibrate_nothing():
    with pytest.raises(ValueError, match="there are no ID scores: pass those of some ID samples"):
        calibrate([])
    with pytest.raises(ValueError, match="2 of 3 ID scores are not finite"):
        calibrate([math.nan, 1.0, math.inf])


def test_statement():
    text = str(calibrate(range(1000), scores_ood=[2000] * 9 + [0]))
    assert text.splitlines() == [
        "OOD above 949",
        "accepts 95.0% of 1000 ID samples and, with 95% confidence, 93.5% to 96.2% of others like "
        "them",
        "accepts 10.0% of 10 outlier samples and, with 95% confidence, 0.3% to 44.5% of others "
        "like them",
    ]


def test_intervals_of_ties():
    """What ties with the threshold is accepted, and the interval says so."""
    scores = [1.0] * 30 + [2.0] * 20
    threshold = calibrate(scores, 0.5)
    assert threshold.tpr == 0.6
    lower, upper = threshold.tpr_interval
    # from below, as for the 25th of 50 scores; from above, as for a share of 30
    assert binom.sf(24, 50, lower) == pytest.approx(0.025, rel=1e-6)
    assert binom.cdf(30, 50, upper) == pytest.approx(0.025, rel=1e-6)
    assert calibrate([1.0] * 4, 0.5).tpr_interval[1] == 1
    by_fpr = calibrate([0.0], scores_ood=scores, fpr=0.7)
    assert by_fpr.fpr == 0.6
    lower, upper = by_fpr.fpr_interval
    assert binom.sf(29, 50, lower) == pytest.approx(0.025, rel=1e-6)
    assert binom.sf(35, 50, upper) == pytest.approx(0.975, rel=1e-6)


def test_coverage_with_ties():
    """Scores are rounded to tenths, so the share up to a score is known."""
    generator = np.random.default_rng(0)
    misses = 0
    for _ in range(1500):
        threshold = calibrate(np.floor(10 * generator.random(100)) / 10, 0.85, confidence=0.9)
        lower, upper = threshold.tpr_interval
        misses += not lower <= round(threshold.value + 0.1, 6) <= upper + 1e-9
    assert misses / 1500 <= 0.1


@pytest.mark.parametrize(
    "wrong", [{"value": math.nan}, {"tpr": 1.5}, {"tpr_interval": (0.9, 0.1)}, {"fpr": -1.0}]
)
def test_thresholds_that_make_no_sense(wrong):
    sound = calibrate([1.0, 2.0], scores_ood=[3.0])
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(sound, **wrong)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Threshold(0.0, "tpr", 1, 1.0, (0.0, 1.0)).value = 1.0
