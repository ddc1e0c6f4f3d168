"""
MCD changes the statistics of synchronised batch normalization.

``MCD._switch_mode`` (``pytorch_ood/detector/mcd.py``) puts the model into training mode for the
sake of dropout, and batch normalization back into evaluation mode, as ``batch_norm=True``
promises; but it looks for ``BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d`` only.
``SyncBatchNorm``, which models that were trained on several GPUs have, is none of them: samples
are normalised by their own batch, and each round shifts the running statistics, so the model
predicts something else for good.

Proposed fix, the class that all of them have in common::

    if isinstance(mod, nn.modules.batchnorm._BatchNorm):
"""

import torch
from pytorch_ood.detector import MCD

WORKAROUND = None

norm = torch.nn.SyncBatchNorm(2)
model = torch.nn.Sequential(norm, torch.nn.Dropout(0.5)).eval()
x = torch.tensor([[8.0, 6.0], [9.0, 7.0], [10.0, 8.0]])
MCD(model, samples=10).predict(x)
mean = norm.running_mean.tolist()
assert mean == [0.0, 0.0], f"scoring moved the running mean from [0.0, 0.0] to {mean}"
