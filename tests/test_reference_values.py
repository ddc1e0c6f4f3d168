"""
Values that the released implementations gave, kept outside of the repository: see POOD_REFERENCE.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pood_plugins.detector import GROOD, NERO, grood_gradients, nero_relevance
from pood_plugins.loss import GRegLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def test_grood(reference_folder):
    values = {
        name: torch.from_numpy(value)
        for name, value in np.load(reference_folder / "grood_small.npz").items()
    }
    head = linear(values["weight"], values["bias"])
    z = torch.cat([values["z_train"], values["z_outliers"]])
    labels = torch.cat([values["y_train"], torch.full((len(values["z_outliers"]),), -1)])
    detector = GROOD(None, head, ood_prototype="outliers").fit_features(z, labels)
    gradients = grood_gradients(values["z_test"], detector.prototypes_, detector.ood_prototype_)
    assert len(detector.bank_) == values["n_bank"]
    for ours, theirs in [
        (detector.prototypes_, values["prototypes"]),
        (detector.ood_prototype_, values["ood_prototype"]),
        (gradients, values["gradients_test"]),
        (detector.predict_features(values["z_test"]), values["score"]),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_nero(reference_folder):
    values = {
        name: torch.from_numpy(value)
        for name, value in np.load(reference_folder / "nero_small.npz").items()
    }
    head = linear(values["weight"], values["bias"])
    parts = nero_relevance(values["z_test"].double(), head.weight.double(), head.bias.double())
    relevance = torch.cat([parts[0], parts[1][:, None]], dim=1)
    torch.testing.assert_close(relevance, values["relevance_test"].double(), rtol=1e-4, atol=1e-5)
    detector = NERO(
        None, head, n_components=int(values["n_components"]), n_neurons=int(values["k"])
    )
    scores = detector.fit_features(values["z_train"], values["y_train"]).predict_features(
        values["z_test"]
    )
    torch.testing.assert_close(scores.double(), values["score"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", ["released", "paper"])
@pytest.mark.parametrize("name", ["greg_small", "greg_batchnorm"])
def test_greg(reference_folder, name, scale):
    reference = {
        key: torch.from_numpy(np.asarray(value))
        for key, value in np.load(reference_folder / f"{name}.npz").items()
    }
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *([nn.BatchNorm2d(8)] if reference["batch_norm"] else []),
        nn.Softplus(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    prefix = "param."
    model.load_state_dict(
        {key[len(prefix) :]: value for key, value in reference.items() if key.startswith(prefix)}
    )
    x, y = reference["x"], reference["y"]
    beta = reference["beta"].item() / (len(x) if scale == "paper" else 1)
    criterion = GRegLoss(
        reference["alpha"].item(),
        beta,
        reference["margin_in"].item(),
        reference["margin_out"].item(),
        scale,
    )
    terms = criterion.terms(model, x, y)
    terms["loss"].backward()

    for term, key in {
        "cross_entropy": "cross_entropy",
        "energy": "energy_term",
        "gradient": f"gradient_term_{scale}",
        "loss": "loss_released",
    }.items():
        assert terms[term].item() == pytest.approx(reference[key].item(), rel=1e-5, abs=1e-9), term
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, reference[f"grad.{key}"], rtol=1e-5, atol=1e-6, msg=key
        )
