"""
Scores of MahalanobisODIN change the training of the model.

``MahalanobisODIN._odin_preprocess`` (``pytorch_ood/detector/mahalanobis.py``) calls
``loss.backward()`` for a gradient with respect to the input, which also adds to ``.grad`` of
all parameters of the encoder. Whoever scores while gradients are accumulated, e.g. to monitor
training, trains with the sum of both; after a mere evaluation, as much memory as the weights
take is in use for good. ``ODIN`` asks for the gradient of the input only.

Proposed fix, in place of the two lines with ``backward`` and ``x.grad``::

    gradient = torch.sign(torch.autograd.grad(loss, x)[0])
"""

import torch
from pytorch_ood.detector import MahalanobisODIN

WORKAROUND = "pood_plugins.evaluation.runner"

encoder = torch.nn.Linear(2, 2)
x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
detector = MahalanobisODIN(encoder).fit_features(encoder(x), torch.tensor([0, 0, 1, 1]))

encoder(x).square().sum().backward()
before = encoder.bias.grad.clone()
detector.predict(x + 1)
after = encoder.bias.grad
assert torch.equal(after, before), (
    f"scoring changed the gradient of the bias from {before.tolist()} to {after.tolist()}"
)
