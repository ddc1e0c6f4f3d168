"""
NACUE keeps the graphs of a model's forward passes.

``NACUE.predict`` and ``NACUE.fit`` (``pytorch_ood/detector/nac.py``) put hooks into the model
that collect outputs of layers, with their graphs, and remove them at the end. If the model
raises in between, e.g. out of memory, they stay: from then on every forward pass of the model,
by whomever, adds to the list, until memory is full. Without an error, too, the graph of the
last batch is kept, so that a fitted detector that has scored can't be deep-copied.

Proposed fix: remove the hooks in a ``finally``, in both functions, and forget what they
collected in ``NACUE._remove_hooks``::

    self._captured.clear()
"""

import copy

import torch
from pytorch_ood.detector import NACUE
from torch.utils.data import DataLoader

WORKAROUND = None

layers = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)]
model = torch.nn.Sequential(*layers)
detector = NACUE(model, layers=layers[:1]).fit(DataLoader(torch.rand(8, 2), batch_size=4))
problems = []

detector.predict(torch.rand(4, 2))
try:
    copy.deepcopy(detector)
except RuntimeError:
    problems.append("a detector that has scored can't be copied")

for call in (lambda x: detector.fit([x]), detector.predict):
    try:
        call(torch.rand(4, 7))  # the model takes two features
    except RuntimeError:
        pass
    for _ in range(10):
        model(torch.rand(4, 2))
    if detector._captured:
        n = len(detector._captured)
        problems.append(f"after an error, {n} outputs of 10 unrelated passes were kept")
    detector._remove_hooks()
    detector._captured.clear()
assert not problems, "\n".join(problems)
