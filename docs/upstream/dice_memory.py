"""
DICE needs memory for samples times classes times features.

``DICE.predict_features`` (``pytorch_ood/detector/dice.py``) multiplies every sample with every
row of the weights and sums afterwards, so that there is a tensor of shape B x C x D. A
benchmark passes whole data sets: 50,000 samples with 1,000 classes and 2,048 features would
take 410 GB.

Proposed fix, the product of matrices that it amounts to::

    output = torch.nn.functional.linear(x, self.masked_w.to(x), self.bias.to(x))
"""

import torch
from pytorch_ood.detector import DICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKAROUND = "pood_plugins.evaluation.runner"


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    shape = torch.Size([0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.shape.numel():
                self.shape = leaf.shape
        return result


samples, classes, features = 40, 20, 30
z, y = torch.rand(samples, features), torch.arange(samples) % classes
detector = DICE(None, torch.rand(classes, features), torch.zeros(classes), p=0.5)
detector.fit_features(z, y)
with Largest() as largest:
    scores = detector.predict_features(z)
expected = -torch.logsumexp(z @ detector.masked_w.T, dim=1)
assert torch.allclose(scores, expected, atol=1e-4), "the scores changed"
assert largest.shape.numel() <= samples * features, (
    f"a tensor of shape {tuple(largest.shape)} for {samples} samples of {features} features"
)
