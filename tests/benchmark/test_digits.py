"""The digits benchmark keeps upstream's contract, and its parts keep apart."""

import pytest
import torch
from pytorch_ood.api import BenchmarkInfo, DatasetInfo
from pytorch_ood.benchmark import Benchmark

from pood_plugins.benchmark import Digits
from pood_plugins.benchmark.digits import digits_classifier, train_classifier
from pood_plugins.dataset import GreyPatches, HandwrittenDigits, UniformNoise


@pytest.fixture(scope="module")
def benchmark():
    return Digits()


def rows(dataset):
    """The images of a data set as a set of hashable rows."""
    return {tuple(x.flatten().tolist()) for x, _ in dataset}


def labels(dataset):
    return [y for _, y in dataset]


def test_contract(benchmark):
    assert isinstance(benchmark, Benchmark)
    assert isinstance(vars(Digits)["info"], BenchmarkInfo)
    assert benchmark.ood_names == benchmark.near_ood_names + benchmark.far_ood_names
    mixed = benchmark.test_sets()
    known = benchmark.test_sets(unknown=False)
    unknown = benchmark.test_sets(known=False)
    assert len(mixed) == len(unknown) == len(benchmark.ood_names) and len(known) == 1
    for combined, ood in zip(mixed, unknown):
        assert labels(combined) == labels(known[0]) + labels(ood)
    with pytest.raises(ValueError, match="At least one"):
        benchmark.test_sets(known=False, unknown=False)


def test_labels_and_images(benchmark):
    assert set(labels(benchmark.train_set())) == set(range(6))
    assert set(labels(benchmark.test_sets(unknown=False)[0])) == set(range(6))
    assert set(labels(benchmark.outlier_set())) == {-1}
    assert set(labels(benchmark.validation_set())) == set(range(-1, 6))
    for ood in benchmark.test_sets(known=False):
        assert set(labels(ood)) == {-1}
    for dataset in [benchmark.train_set(), benchmark.outlier_set(), *benchmark.test_sets()]:
        x = torch.stack([image for image, _ in dataset])
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32
        assert 0 <= float(x.min()) and 0.5 < float(x.max()) <= 1


def test_documented_sizes(benchmark):
    import pood_plugins.benchmark.digits as module

    sizes = [
        benchmark.train_set(),
        benchmark.validation_set(),
        *benchmark.test_sets(unknown=False),
    ]
    train, validation, test = map(len, sizes)
    text = f"{train}, {validation - 1000}, {test}"
    assert text in module.__doc__
    assert [len(s) for s in benchmark.test_sets(known=False)] == [714, 1000, 1000]


def test_parts_share_no_image(benchmark):
    parts = {
        "train": rows(benchmark.train_set()),
        "validation": rows(benchmark.validation_set()),
        "outliers": rows(benchmark.outlier_set()),
        "test": rows(benchmark.test_sets(unknown=False)[0]),
        **dict(zip(benchmark.ood_names, map(rows, benchmark.test_sets(known=False)))),
    }
    names = sorted(parts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not parts[one] & parts[other], (one, other)


def test_halves_of_a_photograph_share_no_pixel():
    left = GreyPatches("china.jpg", half="left", n=2120).images
    right = GreyPatches("china.jpg", half="right", n=2120).images
    whole = GreyPatches("china.jpg", n=4240).images
    assert not rows(zip(left, left)) & rows(zip(right, right))
    total = left.double().sum() + right.double().sum()
    assert torch.isclose(total, whole.double().sum())


def test_patches_are_grey_pixels_of_the_photograph():
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).double()
    red, green, blue = pixels.unbind(2)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    patch = grey[8:16, 16:24].float()
    images = GreyPatches("flower.jpg", n=4240).images[:, 0]
    assert ((images - patch).abs().amax(dim=(1, 2)) < 1e-5).any()


def test_seeds_and_transform():
    assert torch.equal(UniformNoise(10, seed=1).images, UniformNoise(10, seed=1).images)
    assert not torch.equal(UniformNoise(10, seed=1).images, UniformNoise(10, seed=2).images)
    image, label = Digits(transform=lambda x: 1 - x).outlier_set()[0]
    assert torch.equal(image, 1 - Digits().outlier_set()[0][0]) and label == -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HandwrittenDigits("tests"), "part must be one of"),
        (lambda: HandwrittenDigits(classes=[10]), "0 to 9"),
        (lambda: GreyPatches("china.jpg", half="top"), "'left', 'right'"),
        (lambda: GreyPatches("china.jpg", n=5000), "between 1 and the 4240"),
        (lambda: UniformNoise(0), "at least 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dataset", [HandwrittenDigits, GreyPatches, UniformNoise])
def test_dataset_info(dataset):
    assert isinstance(vars(dataset)["info"], DatasetInfo)


def test_training_is_repeatable_and_leaves_random_state_alone(benchmark):
    state = torch.get_rng_state()
    first = train_classifier(benchmark, seed=3, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    second = train_classifier(benchmark, seed=3, epochs=2)
    other = train_classifier(benchmark, seed=4, epochs=2)
    assert not first.training
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_ignores_outliers(benchmark, monkeypatch):
    """Without any OOD sample in the validation set, the very same network comes out."""
    with_ood = train_classifier(benchmark, epochs=2)
    monkeypatch.setattr(benchmark, "validation_set", lambda: benchmark._digits("validation"))
    monkeypatch.setattr(benchmark, "outlier_set", lambda: pytest.fail("used"))
    without = train_classifier(benchmark, epochs=2)
    assert torch.equal(with_ood.head.weight, without.head.weight)


def test_classifier_shapes():
    model = digits_classifier(width=4, num_classes=3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
