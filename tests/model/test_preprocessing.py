"""
Preprocessing: the same pixels as the transforms of those who published the weights.
"""

import json

import pytest
import timm
import torch
import torchvision
from PIL import Image
from pytorch_ood.model import get_model_info, list_models, load_transform
from torchvision import transforms

from pood_plugins.model.preprocessing import Preprocessing, complete

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def photo(width, height):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PHOTOS = [photo(50, 80), photo(500, 300), photo(32, 32)]


@pytest.mark.parametrize(
    ("size", "resized"),
    [(8, 8), (32, 32), (64, 64), (65, 74), (96, 110), (224, 256), (299, 342), (384, 439)],
)
def test_default_is_that_of_openood(size, resized):
    """256 for 224 pixels, in proportion for others, and small images are not cropped from more."""
    preprocessing = Preprocessing(size, MEAN, STD)
    expected = transforms.Compose(
        [
            transforms.Resize(resized),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for image in PHOTOS:
        x = preprocessing.transform(image)
        assert x.shape == (3, size, size)
        assert torch.equal(x, expected(image))


def test_normalization_alone():
    image = photo(32, 32)
    x = transforms.ToTensor()(image)
    preprocessing = Preprocessing(32, MEAN, STD)
    normalized = preprocessing.normalize(x[None])[0]
    torch.testing.assert_close(
        normalized, (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    )
    torch.testing.assert_close(preprocessing.transform(image), normalized)


def test_grey():
    preprocessing = Preprocessing(8, (0.25,), (0.5,), channels=1)
    grey = torch.randint(256, (8, 8), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(grey.to(torch.uint8).numpy()).convert("RGB")
    x = preprocessing.transform(image)
    assert x.shape == (1, 8, 8)
    torch.testing.assert_close(x[0], (grey / 255 - 0.25) / 0.5)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "efficientnet_b3", "inception_v3"])
def test_of_torchvision(name):
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    preprocessing = Preprocessing.of_torchvision(preset)
    for image in PHOTOS:
        assert torch.equal(preprocessing.transform(image), preset(image))


def test_of_every_classifier_of_torchvision():
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            preprocessing = Preprocessing.of_torchvision(weights.transforms())
            assert complete(preprocessing) == preprocessing


@pytest.mark.parametrize(
    "name", ["resnet18.tv_in1k", "vit_base_patch16_224.augreg_in21k", "beit_base_patch16_224"]
)
def test_of_timm(name):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    preprocessing = Preprocessing.of_timm(config)
    expected = timm.data.create_transform(**config)
    for image in PHOTOS:
        assert torch.equal(preprocessing.transform(image), expected(image))


def test_of_timm_squash_and_border():
    config = {
        "input_size": (3, 48, 48),
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "crop_pct": 0.9,
        "crop_mode": "squash",
    }
    expected = timm.data.create_transform(**config)
    for image in PHOTOS:
        x = Preprocessing.of_timm(config).transform(image)
        assert torch.equal(x, expected(image))
    for change in ({"crop_mode": "border"}, {"input_size": (3, 48, 64)}):
        with pytest.raises(ValueError, match="not supported: give --size, --mean and --std"):
            Preprocessing.of_timm({**config, **change})


def test_of_pytorch_ood():
    seen = set()
    for key in list_models():
        found = get_model_info(key).preprocessing
        if found is None or found in seen:
            continue
        seen.add(found)
        for image in PHOTOS:
            x = Preprocessing.of_pytorch_ood(found).transform(image)
            assert torch.equal(x, load_transform(key)(image))
    assert len(seen) > 2


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(32, MEAN, STD),
        Preprocessing(48, MEAN, STD, (50, 60), "bicubic"),
        Preprocessing(8, (1 / 3,), (0.1,), 9, "nearest", 1),
    ],
)
def test_json(preprocessing):
    content = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.of_json(content) == preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "can't be 0 pixels high: --size must be 1 to"),
        ({"resize": (8, -1)}, "can't be -1 pixels"),
        ({"resize": 4}, "can't be cropped to 8: --resize must be at least --size"),
        ({"resize": (9, 4)}, "images of 9 x 4 pixels can't be cropped to 8"),
        ({"resize": (9,)}, "can't be cropped"),
        ({"size": 8.5}, "whole numbers of pixels, and not 8.5"),
        ({"size": 5000}, "--size must be 1 to 4096"),
        ({"channels": 2}, "3 channels or, if grey, 1, and not 2"),
        ({"mean": (0.1, 0.2)}, "--mean must be 3 numbers, or 1 for all channels"),
        ({"std": (0.1, 0.2, 0.0)}, "--std must be above 0"),
        ({"std": MEAN, "channels": 1}, "must be 1 numbers"),
        ({"interpolation": "cubic"}, "no interpolation 'cubic': choose nearest"),
    ],
)
def test_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"size": 8, "mean": MEAN, "std": STD, **change})


def test_complete():
    known = Preprocessing(224, MEAN, STD, 232, "bicubic")
    assert complete(known) == known
    assert complete(known, mean=(0.0,)) == Preprocessing(224, (0.0,), STD, 232, "bicubic")
    # what was resized before belongs to the size
    assert complete(known, 64) == Preprocessing(64, MEAN, STD, None, "bicubic")
    assert complete(known, 64, resize=70).resize == 70
    assert complete(known, 224) == known
    assert complete(None, 8, MEAN, STD, 9, "nearest") == Preprocessing(8, MEAN, STD, 9, "nearest")
    with pytest.raises(ValueError, match="scores silently wrong: give --size, --mean, --std of"):
        complete(None)
    with pytest.raises(ValueError, match="give --std of its training"):
        complete(None, 8, MEAN)
