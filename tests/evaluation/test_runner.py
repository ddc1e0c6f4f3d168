"""The runner goes through upstream's ``evaluate`` and keeps clear of its pitfalls."""

import pytest
import torch
from pytorch_ood.api import FeaturesDetector, LogitsDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import KNN, ODIN, EnergyBased, Mahalanobis, MaxSoftmax, ReAct
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from pood_plugins.detector import GROOD, NERO
from pood_plugins.evaluation import run
from pood_plugins.model import split_model

CLASSES = 3


class Blobs(Benchmark):
    """Three classes of small images; outliers far from all of them."""

    ood_names = ["near", "far"]
    near_ood_names = ["near"]
    far_ood_names = ["far"]

    def __init__(self, n_id=60, n_ood=40):
        generator = torch.Generator().manual_seed(0)
        self.centers = torch.randn((CLASSES, 1, 6, 6), generator=generator)
        self.generator = generator
        self.train, self.test = self._known(90), self._known(n_id)
        self.oods = [self._unknown(n_ood, 0.7), self._unknown(n_ood, 4.0)]

    def _known(self, n):
        y = torch.arange(n) % CLASSES
        noise = torch.randn((n, 1, 6, 6), generator=self.generator)
        return TensorDataset(self.centers[y] + 0.3 * noise, y)

    def _unknown(self, n, scale):
        x = scale * torch.randn((n, 1, 6, 6), generator=self.generator)
        return TensorDataset(x, torch.full((n,), -1))

    def train_set(self):
        return self.train

    def test_sets(self, known=True, unknown=True):
        if known and unknown:
            return [ConcatDataset([self.test, ood]) for ood in self.oods]
        return [self.test] if known else self.oods


class Counting(nn.Module):
    """Counts the rows that it sees, by batch."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return self.module(x)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        )


@pytest.fixture
def split(network):
    return split_model(network.eval(), example=torch.zeros(2, 1, 6, 6))


def test_metrics_are_those_of_upstream(split):
    """Same figures as fitting and evaluating by hand on images, for each kind of detector."""
    benchmark = Blobs()
    detectors = {
        "MSP": MaxSoftmax(split),
        "Energy": EnergyBased(split),
        "KNN": KNN(split.encoder, k=5),
        "GROOD": GROOD(split.encoder, split.head),
        "NERO": NERO(split.encoder, split.head),
        "ReAct": ReAct(split.feature_maps, split.map_head),
        "ODIN": ODIN(split),
    }
    report = run(benchmark, detectors, loader_kwargs={"batch_size": 32})
    assert not report.failed, [r.error for r in report.failed]
    loader = DataLoader(benchmark.train_set(), batch_size=32)
    for name, detector in detectors.items():
        detector.fit(loader)
        for ood_name, dataset in zip(benchmark.ood_names, benchmark.test_sets()):
            metrics = OODMetrics()
            for x, y in DataLoader(dataset, batch_size=50):
                metrics.update(detector(x).detach(), y)
            expected = metrics.compute()
            for ours, theirs in {"AUROC": "AUROC", "FPR95": "FPR95TPR"}.items():
                value, std = report.value(name, ood_name, ours)
                assert value == pytest.approx(expected[theirs], abs=1e-4), (name, ood_name)
                assert std is None


def test_encoder_runs_once_per_data_set(network):
    """All detectors of logits and features share one pass over train, ID test and each OOD set."""
    split = split_model(network.eval(), example=torch.zeros(2, 1, 6, 6))
    counting = Counting(split.encoder)
    split.__dict__["encoder"] = counting
    benchmark = Blobs()
    detectors = {
        "a": KNN(counting, k=5),
        "b": GROOD(counting, split.head),
        "c": NERO(counting, split.head),
        "d": MaxSoftmax(split),
        "e": EnergyBased(split),
        "f": Mahalanobis(counting),
    }
    report = run(benchmark, detectors, loader_kwargs={"batch_size": 1000})
    assert not report.failed, [r.error for r in report.failed]
    assert sorted(counting.batches) == sorted([90, 60, 40, 40])


def test_two_models_never_share_features():
    """Also when the first is gone before the second is made, and may leave it its id."""
    benchmark = Blobs()
    values = set()
    for seed in range(8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
        report = run(benchmark, {"KNN": KNN(encoder, k=3)})
        values.add(report.value("KNN", "near", "AUROC")[0])
        del encoder, report
    assert len(values) > 4


def test_two_models_in_one_run():
    benchmark = Blobs()
    encoders = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoders.append(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval())
    together = run(benchmark, {str(i): KNN(e, k=3) for i, e in enumerate(encoders)})
    for i, encoder in enumerate(encoders):
        alone = run(benchmark, {"KNN": KNN(encoder, k=3)})
        assert alone.value("KNN", "far", "AUROC") == together.value(str(i), "far", "AUROC")


def test_labels_of_rows_are_the_users(split):
    detectors = {"k = 1": KNN(split.encoder, k=1), "k = 9": KNN(split.encoder, k=9)}
    report = run(Blobs(), detectors)
    assert [r.detector for r in report.results] == list(detectors)
    assert {r.class_name for r in report.results} == {"KNN"}
    assert report.value("k = 1", "near", "AUROC") != report.value("k = 9", "near", "AUROC")


class Failing(FeaturesDetector):
    def __init__(self, encoder):
        self.encoder = encoder

    def predict(self, x):
        return self.predict_features(self.encoder(x))

    def predict_features(self, x):
        raise RuntimeError("no luck")


class NotFinite(Failing):
    def predict_features(self, x):
        return torch.full((len(x),), float("inf"))


def test_a_failing_detector_is_a_row_and_the_rest_go_on(split):
    detectors = {
        "bad": Failing(split.encoder),
        "worse": NotFinite(split.encoder),
        "good": MaxSoftmax(split),
    }
    report = run(Blobs(), detectors)
    assert [r.detector for r in report.failed] == ["bad", "worse"]
    assert report.failed[0].error == "RuntimeError: no luck"
    assert "not finite" in report.failed[1].error
    alone = run(Blobs(), {"good": MaxSoftmax(split)})
    assert report.value("good", "far", "AUROC") == alone.value("good", "far", "AUROC")
    assert "failed" in report.to_text()
    # the detector is the user's again
    assert detectors["bad"].encoder is split.encoder
    assert not any(name.startswith("predict") for name in vars(detectors["bad"]))


def test_detectors_come_back_whole(split):
    detector, other = KNN(split.encoder, k=3), EnergyBased(split)
    run(Blobs(), {"a": detector, "b": other})
    assert detector.encoder is split.encoder and other.model is split
    assert not any(name.startswith("predict") for name in vars(detector) | vars(other))
    assert detector(torch.zeros(2, 1, 6, 6)).shape == (2,)


class ModeKeeping(LogitsDetector):
    """Records the mode of its model and whether gradients are on."""

    def __init__(self, model):
        self.model = model
        self.seen = []

    def predict_logits(self, logits):
        self.seen.append((self.model.training, torch.is_grad_enabled()))
        return logits[:, 0]


def test_models_are_put_into_eval_mode(network):
    network.train()
    run(Blobs(), {"MSP": MaxSoftmax(network)})
    assert not network.training


def test_images_path_runs_without_gradients(split):
    class Raw(ReAct):
        def predict(self, x):
            assert not torch.is_grad_enabled()
            return super().predict(x)

    report = run(Blobs(), {"raw": Raw(split.feature_maps, split.map_head)})
    assert not report.failed


def test_random_detectors_repeat(network):
    from pytorch_ood.detector import MCD

    network = nn.Sequential(*network[:5], nn.Dropout(0.5), network[5]).eval()
    state = torch.get_rng_state()
    values = [
        run(Blobs(), {"MCD": MCD(network, samples=3)}).value("MCD", "near", "AUROC")
        for _ in range(2)
    ]
    assert values[0] == values[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_accuracy_is_that_of_the_network(split):
    benchmark = Blobs()
    report = run(benchmark, {"KNN": KNN(split.encoder, k=3), "MSP": MaxSoftmax(split)})
    x, y = benchmark.test.tensors
    expected = float((split(x).argmax(dim=1) == y).double().mean())
    assert [r.accuracy for r in report.results] == [pytest.approx(expected)] * 2


def test_no_detectors():
    with pytest.raises(ValueError, match="at least one"):
        run(Blobs(), {})


def test_empty_sets_name_the_set(split):
    with pytest.raises(ValueError, match="'near' of Blobs is empty"):
        run(Blobs(n_ood=0), {"MSP": MaxSoftmax(split)})
    with pytest.raises(ValueError, match="'ID' of Blobs is empty"):
        run(Blobs(n_id=0), {"MSP": MaxSoftmax(split)})


def test_sets_without_outliers_name_the_set(split):
    benchmark = Blobs()
    benchmark.oods[1] = benchmark.test
    for detector in (MaxSoftmax(split), ReAct(split.feature_maps, split.map_head)):
        with pytest.raises(ValueError, match="'far' has no OOD samples"):
            run(benchmark, {"row": detector})


def test_names_and_sets_must_match(split):
    benchmark = Blobs()
    benchmark.ood_names = ["near"]
    with pytest.raises(ValueError, match="names 1 OOD sets"):
        run(benchmark, {"MSP": MaxSoftmax(split)})
