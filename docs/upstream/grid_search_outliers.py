"""
GridSearch fits on other data than ``fit`` does: outliers are dropped.

``GridSearch.run`` (``pytorch_ood/utils/hpo.py``) fits detectors of features and of logits with
what ``extract_features`` returns, which has no samples with labels < 0. A detector that learns
from outliers in its ``fit`` never sees those of ``fit_loader`` in a search: candidates are
compared in a setting that the detector is not meant for, and the one that is left fitted lacks
them. None of pytorch-ood's own detectors is concerned; detectors of others are. That
``extract_features`` ignores outliers is documented, that GridSearch does is not.

Proposed fix: hand on everything, as is done with the validation data, and have ``fit_features``
and ``fit_logits`` decide. Those of ``KNN``, ``DICE`` and others drop outliers already; ``ViM``,
``NCI``, ``fDBD`` and ``Mahalanobis`` have to learn it first::

    z_train, y_train = _extract_all(self.fit_loader, producer, self.device)
"""

import torch
from pytorch_ood.api import FeaturesDetector
from pytorch_ood.utils import GridSearch
from torch.utils.data import DataLoader, TensorDataset

WORKAROUND = None


class DistanceToOutliers(FeaturesDetector):
    requires_fit = True
    hyperparameter_space = {"power": [1, 2]}

    def __init__(self):
        self.encoder = torch.nn.Identity()
        self.power = 1
        self.n_outliers = None

    def fit(self, data_loader):
        z, y = (torch.cat(tensors) for tensors in zip(*data_loader))
        return self.fit_features(self.encoder(z), y)

    def fit_features(self, x, y):
        self.n_outliers = int((y < 0).sum())
        return self

    def predict(self, x):
        return self.predict_features(self.encoder(x))

    def predict_features(self, x):
        return x.norm(dim=1) ** self.power


x, y = torch.tensor([[1.0], [2.0], [5.0], [6.0]]), torch.tensor([0, 1, -1, -1])
loader = DataLoader(TensorDataset(x, y), batch_size=4)
fitted = DistanceToOutliers().fit(loader)
searched = DistanceToOutliers()
GridSearch(searched, fit_loader=loader, val_loader=loader).run()
assert searched.n_outliers == fitted.n_outliers, (
    f"fit had {fitted.n_outliers} outliers to learn from, GridSearch left {searched.n_outliers}"
)
