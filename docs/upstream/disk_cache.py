"""
Two models of one class share their cached outputs, even within one call.

``Benchmark.evaluate(..., cache_dir=..., cache_key=...)`` recognises the model of a file by its
class only (``Benchmark._producer_token`` in ``pytorch_ood/benchmark/base.py``). The
documentation makes a fitting ``cache_key`` the caller's responsibility, but there is one key
per call: if the detectors of a call hold two checkpoints of one architecture, the second gets
the logits of the first from the disk, and no key prevents it. The metrics are wrong, and
nothing tells so.

Proposed fix: have the token of a module, and of a module's bound method, tell the weights,
e.g.::

    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"module:{...}:{digest.hexdigest()[:16]}"
"""

import tempfile
import warnings

import torch
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import MaxLogit
from torch.utils.data import TensorDataset

WORKAROUND = "pood_plugins.evaluation.cache"


class Toy(Benchmark):
    ood_names = ["OOD"]

    def train_set(self):
        raise NotImplementedError

    def test_sets(self, known=True, unknown=True):
        return [TensorDataset(torch.tensor([[2.0], [3.0], [1.0]]), torch.tensor([0, 1, -1]))]


def model(weight):
    layer = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.constant_(layer.weight, weight)
    return layer


with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Benchmark cache reuse is keyed by")
    first, second = Toy().evaluate(
        [MaxLogit(model(1.0)), MaxLogit(model(-1.0))], cache_dir=folder, cache_key="key"
    )
assert float(first["AUROC"]) == 1.0
assert float(second["AUROC"]) == 0.0, (
    f"the second model got the logits of the first: AUROC {float(second['AUROC'])} instead of 0.0"
)
