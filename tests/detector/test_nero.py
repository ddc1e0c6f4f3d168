import math

import numpy as np
import pytest
import torch
from pytorch_ood.api import RequiresFittingException
from torch import Tensor, nn

from pood_plugins.detector import NERO, nero_relevance

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor = None) -> nn.Linear:
    head = nn.Linear(*reversed(weight.shape), bias=bias is not None).requires_grad_(False)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    return head


def problem(n=150, dimension=12, n_classes=4, bias=True, seed=0):
    """Non-negative features, labels of which some are -1, and a head."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_classes, (n,), generator=generator)
    labels[: 2 * n_classes] = torch.arange(n_classes).repeat(2)
    centers = 2 * torch.rand(n_classes + 1, dimension, generator=generator)
    z = (centers[labels] + 0.5 * torch.randn(n, dimension, generator=generator)).relu()
    offset = torch.randn(n_classes, generator=generator) if bias else None
    return linear(centers[:-1] - centers.mean(dim=0), offset), z, labels


def explicit_relevance(x, weight, bias, eps=0.0):
    """One sample, class by class: relevance of the neurons, and of the bias in the last entry."""
    logits = [float(w @ x + b) for w, b in zip(weight, bias)]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    relevance = np.zeros(len(x) + 1)
    for w, b, logit, e in zip(weight, bias, logits, exponentials):
        divisor = math.copysign(max(abs(logit) + eps, 1e-6), -1.0 if logit < 0 else 1.0)
        relevance += e / sum(exponentials) * np.append(w * x, b) / divisor
    return relevance


def explicit_scores(head, z, labels, queries, n_components, n_neurons, eps=0.0):
    """All of NERO, sample by sample in numpy, with the principal components of scikit-learn."""
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs scikit-learn")
    weight = head.weight.double().numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.double().numpy()
    known = (labels >= 0).numpy()
    z, labels, queries = z.double().numpy()[known], labels.numpy()[known], queries.double().numpy()

    train = np.array([explicit_relevance(x, weight, bias, eps) for x in z])
    pca = decomposition.PCA(n_components, svd_solver="full").fit(train[:, :-1])
    projected = pca.transform(train[:, :-1])
    classes = sorted(set(labels.tolist()))
    centroids = [projected[labels == c].mean(axis=0) for c in classes]
    full_centroids = [train[labels == c].mean(axis=0) for c in classes]
    nearest = [min(np.abs(r - m).sum() for m in full_centroids) for r in train]
    scale = np.mean(nearest) / np.abs(train[:, -1]).mean() if bias.any() else 0.0

    scores = []
    for x in queries:
        relevance = explicit_relevance(x, weight, bias, eps)
        distance = min(np.abs(pca.transform(relevance[None, :-1])[0] - m).sum() for m in centroids)
        lowest = np.argsort(relevance[:-1])[:n_neurons]
        ratio = sum(abs(x[d]) for d in lowest) / sum(abs(v) for v in x)
        scores.append((distance + scale * abs(relevance[-1])) * ratio)
    return torch.tensor(np.array(scores))


class TestRelevance:
    @pytest.mark.parametrize("eps", [0.0, 0.3])
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_explicit_loops(self, bias, eps):
        z, weight = randn(20, 7).double(), randn(3, 7, seed=1).double()
        b = randn(3, seed=2).double() if bias else None
        relevance, bias_relevance = nero_relevance(z, weight, b, eps)
        numbers = b.numpy() if bias else np.zeros(3)
        expected = np.array(
            [explicit_relevance(x, weight.numpy(), numbers, eps) for x in z.numpy()]
        )
        assert relevance.shape == (20, 7) and bias_relevance.shape == (20,)
        np.testing.assert_allclose(relevance, expected[:, :-1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(bias_relevance, expected[:, -1], rtol=1e-9, atol=1e-12)
        assert bias or (bias_relevance == 0).all()

    def test_stabilizer_shrinks_relevance(self):
        z, weight, bias = randn(20, 7).double(), randn(1, 7, seed=1).double(), torch.zeros(1)
        bias, logits = bias.double(), (z @ weight.T)[:, 0]
        relevance, _ = nero_relevance(z, weight, bias, eps=0.5)
        # one class has probability 1, so the sum is logit / (logit + sign * eps)
        torch.testing.assert_close(relevance.sum(dim=1), logits.abs() / (logits.abs() + 0.5))

    @pytest.mark.parametrize("logit, divisor", [(0.0, 1e-6), (1e-9, 1e-6), (-1e-9, -1e-6)])
    def test_floored_logits_keep_their_sign(self, logit, divisor):
        relevance, bias_relevance = nero_relevance(
            torch.ones(1, 2).double(),
            torch.tensor([[1.0, -1.0]]).double(),
            torch.tensor([logit]).double(),
        )
        expected = torch.tensor([[1.0, -1.0]]).double() / divisor
        torch.testing.assert_close(relevance, expected)
        torch.testing.assert_close(bias_relevance, torch.tensor([logit]).double() / divisor)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_dtype(self, dtype):
        parts = nero_relevance(
            randn(4, 3).to(dtype), randn(2, 3, seed=1).to(dtype), randn(2, seed=2).to(dtype)
        )
        assert [part.dtype for part in parts] == [dtype, dtype]


class TestDetector:
    @pytest.mark.parametrize("bias, eps", [(True, 0.0), (False, 0.0), (True, 0.2)])
    def test_equals_explicit_loops(self, bias, eps):
        head, z, labels = problem(bias=bias)
        queries = torch.cat([z[:20], randn(20, 12, seed=5)])
        detector = NERO(None, head, n_components=8, n_neurons=4, eps=eps)
        scores = detector.fit_features(z, labels).predict_features(queries)
        expected = explicit_scores(head, z, labels, queries, 8, 4, eps)
        assert (expected > 0).all()
        torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0)
        assert bias or detector.bias_scale_ == 0

    def test_fitted_state(self):
        head, z, labels = problem()
        detector = NERO(None, head, n_components=5).fit_features(z, labels)
        assert detector.centroids_.shape == (4, 12) and detector.bias_centroids_.shape == (4,)
        assert detector.components_.shape == (12, 5) and detector.bias_scale_.shape == ()
        assert detector.projected_centroids_.shape == (4, 5)
        assert detector.classes_ == [0, 1, 2, 3]
        torch.testing.assert_close(
            detector.components_.T @ detector.components_, torch.eye(5).double()
        )

    def test_absent_classes_have_no_centroid(self):
        head, z, labels = problem()
        labels[labels == 1] = 0
        queries = randn(10, 12, seed=5)
        detector = NERO(None, head, n_components=8, n_neurons=4).fit_features(z, labels)
        assert detector.classes_ == [0, 2, 3] and detector.centroids_.shape == (3, 12)
        torch.testing.assert_close(
            detector.predict_features(queries).double(),
            explicit_scores(head, z, labels, queries, 8, 4),
            rtol=1e-6,
            atol=0,
        )

    def test_outliers_are_ignored(self):
        head, z, labels = problem()
        fits = [
            NERO(None, head).fit_features(z[keep], labels[keep])
            for keep in (labels == labels, labels >= 0)
        ]
        scores = [fit.predict_features(z) for fit in fits]
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", ["n_components", "n_neurons"])
    @pytest.mark.parametrize("value, count", [(0.5, 6), (0.99, 11), (0.0, 1), (1.0, 12), (99, 12)])
    def test_count_or_fraction(self, name, value, count):
        head, z, labels = problem()
        scores = [
            NERO(None, head, **{name: v}).fit_features(z, labels).predict_features(z)
            for v in (value, count)
        ]
        assert torch.equal(scores[0], scores[1])

    def test_defaults(self):
        head, z, labels = problem()
        scores = [
            detector.fit_features(z, labels).predict_features(z)
            for detector in (NERO(None, head), NERO(None, head, n_components=8, n_neurons=4))
        ]
        assert torch.equal(scores[0], scores[1])

    def test_n_neurons_is_read_when_scoring(self):
        head, z, labels = problem()
        detector = NERO(None, head, n_neurons=2).fit_features(z, labels)
        detector.n_neurons = 5
        expected = NERO(None, head, n_neurons=5).fit_features(z, labels).predict_features(z)
        assert torch.equal(detector.predict_features(z), expected)

    @pytest.mark.parametrize("name, value", [("n_components", 3), ("eps", 0.1)])
    def test_changed_after_fit(self, name, value):
        head, z, labels = problem()
        detector = NERO(None, head).fit_features(z, labels)
        scores, before = detector.predict_features(z), getattr(detector, name)
        setattr(detector, name, value)
        with pytest.raises(RequiresFittingException, match="changed after fitting.* Call fit"):
            detector.predict_features(z)
        setattr(detector, name, before)
        assert torch.equal(detector.predict_features(z), scores)

    def test_fewer_samples_than_features(self):
        head, z, labels = problem(n=16, dimension=40)
        queries = randn(10, 40, seed=5).abs()
        detectors = [
            NERO(None, head, n_components=n).fit_features(z, labels)
            for n in (1.0, (labels >= 0).sum().item() - 1)
        ]
        scores = [detector.predict_features(queries) for detector in detectors]
        assert scores[0].isfinite().all()
        # further components have no variance and add nothing
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=0)

    def test_batch_size_does_not_matter(self):
        head, z, labels = problem()
        scores = [
            NERO(None, head).fit_features(z, labels, batch_size=n).predict_features(z)
            for n in (4096, 7)
        ]
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=0)

    def test_features_of_zero(self):
        head, z, labels = problem()
        detector = NERO(None, head, n_neurons=3).fit_features(z, labels)
        score = detector.predict_features(torch.zeros(1, 12))
        detector.n_neurons = 6
        # the ratio is |K| / D
        torch.testing.assert_close(detector.predict_features(torch.zeros(1, 12)), 2 * score)
        assert score.isfinite() and score > 0

    @pytest.mark.parametrize("bias", [True, False])
    def test_floored_logits_stay_finite(self, bias):
        head, z, labels = problem(bias=bias)
        head.weight[0] = 0
        if bias:
            head.bias[0] = 0
        z[::3] = 0
        detector = NERO(None, head).fit_features(z, labels)
        queries = torch.cat([z, 1e-30 * z[1:3], 3e38 * z[1:3].sign()])
        assert detector.predict_features(queries).isfinite().all()

    def test_scores_beyond_float32_stay_finite(self):
        # logits of exactly 0 from huge features: their relevance exceeds float32
        _, z, labels = problem()
        head = linear(torch.ones(4, 12), torch.zeros(4))
        query = 3e38 * torch.tensor([1.0, -1.0]).repeat(1, 6)
        score = NERO(None, head).fit_features(z, labels).predict_features(query)
        assert 1e38 < score.item() < math.inf

    def test_small_variance_is_enough(self):
        head, _, _ = problem()
        z = randn(1, 12).repeat(30, 1)
        z[0, 0] *= 1 + 1e-6
        assert NERO(None, head).fit_features(z, torch.arange(30) % 4).components_.norm() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"n_components": 1.5}, r"n_components must be a fraction in \[0, 1\], got 1.5"),
        ({"n_components": "all"}, r"n_components must be a count \(int\) or a fraction \(float\)"),
        ({"n_neurons": 0}, "n_neurons must be at least 1, got 0"),
        ({"n_neurons": 95.0}, r"n_neurons must be .*use 0\.95 instead of 95"),
        ({"n_neurons": True}, "n_neurons must be a count"),
        ({"n_neurons": math.nan}, "n_neurons must be a fraction"),
        ({"eps": -1e-6}, "eps must be a finite number >= 0, got -1e-06"),
        ({"eps": math.inf}, "eps must be a finite number >= 0"),
        ({"eps": math.nan}, "eps must be a finite number >= 0"),
    ],
)
def test_bad_hyperparameters(arguments, message):
    head, z, labels = problem()
    with pytest.raises(ValueError, match=message):
        NERO(None, head, **arguments)
    # set later, they are found by the next call
    detector = NERO(None, head).fit_features(z, labels)
    for name, value in arguments.items():
        setattr(detector, name, value)
    with pytest.raises(ValueError, match=message):
        detector.fit_features(z, labels)


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(4, 2)), nn.Identity(), None])
def test_head_must_be_linear(head):
    with pytest.raises(ValueError, match=f"linear layer .* got {type(head).__name__}"):
        NERO(None, head)


def test_repr():
    head = problem()[0]
    assert repr(NERO(None, head)) == "NERO(n_components=0.6667, n_neurons=0.3418)"
    assert repr(NERO(None, head, n_components=8, n_neurons=4)) == (
        "NERO(n_components=8, n_neurons=4)"
    )
