"""
The cache of a benchmark gives a model the outputs of another one.

``Benchmark.evaluate(..., cache=True)`` keeps logits and features under ``id(model)``
(``Benchmark._memory_cache_key`` in ``pytorch_ood/benchmark/base.py``), but not the model. Once
a model is freed, Python uses its id again, and the next model that gets it is never run: it is
given the metrics of the freed one. This hits whoever compares models, seeds or checkpoints in a
loop on one benchmark, and nothing tells that it happened.

Proposed fix: have the key hold the producer itself, which keeps it alive and is compared by
identity. As bound methods of one object are equal, ``KNN(model.features)`` and
``ViM(model.features)`` then share one pass, too::

    return split, dataset_name, representation, producer, cache_key
"""

import torch
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import MaxLogit
from torch.utils.data import TensorDataset

WORKAROUND = "pood_plugins.evaluation.runner"


class Toy(Benchmark):
    ood_names = ["OOD"]

    def train_set(self):
        raise NotImplementedError

    def test_sets(self, known=True, unknown=True):
        x = torch.tensor([*range(50), -1.0])[:, None]
        return [TensorDataset(x, x[:, 0].long())]


class Model(torch.nn.Module):
    """Puts the OOD sample in front of so many of the 50 ID samples."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return torch.where(x < 0, 49.5 - self.n, x)


benchmark = Toy()
wrong = []
for n in range(50):
    (result,) = benchmark.evaluate(MaxLogit(Model(n)), {"batch_size": 51}, cache=True)
    auroc = float(result["AUROC"])
    if abs(auroc - n / 50) > 1e-3:
        wrong.append(f"model {n} has AUROC {auroc:.2f} instead of {n / 50:.2f}")
assert not wrong, f"{len(wrong)} of 50 models got the outputs of another one: {wrong[0]}"
