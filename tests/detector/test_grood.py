import copy
import gc
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_ood.api import RequiresFittingException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import gaussian_blur

from pood_plugins.detector import GROOD, grood, grood_gradients, mixup_prototype, noise_prototype

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def problem(n: int = 150, dimension: int = 6, n_classes: int = 4, seed: int = 0):
    """Features of overlapping classes, labels of which some are -1, and a head that errs often."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_classes, (n,), generator=generator)
    labels[: 2 * n_classes] = torch.arange(n_classes).repeat(2)
    centers = torch.randn(n_classes + 1, dimension, generator=generator)
    z = centers[labels] + 0.8 * torch.randn(n, dimension, generator=generator)
    head = linear(centers[:-1], -0.5 * centers[:-1].square().sum(dim=1))
    return head, z, labels


def explicit_gradients(z, prototypes, ood_prototype, temperature):
    """The closed form, sample by sample in numpy."""
    gradients = []
    for x in z:
        distances = [np.sqrt(((x - p) ** 2).sum()) for p in [*prototypes, ood_prototype]]
        weights = [math.exp(-(d - min(distances)) / temperature) for d in distances]
        gradients.append(weights[-1] / sum(weights) * (x - ood_prototype) / distances[-1])
    return np.array(gradients)


def explicit_prototype(source, head, z, labels, prototypes, classes, mixup):
    """The OOD prototype, sample by sample in numpy."""
    logits = head(z).numpy()
    z, labels = z.double().numpy(), labels.numpy()
    if source == "outliers":
        return np.mean([x for x, label in zip(z, labels) if label < 0], axis=0)
    if source == "mean":
        return np.mean(prototypes, axis=0)
    mixed = []
    for x, label, row in zip(z, labels, logits):
        if label >= 0:
            ranking = sorted(classes, key=lambda c: -row[c])
            runner_up = prototypes[classes.index(ranking[1])]
            mixed.append(mixup * x + (1 - mixup) * runner_up)
    return np.mean(mixed, axis=0)


def explicit_scores(source, head, z, labels, queries, k=1, temperature=1.0, mixup=0.5):
    """All of GROOD, sample by sample in numpy."""
    classes = sorted({c for c in labels.tolist() if c >= 0})
    predicted = head(z).argmax(dim=1).tolist()
    rows = z.double().numpy()
    prototypes = [rows[[label == c for label in labels.tolist()]].mean(axis=0) for c in classes]
    if isinstance(source, Tensor):
        ood_prototype = source.double().numpy()
    else:
        ood_prototype = explicit_prototype(source, head, z, labels, prototypes, classes, mixup)
    correct = [x for x, y, label in zip(rows, predicted, labels.tolist()) if y == label]
    bank = explicit_gradients(correct, prototypes, ood_prototype, temperature)
    scores = []
    for gradient in explicit_gradients(
        queries.double().numpy(), prototypes, ood_prototype, temperature
    ):
        scores.append(sorted(np.sqrt(((gradient - b) ** 2).sum()) for b in bank)[k - 1])
    return torch.tensor(np.array(scores)), len(bank)


def assert_same_fit(detector: GROOD, expected: GROOD) -> None:
    """The same but for the rounding of sums in another order."""
    for name in ("prototypes_", "ood_prototype_", "temperature_"):
        torch.testing.assert_close(getattr(detector, name), getattr(expected, name))
    assert detector.classes_ == expected.classes_
    assert detector.bank_.dtype == expected.bank_.dtype
    rows = []
    for d in (detector, expected):
        lengths = 1.0 if d.bank_lengths_ is None else d.bank_lengths_[:, None]
        rows.append(d.bank_.float() * lengths)
    # halves that lie between two numbers may be rounded to either
    atol = 1e-7 if expected.bank_lengths_ is None else 1e-3
    torch.testing.assert_close(*rows, rtol=1e-5, atol=atol)


class TestGradients:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("pseudo_label", [0, 2])
    def test_equal_autograd(self, temperature, pseudo_label):
        z, prototypes = randn(9, 5).double(), randn(3, 5, seed=1).double()
        o = randn(5, seed=2).double().requires_grad_()
        expected = []
        for x in z:
            logits = -torch.stack([(x - p).norm() for p in [*prototypes, o]]) / temperature
            loss = F.cross_entropy(logits[None], torch.tensor([pseudo_label]))
            expected.append(torch.autograd.grad(loss, o)[0])
        gradients = grood_gradients(z, prototypes, o.detach(), temperature)
        # the constant factor 1 / T is left out on purpose
        torch.testing.assert_close(
            gradients, temperature * torch.stack(expected), rtol=1e-10, atol=0
        )

    def test_norm_is_the_probability_of_the_ood_prototype(self):
        z, prototypes, o = randn(50, 5), randn(3, 5, seed=1), randn(5, seed=2)
        logits = -torch.cdist(z.double(), torch.cat([prototypes, o[None]]).double())
        norm = grood_gradients(z, prototypes, o).norm(dim=1)
        torch.testing.assert_close(norm.double(), logits.softmax(dim=1)[:, -1], rtol=1e-6, atol=0)

    def test_zero_at_the_ood_prototype(self):
        o = randn(5)
        gradients = grood_gradients(torch.stack([o, o + 1]), randn(3, 5, seed=1), o)
        assert (gradients[0] == 0).all() and (gradients[1] != 0).all()

    def test_small_probabilities_are_not_lost(self):
        # distances 0 and d to the two prototypes: the probability is about exp(-d)
        distances = torch.tensor([40.0, 60.0, 69.0, 90.0, 100.0])
        for d in distances.tolist():
            gradient = grood_gradients(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([d]))
            assert gradient.norm().item() == pytest.approx(math.exp(-d), rel=1e-5)

    @pytest.mark.parametrize("temperature", [1e-300, 1e300])
    def test_extreme_temperatures_and_features_stay_finite(self, temperature):
        z = torch.cat([randn(5, 4), 3e38 * randn(5, 4, seed=1).sign()])
        gradients = grood_gradients(z, randn(3, 4, seed=2), randn(4, seed=3), temperature)
        assert gradients.isfinite().all() and (gradients.norm(dim=1) <= 1 + 1e-6).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_dtype(self, dtype):
        gradients = grood_gradients(randn(4, 3).to(dtype), randn(2, 3, seed=1), randn(3, seed=2))
        assert gradients.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


class TestFit:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("source", ["outliers", "mixup", "mean", "tensor"])
    def test_equals_explicit_loops(self, source, temperature):
        head, z, labels = problem()
        source = randn(6, seed=7) if source == "tensor" else source
        queries = torch.cat([z[:20], 2 * randn(30, 6, seed=5)])
        for k in [1, 5]:
            detector = GROOD(
                None, head, ood_prototype=source, mixup=0.3, k=k, temperature=temperature
            ).fit_features(z, labels)
            expected, bank = explicit_scores(
                source, head, z, labels, queries, k, temperature, mixup=0.3
            )
            # the head errs, and the bank is of its correct predictions only
            assert 0 < bank < (labels >= 0).sum() and len(detector.bank_) == bank
            torch.testing.assert_close(
                detector.predict_features(queries).double(), expected, rtol=1e-5, atol=1e-7
            )

    def test_fitted_state(self):
        head, z, labels = problem()
        detector = GROOD(None, head).fit_features(z, labels)
        assert detector.prototypes_.shape == (4, 6) and detector.ood_prototype_.shape == (6,)
        assert detector.bank_.shape[1] == 6 and detector.classes_ == [0, 1, 2, 3]
        for c in range(4):
            mean = z[labels == c].double().mean(dim=0)
            torch.testing.assert_close(detector.prototypes_[c].double(), mean, rtol=0, atol=1e-6)

    def test_absent_classes_have_no_prototype_and_are_no_runner_up(self):
        head, z, labels = problem()
        labels[(labels == 1) | (labels == 3)] = 0
        queries = randn(20, 6, seed=5)
        with pytest.warns(UserWarning, match=r"2 of the 4 head columns \(1, 3\)"):
            detector = GROOD(None, head, ood_prototype="mixup").fit_features(z, labels)
        assert detector.classes_ == [0, 2] and detector.prototypes_.shape == (2, 6)
        expected, _ = explicit_scores("mixup", head, z, labels, queries)
        torch.testing.assert_close(
            detector.predict_features(queries).double(), expected, rtol=1e-5, atol=1e-7
        )

    def test_long_lists_of_absent_classes_are_shortened(self):
        head = linear(randn(100, 6), torch.zeros(100))
        with pytest.warns(UserWarning) as record:
            GROOD(None, head).fit_features(randn(30, 6), torch.arange(30) % 3)
        messages = [str(warning.message) for warning in record]
        assert any("97 of the 100" in m and "3, 4, 5" in m and ", ..." in m for m in messages)
        assert all(len(message) < 200 for message in messages)

    @pytest.mark.parametrize("remaining, source", [(5, "outliers"), (4, "mixup"), (1, "mean")])
    def test_auto_takes_the_first_source_with_data(self, remaining, source):
        head, z, labels = problem()
        head = linear(head.weight[:remaining], head.bias[:remaining])
        keep = labels < remaining if source == "outliers" else (labels >= 0) & (labels < remaining)
        fits = [
            GROOD(None, head, ood_prototype=s).fit_features(z[keep], labels[keep])
            for s in ["auto", source]
        ]
        assert torch.equal(fits[0].ood_prototype_, fits[1].ood_prototype_)
        assert torch.equal(fits[0].bank_, fits[1].bank_)

    def test_tensor_is_taken_as_it_is_and_copied(self):
        head, z, labels = problem()
        prototype = randn(6, seed=7)
        detector = GROOD(None, head, ood_prototype=prototype).fit_features(z, labels)
        expected = prototype.clone()
        prototype.zero_()
        assert torch.equal(detector.ood_prototype_, expected)

    @pytest.mark.parametrize("n_synthetic, size", [(10, 10), (0.5, 61), (0.001, 1), (1, 1)])
    def test_n_synthetic_is_a_count_or_a_fraction(self, n_synthetic, size, monkeypatch):
        head, z, labels = problem()
        assert (labels >= 0).sum() == 122
        sizes = []
        runner_up = grood._runner_up
        monkeypatch.setattr(
            grood, "_runner_up", lambda *a: sizes.append(len(a[0])) or runner_up(*a)
        )
        GROOD(None, head, ood_prototype="mixup", n_synthetic=n_synthetic).fit_features(
            z, labels, batch_size=25
        )
        assert sum(sizes) == size

    @pytest.mark.parametrize("fraction, size", [(0.25, 0.25), (0.5, 0.5), (0.0, 0)])
    def test_bank_fraction(self, fraction, size):
        head, z, labels = problem()
        full = GROOD(None, head).fit_features(z, labels).bank_
        part = GROOD(None, head, bank_fraction=fraction).fit_features(z, labels).bank_
        assert len(part) == max(1, int(size * len(full)))
        rows = {tuple(row) for row in full.tolist()}
        assert len({tuple(row) for row in part.tolist()} & rows) == len(part)

    def test_seed(self):
        head, z, labels = problem()

        def fit(seed):
            arguments = {"n_synthetic": 20, "bank_fraction": 0.3, "ood_prototype": "mixup"}
            return GROOD(None, head, seed=seed, **arguments).fit_features(z, labels)

        state = torch.random.get_rng_state()
        first = fit(1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(99)
        again, other = fit(1), fit(2)
        assert torch.equal(first.bank_, again.bank_)
        assert not torch.equal(first.ood_prototype_, other.ood_prototype_)

    def test_batch_size_does_not_matter(self):
        head, z, labels = problem()
        fits = [
            GROOD(None, head, ood_prototype="mixup").fit_features(z, labels, batch_size=n)
            for n in (4096, 7)
        ]
        torch.testing.assert_close(fits[0].bank_, fits[1].bank_, rtol=1e-6, atol=1e-8)

    def test_outliers_in_the_loader_are_kept(self):
        head, z, labels = problem()
        loader = [(z[:70], labels[:70]), (z[70:], labels[70:])]
        fits = [
            GROOD(nn.Flatten(), head, ood_prototype="outliers").fit(loader),
            GROOD(None, head, ood_prototype="outliers").fit_features(z, labels),
        ]
        assert torch.equal(fits[0].ood_prototype_, fits[1].ood_prototype_)
        assert torch.equal(fits[0].bank_, fits[1].bank_)

    @pytest.mark.parametrize("fraction, dtype", [(0.5, torch.float32), (1.0, torch.float16)])
    @pytest.mark.parametrize(
        "arguments, passes",
        [
            ({"ood_prototype": "mean"}, 2),
            ({"ood_prototype": "outliers"}, 2),
            ({"ood_prototype": randn(6, seed=5)}, 2),
            ({"ood_prototype": "mixup"}, 2),
            ({"ood_prototype": "mixup", "n_synthetic": 20}, 3),  # there are outliers among them
            ({"n_synthetic": 20}, 2),  # "auto": these outliers are the prototype
            ({"ood_prototype": "mean", "temperature": "auto"}, 3),
            ({"ood_prototype": "mixup", "n_synthetic": 0.2, "temperature": "auto"}, 3),
        ],
    )
    def test_small_banks_are_fitted_in_few_passes(self, arguments, passes, fraction, dtype):
        head, z, labels = problem()
        arguments = {**arguments, "bank_fraction": fraction, "bank_dtype": dtype}
        expected = GROOD(None, head, **arguments).fit_features(z, labels)
        loader = DataLoader(TensorDataset(z, labels), batch_size=25)
        seen = []
        encoder = nn.Identity()
        encoder.register_forward_hook(lambda *a: seen.append(len(a[2])))
        detector = GROOD(encoder, head, **arguments).fit(loader)
        assert sum(seen) == passes * len(z)
        assert_same_fit(detector, expected)

    def test_a_choice_among_id_samples_alone_needs_no_third_pass(self):
        head, z, labels = problem()
        z, labels = z[labels >= 0], labels[labels >= 0]
        arguments = {"n_synthetic": 20, "bank_fraction": 0.5}
        expected = GROOD(None, head, **arguments).fit_features(z, labels)
        for loader, passes in [
            (DataLoader(TensorDataset(z, labels), batch_size=25), 2),
            ([(z[:70], labels[:70]), (z[70:], labels[70:])], 3),  # has no length beforehand
        ]:
            seen = []
            encoder = nn.Identity()
            encoder.register_forward_hook(lambda *a: seen.append(len(a[2])))
            assert_same_fit(GROOD(encoder, head, **arguments).fit(loader), expected)
            assert sum(seen) == passes * len(z)

    def test_a_choice_with_absent_classes_needs_a_third_pass(self):
        head, z, labels = problem()
        keep = (labels >= 0) & (labels != 2)
        z, labels = z[keep], labels[keep]
        arguments = {"n_synthetic": 20, "bank_fraction": 0.5}
        loader = DataLoader(TensorDataset(z, labels), batch_size=25)
        with pytest.warns(UserWarning, match="No ID sample for 1 of the 4"):
            expected = GROOD(None, head, **arguments).fit_features(z, labels)
            detector = GROOD(nn.Identity(), head, **arguments).fit(loader)
        assert_same_fit(detector, expected)

    @pytest.mark.parametrize("fraction, largest", [(0.5, 3), (1.0, 100)])
    def test_features_are_kept_for_a_whole_bank_only(self, fraction, largest):
        head, z, labels = problem(n=600)

        def encoder(x):
            passed.append(len(x))
            if len(passed) % 30 == 0:  # in the middle and at the end of a pass
                with warnings.catch_warnings():  # of deprecated attributes of other objects
                    warnings.simplefilter("ignore")
                    tensors = [t for t in gc.get_objects() if type(t) is Tensor]
                alive.append(sum(t.shape == (10, 6) for t in tensors))
            return x * 1

        passed: list[int] = []
        alive: list[int] = []
        loader = DataLoader(TensorDataset(z, labels), batch_size=10)
        GROOD(encoder, head, bank_fraction=fraction).fit(loader)
        assert max(alive) <= largest
        assert (max(alive) > 50) == (fraction == 1.0)

    @pytest.mark.parametrize("change", ["other order", "fewer"])
    def test_passes_must_not_differ(self, change):
        head, z, labels = problem()
        detector = GROOD(nn.Identity(), head, ood_prototype="mean", bank_fraction=0.5)

        class Loader:
            passes = 0

            def __iter__(self):
                self.passes += 1
                if self.passes == 1:
                    return iter([(z, labels)])
                if change == "fewer":
                    return iter([(z[:100], labels[:100])])
                return iter([(z.flip(0), labels.flip(0))])

        with pytest.raises(ValueError, match="other labels in another pass. Turn shuffling off"):
            detector.fit(Loader())
        assert detector.bank_ is None

    def test_vanishing_gradients_in_few_passes(self):
        head, z, labels = problem()
        far = torch.full((6,), 1e4)
        loader = DataLoader(TensorDataset(z, labels), batch_size=25)
        with pytest.warns(UserWarning, match=r"100% of the bank .* norm 0"):
            GROOD(nn.Identity(), head, ood_prototype=far, bank_fraction=0.5).fit(loader)

    def test_vanishing_gradients(self):
        head, z, labels = problem()
        far = torch.full((6,), 1e4)
        with pytest.warns(UserWarning, match=r"100% of the bank .* norm 0.* larger temperature"):
            GROOD(None, head, ood_prototype=far).fit_features(z, labels)
        # no more than one percent may vanish in silence: here, one of more than a hundred
        z = torch.cat([z, z, torch.zeros(1, 6)])
        labels = torch.cat([labels, labels, head(torch.zeros(1, 6)).argmax(dim=1)])
        detector = GROOD(None, head, ood_prototype=torch.zeros(6)).fit_features(z, labels)
        assert (detector.bank_ == 0).all(dim=1).sum() == 1 and len(detector.bank_) > 100

    def test_failed_fit_leaves_the_fitted_state(self):
        head, z, labels = problem()
        detector = GROOD(None, head).fit_features(z, labels)
        before = copy.deepcopy(vars(detector))
        with warnings.catch_warnings(), pytest.raises(UserWarning):
            warnings.simplefilter("error")
            detector.fit_features(z[labels < 2], labels[labels < 2])
        detector.ood_prototype = torch.full((6,), math.nan)
        with pytest.raises(ValueError, match="OOD prototype contains NaN"):
            detector.fit_features(z, labels)
        for name in ("prototypes_", "ood_prototype_", "bank_"):
            assert torch.equal(getattr(detector, name), before[name])
        assert detector.classes_ == before["classes_"]

    def test_head_need_not_be_linear(self):
        head, z, labels = problem()
        fits = [GROOD(None, h).fit_features(z, labels) for h in (head, lambda x: head(x))]
        assert torch.equal(fits[0].bank_, fits[1].bank_)


class TestPredict:
    def test_tiny_probabilities_still_rank(self):
        # one class at the origin, the OOD prototype at distance 69: probabilities of about 1e-30
        head, o = linear(torch.zeros(1, 2), torch.zeros(1)), torch.tensor([69.0, 0.0])
        z = 1e-3 * randn(50, 2)
        detector = GROOD(None, head, ood_prototype=o).fit_features(z, torch.zeros(50).long())
        queries = torch.stack([torch.linspace(0.1, 8, 30), torch.zeros(30)], dim=1)
        scores = detector.predict_features(queries)
        assert 0 < scores.min() < 1e-29 and (scores.diff() > 0).all()

    def test_k_is_read_when_scoring(self):
        head, z, labels = problem()
        queries = randn(20, 6, seed=5)
        detector = GROOD(None, head).fit_features(z, labels)
        gradients = grood_gradients(queries, detector.prototypes_, detector.ood_prototype_)
        distances = torch.cdist(gradients.double(), detector.bank_.double()).sort(dim=1).values
        size = len(detector.bank_)
        for k, position in [(1, 1), (7, 7), (size, size), (0.5, size // 2), (0.0, 1), (1.0, size)]:
            detector.k = k
            torch.testing.assert_close(
                detector.predict_features(queries).double(),
                distances[:, position - 1],
                rtol=1e-5,
                atol=1e-7,
            )
        detector.k = size + 1
        with pytest.raises(ValueError, match=rf"k={size + 1} .* {size} rows of the bank\. Use a"):
            detector.predict_features(queries)

    def test_temperature_changed_after_fit(self):
        head, z, labels = problem()
        detector = GROOD(None, head).fit_features(z, labels)
        scores = detector.predict_features(z)
        detector.temperature = 0.5
        with pytest.raises(RequiresFittingException, match=r"from 1.0 to 0.5 .* Call fit"):
            detector.predict_features(z)
        detector.temperature = 1.0
        assert torch.equal(detector.predict_features(z), scores)

    @pytest.mark.parametrize("temperature", [1.0, 0.02])
    def test_half_precision(self, temperature):
        head, z, labels = problem()
        arguments = {"ood_prototype": "mean", "temperature": temperature}
        full = GROOD(None, head, **arguments).fit_features(z, labels)
        half = GROOD(None, head, bank_dtype=torch.float16, **arguments).fit_features(z, labels)
        assert half.bank_.dtype == torch.float16 and half.bank_.shape == full.bank_.shape
        assert half.bank_lengths_.dtype == torch.float32 and full.bank_lengths_ is None
        queries = torch.cat([z, randn(50, 6, seed=3)])
        gradients = grood_gradients(
            queries, half.prototypes_, half.ood_prototype_, half.temperature_
        )
        # exact distances to the rows as they are kept, and these are off by 2^-11 at most
        rows = half.bank_.double() * half.bank_lengths_.double()[:, None]
        expected = torch.cdist(
            gradients.double(), rows, compute_mode="donot_use_mm_for_euclid_dist"
        ).amin(dim=1)
        scores = half.predict_features(queries)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-44)
        bank = full.bank_.double()
        assert ((rows - bank).norm(dim=1) <= 2**-11 * bank.norm(dim=1) + 1e-44).all()
        assert ((scores - full.predict_features(queries)).abs() <= 2**-11).all()

    def test_half_precision_keeps_tiny_gradients(self):
        head, z, labels = problem()
        # all features lie so much closer to their prototype that probabilities are near 1e-30
        arguments = {"ood_prototype": torch.full((6,), 30.0), "temperature": 1.0}
        full = GROOD(None, head, **arguments).fit_features(z, labels)
        half = GROOD(None, head, bank_dtype=torch.float16, **arguments).fit_features(z, labels)
        norms = full.bank_.double().norm(dim=1)
        assert norms.max() < 1e-20 and norms.min() > 0
        torch.testing.assert_close(half.bank_lengths_.double(), norms, rtol=1e-3, atol=0)
        scores = half.predict_features(z + 0.1), full.predict_features(z + 0.1)
        assert len(set(scores[0].tolist())) == len(z) and (scores[0] > 0).all()
        torch.testing.assert_close(*scores, rtol=0.02, atol=0)

    def test_training_samples_of_the_bank_score_zero(self):
        head, z, labels = problem()
        detector = GROOD(None, head).fit_features(z, labels)
        correct = head(z).argmax(dim=1) == labels
        assert (detector.predict_features(z[correct]) == 0).all()
        assert (detector.predict_features(z[labels < 0]) > 0).all()

    def test_scores_lie_in_0_2(self):
        head, z, labels = problem()
        detector = GROOD(None, head, k=1.0).fit_features(z, labels)
        scores = detector.predict_features(
            torch.cat([100 * randn(50, 6), 3e38 * randn(9, 6).sign()])
        )
        assert ((scores >= 0) & (scores <= 2)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"ood_prototype": "noise"},
            "one of auto, outliers, mixup, mean or a tensor, got 'noise'",
        ),
        ({"ood_prototype": None}, "or a tensor, got None"),
        ({"ood_prototype": np.zeros(6)}, "or a tensor, got array"),
        ({"ood_prototype": torch.zeros(1, 6)}, r"of shape D, got .* \(1, 6\)\. Take the mean"),
        ({"ood_prototype": torch.zeros(6).long()}, "must be floating point .* torch.int64"),
        ({"n_synthetic": 0}, "n_synthetic must be at least 1, got 0"),
        ({"n_synthetic": 1.5}, r"n_synthetic must be a fraction in \[0, 1\], got 1.5"),
        ({"n_synthetic": "all"}, r"n_synthetic must be a count \(int\) or a fraction"),
        ({"mixup": 50}, r"mixup must be a fraction.*use 0\.5 instead of 50"),
        ({"mixup": math.nan}, "mixup must be a fraction"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": True}, r"k must be a count \(int\) or a fraction \(float\), got True"),
        ({"k": 5.0}, r"k must be a fraction"),
        ({"temperature": "Auto"}, "temperature must be a finite number > 0 or 'auto', got 'Auto'"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"temperature": math.inf}, "temperature must be a finite number > 0"),
        ({"temperature": math.nan}, "temperature must be a finite number > 0"),
        ({"bank_fraction": 95}, r"bank_fraction must be .*use 0\.95 instead of 95"),
        ({"bank_dtype": torch.bfloat16}, "must be torch.float32 or torch.float16, got torch.bf"),
        ({"bank_dtype": "float16"}, "must be torch.float32 or torch.float16, got 'float16'"),
        ({"bank_fraction": -0.1}, "bank_fraction must be a fraction"),
    ],
)
def test_bad_hyperparameters(arguments, message):
    head, z, labels = problem()
    with pytest.raises(ValueError, match=message):
        GROOD(None, head, **arguments)
    # set later, they are found by the next call
    detector = GROOD(None, head).fit_features(z, labels)
    for name, value in arguments.items():
        setattr(detector, name, value)
    with pytest.raises(ValueError, match=message):
        detector.fit_features(z, labels)


def test_prototype_of_another_width():
    head, z, labels = problem()
    with pytest.raises(ValueError, match="has 5 entries, the features have 6. Compute it with"):
        GROOD(None, head, ood_prototype=torch.zeros(5)).fit_features(z, labels)


@pytest.mark.parametrize(
    "change, got",
    [
        (lambda logits: (logits, logits), "tuple"),
        (lambda logits: logits[:, 0], r"\(150,\)"),
        (lambda logits: logits[1:], r"\(149, 4\)"),
    ],
)
def test_head_must_give_logits(change, got):
    head, z, labels = problem()
    with pytest.raises(ValueError, match=f"of shape B x C, got {got} for 150 rows. Pass the last"):
        GROOD(None, lambda x: change(head(x))).fit_features(z, labels)


def test_head_must_be_callable():
    with pytest.raises(ValueError, match="needs a head .* got NoneType. Pass the last layer"):
        GROOD(None, None)


def test_classes_may_be_ruled_out():
    """By a logit of minus infinity, which says no more than that the class is not predicted."""
    head, z, labels = problem()
    ruled_out = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    detector = GROOD(None, lambda x: head(x) + ruled_out).fit_features(z, labels)
    predicted = head(z)[:, :3].argmax(dim=1)
    assert len(detector.bank_) == (predicted == labels).sum()


def test_repr():
    head = problem()[0]
    assert repr(GROOD(None, head)) == "GROOD(ood_prototype=auto, k=1, temperature=1.0)"
    assert "tensor" in repr(GROOD(None, head, ood_prototype=torch.zeros(6)))


class Early(nn.Module):
    """First layers of a tiny network; remembers the images that it was given."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
        self.convolution.weight.copy_(randn(5, 3, 3, 3) / 3)
        self.images = []

    def forward(self, x: Tensor) -> Tensor:
        self.images += list(x)
        return self.convolution(x).relu()


@pytest.fixture
def network():
    convolution = nn.Conv2d(5, 6, 3, stride=2).requires_grad_(False)
    convolution.weight.copy_(randn(6, 5, 3, 3, seed=1) / 5)
    late = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Early(), late, linear(5 * randn(3, 6, seed=2), randn(3, seed=3))


@pytest.fixture
def batches():
    images = randn(40, 3, 8, 8)
    labels = torch.arange(40) % 4 - 1  # a quarter are outliers
    images[labels < 0] = 1e3
    # the first batch holds outliers only
    order = torch.cat([(labels < 0).nonzero()[:5, 0], (labels >= 0).nonzero()[:, 0]])
    order = torch.cat([order, (labels < 0).nonzero()[5:, 0]])
    return [(images[rows], labels[rows]) for rows in order.split(5)]


class TestMixupPrototype:
    def explicit(self, network, batches, chosen, weight):
        """Sample by sample; ``chosen`` are the positions among the ID samples."""
        early, late, head = network
        samples = [(x, int(y)) for batch in batches for x, y in zip(*batch) if y >= 0]
        maps = [early(x[None])[0].double() for x, _ in samples]
        classes = sorted({y for _, y in samples})
        prototypes = {
            c: torch.stack([m for m, (_, y) in zip(maps, samples) if y == c]).mean(dim=0)
            for c in classes
        }
        features = []
        for i in chosen:
            logits = head(late(maps[i].float()[None]))[0]
            runner_up = sorted(classes, key=lambda c: -logits[c].item())[1]
            mixed = weight * maps[i] + (1 - weight) * prototypes[runner_up]
            features.append(late(mixed.float()[None])[0].double())
        return torch.stack(features).mean(dim=0)

    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
    def test_equals_explicit_loops(self, network, batches, weight):
        prototype = mixup_prototype(*network, batches, weight=weight)
        expected = self.explicit(network, batches, range(30), weight)
        assert prototype.shape == (6,) and prototype.dtype == torch.float32
        torch.testing.assert_close(prototype.double(), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("n, size", [(1, 1), (12, 12), (0.5, 15), (30, 30), (1000, 30)])
    def test_random_subset(self, network, batches, n, size):
        samples = [x for batch in batches for x, y in zip(*batch) if y >= 0]
        early = network[0]
        early.images.clear()
        prototype = mixup_prototype(*network, batches, n=n, seed=3)
        assert len(early.images) == 30 + size
        chosen = [
            next(i for i, x in enumerate(samples) if torch.equal(x, image))
            for image in early.images[30:]
        ]
        assert len(set(chosen)) == size
        expected = self.explicit(network, batches, chosen, 0.5)
        torch.testing.assert_close(prototype.double(), expected, rtol=1e-5, atol=1e-7)

    def test_seed(self, network, batches):
        prototypes = [mixup_prototype(*network, batches, n=10, seed=s) for s in (1, 1, 2)]
        assert torch.equal(prototypes[0], prototypes[1])
        assert not torch.equal(prototypes[0], prototypes[2])

    def test_absent_class_is_no_runner_up(self, network, batches):
        batches = [(x, torch.where(y == 1, 0, y)) for x, y in batches]
        prototype = mixup_prototype(*network, batches)
        expected = self.explicit(network, batches, range(30), 0.5)
        torch.testing.assert_close(prototype.double(), expected, rtol=1e-5, atol=1e-7)

    def test_serves_grood(self, network, batches):
        early, late, head = network
        prototype = mixup_prototype(*network, batches)
        detector = GROOD(nn.Sequential(early, late), head, ood_prototype=prototype).fit(batches)
        assert torch.equal(detector.ood_prototype_, prototype)
        assert detector(batches[1][0]).isfinite().all()

    def test_errors(self, network, batches):
        with pytest.raises(ValueError, match="at least two classes, got 1. Use another"):
            mixup_prototype(*network, [(x, y.clamp(max=0)) for x, y in batches])
        with pytest.raises(ValueError, match="at least two classes, got 0"):
            mixup_prototype(*network, [])
        with pytest.raises(ValueError, match="weight must be a fraction"):
            mixup_prototype(*network, batches, weight=1.5)
        with pytest.raises(ValueError, match="n must be at least 1"):
            mixup_prototype(*network, batches, n=0)
        with pytest.raises(ValueError, match="gave 30 ID samples, .* iterated over twice"):
            mixup_prototype(*network, iter(batches))
        growing = iter([batches, batches + batches])

        class Growing:
            def __iter__(self):
                return iter(next(growing))

        with pytest.raises(ValueError, match="gave 30 ID samples, .* iterated over twice"):
            mixup_prototype(*network, Growing())
        batches[1][0].fill_(math.nan)
        with pytest.raises(ValueError, match="NaN or infinite features. Check"):
            mixup_prototype(*network, batches)


class TestNoisePrototype:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_blur_equals_torchvision(self, channels):
        images = torch.rand(4, channels, 9, 6, generator=torch.Generator().manual_seed(0))
        sigma = torch.tensor([0.2, 0.7, 1.5, 5.0])
        expected = [gaussian_blur(x, [5, 7], [s, s]) for x, s in zip(images, sigma.tolist())]
        torch.testing.assert_close(grood._blur(images, sigma), torch.stack(expected))

    @pytest.mark.parametrize(
        "n, keep, size", [(250, 0.1, 25), (60, 7, 7), (60, 0.0, 1), (9, 50, 9)]
    )
    def test_mean_feature_of_the_lowest(self, network, n, keep, size):
        early, late, head = network
        prototype = noise_prototype(nn.Sequential(early, late), head, (3, 8, 8), n=n, keep=keep)
        assert len(early.images) == n
        features = [late(early(x[None]))[0].double() for x in early.images[:n]]
        energy = [head(z.float()[None])[0].double().exp().sum().log().item() for z in features]
        lowest = sorted(range(n), key=energy.__getitem__)[:size]
        expected = torch.stack([features[i] for i in lowest]).mean(dim=0)
        assert prototype.shape == (6,) and prototype.dtype == torch.float32
        torch.testing.assert_close(prototype.double(), expected, rtol=1e-5, atol=1e-7)

    def test_images_are_blurred_uniform_noise(self, network, monkeypatch):
        early, late, head = network
        seen = []
        blur = grood._blur
        monkeypatch.setattr(grood, "_blur", lambda *a: seen.append(a) or blur(*a))
        noise_prototype(nn.Sequential(early, late), head, (3, 8, 8), n=250)
        images, sigma = (torch.cat(values) for values in zip(*seen))
        torch.testing.assert_close(torch.stack(early.images), blur(images, sigma))
        assert images.shape == (250, 3, 8, 8) and sigma.shape == (250,)
        for values, low, high in [(images, 0.0, 1.0), (sigma, 0.2, 5.0)]:
            assert low <= values.min() and values.max() <= high
            assert values.mean().item() == pytest.approx((low + high) / 2, rel=0.1)
            # the standard deviation of a uniform distribution
            assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.1)

    def test_normalize(self, network):
        early, late, head = network
        encoder = nn.Sequential(early, late)
        noise_prototype(encoder, head, (3, 8, 8), n=30)
        noise_prototype(encoder, head, (3, 8, 8), n=30, normalize=lambda x: (x - 0.5) / 0.1)
        images = torch.stack(early.images)
        assert (images[:30] >= 0).all() and (images[:30] <= 1).all()
        torch.testing.assert_close(images[30:], (images[:30] - 0.5) / 0.1)

    def test_seed(self, network):
        early, late, head = network
        encoder = nn.Sequential(early, late)
        state = torch.random.get_rng_state()
        prototypes = [noise_prototype(encoder, head, (3, 8, 8), n=30, seed=s) for s in (1, 1, 2)]
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(prototypes[0], prototypes[1])
        assert not torch.equal(prototypes[0], prototypes[2])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                {"shape": (8, 8)},
                r"shape must be \(channels, height >= 4, width >= 3\), got \(8, 8\)",
            ),
            ({"shape": (3, 3, 8)}, r"shape must be .* got \(3, 3, 8\)"),
            ({"shape": (3, 8, 2)}, r"shape must be .* got \(3, 8, 2\)"),
            ({"n": 0}, "n must be at least 1, got 0"),
            ({"keep": 0}, "keep must be at least 1, got 0"),
            ({"keep": 10.0}, "keep must be a fraction"),
        ],
    )
    def test_bad_arguments(self, network, arguments, message):
        early, late, head = network
        arguments = {"shape": (3, 8, 8), **arguments}
        with pytest.raises(ValueError, match=message):
            noise_prototype(nn.Sequential(early, late), head, **arguments)

    def test_broken_network(self):
        head = linear(torch.full((2, 192), math.nan), torch.zeros(2))
        with pytest.raises(ValueError, match="NaN or infinite features. Check"):
            noise_prototype(lambda x: x / 0, head, (3, 8, 8))


def test_auto_temperature_is_an_eighth_of_the_spread():
    """Explicit loop over samples, and the same scores as with that number given."""
    head, z, labels = problem()
    detector = GROOD(None, head, temperature="auto").fit_features(z, labels)
    distances = []
    for sample, label in zip(z, labels):
        if label >= 0:
            mean = z[labels == label].double().mean(dim=0)
            distances.append(float((sample.double() - mean).norm()))
    expected = sum(distances) / len(distances) / 8
    assert float(detector.temperature_) == pytest.approx(expected, rel=1e-6)
    same = GROOD(None, head, temperature=float(detector.temperature_)).fit_features(z, labels)
    assert torch.equal(detector.predict_features(z), same.predict_features(z))


def test_auto_temperature_follows_the_scale_of_the_features():
    """Scores do not depend on the unit of the features, which those of a fixed temperature do."""
    head, z, labels = problem()
    scaled = nn.Linear(head.in_features, head.out_features).requires_grad_(False)
    scaled.weight.copy_(head.weight / 16)
    scaled.bias.copy_(head.bias)
    one, other = (
        GROOD(None, h, temperature="auto").fit_features(c * z, labels).predict_features(c * z)
        for h, c in ((head, 1.0), (scaled, 16.0))
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    fixed, other = (
        GROOD(None, h).fit_features(c * z, labels).predict_features(c * z)
        for h, c in ((head, 1.0), (scaled, 16.0))
    )
    assert not torch.allclose(fixed, other, rtol=1e-2)


def test_auto_temperature_does_not_depend_on_chunks_or_order():
    head, z, labels = problem()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    one = GROOD(None, head, temperature="auto").fit_features(z, labels)
    other = GROOD(None, head, temperature="auto").fit_features(z[order], labels[order], 7)
    torch.testing.assert_close(one.temperature_, other.temperature_, rtol=1e-6, atol=0)


def test_changing_to_auto_needs_a_new_fit():
    head, z, labels = problem()
    detector = GROOD(None, head).fit_features(z, labels)
    detector.temperature = "auto"
    with pytest.raises(RequiresFittingException, match="from 1.0 to auto"):
        detector.predict_features(z)
