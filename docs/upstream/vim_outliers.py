"""
ViM fits on outliers that it says it ignores.

The docstring of ``ViM.fit_features`` (``pytorch_ood/detector/vim.py``) says that it ignores OOD
samples, but the labels are not looked at: samples with labels < 0 take part in the principal
subspace and in alpha, and the more they differ from ID data, the more they bend both. ``fit``
is right, since ``extract_features`` drops them before. Whoever fits on cached features and
labels, as with ``KNN`` or ``DICE``, gets other scores. ``NCI`` and ``fDBD`` do not
look for labels < 0 either, but do not say that they would.

Proposed fix, before the features are used::

    features = features[is_known(labels)]
"""

import torch
from pytorch_ood.detector import ViM

WORKAROUND = "pood_plugins.evaluation.runner"

generator = torch.Generator().manual_seed(0)
weight, bias = torch.rand(3, 6, generator=generator), torch.zeros(3)
z, y = torch.rand(90, 6, generator=generator), torch.arange(90) % 3
outliers = 9 * torch.rand(90, 6, generator=generator)

known = ViM(None, 3, weight, bias).fit_features(z, y)
both = ViM(None, 3, weight, bias).fit_features(
    torch.cat([z, outliers]), torch.cat([y, torch.full((90,), -1)])
)
x = torch.rand(4, 6, generator=generator)
expected, scores = known.predict_features(x), both.predict_features(x)
assert torch.allclose(scores, expected, atol=1e-4), (
    f"with outliers to ignore, scores are {scores.tolist()} instead of {expected.tolist()}"
)
