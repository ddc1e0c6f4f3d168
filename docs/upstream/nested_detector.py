"""
``to`` does not move a detector that another one holds.

``Detector.to`` moves modules, tensors and containers of them, but leaves attributes that are
detectors where they are, and ``Detector.device`` does not look into them
(``Detector._move_value_to_device`` and ``Detector._infer_value_device`` in
``pytorch_ood/api.py``). ``MahalanobisODIN`` is one around ``Mahalanobis``:
``MahalanobisODIN(encoder).to("cuda")`` leaves encoder, centers and precision on the CPU, so
that ``Benchmark.evaluate(..., device="cuda")``, which moves the inputs, fails.

Proposed fix, one line at the start of each of the two functions::

    if isinstance(value, Detector): return value.to(device)
    if isinstance(value, Detector): return value.device
"""

import torch
from pytorch_ood.detector import MahalanobisODIN

WORKAROUND = "pood_plugins.evaluation.runner"

encoder = torch.nn.Linear(2, 2)
detector = MahalanobisODIN(encoder)
detector.fit_features(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1]))
detector.to("meta")  # stands for any other device
places = {
    "encoder": encoder.weight.device.type,
    "centers": detector._base.mu.device.type,
    "precision": detector._base.precision.device.type,
}
left = {name: place for name, place in places.items() if place != "meta"}
assert not left, f"after .to('meta'), these are still elsewhere: {left}"
assert detector.device == torch.device("meta"), f"device is {detector.device}"
