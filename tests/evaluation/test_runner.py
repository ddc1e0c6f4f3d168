"""The runner goes through upstream's ``evaluate`` and keeps clear of its pitfalls."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from pytorch_ood.api import FeaturesDetector, LogitsDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import (
    KNN,
    MCD,
    ODIN,
    EnergyBased,
    Mahalanobis,
    MahalanobisODIN,
    MaxSoftmax,
    ReAct,
)
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import Normalize

from pood_plugins import registry
from pood_plugins.dataset import ImagePack
from pood_plugins.detector import GROOD, NERO
from pood_plugins.evaluation import run, runner
from pood_plugins.model import split_model

pytestmark = pytest.mark.usefixtures("one_thread")

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

    batches = []  # of the class: with an attribute of its own that changes, it would be changed

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.batches.clear()

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
    for text in (report.to_text(), report.to_markdown()):
        assert "bad failed: RuntimeError: no luck\n" in text
    # the detector is the user's again
    assert detectors["bad"].encoder is split.encoder
    assert not any(name.startswith("predict") for name in vars(detectors["bad"]))


class Immovable(Failing):
    def to(self, device):
        raise RuntimeError("out of memory")


class Committee(FeaturesDetector):
    """The mean of several detectors, and in a circle."""

    requires_fit = True

    def __init__(self, *members):
        self.encoder = members[0].encoder
        self.members = {"all": None, **dict(enumerate(members))}
        self.more, self.itself = list(members), self
        self.modes = []

    def fit(self, data_loader):
        raise AssertionError("features are there already")

    def fit_features(self, z, y):
        for member in self.more:
            member.fit_features(z, y)
        return self

    def predict(self, x):
        raise AssertionError("features are there already")

    def predict_features(self, z):
        self.modes += [member.head.training for member in self.more]
        return torch.stack([member.predict_features(z) for member in self.more]).mean(dim=0)


def test_a_detector_that_can_not_be_prepared_is_a_row(split):
    detectors = {"bad": Immovable(split.encoder), "good": MaxSoftmax(split)}
    report = run(Blobs(), detectors)
    assert [r.error for r in report.failed] == ["RuntimeError: out of memory"]
    alone = run(Blobs(), {"good": MaxSoftmax(split)})
    assert report.value("good", "far", "AUROC") == alone.value("good", "far", "AUROC")


def test_members_of_a_detector_are_prepared(network):
    split = split_model(network, example=torch.zeros(2, 1, 6, 6)).train()
    heads = [nn.Linear(8, CLASSES).train() for _ in range(2)]
    committee = Committee(*(GROOD(split.encoder, head) for head in heads))
    report = run(Blobs(), {"row": committee})
    assert not report.failed, report.failed[0].error
    assert committee.modes and not any(committee.modes) and not network[1].training


class ByKeyword(EnergyBased):
    def predict_features(self, z):  # with a name that upstream does not use
        return self.predict_logits(logits=z)


def test_detectors_may_call_themselves_by_keyword(split):
    report = run(Blobs(), {"row": ByKeyword(split), "plain": EnergyBased(split)})
    assert not report.failed
    assert report.value("row", "far", "AUROC") == report.value("plain", "far", "AUROC")


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


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99"])
def test_a_device_that_is_not_there_ends_the_run(split, device):
    with pytest.raises(ValueError, match=f"device '{device}.*' can't be used: .+"):
        run(Blobs(), {"MSP": MaxSoftmax(split)}, device=device)


def test_what_is_no_benchmark_or_no_detector(split):
    with pytest.raises(ValueError, match="benchmark must be a Benchmark, not 'digits'. Construct"):
        run("digits", {"MSP": MaxSoftmax(split)})
    with pytest.raises(ValueError, match="GROOD must be a Detector, not 'GROOD': see registry"):
        run(Blobs(), {"GROOD": "GROOD"})


def test_no_detectors():
    with pytest.raises(ValueError, match="at least one"):
        run(Blobs(), {})


def test_empty_sets_name_the_set(split):
    with pytest.raises(ValueError, match="'near' of Blobs is empty"):
        run(Blobs(n_ood=0), {"MSP": MaxSoftmax(split)})
    with pytest.raises(ValueError, match="'ID' of Blobs is empty"):
        run(Blobs(n_id=0), {"MSP": MaxSoftmax(split)})


def test_detectors_that_hold_others(network):
    """MahalanobisODIN keeps the encoder in a Mahalanobis, and adds to gradients of the weights."""
    split = split_model(network.train(), example=torch.zeros(2, 1, 6, 6))
    gradients = [torch.full_like(p, 3.0) for p in network.parameters()]
    for parameter, gradient in zip(network.parameters(), gradients):
        parameter.grad = gradient
    detector = MahalanobisODIN(split.encoder)
    statistics = network[1].running_mean.clone()
    report = run(Blobs(), {"row": detector}, loader_kwargs={"batch_size": 32})
    assert not report.failed, report.failed[0].error
    assert not network[1].training and torch.equal(network[1].running_mean, statistics)
    for parameter, gradient in zip(network.parameters(), gradients):
        assert parameter.grad is gradient and (gradient == 3).all()


@pytest.mark.parametrize("name", ["ViM", "NCI", "fDBD", "OpenMax", "Mahalanobis", "KNN"])
def test_outliers_in_the_training_set_are_as_in_fit(split, name):
    """pytorch-ood's ``fit`` drops them, which not all its ``fit_features`` do."""

    class WithOutliers(Blobs):
        def train_set(self):
            return ConcatDataset([self.train, self.oods[1]])

    arguments = {"OpenMax": {"tailsize": 5}, "KNN": {"k": 5}, "ViM": {"d": 4}}.get(name, {})
    scores = []
    for benchmark in (Blobs(), WithOutliers()):
        report = run(benchmark, {"row": registry.build(name, split, **arguments)})
        assert not report.failed, report.failed[0].error
        scores.append(report.results[0].scores)
    for before, after in zip(scores[0].values(), scores[1].values()):
        for x, y in zip(before, after):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["DICE", "GMM"])
def test_detectors_that_need_much_memory_score_few_rows_at_once(split, monkeypatch, name):
    reports, sizes = [], []
    for entries in (2**26, 7 * CLASSES * 8):
        monkeypatch.setattr(runner, "_ENTRIES", entries)
        detector = registry.build(name, split)
        score = detector.predict_features
        detector.predict_features = lambda z, score=score: sizes.append(len(z)) or score(z)
        reports.append(run(Blobs(), {"row": detector}))
        assert not reports[-1].failed, reports[-1].failed[0].error
    assert sizes == [100, 100, *2 * [*14 * [7], 2]]
    before, after = (report.results[0].scores for report in reports)
    for name in before:
        for x, y in zip(before[name], after[name]):
            torch.testing.assert_close(x, y)


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


def test_benchmark_that_fails_ends_the_run(split):
    benchmark = Blobs()
    benchmark.test_sets = lambda known=True, unknown=True: [][0]
    with pytest.raises(IndexError):
        run(benchmark, {"MSP": MaxSoftmax(split)})


def test_remarks_and_baselines_reach_the_report(split):
    benchmark = Blobs()
    benchmark.missing, benchmark.notes = {"SVHN": "no list"}, {"far": "2 of 3 images"}
    report = run(benchmark, {"MSP": MaxSoftmax(split), "GROOD": grood(split)})
    assert report.missing == {"SVHN": "no list"} and report.notes == {"far": "2 of 3 images"}
    assert [r.baseline for r in report.results] == [True, False]
    assert report.metadata["images"] == {"ID": 60, "near": 40, "far": 40}


def grood(split):
    return GROOD(split.encoder, split.head)


# labels


class TenClasses(Blobs):
    num_classes = 10


def test_classifier_with_another_number_of_classes(split):
    for detector in (MaxSoftmax(split), grood(split)):
        with pytest.raises(ValueError, match="has 3 classes, but TenClasses has 10: choose"):
            run(TenClasses(), {"KNN": KNN(split.encoder), "row": detector})


@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_beyond_the_columns(split, part):
    benchmark = Blobs()
    getattr(benchmark, part).tensors[1][4] = 7
    with pytest.raises(ValueError, match="a label 7, but the classifier has 3 classes"):
        run(benchmark, {"KNN": KNN(split.encoder), "MSP": MaxSoftmax(split)})


# what can't be read


class Broken(Dataset):
    def __init__(self, dataset, error, at=7):
        self.dataset, self.error, self.at = dataset, error, at

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return self.dataset[index]


NO_IMAGE = ValueError("7.png can't be read as an image (it is truncated): remove or replace it.")


@pytest.mark.parametrize("part", ["test ID", "test far", "train"])
@pytest.mark.parametrize("make", [grood, lambda split: registry.build("ReAct", split)])
def test_an_image_that_can_not_be_read_ends_the_run(split, part, make, tmp_path):
    benchmark = Blobs()
    if part == "train":
        benchmark.train = Broken(benchmark.train, NO_IMAGE)
    elif part == "test ID":
        benchmark.test = Broken(benchmark.test, NO_IMAGE)
    else:
        benchmark.oods[1] = Broken(benchmark.oods[1], NO_IMAGE)
    detector = make(split)
    where = "fit" if part == "train" and isinstance(detector, ReAct) else part
    with pytest.raises(ValueError) as caught:
        run(benchmark, {"row": detector, "MSP": MaxSoftmax(split)}, cache_dir=tmp_path)
    assert str(caught.value) == f"{where}: {NO_IMAGE}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("7.png: no such file"), "7.png: no such file"),
        (KeyError("label of 7.png"), "KeyError: 'label of 7.png'"),
        (SyntaxError("broken PNG file"), "SyntaxError: broken PNG file"),
        (EOFError(), "EOFError: EOFError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (RuntimeError("first\nsecond"), "second"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_an_image_raises_is_one_sentence(split, error, reason):
    benchmark = Blobs()
    benchmark.oods[0] = Broken(benchmark.oods[0], error)
    with pytest.raises(ValueError) as caught:
        run(benchmark, {"MSP": MaxSoftmax(split)})
    assert str(caught.value) == f"test near: {reason}"


def test_an_image_that_a_worker_can_not_read(split):
    benchmark = Blobs()
    benchmark.oods[0] = Broken(benchmark.oods[0], NO_IMAGE)
    with pytest.raises(ValueError) as caught:
        run(benchmark, {"MSP": MaxSoftmax(split)}, loader_kwargs={"num_workers": 1})
    assert str(caught.value) == f"test near: {NO_IMAGE}"


# image packs


class Packs(Benchmark):
    """Images as bytes, either in packs or as tensors."""

    ood_names = ["dark", "noise"]
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

    def __init__(self, packed):
        random = np.random.default_rng(0)
        self.packed = packed
        self.sets = []
        for high, label in ((256, None), (256, None), (90, -1), (30, -1)):
            x = random.integers(0, high, (50, 6, 6, 3), dtype=np.uint8)
            self.sets.append((x, np.arange(50) % CLASSES if label is None else [label] * 50))

    def _make(self, x, y):
        if self.packed:
            return ImagePack(x, y, self.normalize)
        scaled = torch.from_numpy(x).permute(0, 3, 1, 2).float().div(255)
        return TensorDataset(self.normalize(scaled), torch.as_tensor(y))

    def train_set(self):
        return self._make(*self.sets[0])

    def test_sets(self, known=True, unknown=True):
        known_set, *oods = [self._make(*arrays) for arrays in self.sets[1:]]
        if known and unknown:
            return [ConcatDataset([known_set, ood]) for ood in oods]
        return [known_set] if known else oods


@pytest.fixture
def color_split():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(8, CLASSES)).eval()
    return split_model(model, example=torch.zeros(2, 3, 6, 6))


def figures(report):
    assert not report.failed, [r.error for r in report.failed]
    return {r.detector: (r.metrics, r.accuracy, r.images) for r in report.results}


def test_packs_give_the_figures_of_tensors(color_split):
    def report(packed):
        names = ["GROOD", "MSP", "ODIN", "ReAct", "KNN"]
        detectors = {name: registry.build(name, color_split) for name in names}
        arguments = {"batch_size": 16}
        limits = {"ReAct": 20}
        return run(Packs(packed), detectors, loader_kwargs=arguments, max_images=limits)

    assert figures(report(packed=True)) == figures(report(packed=False))


# a part of the images


def test_detectors_that_need_images_see_each_set_once(split, monkeypatch):
    rows = []
    predict = ODIN.predict
    monkeypatch.setattr(ODIN, "predict", lambda self, x: rows.append(len(x)) or predict(self, x))
    run(Blobs(), {"ODIN": ODIN(split)}, loader_kwargs={"batch_size": 1000})
    assert rows == [60, 40, 40]


def drawn_rows(n, k):
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].sort().values


@pytest.mark.parametrize("k", [7, 50])
def test_max_images(split, k):
    benchmark = Blobs()
    detectors = {"ODIN": ODIN(split), "all": ODIN(split), "MSP": MaxSoftmax(split)}
    report = run(benchmark, detectors, max_images={"ODIN": k, "MSP": k, "other": k})
    part, whole, features = report.results
    # only detectors that need images, and only those that are named
    assert [part.images, whole.images, features.images] == [k, None, None]
    sets = [benchmark.test, *benchmark.oods]
    known, *unknown = [data.tensors[0][drawn_rows(len(data), k)] for data in sets]
    assert len(known) == k and len(unknown[0]) == min(k, 40)
    for name, x in zip(benchmark.ood_names, unknown):
        for scores, images in zip(part.scores[name], (known, x)):
            assert torch.equal(scores, ODIN(split)(images).double())
        assert len(whole.scores[name][0]) == 60 and len(features.scores[name][0]) == 60
    again = run(benchmark, {"ODIN": ODIN(split)}, max_images={"ODIN": k})
    assert again.results[0].metrics == part.metrics != whole.metrics


def test_max_images_is_no_limit_for_smaller_sets(split):
    report = run(Blobs(), {"ODIN": ODIN(split)}, max_images={"ODIN": 60})
    assert report.results[0].images is None and len(report.results[0].scores["near"][0]) == 60


def test_max_images_may_have_a_default(split):
    """As on the command line, where one number is for all rows."""
    report = run(Blobs(), {"ODIN": ODIN(split)}, max_images=defaultdict(lambda: 9))
    assert report.results[0].images == 9


@pytest.mark.parametrize("limit", [0, -3])
def test_max_images_of_nothing(split, limit):
    with pytest.raises(ValueError, match=f"max_images has {limit} for 'ODIN'"):
        run(Blobs(), {"ODIN": ODIN(split)}, max_images={"ODIN": limit})


# cache


class Drawing(FeaturesDetector):
    """Draws at random when it is fitted."""

    requires_fit = True

    def __init__(self, encoder):
        self.encoder = encoder

    def fit_features(self, z, y):
        self.direction = torch.randn(z.shape[1])
        return self

    def fit(self, data_loader):
        raise NotImplementedError

    def predict(self, x):
        return self.predict_features(self.encoder(x))

    def predict_features(self, z):
        return z @ self.direction


def with_dropout(network):
    model = nn.Sequential(*network[:5], nn.Dropout(0.5), network[5]).eval()
    return split_model(model, example=torch.zeros(2, 1, 6, 6))


def rows_of(split):
    names = ["MSP", "GROOD", "KNN", "ODIN", "ReAct", "MCD", "GradNorm", "NACUE"]
    rows = {name: registry.build(name, split) for name in names}
    return {"drawing": Drawing(split.encoder), **rows}


def test_same_table_with_and_without_cache(network, tmp_path, monkeypatch):
    split = with_dropout(network)
    arguments = {"max_images": {"MCD": 20}, "loader_kwargs": {"batch_size": 32}}
    plain = run(Blobs(), rows_of(split), **arguments)
    first = run(Blobs(), rows_of(split), cache_dir=tmp_path, **arguments)

    def fail(*_, **__):
        raise AssertionError("computed although it is there")

    # neither forward passes over features nor scores of images
    monkeypatch.setattr(type(split.encoder), "forward", fail)
    monkeypatch.setattr(type(split), "forward", fail)
    monkeypatch.setattr("pood_plugins.evaluation.runner._Batches.__iter__", fail)
    second = run(Blobs(), rows_of(split), cache_dir=tmp_path, **arguments)
    assert figures(plain) == figures(first) == figures(second)
    for a, b, c in zip(plain.results, first.results, second.results):
        for name in Blobs.ood_names:
            for x, y, z in zip(a.scores[name], b.scores[name], c.scores[name]):
                assert torch.equal(x, y) and torch.equal(y, z)
    assert [r.fit_seconds is None for r in second.results] == [
        r.fit_seconds is None for r in first.results
    ]


def test_features_are_extracted_once_for_all_runs(split, tmp_path):
    counting = Counting(split.encoder)

    def report(*classes):
        detectors = {kind.__name__: kind(counting) for kind in classes}
        return run(Blobs(), detectors, cache_dir=tmp_path, loader_kwargs={"batch_size": 1000})

    knn = report(KNN)
    assert sorted(counting.batches) == [40, 40, 60, 90]
    counting.batches.clear()
    both = report(Mahalanobis, KNN)
    assert counting.batches == []
    assert figures(both)["KNN"] == figures(knn)["KNN"]


def test_random_detectors_do_not_depend_on_their_place(split):
    alone = run(Blobs(), {"drawing": Drawing(split.encoder)})
    after = run(Blobs(), {"MSP": MaxSoftmax(split), "drawing": Drawing(split.encoder)})
    fitted = run(Blobs(), {"KNN": KNN(split.encoder), "drawing": Drawing(split.encoder)})
    for report in (after, fitted):
        assert figures(report)["drawing"][0] == figures(alone)["drawing"][0]


@pytest.fixture
def scored(monkeypatch):
    """Names of the detectors that score images, once per batch."""
    names = []
    for kind in (ODIN, ReAct, MCD):

        def predict(self, x, kind=kind, original=kind.predict):
            names.append(kind.__name__)
            return original(self, x)

        monkeypatch.setattr(kind, "predict", predict)
    return names


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("rebuilt", [True, False])
def test_an_interrupted_run_goes_on_where_it_was(network, tmp_path, scored, error, rebuilt):
    split = with_dropout(network)

    def build():
        return {name: registry.build(name, split) for name in ("ReAct", "ODIN", "MCD")}

    expected = run(Blobs(), build())
    detectors = build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MCD, "predict", lambda self, x: (_ for _ in ()).throw(error("stop")))
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                run(Blobs(), detectors, cache_dir=tmp_path)
        else:
            (failed,) = run(Blobs(), detectors, cache_dir=tmp_path).failed
            assert failed.detector == "MCD"
    scored.clear()
    # the first was fitted meanwhile, which makes it no other detector
    report = run(Blobs(), build() if rebuilt else detectors, cache_dir=tmp_path)
    assert set(scored) == {"MCD"}
    assert figures(report) == figures(expected)
    scored.clear()
    run(Blobs(), build(), cache_dir=tmp_path)
    assert scored == []


def test_only_detectors_of_the_registry_are_recognised(split, tmp_path, scored):
    for _ in range(2):
        run(Blobs(), {"ODIN": ODIN(split)}, cache_dir=tmp_path)
    assert len(scored) == 6
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        run(Blobs(), {"ODIN": registry.build("ODIN", split)}, cache_dir=tmp_path)
    assert len(scored) == 9


def minus_first(logits):
    return -logits[:, 0]


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("ODIN", "eps", 0.5),
        ("ODIN", "temperature", 1.0),
        ("ODIN", "norm_std", [0.01]),
        ("ODIN", "criterion", nn.MultiMarginLoss()),
        ("ReAct", "percentile", 0.2),
        ("ReAct", "detector", minus_first),
        ("MCD", "n_samples", 4),
        ("MCD", "mode", "mean"),
    ],
)
def test_a_changed_detector_is_another_one(network, tmp_path, scored, name, attribute, value):
    """Whether or not it tells by its hyper-parameters."""
    split = with_dropout(network)
    run(Blobs(), {"row": registry.build(name, split)}, cache_dir=tmp_path)
    changed = registry.build(name, split)
    setattr(changed, attribute, value)
    scored.clear()
    report = run(Blobs(), {"row": changed}, cache_dir=tmp_path)
    assert len(scored) == 3
    assert figures(report) == figures(run(Blobs(), {"row": changed}))


@pytest.mark.parametrize("arguments", [{"samples": 4}, {"mode": "mean"}, {"batch_norm": False}])
def test_arguments_that_are_no_hyperparameters(network, tmp_path, scored, arguments):
    split = with_dropout(network)
    run(Blobs(), {"MCD": registry.build("MCD", split, samples=3)}, cache_dir=tmp_path)
    scored.clear()
    detector = registry.build("MCD", split, **{"samples": 3, **arguments})
    run(Blobs(), {"MCD": detector}, cache_dir=tmp_path)
    assert len(scored) == 3


@pytest.mark.parametrize("what", ["weight", "image", "label", "batch size", "part", "train image"])
def test_what_has_changed_is_computed_again(split, tmp_path, scored, what):
    benchmark, arguments = Blobs(), {}

    def report(cache_dir):
        detectors = {name: registry.build(name, split) for name in ("KNN", "ODIN", "ReAct")}
        return run(benchmark, detectors, cache_dir=cache_dir, **arguments)

    before = report(tmp_path)
    scored.clear()
    assert figures(report(tmp_path)) == figures(before) and scored == []
    with torch.no_grad():
        if what == "weight":
            split.model[0].weight[3, 0, 1, 1] += 3
        elif what == "image":
            benchmark.oods[1].tensors[0][5] += 1
        elif what == "label":
            benchmark.test.tensors[1][5] = 0
        elif what == "train image":
            benchmark.train.tensors[0][5] += 100
        elif what == "part":
            benchmark.oods[1] = Subset(benchmark.oods[1], range(30))
        else:
            arguments["loader_kwargs"] = {"batch_size": 50}
    after = report(tmp_path)
    assert set(scored) == ({"ReAct"} if what == "train image" else {"ODIN", "ReAct"})
    assert figures(after) == figures(report(None))
    if what in ("weight", "train image"):
        assert figures(after) != figures(before)


class Named(Blobs):
    """Sets may be called like parts of a cache's key."""

    ood_names = ["train", "device"]


@pytest.mark.parametrize("which", [0, 1])
def test_sets_with_strange_names(split, tmp_path, which):
    benchmark = Named()
    reports = []
    for shift in (0, 5):
        benchmark.oods[which].tensors[0].add_(shift)
        detectors = {"ReAct": registry.build("ReAct", split)}
        reports.append(run(benchmark, detectors, cache_dir=tmp_path))
        assert figures(reports[-1]) == figures(run(benchmark, detectors))
    assert figures(reports[0]) != figures(reports[1])


def test_a_damaged_cache_changes_nothing(split, tmp_path, caplog):
    def report():
        detectors = {name: registry.build(name, split) for name in ("KNN", "ODIN")}
        return run(Blobs(), detectors, cache_dir=tmp_path)

    before = report()
    entries = list(tmp_path.iterdir())
    assert len(entries) == 5
    for entry in entries:
        content = bytearray(entry.read_bytes())
        content[150] ^= 0xFF
        entry.write_bytes(content)
    assert figures(report()) == figures(before)
    assert caplog.text.count("is damaged and computed anew") == 5


class Unknown(TensorDataset):
    """With a transform that can't be recognised."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.transform = lambda x: x


def test_unknown_data_are_read_again(split, tmp_path, scored, caplog):
    benchmark = Blobs()
    benchmark.oods[0] = Unknown(*benchmark.oods[0].tensors)
    counting = Counting(split.encoder)
    for _ in range(2):
        detectors = {"KNN": KNN(counting), "ODIN": registry.build("ODIN", split)}
        report = run(benchmark, detectors, cache_dir=tmp_path, loader_kwargs={"batch_size": 99})
        assert not report.failed
    assert sorted(counting.batches) == [40, 40, 40, 60, 90]
    assert len(scored) == 6
    assert "features test near can't be kept: data can't be recognised" in caplog.text
    assert "scores ODIN can't be kept: test near can't be recognised" in caplog.text


def test_functions_are_run_again(split, tmp_path):
    calls = []

    def encoder(x):
        calls.append(len(x))
        return split.encoder(x)

    for _ in range(2):
        run(Blobs(), {"KNN": KNN(encoder)}, cache_dir=tmp_path)
    assert sorted(calls) == sorted([90, 60, 40, 40] * 2)
    assert list(tmp_path.iterdir()) == []
