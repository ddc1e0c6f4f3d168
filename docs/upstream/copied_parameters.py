"""
``to`` replaces parameters by copies that nobody else knows.

``Detector._move_value_to_device`` (``pytorch_ood/api.py``) makes a new ``Parameter`` of each
parameter that a detector holds, even if it is on the device already. An optimizer that was made
before, or the model that the parameter belongs to, keeps the old one: gradients go to the copy,
the optimizer changes nothing, and on another device model and detector have different values
from then on. ``torch.nn.Module.to`` keeps the parameter where it can. Detectors of others are
hit whose parameters are trained or belong to a model, those of pytorch-ood are not:
``TemperatureScaling`` makes its optimizer when it is fitted.

Proposed fix, as modules do::

    value.data = value.data.to(device); return value
"""

import torch
from pytorch_ood.api import LogitsDetector

WORKAROUND = "pood_plugins.registry"


class Scaled(LogitsDetector):
    def __init__(self):
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def predict_logits(self, logits):
        return -self.scale * logits.max(dim=1).values


detector = Scaled()
optimizer = torch.optim.SGD([detector.scale], lr=1.0)
detector.to("cpu")  # where it is already
detector.predict_logits(torch.tensor([[1.0, 2.0]])).sum().backward()
optimizer.step()
scale = detector.scale.item()
assert scale == 3.0, f"a step of the optimizer leaves the parameter at {scale} instead of 3.0"
