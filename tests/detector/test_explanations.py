"""
Explanations: by explicit loops, and that their parts add and multiply up to the scores.
"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_ood.api import ModelNotSetException, RequiresFittingException
from torch import nn

from pood_plugins.detector import GROOD, NERO, grood_gradients
from pood_plugins.neighbors import nearest_rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """Maps of 6 channels, their means as features, and a linear head."""

    def __init__(self, bias=True):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 3, bias=bias)
        self.runs = 0

    def encode(self, x):
        self.runs += 1
        return self.maps(x).mean(dim=(2, 3))


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Network().eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 3, 10, 14, generator=generator)
    return x * torch.rand(60, 3, 1, 1, generator=generator)


@pytest.fixture
def nero(network, images):
    detector = NERO(network.encode, network.head, n_components=4, n_neurons=2)
    return detector.fit([(images, torch.arange(60) % 3)])


@pytest.fixture
def grood(blobs):
    return GROOD(None, copy.deepcopy(blobs.head), k=2).fit_features(blobs.z, blobs.y)


# NERO


def relevance_by_loops(z, weight, bias):
    logits = [sum(w * a for w, a in zip(row, z)) + b for row, b in zip(weight, bias)]
    largest = max(logits)
    p = [math.exp(value - largest) for value in logits]
    p = [value / sum(p) for value in p]
    relevance = [
        sum(p[c] * weight[c][d] * z[d] / logits[c] for c in range(len(p))) for d in range(len(z))
    ]
    return relevance, sum(p[c] * bias[c] / logits[c] for c in range(len(p)))


def test_parts_of_nero_by_loops(nero, network, images):
    z = network.encode(images).double()
    weight, bias = network.head.weight.tolist(), network.head.bias.tolist()
    explanation = nero.explain_features(z[:12], n_neurons=3)
    of_training = [relevance_by_loops(row, weight, bias)[0] for row in z.tolist()]
    means = [
        [sum(of_training[i][d] for i in range(c, 60, 3)) / 20 for d in range(6)] for c in range(3)
    ]
    components = nero.components_.tolist()
    for i in range(12):
        relevance, of_bias = relevance_by_loops(z[i].tolist(), weight, bias)
        torch.testing.assert_close(explanation.relevance[i], torch.tensor(relevance))
        distances = []
        for mean in means:
            difference = [r - m for r, m in zip(relevance, mean)]
            projected = [
                abs(sum(difference[d] * components[d][j] for d in range(6))) for j in range(4)
            ]
            distances.append(sum(projected))
        torch.testing.assert_close(explanation.distances[i], torch.tensor(distances))
        nearest = distances.index(min(distances))
        assert explanation.nearest_class[i] == nearest
        deviation = [r - m for r, m in zip(relevance, means[nearest])]
        torch.testing.assert_close(
            explanation.deviation[i], torch.tensor(deviation), rtol=1e-4, atol=1e-6
        )
        order = sorted(range(6), key=lambda d: -abs(deviation[d]))
        assert explanation.top_neurons[i].tolist() == order[:3]
        lowest = sorted(range(6), key=lambda d: relevance[d])[:2]
        magnitude = z[i].abs().tolist()
        ratio = sum(magnitude[d] for d in lowest) / sum(magnitude)
        assert float(explanation.feature_ratio[i]) == pytest.approx(ratio, rel=1e-5)
        scaled = float(nero.bias_scale_) * abs(of_bias)
        assert float(explanation.bias[i]) == pytest.approx(scaled, rel=1e-5)


def test_parts_of_nero_make_the_score(nero, images):
    explanation = nero.explain(images)
    assert torch.equal(explanation.score, nero.predict(images))
    made = (explanation.distance + explanation.bias) * explanation.feature_ratio
    torch.testing.assert_close(made, explanation.score, rtol=1e-5, atol=0)
    assert torch.equal(explanation.distance, explanation.distances.amin(dim=1))


def test_heat_map_by_loops(nero, network, images):
    explanation = nero.explain(images[:5], layer=network.maps, n_neurons=2)
    assert explanation.heat_map.shape == (5, 10, 14)
    network.requires_grad_(False)
    maps = network.maps(images[:5]).double()
    weight, bias = network.head.weight.double(), network.head.bias.double()
    for i in range(5):
        z = maps[i].mean(dim=(1, 2))
        logits = weight @ z + bias
        p = logits.softmax(dim=0)
        small = torch.zeros(5, 7, dtype=torch.float64)
        for d in explanation.top_neurons[i].tolist():
            coefficient = sum(p[c] * weight[c, d] / logits[c] for c in range(3))
            small += coefficient * maps[i, d] / 35
        # the sum is the relevance that it shows
        shown = explanation.relevance[i, explanation.top_neurons[i]].double().sum()
        assert float(small.sum()) == pytest.approx(float(shown), rel=1e-5)
        heat = explanation.heat_map[i].double()
        assert float(heat.sum()) == pytest.approx(float(shown), rel=1e-5)
        # and in its middle, each of 2 x 2 positions has a quarter of what interpolation gives
        smooth = F.interpolate(small[None, None], (10, 14), mode="bilinear")[0, 0] / 4
        torch.testing.assert_close(heat[3:-3, 3:-3], smooth[3:-3, 3:-3], rtol=1e-4, atol=1e-8)


def test_heat_map_is_where_the_neurons_are(network):
    """A bright patch in dark images: the heat is there, and at most a stride away."""
    x = torch.zeros(60, 3, 16, 16)
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 12, (60, 2), generator=generator).tolist()
    for image, (i, j) in zip(x, corners):
        image[:, i : i + 4, j : j + 4] = torch.rand(3, 4, 4, generator=generator)
    nn.init.zeros_(network.maps[0].bias)
    detector = NERO(network.encode, network.head).fit([(x, torch.arange(60) % 3)])
    heat = detector.explain(x, layer=network.maps).heat_map.abs()
    for of_image, (i, j) in zip(heat, corners):
        near = of_image[max(0, i - 4) : i + 8, max(0, j - 4) : j + 8].sum()
        assert float(near) >= 0.999 * float(of_image.sum())


def test_one_forward_pass(nero, network, images):
    network.runs = 0
    nero.explain(images, layer=network.maps)
    assert network.runs == 1
    assert not network.maps._forward_hooks


def test_without_heat_map(nero, images):
    assert nero.explain(images).heat_map is None
    assert nero.explain_features(nero.encoder(images)).heat_map is None


def test_head_without_bias(images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Network(bias=False).eval()
    detector = NERO(network.encode, network.head).fit([(images, torch.arange(60) % 3)])
    explanation = detector.explain(images)
    assert not explanation.bias.any()
    torch.testing.assert_close(explanation.relevance.sum(dim=1), torch.ones(60))


def test_classes_are_ids(network, images):
    detector = NERO(network.encode, network.head).fit([(images, 2 * (torch.arange(60) % 2))])
    assert set(detector.explain(images).nearest_class.tolist()) == {0, 2}


def test_heat_maps_of_no_images_and_of_broken_ones(nero, network, images):
    assert nero.explain(images[:0], layer=network.maps).top_neurons.shape == (0, 6)
    images = images.clone()
    images[2, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="1 of 60 .*rows contain NaN"):
        nero.explain(images, layer=network.maps)


LAYERS = {
    "runs twice": (lambda network: network.twice, "must run once, but ran 2 times"),
    "does not run": (lambda network: nn.ReLU(), "must run once, but ran 0 times"),
    "returns features": (lambda network: network.flat, r"return maps of shape B x 6 x H x W, one"),
    "returns other maps": (lambda network: network.first, r"got \(60, 3, 10, 14\)\. Pass the mod"),
    "maps of other means": (lambda network: network.maps[0], "features are not the means of the"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_do_not_fit(nero, network, images, name):
    layer, message = LAYERS[name]
    network.twice, network.flat, network.first = nn.Identity(), nn.Identity(), nn.Identity()
    encode = network.encode

    def encoder(x):
        x = network.twice(network.twice(network.first(x)))
        return network.flat(encode(x))

    nero.encoder = encoder
    layer = layer(network)
    with pytest.raises(ValueError, match=message):
        nero.explain(images, layer=layer)
    assert not layer._forward_hooks


# GROOD


def test_neighbors_by_brute_force(grood, blobs):
    queries = torch.cat([blobs.z_in, blobs.z_out])
    explanation = grood.explain_features(queries, n_neighbors=4)
    state = grood.prototypes_, grood.ood_prototype_
    correct = blobs.head(blobs.z).argmax(dim=1) == blobs.y
    bank, rows = grood_gradients(blobs.z, *state), correct.nonzero()[:, 0]
    for i, gradient in enumerate(grood_gradients(queries, *state)):
        distances = (bank[rows].double() - gradient.double()).norm(dim=1)
        nearest = distances.argsort()[:4]
        assert explanation.neighbors[i].tolist() == rows[nearest].tolist()
        torch.testing.assert_close(
            explanation.neighbor_distances[i].double(), distances[nearest], rtol=1e-5, atol=1e-9
        )


def test_parts_of_grood(grood, blobs):
    queries = torch.cat([blobs.z_in, blobs.z_out])
    explanation = grood.explain_features(queries)
    assert torch.equal(explanation.score, grood.predict_features(queries))
    assert torch.equal(explanation.score, explanation.neighbor_distances[:, 1])  # k is 2
    gradients = grood_gradients(queries, grood.prototypes_, grood.ood_prototype_)
    torch.testing.assert_close(explanation.probability, gradients.norm(dim=1))
    for i, z in enumerate(queries):
        distances = (grood.prototypes_ - z).norm(dim=1)
        torch.testing.assert_close(explanation.distances[i], distances)
        assert explanation.nearest_class[i] == distances.argmin()


def test_neighbors_are_positions_in_the_fitted_data(blobs):
    """Also where outliers and what the head gets wrong come in between."""
    outlier = torch.rand(len(blobs.z), generator=torch.Generator().manual_seed(0)) < 0.3
    y = torch.where(outlier, -1, blobs.y)
    wrong = torch.arange(len(y)) % 7 == 0
    y = torch.where(wrong & ~outlier, (blobs.y + 1) % 4, y)
    detector = GROOD(None, blobs.head, ood_prototype="mean").fit_features(blobs.z, y)
    explanation = detector.explain_features(blobs.z, n_neighbors=1)
    own = explanation.neighbors[:, 0] == torch.arange(len(y))
    in_bank = (y >= 0) & (blobs.head(blobs.z).argmax(dim=1) == y)
    assert torch.equal(own, in_bank) and 0 < int(in_bank.sum()) < len(y)
    assert not explanation.score[in_bank].any()


def test_neighbors_of_a_drawn_bank_in_half_precision(blobs):
    detector = GROOD(None, blobs.head, bank_fraction=0.4, bank_dtype=torch.float16)
    detector.fit_features(blobs.z, blobs.y)
    explanation = detector.explain_features(blobs.z, n_neighbors=1)
    kept = set(detector.bank_indices_.tolist())
    assert len(kept) == len(detector.bank_) < len(blobs.z)
    for i in kept:
        assert explanation.neighbors[i] == i


def test_fewer_rows_than_neighbors(blobs):
    detector = GROOD(None, blobs.head, ood_prototype="mean")
    detector.fit_features(blobs.z[::60], blobs.y[::60])
    assert detector.explain_features(blobs.z_out, n_neighbors=9).neighbors.shape == (100, 4)


# both


@pytest.fixture(params=["GROOD", "NERO"])
def fitted(request, blobs):
    make = {"GROOD": GROOD, "NERO": NERO}[request.param]
    detector = make(nn.Identity(), copy.deepcopy(blobs.head))
    return detector.fit_features(blobs.z, blobs.y)


def fields(explanation):
    return {f.name: getattr(explanation, f.name) for f in dataclasses.fields(explanation)}


def test_batch_is_one_by_one(fitted, blobs):
    z = torch.cat([blobs.z_in[:20], blobs.z_out[:20]])
    together = fields(fitted.explain_features(z))
    apart = [fields(fitted.explain_features(row[None])) for row in z]
    chunked = fields(fitted.explain_features(z, 10 if "top_neurons" in together else 5, 7))
    for name, value in together.items():
        if value is None:
            continue
        assert len(value) == 40, name
        torch.testing.assert_close(torch.cat([one[name] for one in apart]), value)
        torch.testing.assert_close(chunked[name], value)


def test_explanation_of_inputs_is_that_of_their_features(fitted, blobs):
    of_inputs, of_features = fitted.explain(blobs.z_out), fitted.explain_features(blobs.z_out)
    for name, value in fields(of_features).items():
        assert value is None or torch.equal(fields(of_inputs)[name], value)
        assert value is None or not value.requires_grad


def test_nothing_changes(fitted, blobs):
    before = copy.deepcopy({n: v for n, v in vars(fitted).items() if n.endswith("_")})
    z = blobs.z_out.clone()
    fitted.explain_features(z)
    assert torch.equal(z, blobs.z_out)
    for name, value in before.items():
        after = getattr(fitted, name)
        assert torch.equal(after, value) if isinstance(value, torch.Tensor) else after == value


def test_empty_batch(fitted):
    explanation = fields(fitted.explain_features(torch.empty(0, 20)))
    assert all(value is None or len(value) == 0 for value in explanation.values())


def test_frozen(fitted, blobs):
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted.explain(blobs.z_out).score = 0


def test_nonsense(fitted, blobs):
    for count in (0, -1, True, "x"):
        with pytest.raises(ValueError, match="must be"):
            fitted.explain_features(blobs.z_out, count)
    with pytest.raises(ValueError, match="1 of 100 .*rows contain NaN"):
        z = blobs.z_out.clone()
        z[3, 4] = math.nan
        fitted.explain_features(z)
    with pytest.raises(ValueError, match="got 19"):
        fitted.explain_features(blobs.z_out[:, :19])
    with pytest.raises(RequiresFittingException):
        type(fitted)(nn.Identity(), blobs.head).explain(blobs.z_out)
    with pytest.raises(RequiresFittingException):
        type(fitted)(nn.Identity(), blobs.head).explain_features(blobs.z_out)
    fitted.encoder = None
    with pytest.raises(ModelNotSetException, match="or use explain_features"):
        fitted.explain(blobs.z_out)


def test_nearest_rows_is_sorted_and_consistent():
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(n, 5, generator=generator) for n in (30, 200))
    distances, rows = nearest_rows(query, bank, 7)
    assert distances.shape == rows.shape == (30, 7)
    assert (distances.diff(dim=1) >= 0).all()
    torch.testing.assert_close((bank[rows] - query[:, None]).norm(dim=2), distances)
    expected = torch.cdist(query, bank).topk(7, largest=False)
    assert torch.equal(rows, expected.indices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(fitted, blobs):
    expected = fields(fitted.explain_features(blobs.z_out))
    fitted.to("cuda")
    for name, value in fields(fitted.explain_features(blobs.z_out.cuda())).items():
        if value is not None and name not in ("top_neurons", "neighbors"):
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-3, atol=1e-5)
