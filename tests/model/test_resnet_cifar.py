"""
The CIFAR ResNets: sizes from the paper, shortcuts against a matrix form, published weights.
"""

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

from pood_plugins.dataset import ImagePack, PackLoader, read_pack
from pood_plugins.model import CIFARResNet, resnet20, resnet56, split_model


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20().eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("build", "millions"), [(resnet20, 0.27), (resnet56, 0.85)])
def test_parameter_counts_of_the_paper(build, millions):
    count = sum(parameter.numel() for parameter in build().parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(("build", "depth"), [(resnet20, 20), (resnet56, 56)])
def test_depth_counts_convolutions_and_the_linear_layer(build, depth):
    layers = [m for m in build().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_resolution_is_halved_where_channels_double(model, x):
    shapes = []
    hooks = [
        stage.register_forward_hook(lambda module, inputs, y: shapes.append(tuple(y.shape[1:])))
        for stage in (model.layer1, model.layer2, model.layer3)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_shape_of_logits(x):
    assert resnet20(num_classes=7)(x).shape == (3, 7)


def test_keys(model):
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    blocks = [f"layer{stage}.{i}." for stage in (1, 2, 3) for i in (0, 1, 2)]
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    expected |= {f"{block}conv{i}.weight" for block in blocks for i in (1, 2)}
    expected |= {f"bn1.{name}" for name in statistics}
    expected |= {f"{block}bn{i}.{name}" for block in blocks for i in (1, 2) for name in statistics}
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize("stage", ["layer2", "layer3"])
def test_shortcut_between_stages_against_a_convolution(model, stage):
    block = getattr(model, stage)[0]
    n_in, n_out = block.conv1.in_channels, block.conv1.out_channels
    x = torch.randn(2, n_in, 8, 8, generator=torch.Generator().manual_seed(2))
    # channel i becomes channel i + n_in / 2 of twice as many
    weight = torch.zeros(n_out, n_in, 1, 1)
    weight[torch.arange(n_in) + n_in // 2, torch.arange(n_in)] = 1
    expected = torch.nn.functional.conv2d(x, weight, stride=2)
    assert torch.equal(block.shortcut(x), expected)


def test_shortcut_within_a_stage_is_the_identity(model):
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.layer1[0].shortcut(x), x)
    assert torch.equal(model.layer1[2].shortcut(x), x)


def test_block_without_residual_is_its_shortcut():
    block = resnet20().eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(block(x), block.shortcut(x).relu())


@pytest.mark.parametrize("depth", [2, 18, 21, 0, -4])
def test_depth_that_does_not_exist(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*{depth}"):
        CIFARResNet(depth)


@pytest.mark.parametrize("early", ["layer1", "layer2"])
def test_split(model, x, early):
    split = split_model(model, early=early)
    logits = model(x)
    z = split.encoder(x)
    assert split.head is model.linear
    assert z.shape == (3, 64)
    torch.testing.assert_close(split.head(z), logits)
    torch.testing.assert_close(split.late(split.early(x)), z)
    maps = split.feature_maps(x)
    assert maps.shape == (3, 64, 8, 8)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), z)
    torch.testing.assert_close(split.map_head(maps), logits)


def test_split_cuts_before_the_last_stage_by_default(model):
    split = split_model(model)
    assert split.early_name == "layer2"
    assert {"layer1", "layer2"} <= set(split.early_names)


def test_published_weights(data_folder):
    model = resnet20()
    weights = torch.load(data_folder / "resnet20_cifar10.pt", weights_only=True)
    model.load_state_dict(weights, strict=True)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    arrays = read_pack(data_folder / "cifar10_test.webp.zip")
    n = 1000
    rows = torch.randperm(len(arrays["y"]), generator=torch.Generator().manual_seed(0))[:n]
    test_set = ImagePack(arrays["x"], arrays["y"], normalize).subset(rows)
    with torch.no_grad():
        correct = [model.eval()(x).argmax(dim=1) == y for x, y in PackLoader(test_set, 250)]
    accuracy, expected = float(torch.cat(correct).double().mean()), 0.9173
    # three standard deviations of the share in a sample
    assert abs(accuracy - expected) < 3 * (expected * (1 - expected) / n) ** 0.5
