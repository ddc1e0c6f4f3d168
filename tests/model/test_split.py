import copy
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from pytorch_ood.detector import NCI
from pytorch_ood.model import ResNet18, ResNet50, WideResNet
from torch import nn
from torchvision.models import googlenet, resnet18, resnet50, squeezenet1_1
from torchvision.models.vision_transformer import VisionTransformer

from pood_plugins.detector import GROOD, NERO
from pood_plugins.model import SplitModel, split_model

pytestmark = pytest.mark.usefixtures("one_thread")


class CifarBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - in_planes) // 2

    def forward(self, x):
        z = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(z + F.pad(x, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """Functional activations, option-A shortcuts and functional average pooling."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(CifarBlock(4, 4, 1), CifarBlock(4, 4, 1))
        self.layer2 = nn.Sequential(CifarBlock(4, 8, 2), CifarBlock(8, 8, 1))
        self.layer3 = nn.Sequential(CifarBlock(8, 16, 2), CifarBlock(16, 16, 1))
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def mlp():
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)),
    )


def vit():
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=5,
    )


# name: (constructor, shape of an input, default early, maps of an input)
FAMILIES = {
    "mlp": (mlp, (6,), "1", None),
    "cnn": (cnn, (1, 28, 28), "3", (8, 11, 11)),
    "cifar_resnet": (CifarResNet, (3, 32, 32), "layer2", (16, 8, 8)),
    "wrn": (lambda: WideResNet(5, depth=10), (3, 32, 32), "block2", (128, 8, 8)),
    "ood_resnet18": (lambda: ResNet18(5), (3, 64, 64), "layer3", (512, 2, 2)),
    "ood_resnet50": (lambda: ResNet50(5), (3, 64, 64), "layer3", (2048, 2, 2)),
    "resnet18": (lambda: resnet18(num_classes=5), (3, 64, 64), "layer3", (512, 2, 2)),
    "resnet50": (lambda: resnet50(num_classes=5), (3, 64, 64), "layer3", (2048, 2, 2)),
    "vit": (vit, (3, 32, 32), "encoder.layers.encoder_layer_0", None),
}
SMALL = ("mlp", "cnn", "cifar_resnet", "wrn", "vit")


def convolution_head(*ending, **settings):
    """Ends in a 1×1 convolution, by default of pooled maps."""
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()]
    ending = ending or (nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1, **settings), nn.Flatten())
    return nn.Sequential(*body, *ending)


CONVOLUTION_HEAD = (convolution_head, (3, 32, 32), "3", (8, 28, 28))


def randomized(model):
    """Random statistics and heads: a fresh ViT head is zero, fresh BatchNorm does nothing."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2, generator=generator)
    return model.eval()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, shape, early, maps = FAMILIES[request.param]
    model = randomized(make())
    return model, split_model(model), random(3, *shape), early, maps


@pytest.fixture(params=SMALL)
def small(request):
    make, shape, _, _ = FAMILIES[request.param]
    return randomized(make()), random(3, *shape)


@pytest.fixture
def wrn():
    return randomized(WideResNet(3, depth=10, widen_factor=1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def test_parts_make_up_the_model(family):
    model, split, x, early, maps = family
    logits = model(x)
    features = split.encoder(x)
    assert features.shape == (3, split.head.in_features) and features.is_contiguous()
    assert isinstance(split.head, nn.Linear) and split.head in list(model.modules())
    assert logits.std() > 0
    assert torch.equal(split.head(features), logits)
    assert torch.equal(split(x), logits)
    assert split.early_name == early
    assert torch.equal(split.late(split.early(x)), features)


@torch.no_grad()
def test_feature_maps_and_layers(family):
    model, split, x, _, maps = family
    if maps is None:
        assert split.feature_maps is split.map_head is split.layers is None
        assert split.maps_reason
        return
    z = split.feature_maps(x)
    assert z.shape == (3, *maps) and split.maps_reason is None
    close(split.map_head(z), model(x))
    assert 2 <= len(split.layers) <= 4
    outputs = [x]
    for layer in split.layers:
        outputs.append(layer(outputs[-1]))
    assert all(output.ndim == 4 for output in outputs)
    assert torch.equal(outputs[-1], z)
    close(split.map_head(outputs[-1]), model(x))


@torch.no_grad()
def test_wide_resnet_agrees_with_its_own_methods(wrn):
    split, x = split_model(wrn), random(2, 3, 32, 32)
    assert torch.equal(split.encoder(x), wrn.features(x))
    assert torch.equal(split.feature_maps(x), wrn.feature_maps(x))
    assert torch.equal(split.map_head(split.feature_maps(x)), wrn(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pooled_before", [True, False])
def test_convolution_head(bias, pooled_before):
    convolution = nn.Conv2d(8, 5, 1, bias=bias)
    pool = nn.AdaptiveAvgPool2d(1)
    ending = (pool, convolution) if pooled_before else (nn.Dropout(), convolution, pool)
    model, x = randomized(convolution_head(*ending, nn.Flatten())), random(3, 3, 32, 32)
    split = split_model(model)
    head, features, logits = split.head, split.encoder(x), model(x)
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (8, 5)
    assert features.shape == (3, 8) and features.is_contiguous()
    close(head(features), logits)
    close(features @ head.weight.T + (head.bias if bias else 0), logits)
    close(split.late(split.early(x)), features)
    assert split.feature_maps(x).shape == (3, 8, 28, 28)
    close(split.map_head(split.feature_maps(x)), logits)

    # it is the convolution: the same parameters, and no others
    assert list(map(id, head.parameters())) == list(map(id, convolution.parameters()))
    assert list(split.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    assert not set(head.parameters()) & set(split.encoder.parameters())
    split(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        close(gradient, parameter.grad)
    with torch.no_grad():
        convolution.weight.mul_(2)
    close(split(x), model(x))
    split.double()
    close(split(x.double()), model(x.double()))


def test_convolution_head_copied():
    split, x = split_model(randomized(convolution_head())), random(3, 3, 32, 32)
    features, expected = split.encoder(x), split(x)
    head, twin = copy.deepcopy(split.head), copy.deepcopy(split)
    assert twin.head.convolution is twin.model[6] and split.head.convolution is split.model[6]
    with torch.no_grad():
        split.model[6].weight.zero_()
    assert torch.equal(head(features), expected) and torch.equal(twin(x), expected)
    assert "in_features=8, out_features=5" in repr(head)


def test_detectors_on_a_convolution_head():
    split = split_model(randomized(convolution_head()))
    x = random(200, 3, 32, 32) * torch.linspace(0.1, 4, 200)[:, None, None, None]
    with torch.no_grad():
        z, y = split.encoder(x), torch.arange(200) % 5
        split.head.bias.sub_(split.head(z).mean(0))  # so that several classes are predicted
    linear = nn.Linear(8, 5)
    linear.load_state_dict({"weight": split.head.weight, "bias": split.head.bias})
    for detector in (GROOD, NERO, NCI):
        scores = [
            detector(split.encoder, head).fit_features(z, y).predict_features(z)
            for head in (split.head, linear)
        ]
        assert scores[0].std() > 0 and torch.equal(*scores), detector


@pytest.mark.parametrize(
    "ending",
    [
        (nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        (nn.Conv2d(8, 5, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
        (nn.Conv2d(8, 5, 1), nn.AdaptiveMaxPool2d(1)),
        (nn.Conv2d(8, 5, 1, stride=5), nn.AdaptiveAvgPool2d(1)),
        (nn.Conv2d(8, 5, 1, padding=3), nn.AdaptiveAvgPool2d(1)),
    ],
)
def test_convolution_heads_that_are_not_linear_in_pooled_maps(ending):
    model = randomized(convolution_head(*ending, nn.Flatten()))
    with pytest.raises(ValueError, match="output is not 5 of the features"):
        split_model(model)


@pytest.mark.parametrize("last", [nn.Linear(8, 5), nn.Conv2d(8, 5, 1)])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(0, 1e9)])
def test_an_activation_after_the_head_that_is_idle_on_the_example(last, activation):
    nn.init.constant_(last.bias, 1000.0)
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    ending = [*pooling, last] if isinstance(last, nn.Linear) else [pooling[0], last, pooling[1]]
    model, x = convolution_head(*ending, activation).eval(), random(3, 3, 32, 32)
    assert torch.equal(model[:-1](x), model(x))
    with pytest.raises(ValueError, match="output is not [67] of the features"):
        split_model(model)
    assert not last._forward_hooks


@torch.no_grad()
def test_every_cut_works(small):
    model, x = small
    features = split_model(model).encoder(x)
    names = split_model(model).early_names
    assert names
    for name in names:
        split = split_model(model, name)
        assert split.early_name == name
        close(split.late(split.early(x)), features)
        assert split.early(x).shape[0] == 3


def test_cut_returns_what_the_module_returns(wrn):
    split, x, outputs = split_model(wrn, "block1.layer.0"), random(2, 3, 32, 32), []
    handle = wrn.block1.layer[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    wrn(x)
    handle.remove()
    assert torch.equal(split.early(x), outputs[0])


def test_no_cut_around_which_something_goes():
    names = split_model(randomized(CifarResNet())).early_names
    assert "layer1.0" in names and "layer1" in names and "bn1" in names
    assert not [name for name in names if name.endswith((".conv1", ".bn1", ".conv2", ".bn2"))]
    assert "linear" not in names


def test_identity_beside_a_skip_connection_is_no_cut():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.identity = nn.Linear(4, 4), nn.Identity()
            self.second, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.fc(x + self.second(self.identity(x)))

    assert split_model(Residual()).early_names == ["first"]


def test_in_place_addition_on_the_way_to_a_cut():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
            self.block, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.embed(x)
            x += self.position
            return self.fc(self.block(x))

    model, x = InPlace(), random(3, 4)
    split = split_model(model, "block")
    assert torch.equal(split.head(split.late(split.early(x))), model(x))


@torch.no_grad()
def test_late_leaves_its_input_alone(wrn):
    split = split_model(wrn, "bn1")  # an in-place ReLU follows
    z = split.early(random(2, 3, 32, 32))
    before = z.clone()
    first = split.late(z)
    assert torch.equal(z, before) and (z < 0).any()
    assert torch.equal(split.late(z), first)


@pytest.mark.parametrize("rows", [1, 2, 5])
@torch.no_grad()
def test_other_batch_sizes(small, rows):
    model, x = small
    split, x = split_model(model), random(rows, *x.shape[1:])
    close(split(x), model(x))
    close(split.late(split.early(x)), split.encoder(x))


@torch.no_grad()
def test_other_image_sizes():
    model = randomized(resnet18(num_classes=3))
    split, x = split_model(model), random(2, 3, 96, 80)
    assert torch.equal(split.head(split.late(split.early(x))), model(x))
    assert torch.equal(split.map_head(split.feature_maps(x)), model(x))


@torch.no_grad()
def test_double_precision(small):
    model, x = small
    model, x = model.double(), x.double()
    split = split_model(model)
    assert split(x).dtype == torch.float64
    assert torch.equal(split(x), model(x))
    assert torch.equal(split.late(split.early(x)), split.encoder(x))


@torch.no_grad()
def test_precision_changed_after_splitting(small):
    model, x = small
    split = split_model(model).double()
    assert torch.equal(split.late(split.early(x.double())), split.encoder(x.double()))
    assert torch.equal(split(x.double()), model(x.double()))


def test_precision_changed_with_functional_layers_on_the_way_to_a_cut():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))
            self.block, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.block(F.linear(self.embed(x), self.weight)))

    split, x = split_model(Mixed(), "block").double(), random(3, 4).double()
    assert torch.equal(split.late(split.early(x)), split.encoder(x))


@pytest.mark.parametrize("name", [*SMALL, "convolution_head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(name, dtype):
    make, shape, _, maps = {**FAMILIES, "convolution_head": CONVOLUTION_HEAD}[name]
    model, x = randomized(make()).to(dtype), random(3, *shape).to(dtype)
    split = split_model(model)
    features = split.encoder(x)
    assert features.dtype == split(x).dtype == dtype
    assert torch.equal(split.late(split.early(x)), features)
    if name == "convolution_head":
        assert relative(split(x), model(x)) < torch.finfo(dtype).eps
    else:
        assert torch.equal(split(x), model(x))
    if maps is not None:
        assert torch.equal(split.map_head(split.feature_maps(x)), model(x))


def test_a_precision_without_kernels_is_refused(wrn):
    with pytest.raises(ValueError, match="no inputs found.*not implemented for 'Float8"):
        split_model(wrn.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_channels_last(wrn, model_format, input_format):
    split = split_model(wrn.to(memory_format=model_format))
    x = random(2, 3, 32, 32).to(memory_format=input_format)
    for part in (split.encoder, split.early, split.feature_maps):
        assert part(x).is_contiguous()
    assert wrn.block1(wrn.conv1(x)).is_contiguous() == (
        model_format == input_format == torch.contiguous_format
    )
    close(split(x), wrn(x))
    close(split.late(split.early(x)), split.encoder(x))
    close(split.map_head(split.feature_maps(x)), wrn(x))


def test_gradients_pass_through_parts(small):
    model, x = small
    split = split_model(model)
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs).pow(2).sum(), inputs)
    z = split.early(inputs)
    (z_grad,) = torch.autograd.grad(split.head(split.late(z)).pow(2).sum(), z, retain_graph=True)
    (grad,) = torch.autograd.grad(z, inputs, z_grad)
    close(grad, expected)
    split(x).sum().backward()
    assert all(p.grad is not None for p in split.parameters())
    model.zero_grad()


def test_gradient_to_a_leaf_given_to_late(wrn):
    split = split_model(wrn, "bn1")
    z = split.early(random(2, 3, 32, 32)).detach().requires_grad_()
    split.late(z).sum().backward()  # the in-place ReLU must not meet the leaf
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_splitting_leaves_the_model_alone(training):
    model = randomized(CifarResNet()).train(training)
    model.layer2.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    modules = list(model.named_modules())
    generator_state = torch.get_rng_state()
    split = split_model(model)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert [m.training for m in model.modules()] == modes
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert split.training is training


def test_failed_splitting_leaves_the_model_alone():
    model = squeezenet1_1(num_classes=3).train()
    with pytest.raises(ValueError, match="convolution"):
        split_model(model)
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_parameters_are_shared_and_counted_once(family):
    model, split, _, _, _ = family
    own = list(model.parameters())
    assert [id(p) for p in split.parameters()] == [id(p) for p in own]
    assert list(split.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    body = {id(p) for p in own} - {id(p) for p in split.head.parameters()}
    assert {id(p) for p in split.encoder.parameters()} == body
    early, late = ({id(p) for p in part.parameters()} for part in (split.early, split.late))
    assert early <= body and late <= body and early and id(split.head.weight) not in late
    if split.layers:
        layers = [id(p) for layer in split.layers for p in layer.parameters()]
        assert len(layers) == len(set(layers))


def test_early_and_late_share_no_parameter(wrn):
    split = split_model(wrn)
    early, late = ({id(p) for p in part.parameters()} for part in (split.early, split.late))
    assert not early & late
    assert len(early | late) + 2 == len(list(wrn.parameters()))


def test_parts_are_made_once(small):
    split = split_model(small[0])
    for name in ("encoder", "head", "early", "late", "feature_maps", "map_head", "layers"):
        assert getattr(split, name) is getattr(split, name)


def test_parts_follow_the_mode_of_the_model(small):
    model, x = small
    split = split_model(model)
    parts = [split, split.encoder, split.early, split.late]
    model.train()
    assert all(part.training for part in parts)
    with torch.random.fork_rng(devices=[]):  # the same dropout in all three
        logits = []
        for network in (model, split, lambda x: split.head(split.late(split.early(x)))):
            torch.manual_seed(0)
            logits.append(network(x))
    close(logits[1], logits[0])
    close(logits[2], logits[0])
    for part in parts:
        assert part.eval() is part and not any(m.training for m in model.modules())
        assert part.train() is part and all(m.training for m in model.modules())


def test_functional_dropout_follows_the_mode():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.fc = nn.Linear(4, 64), nn.Linear(64, 2)

        def forward(self, x):
            return self.fc(F.dropout(self.hidden(x), 0.5, self.training))

    model, x = Dropping().train(), random(3, 4)
    split = split_model(model)
    assert (split.encoder(x) == 0).any() and (split.late(split.early(x)) == 0).any()
    model.eval()
    assert torch.equal(split.encoder(x), model.hidden(x))


def test_running_statistics_are_updated_once():
    model, x = randomized(CifarResNet()), random(4, 3, 32, 32)
    twin, before = copy.deepcopy(model), model.bn1.running_mean.clone()
    split = split_model(model).train()
    twin.train()(x)
    split(x)
    assert not torch.equal(model.bn1.running_mean, before)
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_placeholders_do_not_spoil_running_statistics():
    model = randomized(googlenet(num_classes=3, init_weights=False)).train()
    split = split_model(model, "inception4d")  # the auxiliary heads run in training mode only
    x = random(2, 3, 64, 64)
    z = split.early(x)
    with pytest.raises(RuntimeError, match="aux1.*eval"):
        split.late(z)
    assert split(x).shape == (2, 3)
    assert split.eval().late(z).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_deepcopy(wrn):
    split, x = split_model(wrn), random(2, 3, 32, 32)
    twin = copy.deepcopy(split)
    with torch.no_grad():
        expected = split(x)
        for parameter in wrn.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.head(twin.late(twin.early(x))), expected)
        assert torch.equal(twin.map_head(twin.feature_maps(x)), expected)
    assert twin.head is twin.model.fc and twin.stages[0] is twin.model.block1
    assert not {id(p) for p in twin.encoder.parameters()} & {id(p) for p in wrn.parameters()}
    twin.model.train()
    assert twin.encoder.training and not split.encoder.training


def test_state_dict_goes_in_and_out(wrn):
    split, x = split_model(wrn), random(2, 3, 32, 32)
    other = split_model(randomized(WideResNet(3, depth=10, widen_factor=1)))
    assert not torch.equal(other(x), split(x))
    other.load_state_dict(split.state_dict())
    assert torch.equal(other(x), split(x))
    assert torch.equal(other.late(other.early(x)), split.encoder(x))


def test_hooks_on_stages_run_with_the_split_model(family):
    model, split, x, _, _ = family
    assert all(stage in list(model.modules()) for stage in split.stages)
    for network in (model, split):
        calls = []
        handles = [s.register_forward_hook(lambda m, *_: calls.append(m)) for s in split.stages]
        network(x)
        for handle in handles:
            handle.remove()
        assert calls == split.stages


@torch.no_grad()
def test_threads_do_not_meet(wrn):
    split = split_model(wrn)
    inputs = [torch.full((2, 3, 32, 32), float(i)) for i in range(4)]
    expected, found = [split.encoder(x) for x in inputs], [[] for _ in inputs]

    def work(i):
        with torch.no_grad():
            found[i] += [split.late(split.early(inputs[i])) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for features, z in zip(found, expected):
        assert len(features) == 5
        for feature in features:
            close(feature, z)


def test_nothing_is_kept_of_an_input(wrn):
    split, x = split_model(wrn), random(2, 3, 32, 32)
    kept = weakref.ref(x)
    split.encoder(x)
    del x
    assert kept() is None


def test_under_inference_mode(wrn):
    x = random(2, 3, 32, 32)
    with torch.inference_mode():
        split = split_model(wrn)
        expected = wrn(x)
        assert torch.equal(split.head(split.late(split.early(x))), expected)
    assert "block2" in split.early_names


def test_compiled_and_wrapped_models_are_unwrapped(wrn):
    compiled = torch.compile(wrn, backend="eager")
    assert split_model(compiled).model is wrn
    assert split_model(nn.DataParallel(wrn)).model is wrn
    assert split_model(nn.DataParallel(compiled)).model is wrn
    assert split_model(torch.compile(nn.DataParallel(wrn), backend="eager")).model is wrn
    split = split_model(wrn)
    assert isinstance(split, SplitModel)
    assert split_model(split, "block1").model is wrn


def test_attributes_of_modules_that_are_replaced():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Linear(4, 4), nn.Linear(4, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.block(self.embed(x.to(self.fc.weight.dtype))) * self.embed.in_features
            return self.fc(x + self.block.out_features)

    model, x = Asking(), random(3, 4)
    for name in ("embed", "block"):
        split = split_model(model, name)
        assert torch.equal(split.head(split.late(split.early(x))), model(x))
        assert not {id(p) for p in split.late.parameters()} & {id(model.embed.weight)}
        twin = copy.deepcopy(split)
        assert torch.equal(twin.late(twin.early(x)), split.encoder(x))


def test_example_chooses_the_input():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5, 4), nn.ReLU(), nn.Linear(4, 2))
    split = split_model(model, example=random(1, 2, 5).double())
    assert split.late(split.early(random(3, 2, 5))).shape == (3, 4)


def test_image_size_of_the_model_is_tried():
    class Sized(nn.Module):
        image_size = 20

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(3 * 18 * 18, 2)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1))

    assert split_model(Sized()).encoder(random(3, 2, 20, 20)).shape == (3, 972)


def test_a_size_that_changes_the_number_of_rows_is_refused(wrn):
    with pytest.raises(ValueError, match=r"\(8, 3\).*check the example"):
        split_model(wrn, example=random(2, 3, 64, 64))


class Reply(nn.Module):
    """An encoder with two heads, and an answer made of them."""

    def __init__(self, answer):
        super().__init__()
        self.body, self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.answer = answer

    def forward(self, x):
        return self.answer(self, self.body(x))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda x: x, "no nn.Module"),
        (nn.Linear(3, 2), "nothing comes before"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "convolution"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Softmax(1)), "something else than"),
        (nn.Sequential(nn.Linear(4, 4), Doubling(4, 2)), "not 1 of the features"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)), "something else than"),
        (nn.Sequential(nn.ReLU()), "pass a batch"),
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "lazy"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2)), "pass a batch"),
        (Reply(lambda m, z: m.fc(z) + m.other(z)), r"several heads \(fc, other\)"),
        (Reply(lambda m, z: (m.fc(z), m.other(z))), "returns tuple"),
        (Reply(lambda m, z: {"logits": m.fc(z)}), "returns dict"),
        (Reply(lambda m, z: m.fc(z) * torch.inf), "not finite"),
    ],
)
def test_refusals(model, message):
    with pytest.raises(ValueError, match=message):
        split_model(model)


def test_a_head_outside_the_registered_modules_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)
            self.chain = [self.body, self.fc]

        def forward(self, x):
            for layer in self.chain:
                x = layer(x)
            return x

    with pytest.raises(ValueError, match="head can't be taken off"):
        split_model(Hidden())


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@torch.no_grad()
def test_compiled_parts_of_a_model():
    model, x = mlp().eval(), random(3, 6)
    expected = model(x)
    model[0] = torch.compile(model[0], backend="eager")
    model[2].compile(backend="eager")
    split = split_model(model, "1", example=x)
    close(split(x), expected)
    close(split.head(split.late(split.early(x))), expected)


def test_compiled_parts_are_refused_by_an_older_torch(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    model = mlp().eval()
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ValueError, match="parts of it are compiled, which needs torch 2.6"):
        split_model(model, example=random(3, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("make", [lambda m: torch.jit.trace(m, random(2, 6)), torch.jit.script])
def test_torchscript_is_refused(make):
    with pytest.raises(ValueError, match="TorchScript"):
        split_model(make(mlp().eval()))


# torch.ao's warnings of its own end
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_quantized_models_are_refused():
    quantized = torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear})
    with pytest.raises(ValueError, match="it is quantized, split the model it was made from"):
        split_model(quantized)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="meta device, load its weights first"):
        split_model(mlp().to("meta"))


@pytest.mark.parametrize("example", [3, [1.0], torch.tensor(1.0), torch.empty(0, 6)])
def test_bad_example(example):
    with pytest.raises(ValueError, match="example has to be"):
        split_model(mlp(), example=example)


@pytest.mark.parametrize(
    "early, message",
    [
        ("layer_2", "no such module.*nearest choices.*layer2.*all choices.*conv1, bn1"),
        ("layer1.0.conv1", "nothing going around it.*nearest choices"),
        ("linear", "before the head"),
        ("", "before the head"),
    ],
)
def test_bad_early(early, message):
    with pytest.raises(ValueError, match=message):
        split_model(CifarResNet(), early)


def test_nowhere_to_cut():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(F.linear(x, self.weight))

    model, x = Functional(), random(3, 6)
    split = split_model(model, example=x)
    assert split.early is split.late is split.early_name is split.stages is None
    assert split.early_names == []
    assert torch.equal(split(x), model(x))
    with pytest.raises(ValueError, match="all choices: none"):
        split_model(model, "fc", example=x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_the_split_model_moves_all_parts():
    split = split_model(randomized(WideResNet(3, depth=10))).to("cuda")
    x = random(2, 3, 32, 32).cuda()
    close(split.late(split.early(x)), split.encoder(x))
    assert split_model(split.model).encoder(x).is_cuda
