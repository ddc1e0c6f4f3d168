"""
Outputs in channels-last memory format can't be flattened.

Outputs of encoders are flattened with ``view``, which fails where memory is not laid out in the
order of the dimensions. This hits encoders whose output has more than two dimensions: feature
maps of networks in ``torch.channels_last``, which is recommended for speed on GPUs, and
permuted tokens of transformers. Three functions do it: ``extract_features`` in
``pytorch_ood/utils/utils.py``, which detectors fit with, ``_extract_all`` in
``pytorch_ood/utils/hpo.py``, and ``Benchmark._extract_representation`` in
``pytorch_ood/benchmark/base.py``.

Proposed fix, in all three::

    z = z.reshape(z.shape[0], -1)
"""

import torch
from pytorch_ood.api import FeaturesDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.utils import GridSearch, extract_features
from torch.utils.data import DataLoader, TensorDataset

WORKAROUND = "pood_plugins.model.split"

x = torch.arange(96.0).view(2, 3, 4, 4)
data = TensorDataset(x, torch.tensor([0, -1]))
encoder = torch.nn.Identity().to(memory_format=torch.channels_last)


def channels_last(x):
    return encoder(x.to(memory_format=torch.channels_last))


class Toy(Benchmark):
    ood_names = ["OOD"]

    def train_set(self):
        return data

    def test_sets(self, known=True, unknown=True):
        return [data]


class Sum(FeaturesDetector):
    hyperparameter_space = {"sign": [1]}

    def __init__(self):
        self.encoder = channels_last

    def predict(self, x):
        return self.predict_features(self.encoder(x).flatten(1))

    def predict_features(self, x):
        return x.sum(dim=1)


failed = []
loader = DataLoader(data, batch_size=2)
for name, extract in {
    "extract_features": lambda: extract_features(loader, channels_last, "cpu"),
    "GridSearch": lambda: GridSearch(Sum(), None, loader).run(),
    "Benchmark.evaluate": lambda: Toy().evaluate(Sum(), loader_kwargs={"batch_size": 2}),
}.items():
    try:
        extract()
    except RuntimeError as error:
        failed.append(f"{name}: {error}")
assert not failed, "\n".join(failed)
z, _ = extract_features(loader, channels_last, "cpu")
assert torch.equal(z, x[:1].flatten(1)), "the order of the features changed"
