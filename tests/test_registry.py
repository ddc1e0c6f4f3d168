"""
Registry: what is listed, how names resolve, and what build fills in.

Plugins are written to a temporary folder as ``*.dist-info`` next to a module, which is all that
importlib.metadata needs to see.
"""

import copy
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_ood import benchmark as upstream_benchmarks
from pytorch_ood import detector as upstream_detectors
from pytorch_ood import loss as upstream_losses
from pytorch_ood.api import Detector
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pood_plugins import _loader, entry_points, registry
from pood_plugins.model.split import split_model

N_CLASSES = 3
OFFERED = Path(entry_points.__file__).read_text("utf-8")
NOT_BUILDABLE = {"MCM": "text_embeddings", "WeightedEBO": "weights"}

UPSTREAM = sorted(
    name
    for name in upstream_detectors.__all__
    if isinstance(getattr(upstream_detectors, name), type)
)

DETECTOR_SOURCE = """
from pytorch_ood.api import FeaturesDetector

class {name}(FeaturesDetector):
    requires_fit = False

    def __init__({signature}):
        self.arguments = {{k: v for k, v in locals().items() if k != "self"}}

    def predict(self, x):
        return x.flatten(1).sum(1)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one module and the given entry points, for one test."""

    def install(distribution, source, version="1.0", **entry_points):
        module = distribution.replace("-", "_").replace(".", "_").lower()
        folder = tmp_path / distribution
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = []
        for group, names in entry_points.items():
            lines += [f"[pytorch_ood.{group}]"]
            lines += [f"{n.split(':')[-1]} = {module}:{n.split(':')[0]}" for n in names]
        info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return install


class ConvNet(nn.Module):
    """Two stages with batch norm, global pooling, dropout, one linear layer."""

    def __init__(self, bias=True, p=0.5):
        super().__init__()
        self.stage1 = self._stage(3, 8)
        self.stage2 = self._stage(8, 16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(16, N_CLASSES, bias=bias)

    @staticmethod
    def _stage(channels_in, channels_out):
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x):
        maps = self.stage2(self.stage1(x))
        return self.fc(self.drop(self.pool(maps).flatten(1)))


class LinearNet(nn.Module):
    """No module before the head."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(768, N_CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))


def seeded(make):
    """Call ``make`` with a fixed global seed and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


LABELS = torch.arange(60) % N_CLASSES
IMAGES = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IMAGES[range(60), LABELS] += 1  # each class has its color


def train(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(IMAGES), LABELS).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def trained_net():
    """Trained since SHE needs correctly classified samples of every class."""
    return seeded(lambda: train(ConvNet()))


@pytest.fixture
def split(trained_net):
    return split_model(copy.deepcopy(trained_net), example=IMAGES[:2]).eval()


@pytest.fixture
def flat_split():
    """A classifier without feature maps."""
    net = seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 3))
    )
    return split_model(net, example=IMAGES[:2]).eval()


# -- listing ---------------------------------------------------------------------------


def test_lists_every_upstream_class_and_this_package():
    names = registry.list_detectors()
    assert len(UPSTREAM) == 35
    assert set(UPSTREAM) < set(names)
    assert {"GROOD", "NERO"} < set(names)
    assert "odin_preprocessing" not in names
    assert names == sorted(names)


def test_lists_losses_without_functions():
    upstream = {n for n, v in vars(upstream_losses).items() if isinstance(v, type)}
    assert upstream <= set(registry.list_losses())
    assert "logit_norm_loss" not in registry.list_losses()


def test_lists_benchmarks_without_the_base_class():
    upstream = set(upstream_benchmarks.__all__) - {"Benchmark"}
    assert upstream <= set(registry.list_benchmarks())
    assert "Benchmark" not in registry.list_benchmarks()


@pytest.mark.parametrize("name", UPSTREAM)
def test_loads_upstream_classes(name):
    assert registry.load(name) is getattr(upstream_detectors, name)
    assert registry.get_info(name).origin == "pytorch-ood"
    assert registry.get_info(name).version == importlib.metadata.version("pytorch-ood")


def test_loads_losses_and_benchmarks():
    assert issubclass(registry.load("LogitNorm", kind="loss"), nn.Module)
    assert issubclass(
        registry.load("CIFAR10_ODIN", kind="benchmark"), upstream_benchmarks.Benchmark
    )


def test_listing_imports_nothing(install, tmp_path):
    module = install(
        "heavy", "raise RuntimeError", detectors=["A"], losses=["B"], benchmarks=["C"]
    )
    script = (
        "import sys; from pood_plugins import registry as r; "
        "assert 'A' in r.list_detectors() and 'B' in r.list_losses()"
        " and 'C' in r.list_benchmarks(); r.get_info('A'); r.get_info('KNN'); "
        f"print(sorted({{'torch', 'pytorch_ood', 'numpy', '{module}'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path / 'heavy'}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


# -- names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("KNN", "KNN"),
        ("knn", "KNN"),
        ("FDBD", "fDBD"),
        ("msp", "MaxSoftmax"),
        ("MSP", "MaxSoftmax"),
        ("Energy", "EnergyBased"),
        ("EBO", "EnergyBased"),
        ("RMDS", "RMD"),
        ("MDS", "Mahalanobis"),
        ("MLS", "MaxLogit"),
        ("pytorch-ood:KNN", "KNN"),
        ("PyTorch_OOD:knn", "KNN"),
    ],
)
def test_names_and_aliases(name, expected):
    assert registry.get_info(name).name == expected


def test_display_names():
    names = {name: registry.display_name(name) for name in registry.list_detectors()}
    renamed = {name: shown for name, shown in names.items() if name != shown}
    assert renamed == {
        "MaxSoftmax": "MSP",
        "EnergyBased": "Energy",
        "MaxLogit": "MLS",
        "RMD": "RMDS",
    }
    for name, shown in names.items():
        assert registry.get_info(shown).name == name


@pytest.mark.parametrize(
    "name, near", [("MPS", "MSP"), ("mahalanobsi", "Mahalanobis"), ("GRODO", "GROOD")]
)
def test_unknown_names_suggest_the_nearest(name, near):
    with pytest.raises(LookupError, match=f"no detector is called '{name}'.*{near}"):
        registry.get_info(name)


def test_unknown_name_without_a_near_one_lists_the_choices():
    with pytest.raises(LookupError, match="'§§§': choose from .*'ASH', 'DICE'"):
        registry.load("§§§")


def test_aliases_are_names_of_detectors_only():
    with pytest.raises(LookupError, match="no loss is called 'MSP'"):
        registry.get_info("MSP", kind="loss")


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'detectors': choose from detector, loss"):
        registry.get_info("KNN", kind="detectors")


# -- plugins ---------------------------------------------------------------------------


def test_plugin_is_listed_described_and_loaded(install):
    source = DETECTOR_SOURCE.format(name="Third", signature="self, encoder")
    module = install("Acme.OOD__Extras", source, version="2.3", detectors=["Third"])
    assert "Third" in registry.list_detectors()
    assert registry.get_info("third") == registry.PluginInfo(
        "Third", "detector", "acme-ood-extras", "2.3", f"{module}:Third"
    )
    assert module not in sys.modules
    assert issubclass(registry.load("ACME_OOD_EXTRAS:Third"), Detector)


def test_conflicting_names_are_reached_by_distribution(install):
    source = DETECTOR_SOURCE.format(name="KNN", signature="self, encoder")
    module = install("rival", source, detectors=["KNN"])
    names = registry.list_detectors()
    assert {"rival:KNN", "pytorch-ood:KNN"} < set(names)
    assert "KNN" not in names
    with pytest.raises(LookupError, match="claimed by pytorch-ood:KNN and rival:KNN"):
        registry.load("knn")
    assert registry.load("pytorch-ood:KNN") is upstream_detectors.KNN
    assert registry.load("rival:KNN") is sys.modules[module].KNN


def test_names_that_differ_in_case_conflict(install):
    install("rival", DETECTOR_SOURCE.format(name="Knn", signature="self"), detectors=["Knn"])
    with pytest.raises(LookupError, match="claimed by pytorch-ood:KNN and rival:Knn"):
        registry.get_info("KNN")


def test_class_name_goes_before_alias(install):
    source = DETECTOR_SOURCE.format(name="MSP", signature="self, encoder")
    install("rival", source, detectors=["MSP"])
    assert registry.get_info("MSP").origin == "rival"
    assert registry.get_info("MaxSoftmax").origin == "pytorch-ood"


@pytest.mark.parametrize(
    "source, cause",
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("", "AttributeError"),
        ("def", "SyntaxError"),
    ],
)
def test_broken_plugin_fails_by_name_and_alone(install, source, cause):
    install("broken", source, version="0.9", detectors=["Broken"])
    assert "Broken" in registry.list_detectors()
    with pytest.raises(ImportError, match=f"'broken:Broken' of broken 0.9.*{cause}"):
        registry.load("Broken")
    assert registry.load("KNN") is upstream_detectors.KNN


# -- pytorch-ood's own registry ------------------------------------------------------------


@pytest.fixture
def clean_modules():
    yield
    sys.modules.pop("pytorch_ood.registry", None)


@pytest.mark.usefixtures("clean_modules")
@pytest.mark.parametrize(
    "text, taken", [(OFFERED, True), ("raise RuntimeError", False), (None, False)]
)
def test_finder_of_pytorch_ood_is_used_where_there_is_one(tmp_path, monkeypatch, text, taken):
    path = tmp_path / "registry.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(_loader, "_pytorch_ood", lambda: tmp_path)
    finder = _loader._finder()
    assert finder.__file__ == str(path if taken else entry_points.__file__)
    names = {plugin.qualified_name for plugin in finder.find_plugins()}
    assert "pood-plugins:GROOD" in names
    # whoever imports it later gets the same
    assert taken == (sys.modules.get("pytorch_ood.registry") is finder)
    assert finder.PluginInfo("A", "loss", "b", "1", "c:d").qualified_name == "b:A"


def test_pytorch_ood_registry_that_can_not_be_run(tmp_path, monkeypatch):
    (tmp_path / "registry.py").write_text(OFFERED + "\nraise RuntimeError('broken')\n")
    monkeypatch.setattr(_loader, "_pytorch_ood", lambda: tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        _loader._finder()
    assert "pytorch_ood.registry" not in sys.modules


@pytest.mark.parametrize(
    "files, names",
    [
        ([], []),  # a folder of that name is no package
        (["__init__.py"], ["pytorch-ood 7.8"]),  # a checkout on PYTHONPATH, not installed
    ],
)
def test_pytorch_ood_that_is_not_installed(tmp_path, files, names):
    folder = tmp_path / "pytorch_ood"
    (folder / "detector").mkdir(parents=True)
    (folder / "detector" / "__init__.py").write_text("from .mine import Mine\n")
    (folder / "detector" / "mine.py").write_text("class Mine: ...\n")
    for name in files:
        (folder / name).write_text('__version__ = "7.8"\n')
    package = Path(registry.__file__).parent.parent
    script = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, {str(package)!r}, "
        "*(p for p in sys.path if 'site-packages' not in p)]; "
        "from pood_plugins import registry as r; "
        "print([f'{i.origin} {i.version}' for i in r.list_plugins().values() if i.name == 'Mine'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(names), done.stderr


# -- build -----------------------------------------------------------------------------


def fit_and_score(detector):
    """Scores of the images after fitting on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector.fit(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=20))
        return detector.predict(IMAGES)


@pytest.mark.parametrize("name", [n for n in UPSTREAM if n not in NOT_BUILDABLE])
def test_upstream_detector_builds_fits_and_scores(name, split):
    scores = fit_and_score(registry.build(name, split))
    assert scores.shape == (60,)
    assert scores.isfinite().all()
    assert scores.unique().numel() > 1


def test_all_but_two_of_upstream_can_be_built(split):
    refused = {}
    for name in UPSTREAM:
        try:
            registry.build(name, split)
        except ValueError as error:
            refused[name] = str(error)
    assert len(UPSTREAM) - len(refused) == 33
    assert {name: argument in refused[name] for name, argument in NOT_BUILDABLE.items()} == {
        "MCM": True,
        "WeightedEBO": True,
    }


@pytest.mark.parametrize("name", ["GROOD", "NERO"])
def test_detectors_of_this_package_build_fit_and_score(name, split):
    scores = fit_and_score(registry.build(name, split))
    assert scores.shape == (60,)
    assert scores.isfinite().all()


def test_what_the_split_lacks_can_be_given(split):
    text = torch.eye(N_CLASSES, 16)
    detector = registry.build("MCM", split, text_embeddings=text)
    z = split.encoder(IMAGES)
    cosines = nn.functional.normalize(z) @ text.T
    expected = -cosines.softmax(dim=1).max(dim=1).values
    torch.testing.assert_close(detector.predict(IMAGES), expected)
    weighted = registry.build("WeightedEBO", split, weights=torch.ones(N_CLASSES))
    energy = registry.build("Energy", split)
    torch.testing.assert_close(weighted.predict(IMAGES), energy.predict(IMAGES))


def test_parts_are_the_same_objects_every_time(split):
    first, second = registry.build("KNN", split), registry.build("ViM", split)
    assert first.encoder is second.encoder is split.encoder
    assert registry.build("MSP", split).model is registry.build("Energy", split).model is split
    ash, react = registry.build("ASH", split), registry.build("ReAct", split)
    assert ash.backbone is react.backbone is split.feature_maps
    assert registry.build("PNML", split).head is split.head


def test_heads_agree_with_the_model(split):
    ash = registry.build("ASH", split)
    logits = split(IMAGES)
    torch.testing.assert_close(ash.head(ash.backbone(IMAGES)), logits)
    gram = registry.build("Gram", split)
    torch.testing.assert_close(gram.head(nn.Sequential(*gram.feature_layers)(IMAGES)), logits)


def test_weight_and_bias_are_detached_and_a_missing_bias_is_zero():
    split = split_model(seeded(lambda: ConvNet(bias=False)), example=IMAGES[:2]).eval()
    vim = registry.build("ViM", split)
    assert torch.equal(vim.w, split.head.weight) and not vim.w.requires_grad
    assert torch.equal(vim.b, torch.zeros(N_CLASSES))


def test_defaults_of_dice_and_vim(split):
    assert registry.build("DICE", split).p == 0.9
    assert registry.build("DICE", split, p=0.3).p == 0.3
    assert registry.build("ViM", split).d == 8
    assert registry.build("ViM", split, d=2).d == 2


@pytest.mark.parametrize("width, d", [(2, 1), (84, 42), (512, 256), (768, 512), (2048, 1000)])
def test_vim_dimension_follows_the_width(width, d):
    split = split_model(
        nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)),
        example=torch.zeros(2, 1, 2, 2),
    )
    assert registry.build("ViM", split).d == d


def test_record_rebuilds_the_detector(split):
    record = registry.build("pytorch-ood:knn", split, k=7, algorithm="brute").build_record
    assert record.info == registry.get_info("KNN")
    assert record.hyperparameters == {"k": 7, "algorithm": "brute"}
    assert record.from_split == ("encoder",)
    again = registry.build(record.info.qualified_name, split, **record.hyperparameters)
    assert again.k == 7
    assert registry.build("ViM", split).build_record.hyperparameters == {"d": 8}


def test_record_stays_where_it_is_when_the_detector_moves(split):
    text = torch.eye(N_CLASSES, 16)
    detector = registry.build("MCM", split, text_embeddings=text).to("meta")
    assert detector.device == torch.device("meta")
    assert detector.text_embeddings.device == torch.device("meta")
    assert detector.build_record.hyperparameters["text_embeddings"] is text


def test_given_arguments_go_before_the_split(split):
    layers = split.stages[-1:]
    detector = registry.build("NACUE", split, layers=layers)
    assert detector.layers == layers
    assert detector.build_record.from_split == ("model",)


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("GEN", "gama", "GEN has no argument gama: it takes gamma, M"),
        ("Entropy", "t", "Entropy has no argument t: it takes none"),
        ("DICE", "d", "DICE has no argument d: it takes p, detector"),
    ],
)
def test_unknown_arguments_name_the_choices(split, name, given, message):
    with pytest.raises(ValueError, match=message):
        registry.build(name, split, **{given: 1})


@pytest.mark.parametrize(
    "name, message",
    [
        ("MCM", "MCM needs text_embeddings, but .* pass text_embeddings="),
        ("WeightedEBO", "WeightedEBO needs weights, but .* pass weights="),
    ],
)
def test_missing_arguments_are_named(split, name, message):
    with pytest.raises(ValueError, match=message):
        registry.build(name, split)


@pytest.mark.parametrize("name", ["ASH", "RankFeat", "ReAct", "SCALE", "VRA"])
def test_detectors_of_feature_maps_need_feature_maps(flat_split, name):
    with pytest.raises(
        ValueError, match=f"{name} needs backbone, but .* no feature maps \\(.+\\)"
    ):
        registry.build(name, flat_split)


@pytest.mark.parametrize(
    "name, argument", [("Gram", "head"), ("MultiMahalanobis", "model"), ("NACUE", "layers")]
)
def test_detectors_of_layers_need_layers(name, argument):
    split = split_model(LinearNet(), example=IMAGES[:2])
    with pytest.raises(ValueError, match=f"{name} needs {argument}, but .* no feature maps"):
        registry.build(name, split)


@pytest.mark.parametrize("name", ["KNN", "MSP", "NACUE", "GradNorm"])
def test_other_detectors_need_no_feature_maps(flat_split, name):
    assert fit_and_score(registry.build(name, flat_split)).isfinite().all()


def test_raw_model_is_refused():
    with pytest.raises(ValueError, match="split_model"):
        registry.build("KNN", ConvNet())


def build_third(install, split, signature, **hyperparameters):
    install(
        "third", DETECTOR_SOURCE.format(name="Third", signature=signature), detectors=["Third"]
    )
    return registry.build("Third", split, **hyperparameters)


def test_third_party_detector_is_filled_by_name(install, split):
    signature = (
        "self, model, encoder=None, *, head, backbone, w, b, layers, feature_layers, "
        "num_classes, k=3"
    )
    given = build_third(install, split, signature, k=5).arguments
    assert given["model"] is split
    assert given["encoder"] is split.encoder
    assert given["head"] is split.head
    assert given["backbone"] is split.feature_maps
    assert given["layers"] == split.stages
    assert given["feature_layers"] is split.layers
    assert torch.equal(given["w"], split.head.weight)
    assert torch.equal(given["b"], split.head.bias)
    assert given["num_classes"] == N_CLASSES
    assert given["k"] == 5


def test_third_party_defaults_are_left_alone(install, split):
    detector = build_third(install, split, "self, encoder, b=1.0, prior=None, *args")
    assert detector.arguments["b"] == 1.0
    assert detector.arguments["prior"] is None
    assert detector.build_record.from_split == ("encoder",)


def test_third_party_argument_that_is_missing_is_named(install, split):
    with pytest.raises(ValueError, match="Third needs prior, but .* pass prior="):
        build_third(install, split, "self, encoder, prior")


@pytest.mark.parametrize("p", [0.0, None])
def test_mcd_warns_without_dropout(p):
    net = seeded(lambda: ConvNet(p=p or 0.0))
    if p is None:
        net.drop = nn.Identity()
    split = split_model(net, example=IMAGES[:2]).eval()
    with pytest.warns(UserWarning, match="no active dropout layer"):
        detector = registry.build("MCD", split)
    assert detector.predict(IMAGES).unique().numel() == 1  # hence an AUROC of 0.5
