"""Scores against a loop in plain Python, what must not matter, errors, and whether it works."""

import math

import pytest
import torch
from ood_cosine import CosinePrototypes
from pytorch_ood.api import ModelNotSetException, RequiresFittingException
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch
from torch.utils.data import DataLoader, TensorDataset


def cloud(center, n=40, seed=0):
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(center) + 0.5 * noise


Z = torch.cat([cloud([4.0, 0.0, 0.0], seed=1), cloud([0.0, 4.0, 0.0], seed=2)])
LABELS = torch.arange(2).repeat_interleave(40)
Z_OOD = cloud([0.0, 0.0, 4.0], seed=3)


def cosine(a, b):
    return sum(p * q for p, q in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def by_loops(z_fit, labels, z, centered):
    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows)]

    rows = z_fit.double().tolist()
    origin = mean(rows) if centered else [0.0] * len(rows[0])
    means = [
        mean([row for row, label in zip(rows, labels.tolist()) if label == c])
        for c in set(labels.tolist())
    ]

    def seen_from_origin(row):
        return [value - zero for value, zero in zip(row, origin)]

    return torch.tensor(
        [
            -max(cosine(seen_from_origin(row), seen_from_origin(m)) for m in means)
            for row in z.double().tolist()
        ]
    )


@pytest.mark.parametrize("centered", [False, True])
def test_scores(centered):
    detector = CosinePrototypes(None, centered).fit_features(Z, LABELS)
    scores = detector.predict_features(Z_OOD)
    torch.testing.assert_close(scores, by_loops(Z, LABELS, Z_OOD, centered))


def test_outliers_score_higher():
    detector = CosinePrototypes(None).fit_features(Z, LABELS)
    metrics = OODMetrics()
    fresh = torch.cat([cloud([4.0, 0.0, 0.0], seed=4), cloud([0.0, 4.0, 0.0], seed=5)])
    metrics.update(detector.predict_features(fresh), LABELS)
    metrics.update(detector.predict_features(Z_OOD), torch.full((40,), -1))
    assert metrics.compute()["AUROC"] > 0.99


def test_outliers_are_not_fitted():
    detector = CosinePrototypes(None).fit_features(Z, LABELS)
    with_outliers = CosinePrototypes(None).fit_features(
        torch.cat([Z, Z_OOD]), torch.cat([LABELS, torch.full((40,), -1)])
    )
    assert torch.equal(with_outliers.prototypes_, detector.prototypes_)


def test_the_length_of_features_makes_no_difference():
    detector = CosinePrototypes(None).fit_features(Z, LABELS)
    longer = CosinePrototypes(None).fit_features(10 * Z, LABELS)
    torch.testing.assert_close(
        longer.predict_features(3 * Z_OOD), detector.predict_features(Z_OOD)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_floating_point_types_give_float32(dtype):
    detector = CosinePrototypes(None).fit_features(Z.to(dtype), LABELS)
    assert detector.predict_features(Z_OOD.to(dtype)).dtype == torch.float32


def test_inputs_go_through_the_encoder():
    encoder = torch.nn.Linear(3, 3)
    detector = CosinePrototypes(encoder)
    detector.fit(DataLoader(TensorDataset(Z, LABELS), batch_size=32))
    scores = detector(Z_OOD)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, detector.predict_features(encoder(Z_OOD)))


def test_grid_search():
    detector = CosinePrototypes(torch.nn.Identity())
    labels = torch.cat([LABELS, torch.full((40,), -1)])
    loader = DataLoader(TensorDataset(torch.cat([Z, Z_OOD]), labels), batch_size=60)
    search = GridSearch(detector, loader, loader)
    assert search.run().keys() == {"centered"} and len(search.results_) == 2


def test_no_encoder():
    detector = CosinePrototypes(None)
    with pytest.raises(ModelNotSetException):
        detector.fit([(Z, LABELS)])
    with pytest.raises(ModelNotSetException):
        detector.fit_features(Z, LABELS).predict(Z)


def test_not_fitted():
    with pytest.raises(RequiresFittingException):
        CosinePrototypes(None).predict_features(Z)


def test_a_failed_fit_changes_nothing():
    detector = CosinePrototypes(None, centered=True).fit_features(Z, LABELS)
    before = detector.predict_features(Z_OOD)
    broken = Z.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 80 rows of features are not finite"):
        detector.fit_features(broken, LABELS)
    with pytest.raises(ValueError, match="No ID samples"):
        detector.fit_features(Z, torch.full_like(LABELS, -1))
    with pytest.raises(ValueError, match="use centered=False"):
        detector.fit_features(Z, torch.zeros_like(LABELS))
    assert torch.equal(detector.predict_features(Z_OOD), before)


def test_broken_features_get_no_score():
    detector = CosinePrototypes(None).fit_features(Z, LABELS)
    with pytest.raises(ValueError, match="2 of 4 rows"):
        detector.predict_features(torch.tensor([[0.0, math.inf, 0.0], [1.0, 1.0, 1.0]] * 2))
    with pytest.raises(ValueError, match="1 of 1 rows"):  # too large for float32
        detector.predict_features(torch.tensor([[1e300, 0.0, 0.0]], dtype=torch.float64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    detector = CosinePrototypes(torch.nn.Linear(3, 3)).to("cuda").fit_features(Z, LABELS)
    assert detector.prototypes_.is_cuda and detector(Z_OOD).is_cuda
