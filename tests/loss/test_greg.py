import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_ood.api import LossInfo, Representation, Task
from pytorch_ood.loss import EnergyRegularizedLoss, OutlierExposureLoss
from torch import nn

from pood_plugins.loss import GRegLoss
from pood_plugins.loss.greg import gradient_norms

N_CLASSES = 5


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small_net(norm=nn.Identity):
    """Smooth, so that finite differences apply."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        norm(4) if norm is not nn.Identity else nn.Identity(),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, N_CLASSES),
    ).double()


def batch(n_in=5, n_out=4, dtype=torch.float64):
    x = torch.randn(n_in + n_out, 3, 7, 7, dtype=dtype)
    y = torch.randint(0, N_CLASSES, (n_in + n_out,))
    y[n_in:] = -1
    shuffle = torch.randperm(len(y))
    return x[shuffle], y[shuffle]


def energies(model, x):
    return -model(x).exp().sum(dim=1).log()


def median_margins(model, x, y):
    """About half of each side is well placed, and no sample is close to its margin."""
    with torch.no_grad():
        score = energies(model, x)

    def between(values):
        values = values.sort().values
        return values[len(values) // 2 - 1 : len(values) // 2 + 1].mean().item()

    return {
        "margin_in": between(score[y >= 0]) if (y >= 0).any() else 0.0,
        "margin_out": between(score[y < 0]) if (y < 0).any() else 0.0,
    }


def objective(model, x, y, margin_in, margin_out):
    """The released code's scalar, as the design writes it."""
    score = energies(model, x)
    value = x.sum() * 0
    if (y >= 0).any():
        value = value - F.relu(margin_in - score[y >= 0]).mean()
    if (y < 0).any():
        value = value + F.relu(score[y < 0] - margin_out).mean()
    return value


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_all_close(actual, expected, **kwargs):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, **kwargs)


@pytest.mark.parametrize("scale", ["released", "paper"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
@pytest.mark.parametrize("sizes", [(5, 4), (6, 0), (0, 6)])
def test_equals_jacobian_formulation(norm, scale, sizes):
    model, (x, y) = small_net(norm), batch(*sizes)
    margins = median_margins(model, x, y)
    terms = GRegLoss(**margins, scale=scale).terms(model, x, y)

    jacobian = torch.autograd.functional.jacobian(
        lambda x: objective(model, x, y, **margins), x, create_graph=True
    )
    norms = torch.stack(
        [gradient.square().sum().sqrt() for gradient in jacobian if gradient.any()]
    )
    expected = norms.sum() if scale == "paper" else norms.sum() / len(x)

    assert expected > 0
    torch.testing.assert_close(terms["gradient"], expected)
    assert_all_close(
        parameter_gradients(model, terms["gradient"]),
        parameter_gradients(model, expected),
        rtol=1e-6,
        atol=1e-12,
    )


@pytest.mark.parametrize("n_in, n_out", [(5, 4), (2, 8)])
def test_paper_scale_is_the_equation_sample_by_sample(n_in, n_out):
    model, (x, y) = small_net(), batch(n_in, n_out)
    margins = median_margins(model, x, y)

    sides = {True: [], False: []}
    for image, label in zip(x, y):
        image = image.clone().requires_grad_()
        score = energies(model, image[None])[0]
        is_id = bool(label >= 0)
        inside = score <= margins["margin_in"] if is_id else score >= margins["margin_out"]
        gradient = torch.autograd.grad(score, image)[0] if inside else torch.zeros(1).double()
        sides[is_id].append(gradient.norm())
    expected = torch.stack(sides[True]).mean() + torch.stack(sides[False]).mean()

    paper = GRegLoss(**margins, scale="paper").terms(model, x, y)["gradient"]
    released = GRegLoss(**margins, scale="released").terms(model, x, y)["gradient"]
    assert expected > 0
    torch.testing.assert_close(paper, expected)
    torch.testing.assert_close(released, expected / (n_in + n_out))


@pytest.mark.parametrize("score", ["energy", "oe"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_finite_differences_of_the_parameters(norm, score):
    model, (x, y) = small_net(norm), batch()
    criterion = GRegLoss(0.3, 2.0, **median_margins(model, x, y), scale="paper", score=score)
    parameters = list(model.parameters())
    gradients = parameter_gradients(model, criterion(model, x, y))

    for _ in range(3):
        direction = [torch.randn_like(p) for p in parameters]
        expected = sum((g * d).sum() for g, d in zip(gradients, direction))
        values = []
        for sign in (1, -1):
            step = sign * 1e-5
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=step)
                values.append(criterion(model, x, y))
                torch._foreach_add_(parameters, direction, alpha=-step)
        difference = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(expected, difference, rtol=1e-6, atol=1e-8)


def test_finite_differences_of_the_inputs():
    model, (x, y) = small_net(nn.BatchNorm2d), batch(2, 2)
    x = x[..., :5, :5]
    margins = median_margins(model, x, y)
    leaf = x.clone().requires_grad_()
    norms = gradient_norms(energies(model, leaf), leaf, y, **margins, create_graph=False)

    expected = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            offset = torch.zeros_like(x)
            offset.view(-1)[i] = 1e-6
            above = objective(model, x + offset, y, **margins)
            below = objective(model, x - offset, y, **margins)
            expected.view(-1)[i] = (above - below) / 2e-6
    assert not norms.requires_grad
    torch.testing.assert_close(norms, expected.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-8)


def test_gate_keeps_well_placed_samples_only():
    # one class: the energy is -w x, so that every smoothed sample has the gradient norm ||w||
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0]])
    x = torch.tensor([[10.0, 0], [1, 0], [2, 0], [0, 1], [0, 10], [10, 10]])  # 30 3 6 4 40 70
    y = torch.tensor([0, 0, 0, -1, -1, -1])
    criterion = GRegLoss(margin_in=-25, margin_out=-7, scale="paper")
    # 1 of 3 ID samples has an energy of at most -25, 1 of 3 outliers one of at least -7
    assert criterion.terms(model, x, y)["gradient"].item() == pytest.approx(5 / 3 + 5 / 3)
    # with the labels of these two swapped, all samples are on the wrong side
    y = torch.tensor([-1, 0, 0, 0, -1, -1])
    wrong = criterion.terms(model, x, y)
    assert wrong["gradient"].item() == 0
    wrong["loss"].backward()
    assert model.weight.grad.isfinite().all()


def test_margins_are_inclusive():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    x, y = torch.tensor([[25.0], [7.0]]), torch.tensor([0, -1])
    terms = GRegLoss(margin_in=-25, margin_out=-7, scale="paper").terms(model, x, y)
    assert terms["gradient"].item() == 2
    assert terms["energy"].item() == 0


@pytest.mark.parametrize("sizes", [(5, 4), (6, 0), (0, 6)])
def test_beta_zero_is_the_energy_regularized_loss(sizes):
    model, (x, y) = small_net(), batch(*sizes)
    margins = {"margin_in": -2.5, "margin_out": -1.0}
    expected = EnergyRegularizedLoss(alpha=0.7, **margins)(model(x), y)
    terms = GRegLoss(alpha=0.7, beta=0, **margins).terms(model, x, y)

    torch.testing.assert_close(terms["loss"], expected)
    assert_all_close(
        parameter_gradients(model, terms["loss"]), parameter_gradients(model, expected)
    )
    assert terms["energy"] > 0
    assert not terms["gradient"].requires_grad
    with_graph = GRegLoss(alpha=0.7, beta=1, **margins).terms(model, x, y)
    torch.testing.assert_close(terms["gradient"], with_graph["gradient"].detach())


def test_outlier_exposure():
    model, (x, y) = small_net(), batch()
    terms = GRegLoss(score="oe", scale="paper").terms(model, x, y)

    logits = model(x)
    uniform = -logits.log_softmax(dim=1).mean(dim=1)
    torch.testing.assert_close(terms["energy"], uniform[y < 0].mean())
    upstream = OutlierExposureLoss(alpha=1.0, reduction="none")(logits.float(), y)
    torch.testing.assert_close(terms["energy"].float(), upstream[y < 0].mean())
    norms = [
        torch.autograd.functional.jacobian(
            lambda z: -model(z[None]).log_softmax(dim=1).mean(), image
        ).norm()
        for image in x
    ]
    norms = torch.stack(norms)
    torch.testing.assert_close(terms["gradient"], norms[y >= 0].mean() + norms[y < 0].mean())


def test_terms_add_up():
    model, (x, y) = small_net(), batch()
    criterion = GRegLoss(0.3, 2.0, -1.5, -1.4)
    terms = criterion.terms(model, x, y)
    assert set(terms) == {"cross_entropy", "energy", "gradient", "loss", "logits"}
    torch.testing.assert_close(
        terms["loss"], terms["cross_entropy"] + 0.3 * terms["energy"] + 2.0 * terms["gradient"]
    )
    torch.testing.assert_close(
        terms["cross_entropy"], F.cross_entropy(model(x), y, ignore_index=-1)
    )
    torch.testing.assert_close(terms["logits"], model(x))
    torch.testing.assert_close(criterion(model, x, y), terms["loss"])


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_order_of_samples_does_not_matter(norm):
    model, (x, y) = small_net(norm), batch()
    criterion = GRegLoss(**median_margins(model, x, y))
    expected = criterion(model, x, y)
    for _ in range(3):
        order = torch.randperm(len(x))
        torch.testing.assert_close(criterion(model, x[order], y[order]), expected)


def test_batch_norm_statistics_are_updated_once():
    x, y = batch(dtype=torch.float32)
    nets = [small_net(nn.BatchNorm2d).float() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    GRegLoss()(nets[0], x, y).backward()
    nets[1](x)
    assert nets[0][1].num_batches_tracked == 1
    assert_all_close(list(nets[0][1].buffers()), list(nets[1][1].buffers()))

    nets[0].eval()
    before = [buffer.clone() for buffer in nets[0].buffers()]
    GRegLoss()(nets[0], x, y).backward()
    assert_all_close(list(nets[0].buffers()), before, rtol=0, atol=0)
    assert not nets[0].training


def test_one_forward_pass():
    model, (x, y) = small_net(), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    GRegLoss()(model, x, y).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_left_alone(requires_grad):
    model, (x, y) = small_net(), batch()
    x.requires_grad_(requires_grad)
    copies = x.detach().clone(), y.clone()
    GRegLoss()(model, x, y).backward()
    assert x.grad is None
    assert x.requires_grad == requires_grad
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_gives_the_same_values(context):
    model, (x, y) = small_net(), batch()
    criterion = GRegLoss(**median_margins(model, x, y))
    expected = criterion.terms(model, x, y)
    with context():
        terms = criterion.terms(model, x * 1, y * 1)  # in inference mode, inference tensors
    assert expected["gradient"] > 0
    for name, value in terms.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name].detach(), msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_without_well_placed_samples_has_finite_gradients():
    model, (x, y) = small_net(), batch()
    # all ID samples above -25 and all outliers below 1000
    terms = GRegLoss(margin_in=-25, margin_out=1000).terms(model, x, y)
    assert terms["gradient"] == 0
    assert all(gradient.isfinite().all() for gradient in parameter_gradients(model, terms["loss"]))


def test_bfloat16_autocast():
    model, (x, y) = small_net(nn.BatchNorm2d).float(), batch(8, 8, dtype=torch.float32)
    criterion = GRegLoss(margin_in=0, margin_out=-100, beta=1, scale="paper", alpha=0)
    expected = criterion.terms(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        terms = criterion.terms(model, x, y)
    for name in ("cross_entropy", "gradient", "loss"):
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], expected[name], rtol=0.05, atol=0)
    gradients = parameter_gradients(model, terms["loss"])
    exact = parameter_gradients(model, expected["loss"])
    assert F.cosine_similarity(gradients[0].flatten(), exact[0].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_model_that_casts_its_inputs(dtype, parameters):
    model, (x, y) = small_net(), batch()
    criterion = GRegLoss(margin_in=0, margin_out=-100)
    expected = criterion(model, x, y)
    model = nn.Sequential(Lambda(lambda x: x.to(parameters)), model.to(parameters))
    loss = criterion(model, x.to(dtype), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=0.02, atol=0)


def test_frozen_layers_train_the_rest():
    model, (x, y) = small_net(), batch()
    model[0].requires_grad_(False)
    GRegLoss()(model, x, y).backward()
    assert model[0].weight.grad is None
    assert model[-1].weight.grad.isfinite().all()


class Attention(nn.Module):
    """Treats the 7 rows of each image as tokens."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.project = nn.Linear(21, 3 * 8)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)
        q, k, v = self.project(tokens)[:, None].chunk(3, dim=-1)
        return self.head(self.attend(q, k, v).mean(dim=(1, 2)))


def explicit_attention(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def gated_net(gate):
    return nn.Sequential(nn.Flatten(), nn.Linear(147, 8), gate, nn.Linear(8, N_CLASSES))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def discarded_result(x):
    x = x * 2
    F.hardsigmoid(x, inplace=True)
    return x


@pytest.mark.parametrize(
    "model, twice_differentiable",
    [
        (Attention(F.scaled_dot_product_attention), Attention(explicit_attention)),
        (gated_net(nn.Hardsigmoid()), gated_net(Lambda(lambda x: (x / 6 + 0.5).clamp(0, 1)))),
        (
            gated_net(nn.Hardsigmoid(inplace=True)),
            gated_net(Lambda(lambda x: (x / 6 + 0.5).clamp(0, 1))),
        ),
        (
            gated_net(Lambda(discarded_result)),
            gated_net(Lambda(lambda x: (x / 3 + 0.5).clamp(0, 1))),
        ),
    ],
    ids=["attention", "hardsigmoid", "inplace", "functional"],
)
def test_layers_without_second_derivative(model, twice_differentiable):
    x, y = batch(dtype=torch.float32)
    twice_differentiable.load_state_dict(model.state_dict())
    criterion = GRegLoss(margin_in=0, margin_out=-100, scale="paper")
    results = []
    for net in (model, twice_differentiable):
        terms = criterion.terms(net, x, y)
        results.append([terms["gradient"], *parameter_gradients(net, terms["loss"])])
    assert results[0][0] > 0
    assert_all_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.mobilenet_v3_small(num_classes=N_CLASSES),
        lambda: torchvision.models.VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=16,
            dropout=0.1,
            attention_dropout=0.1,
            num_classes=N_CLASSES,
        ),
    ],
    ids=["mobilenet", "vit"],
)
def test_torchvision_models(build, train):
    model = build().train(train)
    with torch.no_grad():  # the last layer of a new ViT is zero
        model.get_submodule(
            "heads.head" if hasattr(model, "heads") else "classifier.3"
        ).reset_parameters()
    x, y = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, -1, -1, -1])
    terms = GRegLoss(margin_in=0, margin_out=-100, scale="paper").terms(model, x, y)
    terms["loss"].backward()
    assert terms["gradient"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_global_state_is_restored(fails):
    def backends():
        return [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ]

    inside = []

    def look(z):
        inside.append(backends())
        if fails:
            raise RuntimeError("broken layer")
        return z

    model, (x, y) = gated_net(Lambda(look)), batch(dtype=torch.float32)
    before = backends()
    if fails:
        with pytest.raises(RuntimeError, match="broken layer"):
            GRegLoss()(model, x, y)
    else:
        GRegLoss()(model, x, y)
    assert inside == [[False, False, False, True]]
    assert backends() == before
    leaf = torch.ones(1, requires_grad=True)
    assert "Hardsigmoid" in F.hardsigmoid(leaf).grad_fn.name()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"alpha": -0.1}, "alpha must be a finite weight of at least 0"),
        ({"beta": float("nan")}, "beta must be a finite weight"),
        ({"beta": float("inf")}, "beta must be a finite weight"),
        ({"margin_in": float("nan")}, "margins must be numbers"),
        ({"scale": "batch"}, "scale must be 'released' or 'paper', got 'batch'"),
        ({"score": "msp"}, "score must be 'energy' or 'oe', got 'msp'"),
    ],
)
def test_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        GRegLoss(**arguments)


def test_swapped_margins_are_logged(caplog):
    GRegLoss(margin_in=-25, margin_out=-7)
    assert not caplog.records
    GRegLoss(margin_in=-7, margin_out=-25)
    assert "Are they swapped?" in caplog.text


class Detached(nn.Module):
    """A frozen encoder, frozen the wrong way, in front of a trainable head."""

    def __init__(self, trainable=True):
        super().__init__()
        self.head = nn.Linear(147, N_CLASSES).double().requires_grad_(trainable)

    def forward(self, x):
        return self.head(x.flatten(1).detach())


X, Y = torch.zeros(4, 3, 7, 7, dtype=torch.float64), torch.tensor([0, 1, -1, -1])


@pytest.mark.parametrize(
    "model, x, y, message",
    [
        (torch.zeros(4, 5), X, Y, "This loss calls the model itself.*torch.float32 of shape"),
        (lambda x: x, X, Y, "with a Module as model, got function"),
        (None, X.byte(), Y, "floating-point inputs.*got torch.uint8 of shape"),
        (None, X.numpy(), Y, "floating-point inputs.*got ndarray"),
        (None, X[:0], Y[:0], "non-empty batch"),
        (None, X[:, 0, 0, 0], Y, "of shape B x"),
        (None, X, Y[:3], "one label for each of 4 inputs, got torch.int64 of shape .3,."),
        (None, X, F.one_hot(Y.relu()), "one label for each of 4 inputs"),
        (None, X, Y.tolist(), "one label for each of 4 inputs, got list"),
        (None, X, Y.double(), "targets must be integers, got torch.float64"),
        (None, X, Y + 4, "Label 5 exceeds the 5 classes"),
        (nn.Identity(), X, Y, "must return logits of shape 4 x classes"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (12, 49))), X, Y, "of shape .12, 49."),
        (Lambda(lambda x: (x, x)), X, Y, "got tuple; wrap models"),
        (Detached(), X, Y, "no gradient with respect to its inputs; remove no_grad"),
        (Detached(trainable=False), X, Y, "no gradient with respect to its inputs"),
    ],
)
def test_bad_input(model, x, y, message):
    model = small_net() if model is None else model
    with pytest.raises(ValueError, match=message):
        GRegLoss()(model, x, y)


def test_refused_inputs_leave_batch_norm_alone():
    model = small_net(nn.BatchNorm2d)
    with pytest.raises(ValueError):
        GRegLoss()(model, X, Y[:3])
    assert model[1].num_batches_tracked == 0


def test_integer_labels_of_any_width():
    model, (x, y) = small_net(), batch()
    torch.testing.assert_close(GRegLoss()(model, x, y.int()), GRegLoss()(model, x, y))


def compiled_in_place():
    model = small_net()
    model.compile()
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.compile(small_net()),
        lambda: nn.Sequential(torch.compile(small_net()), nn.Identity()),
        compiled_in_place,
    ],
    ids=["wrapped", "nested", "in place"],
)
def test_compiled_models_are_refused(build):
    with pytest.raises(ValueError, match="torch.compile have no second derivative"):
        GRegLoss()(build(), X, Y)


def test_docstring_example():
    blocks = re.findall(
        r"\.\. code-block:: python\n\n(.*?)(?=\n\S|\Z)", inspect.getdoc(GRegLoss), re.DOTALL
    )
    assert len(blocks) == 1
    namespace = {}
    exec(textwrap.dedent(blocks[0]), namespace)
    assert namespace["loss"].isfinite()


def test_info():
    info = vars(GRegLoss)["info"]
    assert isinstance(info, LossInfo)
    assert info.tasks == {Task.CLASSIFICATION}
    assert info.inputs == {Representation.LOGITS, Representation.INPUTS}
    assert info.supervised and info.ai_coded
    assert info.paper.year == 2024 and "2404.12368" in info.paper.url


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    model, (x, y) = small_net(nn.BatchNorm2d), batch()
    criterion = GRegLoss(**median_margins(model, x, y))
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        loss = criterion(model, x.to(device), y.to(device))
        results.append([loss.cpu(), *(g.cpu() for g in parameter_gradients(model, loss))])
    assert_all_close(*results, rtol=1e-6, atol=1e-8)
