"""
A second run of a GridSearch returns the winner of the first.

``GridSearch.run`` (``pytorch_ood/utils/hpo.py``) empties ``results_`` but neither
``best_score_`` nor ``best_params_``. If the detector, its model or the validation data changed
between two runs and no candidate beats the old score, the old winner is returned, though the
new results have another, and the detector is left configured with it. The docstring warns of
this, and also of ``results_``, which is reset.

Proposed fix, in place of the line that empties ``results_``::

    self.best_params_, self.best_score_, self.results_ = None, None, []
"""

import torch
from pytorch_ood.api import LogitsDetector
from pytorch_ood.utils import GridSearch
from torch.utils.data import DataLoader, TensorDataset

WORKAROUND = None


class Column(LogitsDetector):
    hyperparameter_space = {"column": [0, 1]}

    def __init__(self):
        self.model = torch.nn.Identity()
        self.column = 0

    def predict_logits(self, logits):
        return logits[:, self.column]


def loader(columns):
    y = torch.tensor([0, 0, -1, -1])
    return DataLoader(TensorDataset(torch.tensor(columns).T, y), batch_size=4)


perfect, good, useless = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]
search = GridSearch(Column(), None, loader([perfect, useless]))
assert search.run() == {"column": 0}
search.val_loader = loader([useless, good])
found = search.run()
scores = {record["params"]["column"]: record["score"] for record in search.results_}
assert found == {"column": 1}, f"the second run returned {found}, but its scores are {scores}"
