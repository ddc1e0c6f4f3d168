"""Rows of a table by the names that people give."""

import sys

import pytest
import torch
from pytorch_ood import detector as upstream
from torch import nn

from pood_plugins import cli, registry
from pood_plugins.benchmark import Digits
from pood_plugins.evaluation.rows import RowBuilder
from pood_plugins.model import split_model

SOURCE = """
import torch
from pytorch_ood.api import FeaturesDetector

class KNN(FeaturesDetector):
    requires_fit = False

    def __init__(self, encoder):
        self.encoder = encoder

    def predict(self, x):
        return self.predict_features(self.encoder(x))

    def predict_features(self, z):
        return z.norm(dim=1)

class GROOD(KNN):
    pass
"""


@pytest.fixture
def rival(tmp_path, monkeypatch):
    """A distribution with a KNN and a GROOD of its own, and a class that can't be imported."""
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (tmp_path / "rival_detectors.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pytorch_ood.detectors]\nKNN = rival_detectors:KNN\nGROOD = rival_detectors:GROOD\n"
        "Boom = rival_nothing:Boom\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("rival_detectors", None)


@pytest.fixture
def rows():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6))
    split = split_model(network.eval(), example=torch.zeros(2, 1, 8, 8))
    return RowBuilder(split, Digits(), shape=(1, 8, 8))


def test_names_in_the_literature(rows):
    name, detector = rows.build("ebo")
    assert (name, type(detector)) == ("Energy", upstream.EnergyBased)


def test_detectors_of_one_name_are_rows_of_their_own(rows, rival):
    built, left_out = rows.build_all(images=False)
    assert type(built["pytorch-ood:KNN"]) is upstream.KNN
    assert type(built["rival:KNN"]).__module__ == "rival_detectors"
    assert {"pood-plugins:GROOD", "rival:GROOD", "GROOD (mean)"} < set(built)
    assert "KNN" not in built and "GROOD" not in built
    for name in ("rival:knn", "pytorch-ood:KNN"):
        assert rows.build(name)[0].casefold() == name.casefold()
    # the variants are of this package's
    assert type(built["GROOD (mean)"]) is registry.load("pood-plugins:GROOD")


def test_a_detector_that_can_not_be_imported_is_left_out(rows, rival):
    built, left_out = rows.build_all(images=False)
    assert "Boom" not in built and "MSP" in built
    assert "'rival_nothing:Boom' of rival 1.0" in left_out["Boom"]
    with pytest.raises(ImportError, match="rival_nothing:Boom"):
        rows.build("Boom")


def test_the_default_table_is_that_of_this_package(rival, tmp_path, capsys):
    assert cli.main(["benchmark", "digits", "--quick", "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "pood-plugins:GROOD" in table and "rival" not in table
