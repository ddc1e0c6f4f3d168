"""
What holds for every detector of this package that works on penultimate features. Unusual and bad
input is in test_bad_input.py.
"""

import copy
import inspect
import itertools

import pytest
import torch
from pytorch_ood.api import (
    DetectorInfo,
    FeaturesDetector,
    Task,
)
from pytorch_ood.utils import GridSearch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pood_plugins.detector import GROOD, NERO

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("Detector", [GROOD, NERO]),
]


class Encoder(nn.Module):
    """Maps images of 2 x 20 pixels to 20 features and counts its calls."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.scale * x.mean(dim=1)).relu()


def images(z: Tensor) -> Tensor:
    """Images whose features are ``z``."""
    return torch.stack([z / 4, 3 * z / 4], dim=1)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    larger = (scores_out[:, None] > scores_in).double() + 0.5 * (scores_out[:, None] == scores_in)
    return larger.mean().item()


def scores_equal(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


@pytest.fixture
def fitted(Detector, blobs) -> FeaturesDetector:
    return Detector(None, copy.deepcopy(blobs.head)).fit_features(blobs.z, blobs.y)


def state(detector: FeaturesDetector) -> dict:
    return copy.deepcopy({name: v for name, v in vars(detector).items() if name.endswith("_")})


def test_separates_clouds(fitted, blobs):
    scores_in, scores_out = map(fitted.predict_features, (blobs.z_in, blobs.z_out))
    assert auroc(scores_in, scores_out) >= 0.95


def test_scores(fitted, blobs):
    scores = fitted.predict_features(blobs.z_out)
    assert scores.shape == (100,) and scores.dtype == torch.float32
    assert scores.isfinite().all() and (scores >= 0).all() and not scores.requires_grad


def test_rows_are_independent(fitted, blobs):
    z = torch.cat([blobs.z_in, blobs.z_out])
    scores = fitted.predict_features(z)
    scores_equal(torch.cat([fitted.predict_features(row[None]) for row in z]), scores)
    for batch_size in (1, 33, 10**6):
        scores_equal(fitted.predict_features(z, batch_size), scores)


def test_inference_mode_and_autocast(Detector, blobs, fitted):
    expected = fitted.predict_features(blobs.z_out)
    with torch.inference_mode():
        detector = Detector(None, blobs.head).fit_features(blobs.z, blobs.y)
    assert torch.equal(detector.predict_features(blobs.z_out), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_equal(fitted.predict_features(blobs.z_out), expected)


def test_fit_is_repeatable(Detector, blobs, fitted):
    torch.manual_seed(99)
    again = Detector(None, blobs.head).fit_features(blobs.z, blobs.y)
    assert torch.equal(again.predict_features(blobs.z_out), fitted.predict_features(blobs.z_out))


def test_fit_and_predict_on_inputs(Detector, blobs, fitted):
    encoder = Encoder()
    loader = DataLoader(TensorDataset(images(blobs.z), blobs.y), batch_size=50)
    detector = Detector(encoder, blobs.head)
    assert detector.fit(loader) is detector
    x = images(blobs.z_out)
    assert torch.equal(detector(x), detector.predict(x))
    assert torch.equal(detector.predict(x), detector.predict_features(encoder(x)))
    scores_equal(detector.predict(x), fitted.predict_features(blobs.z_out))
    assert encoder.training and encoder.scale.grad is None


def test_small_untrained_net(Detector):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 10, generator=generator), torch.arange(24) % 3
    encoder, head = nn.Sequential(nn.Linear(10, 8), nn.ReLU()), nn.Linear(8, 3)
    for parameter in [*encoder.parameters(), *head.parameters()]:
        nn.init.normal_(parameter, std=0.3, generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    scores = Detector(encoder, head).fit(loader)(torch.randn(8, 10, generator=generator))
    assert scores.shape == (8,) and scores.isfinite().all()


@pytest.mark.parametrize("dimension, n_classes", [(1, 3), (1, 1), (5, 1), (2, 2)])
def test_few_features_and_classes(Detector, dimension, n_classes):
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(30, dimension, generator=generator)
    head = nn.Linear(dimension, n_classes).requires_grad_(False)
    head.weight.normal_(generator=generator)
    head.bias.normal_(generator=generator)
    detector = Detector(None, head).fit_features(z, torch.arange(30) % n_classes)
    queries = torch.cat([z, torch.zeros(1, dimension), 1e4 * z[:5], -z[:5]])
    assert detector.predict_features(queries).isfinite().all()


def test_copy_and_move(fitted, blobs):
    scores = fitted.predict_features(blobs.z_out)
    twin = copy.deepcopy(fitted)
    assert torch.equal(twin.predict_features(blobs.z_out), scores)
    twin.fit_features(blobs.z + 1, blobs.y)
    assert torch.equal(fitted.predict_features(blobs.z_out), scores)
    assert fitted.to("cpu") is fitted and fitted.device == torch.device("cpu")
    assert torch.equal(fitted.predict_features(blobs.z_out), scores)


def test_grid_search(Detector, blobs):
    fit_loader = DataLoader(TensorDataset(images(blobs.z), blobs.y), batch_size=60)
    # outliers close to the classes, so that the candidates differ
    z = torch.cat([blobs.z_in, 0.1 * blobs.z_out + 0.9 * blobs.z_in])
    y = torch.tensor([0, -1]).repeat_interleave(100)
    val_loader = DataLoader(TensorDataset(images(z), y), batch_size=100)
    encoder = Encoder()
    detector = Detector(encoder, blobs.head)
    search = GridSearch(detector, fit_loader, val_loader)
    best = search.run()
    assert encoder.calls == 4 + 2  # one pass over each loader, for all candidates

    names, values = zip(*Detector.hyperparameter_space.items())
    results = []
    for candidate in itertools.product(*values):
        candidate = dict(zip(names, candidate))
        expected = Detector(None, blobs.head, **candidate).fit_features(blobs.z, blobs.y)
        scores = expected.predict_features(z)
        results.append((auroc(scores[:100], scores[100:]), candidate))
    assert search.best_score_ == pytest.approx(max(result for result, _ in results), abs=1e-6)
    assert detector.get_hyperparameters() == best != candidate  # not merely the last one tried
    expected = Detector(None, blobs.head, **best).fit_features(blobs.z, blobs.y)
    scores_equal(detector.predict_features(z), expected.predict_features(z))


def test_hyperparameters(Detector, blobs):
    detector = Detector(None, blobs.head)
    for name, values in Detector.hyperparameter_space.items():
        for value in values:
            assert detector.set_hyperparameters(**{name: value}) is detector
            assert detector.get_hyperparameters()[name] == getattr(detector, name) == value
            detector.fit_features(blobs.z, blobs.y).predict_features(blobs.z_out)
    assert detector.get_hyperparameters().keys() == Detector.hyperparameter_space.keys()
    with pytest.raises(ValueError, match="Unknown hyperparameter 'seed'"):
        detector.set_hyperparameters(seed=3)


def test_conventions_of_the_host(Detector):
    info = vars(Detector)["info"]  # on the class itself
    assert isinstance(info, DetectorInfo) and info.tasks == {Task.CLASSIFICATION}
    assert info.ai_coded and info.paper.url.startswith("https://arxiv.org/abs/")
    assert Detector.requires_fit and vars(Detector)["hyperparameter_space"]
    for name, expected in {
        "predict_features": ["self", "z", "batch_size"],
        "fit_features": ["self", "z", "labels", "batch_size"],
        "predict": ["self", "x"],
        "fit": ["self", "data_loader"],
    }.items():
        assert list(inspect.signature(getattr(Detector, name)).parameters) == expected
    parameters = inspect.signature(Detector).parameters.values()
    assert [p.name for p in parameters][:2] == ["encoder", "head"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters)[2:])
    for other in ("predict_logits", "predict_feature_maps", "predict_structured"):
        assert not hasattr(Detector, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reduced_precision_on_a_gpu(Detector, blobs, dtype):
    z, queries = blobs.z.to(dtype), blobs.z_out.to(dtype)
    head = copy.deepcopy(blobs.head)
    expected = Detector(None, head).fit_features(z, blobs.y).predict_features(queries)
    detector = Detector(None, head.cuda()).fit_features(z.cuda(), blobs.y)
    scores = detector.predict_features(queries.cuda())
    assert scores.is_cuda and scores.dtype == torch.float32
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_read_from_a_gpu(Detector, blobs):
    from torch.profiler import ProfilerActivity, profile

    z, queries = blobs.z.cuda(), blobs.z_out.cuda()
    detector = Detector(None, copy.deepcopy(blobs.head).cuda())
    detector.fit_features(z, blobs.y).predict_features(queries)  # what is set up once
    calls = {
        "fit": lambda: detector.fit_features(z, blobs.y, batch_size=50),
        "score": lambda: detector.predict_features(queries, batch_size=50),
    }
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        reads = sum(e.count for e in profiler.key_averages() if "DtoH" in e.key)
        # the eigenvalues of NERO's fit are found with the help of the host
        assert reads <= 1 or (name, Detector.__name__) == ("fit", "NERO")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu(Detector, blobs, fitted):
    expected = fitted.predict_features(blobs.z_out)
    head = copy.deepcopy(blobs.head)
    for detector, z, y in [
        (Detector(None, head).to("cuda").fit_features(blobs.z, blobs.y), blobs.z_out, "cpu"),
        (Detector(None, head.cuda()).fit_features(blobs.z.cuda(), blobs.y), blobs.z_out, "cuda"),
        (copy.deepcopy(fitted).to("cuda"), blobs.z_out, "cuda"),
    ]:
        scores = detector.predict_features(z.to(y))
        assert scores.is_cuda
        assert all(v.is_cuda for v in state(detector).values() if isinstance(v, Tensor))
        torch.testing.assert_close(scores.cpu(), expected, rtol=1e-4, atol=1e-6)
    detector.to("cpu")
    assert not detector.predict_features(blobs.z_out).is_cuda
