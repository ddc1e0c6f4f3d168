"""
Test sets without a name are left out without a word.

``Benchmark.evaluate`` (``pytorch_ood/benchmark/base.py``) pairs ``ood_names`` with
``test_sets()`` by ``zip``, which stops at the shorter one. A benchmark of one's own that lists
one name too few, or whose sets depend on what was downloaded, lacks rows; and if it is a name
in the middle that is missing, the rows after it carry the name of another set.

Proposed fix, in front of the loop that pairs them::

    if len(test_sets := self.test_sets()) != len(self.ood_names): raise ValueError(...)
"""

import torch
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import MaxLogit
from torch.utils.data import TensorDataset

WORKAROUND = "pood_plugins.evaluation.runner"


class Toy(Benchmark):
    ood_names = ["near", "far"]

    def train_set(self):
        raise NotImplementedError

    def test_sets(self, known=True, unknown=True):
        y = torch.tensor([0, -1])
        return [TensorDataset(torch.tensor([[3.0], [x]]), y) for x in (2.0, 1.0, 0.0)]


try:
    results = Toy().evaluate(MaxLogit(torch.nn.Identity()))
except ValueError:
    pass
else:
    assert len(results) == 3, f"evaluated {len(results)} of 3 test sets, without an error"
