"""
Saved detectors: the same scores bit for bit, one clear error for whatever is wrong, and nothing in
a file is ever run.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pytorch_ood.api import Detector, RequiresFittingException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pood_plugins import persistence, registry, split_model
from pood_plugins.persistence import Saved, fingerprint, load, load_threshold, save
from pood_plugins.threshold import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Small, with all that upstream's detectors ask for: stages, maps, dropout."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.layer2(self.layer1(x))).flatten(1)))


def network(seed: int = 0, width: int = 16) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(width).eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 3, 12, 12, generator=generator)
    # colored, so that an untrained network predicts every class of some of them
    x *= torch.rand(200, 3, 1, 1, generator=generator) * 4
    model = network()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(dim=0))
        y = model(x).argmax(dim=1)
    assert len(y.unique()) == 4
    return model, x, y, torch.rand(9, 3, 12, 12, generator=generator) * 3


@pytest.fixture
def split(data):
    return split_model(copy.deepcopy(data[0]))


@pytest.fixture
def loader(data):
    return DataLoader(TensorDataset(*data[1:3]), batch_size=50)


@pytest.fixture
def fitted(split, loader):
    return registry.build("GROOD", split, k=3).fit(loader)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "detector"


def scores(detector, x):
    """With one seed: MCD draws at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return detector(x)


ARGUMENTS = {
    "WeightedEBO": {"weights": torch.tensor([1.0, 0.5, 2.0, 1.0])},
    "MCM": {"text_embeddings": torch.eye(4, 16)},
    "NACUE": {"o_star": 1000},  # not saturated by 200 samples
}
VARIANTS = {
    "GROOD": [
        {"ood_prototype": torch.linspace(0, 1, 16)},
        {"bank_dtype": torch.float16, "bank_fraction": 0.5},
        {"temperature": "auto", "k": 0.1},
    ],
    "NERO": [{"n_components": 3, "n_neurons": 5, "eps": 1e-3}],
    "KNN": [{"k": 5, "normalize": False, "algorithm": "ball_tree"}],
}
CASES = [
    *[(name, {}) for name in registry.list_detectors() if name != "OpenMax"],
    *[(name, arguments) for name, variants in VARIANTS.items() for arguments in variants],
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_every_detector_comes_back(split, data, loader, path, name, arguments):
    model, _, _, queries = data
    detector = registry.build(name, split, **{**ARGUMENTS.get(name, {}), **arguments})
    if detector.requires_fit:
        detector.fit(loader)
    expected = scores(detector, queries)
    save(detector, path)
    # nothing but what is on disk, and the weights
    loaded = load(path, split_model(copy.deepcopy(model)))
    assert type(loaded) is type(detector)
    assert torch.equal(scores(loaded, queries), expected)
    assert len(expected.unique()) > 1 and expected.isfinite().all()
    # what was loaded can be saved and loaded
    again = path.with_name("again")
    save(loaded, again)
    assert torch.equal(scores(load(again, split), queries), expected)


def test_openmax_is_refused(split, loader, path):
    detector = registry.build("OpenMax", split).fit(loader)
    with pytest.raises(
        ValueError, match=r"^OpenMax can't be saved \(its _openmax is a pytorch_oo"
    ):
        save(detector, path)
    assert not path.exists() and list(path.parent.iterdir()) == []


def test_in_another_process(fitted, data, path):
    model, _, _, queries = data
    save(fitted, path)
    inputs = path.with_name("inputs.safetensors")
    safetensors.torch.save_file({"queries": queries, **model.state_dict()}, inputs)
    program = """
import sys
from safetensors.torch import load_file, save_file
from pood_plugins import persistence, split_model
from tests.test_persistence import Net
import torch
torch.set_num_threads(1)
inputs = load_file(sys.argv[1])
queries, model = inputs.pop("queries"), Net().eval()
model.load_state_dict(inputs)
detector = persistence.load(sys.argv[2], split_model(model))
save_file({"scores": detector(queries)}, sys.argv[3])
"""
    outputs = path.with_name("outputs.safetensors")
    command = [sys.executable, "-c", program, str(inputs), str(path), str(outputs)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    assert torch.equal(safetensors.torch.load_file(outputs)["scores"], fitted(queries))


def test_unfitted_stays_unfitted(split, data, path):
    save(registry.build("NERO", split), path)
    with pytest.raises(RequiresFittingException):
        load(path, split)(data[3])


def test_hyperparameters_that_were_set_later(fitted, split, data, path):
    fitted.set_hyperparameters(k=7)
    save(fitted, path)
    loaded = load(path, split)
    assert loaded.k == 7 and loaded.build_record.hyperparameters == {"k": 3}
    assert torch.equal(loaded(data[3]), fitted(data[3]))


def test_state_is_not_shared(fitted, split, path):
    save(fitted, path)
    first, second = load(path, split), load(path, split)
    first.bank_.zero_()
    assert not torch.equal(first.bank_, second.bank_)
    assert torch.equal(second.bank_, load(path, split).bank_)


def test_order_in_memory_is_kept(fitted, split, path):
    fitted.bank_ = fitted.bank_.T.contiguous().T
    fitted.prototypes_ = fitted.prototypes_.repeat(3, 1)[::3]
    save(fitted, path)
    loaded = load(path, split)
    assert torch.equal(loaded.bank_, fitted.bank_)
    assert loaded.bank_.stride() == fitted.bank_.stride()
    assert torch.equal(loaded.prototypes_, fitted.prototypes_)


def test_threshold(fitted, data, path, split):
    threshold = calibrate(fitted(data[1]), scores_ood=fitted(data[3]))
    save(fitted, path, threshold=threshold)
    assert load_threshold(path) == threshold
    save(fitted, path)
    assert load_threshold(path) is None


def test_fingerprint(data):
    model = copy.deepcopy(data[0])
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    model.layer1[1].running_mean[0] += 1e-6
    assert fingerprint(model) != before


# what belongs together


def test_other_weights(fitted, path):
    save(fitted, path)
    for other in (network(seed=1), network(width=8), fitted.encoder.model.double()):
        with pytest.raises(ValueError, match=r"belongs to other weights, those of Net of 16 fe"):
            load(path, split_model(other))


def test_detector_that_build_did_not_make(split, path):
    detector = type(registry.build("GROOD", split))(split.encoder, split.head)
    with pytest.raises(ValueError, match=r"make it by registry.build\('GROOD', split_model"):
        save(detector, path)


def test_arguments_and_attributes_that_are_not_plain(fitted, split, path):
    odin = registry.build("ODIN", split, criterion=nn.NLLLoss())
    with pytest.raises(ValueError, match=r"ODIN can't be saved \(its argument criterion is a tor"):
        save(odin, path)
    fitted.extra = [1.0, object()]
    with pytest.raises(ValueError, match=r"GROOD can't be saved \(its extra.1 is a builtins.obj"):
        save(fitted, path)
    assert not path.exists()


def test_plain_attributes_of_all_kinds(fitted, split, path):
    fitted.extra = {
        "numbers": [1, -1.5, 2**80, float("inf"), 1e-320, True, None],
        3: ("text \u00e9\n", range(1, 9, 2), torch.float16),
        "tensors": [torch.tensor([float("nan"), 1.0]), torch.empty(0, 3), torch.tensor(True)],
        "parameters": nn.ParameterDict({"a": nn.Parameter(torch.ones(2), requires_grad=False)}),
    }
    save(fitted, path)
    extra = load(path, split).extra
    assert list(extra) == list(fitted.extra)
    assert extra["numbers"] == fitted.extra["numbers"] and extra["numbers"][5] is True
    assert extra[3] == fitted.extra[3] and isinstance(extra[3][1], range)
    for value, expected in zip(extra["tensors"], fitted.extra["tensors"]):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    assert not extra["parameters"]["a"].requires_grad


@dataclass
class Statistics:
    mean: torch.Tensor
    count: int


class WithStatistics(Detector):
    requires_fit = True

    def __init__(self, encoder):
        self.encoder = encoder
        self.statistics = None

    def fit(self, data_loader):
        raise NotImplementedError

    def predict(self, x):
        return self.encoder(x) @ self.statistics.mean


def test_data_class_of_a_plugin(split, data, path, monkeypatch):
    info = registry.PluginInfo("Mine", "detector", "mine", "1.0", f"{__name__}:WithStatistics")
    monkeypatch.setattr(registry, "get_info", lambda name: info)
    detector = registry.build("Mine", split)
    detector.statistics = Statistics(torch.rand(16), 3)
    save(detector, path)
    assert torch.equal(load(path, split)(data[3]), detector(data[3]))
    newer = registry.PluginInfo("Mine", "detector", "mine", "1.1", f"{__name__}:WithStatistics")
    monkeypatch.setattr(registry, "get_info", lambda name: newer)
    with pytest.warns(UserWarning, match=r"was saved with mine 1\.0, and this is 1\.1: compare"):
        load(path, split)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds the detector mine:Mine, which is not installed"):
        load(path, split)


# damage


def reseal(path, change):
    """Changes config.json and makes its checksum right again."""
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(persistence._sealed(config)))


def change_text(path, old, new):
    text = (path / "config.json").read_text()
    assert old in text
    (path / "config.json").write_text(text.replace(old, new, 1))


def truncate(name, keep):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(keep * len(content))])

    return damage


def flip(path):
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "state.safetensors").write_bytes(content)


def swap_states(path):
    state = safetensors.torch.load_file(path / "state.safetensors")
    safetensors.torch.save_file(
        {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in state.items()},
        path / "state.safetensors",
    )


DAMAGES = {
    "state is truncated": (truncate("state.safetensors", 0.5), "state.safetensors was changed or"),
    "state is empty": (truncate("state.safetensors", 0), "state.safetensors was changed or dam"),
    "a bit of the state": (flip, "state.safetensors was changed or damaged, since its checksum"),
    "another state": (swap_states, "state.safetensors was changed or damaged"),
    "no state": (
        lambda path: (path / "state.safetensors").unlink(),
        r"not complete \(state.safetensors is missing\): copy the directory again",
    ),
    "config is truncated": (truncate("config.json", 0.5), "is damaged or no saved detector"),
    "config is empty": (truncate("config.json", 0), "is damaged or no saved detector"),
    "config was changed": (
        lambda path: change_text(path, '"k": 3', '"k": 4'),
        "config.json was changed or damaged, since its checksum is wrong",
    ),
    "config is a list": (
        lambda path: (path / "config.json").write_text("[1, 2]"),
        "no saved detector, since its config.json is something else",
    ),
    "config of something else": (
        lambda path: (path / "config.json").write_text('{"format": 3}'),
        "no saved detector, since its config.json is something else",
    ),
    "config is binary": (
        lambda path: (path / "config.json").write_bytes(b"\xff\xfe" + bytes(range(256))),
        "is damaged or no saved detector",
    ),
    "config is nested": (
        lambda path: (path / "config.json").write_text("[" * 100_000),
        "is damaged or no saved detector",
    ),
    "another format": (
        lambda path: change_text(path, "detector 1", "detector 2"),
        "has the format 'pood-plugins detector 2', and this version of pood-plugins reads",
    ),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        r"is no saved detector, since it has no config.json: name the directory that",
    ),
    "no directory": (shutil.rmtree, "is no saved detector, since it has no config.json"),
    # forged: what no accident makes
    "unknown detector": (
        lambda path: reseal(path, lambda c: c["detector"].update(name="pood-plugins:GRODD")),
        "holds the detector pood-plugins:GRODD, which is not installed",
    ),
    "unknown argument": (
        lambda path: reseal(path, lambda c: c["arguments"].update(depth=1)),
        r"is damaged or no saved detector \(GROOD has no argument depth",
    ),
    "argument of another type": (
        lambda path: reseal(path, lambda c: c["arguments"].update(k="many")),
        r"is damaged or no saved detector \(k must be a count",
    ),
    "kind of value": (
        lambda path: reseal(path, lambda c: c["attributes"].update(k={"pickle": "gASVAA=="})),
        "'pickle' is no kind of value",
    ),
    "data class of elsewhere": (
        lambda path: reseal(
            path, lambda c: c["attributes"].update(k={"dataclass": "kth_distance", "fields": {}})
        ),
        "kth_distance is no data class",
    ),
    "name of an attribute": (
        lambda path: reseal(path, lambda c: c["attributes"].update(__class__=1)),
        "'__class__' is no name of an attribute",
    ),
    "name of a method": (
        lambda path: reseal(path, lambda c: c["attributes"].update(predict_features=1)),
        "'predict_features' is no name of an attribute",
    ),
    "tensor that is not there": (
        lambda path: reseal(path, lambda c: c["attributes"]["bank_"].update(tensor="nix")),
        "is damaged or no saved detector",
    ),
    "shape of a tensor": (
        lambda path: reseal(path, lambda c: c["attributes"]["bank_"].update(shape=[1])),
        r"bank_ has the shape \(",
    ),
    "fields are missing": (
        lambda path: reseal(path, lambda c: c.pop("attributes")),
        "is damaged or no saved detector",
    ),
    "checksum of another file": (
        lambda path: reseal(
            path, lambda c: c["checksums"].update({"state.safetensors": "0" * 64})
        ),
        "state.safetensors was changed or damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(fitted, split, path, name):
    damage, message = DAMAGES[name]
    save(fitted, path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        load(path, split)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_threshold(fitted, data, path):
    save(fitted, path, threshold=calibrate(fitted(data[1])))
    reseal(path, lambda config: config["threshold"].pop("value"))
    with pytest.raises(ValueError, match="is damaged or no saved detector"):
        load_threshold(path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("write", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["config.json", "state.safetensors", "model.safetensors"])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_pickle_is_never_run(fitted, split, path, name, write, sealed):
    save(fitted, path, classifier={})
    marker = path.with_name("marker")
    if write == "pickle":
        (path / name).write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"bank_": Payload(marker)}, path / name)
    if sealed and name != "config.json":
        checksum = persistence._checksum_of_file(path / name)
        reseal(path, lambda config: config["checksums"].update({name: checksum}))
    with pytest.raises(ValueError):
        saved = Saved(path)
        saved.load_weights(network())
        saved.detector(split)
    assert not marker.exists()
    if write == "pickle":  # which would have been run
        pickle.loads((path / name).read_bytes()).close()
        assert marker.exists()


# writing


def test_a_full_disk(fitted, split, data, path, monkeypatch):
    """safetensors has an exception of its own for it."""
    persistence.save(fitted, path)
    before = scores(fitted, data[3])

    def fail(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match=f"{path} can't be written: .*No space left"):
        persistence.save(registry.build("GROOD", split), path)
    assert torch.equal(scores(persistence.load(path, split), data[3]), before)
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_detector_is_replaced(fitted, split, data, path):
    save(registry.build("Energy", split), path)
    save(fitted, path)
    assert torch.equal(load(path, split)(data[3]), fitted(data[3]))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("step", ["save_file", "_checksum_of_file", "_sync", "rename"])
@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_failure_leaves_the_old_one_or_nothing(fitted, split, path, step, exists, monkeypatch):
    if exists:
        save(registry.build("Energy", split), path)

    def fail(*_):
        raise OSError("no space left on device")

    rename = Path.rename

    def fail_to_rename(source, target):
        return fail() if source.suffix == ".new" else rename(source, target)

    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(safetensors.torch, "save_file", fail)
        elif step == "rename":
            patch.setattr(Path, "rename", fail_to_rename)
        else:
            patch.setattr(persistence, step, fail)
        with pytest.raises(OSError, match="no space left"):
            save(fitted, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name] * exists
    if exists:
        assert type(load(path, split)).__name__ == "EnergyBased"


def test_killed_while_saving(fitted, split, path):
    """Wherever it ends, there is the old detector, the new one, or none; never a broken one."""
    energy = registry.build("Energy", split)
    for step in ("save_file", "_checksum_of_file", "_separate", "_sync"):
        save(energy, path)
        child = os.fork()
        if child == 0:
            module = safetensors.torch if step == "save_file" else persistence
            setattr(module, step, lambda *_, **__: os._exit(0))
            save(fitted, path)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert type(load(path, split)).__name__ == "EnergyBased"
        assert [file for file in path.parent.iterdir() if file.suffix == ".new"]
        for file in path.parent.iterdir():
            shutil.rmtree(file)


def test_what_would_be_lost(fitted, path):
    path.mkdir()
    save(fitted, path)  # an empty directory may be there
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\), which would be lost"):
        save(fitted, path)
    (path / "notes.txt").unlink()
    save(fitted, path, classifier={"arch": "x"})
    with pytest.raises(ValueError, match="holds the weights of its classifier, too, which would"):
        save(fitted, path)
    file = path.with_name("file")
    file.write_text("mine")
    with pytest.raises(ValueError, match="file is a file: name a directory"):
        save(fitted, file)
    assert file.read_text() == "mine"


def test_files_of_others_with_the_same_names(fitted, path):
    """As a checkpoint of another library has them."""
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["X"]}')
    (path / "model.safetensors").write_bytes(b"weights")
    message = "is there, and is no sound saved detector: remove it, or name another directory"
    with pytest.raises(ValueError, match=message):
        save(fitted, path, classifier={})
    assert (path / "model.safetensors").read_bytes() == b"weights"
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=message):
        save(fitted, path, classifier={})


def test_tilde_is_a_name_like_any_other(fitted, split, tmp_path, monkeypatch):
    """What is checked is what is replaced."""
    home = tmp_path / "home"
    (home / "results").mkdir(parents=True)
    (home / "results" / "thesis.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    save(fitted, "~/results")
    assert (home / "results" / "thesis.txt").read_text() == "mine"
    assert load(tmp_path / "~" / "results", split) is not None


def test_link_to_a_directory(fitted, split, path):
    real = path.with_name("real")
    real.mkdir()
    path.symlink_to(real)
    save(fitted, path)
    assert path.is_symlink() and load(real, split) is not None


def test_permissions(fitted, path):
    umask = os.umask(0o022)
    try:
        save(fitted, path, classifier={})
    finally:
        os.umask(umask)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o644"}
    assert oct(path.stat().st_mode & 0o777) == "0o755"


def test_weights_of_the_classifier(fitted, data, path, split):
    save(fitted, path, classifier={"arch": "x"})
    model = network(seed=3)
    Saved(path).load_weights(model)
    assert fingerprint(model) == fingerprint(data[0])
    with pytest.raises(ValueError, match="is damaged or no saved detector"):
        Saved(path).load_weights(network(width=8))
    other = path.with_name("other")
    save(fitted, other)
    with pytest.raises(ValueError, match="holds no weights: make it by `pood fit`"):
        Saved(other).load_weights(model)


def test_check(fitted, path):
    save(fitted, path, classifier={})
    Saved(path).check()
    truncate("model.safetensors", 0.9)(path)
    with pytest.raises(ValueError, match="model.safetensors was changed or damaged"):
        Saved(path).check()


def test_shared_weights(data, path):
    model = copy.deepcopy(data[0])
    model.twin = model.fc  # under two names
    save(registry.build("Energy", split_model(model)), path, classifier={})
    again = copy.deepcopy(data[0])
    again.twin = nn.Linear(16, 4)
    Saved(path).load_weights(again)
    assert torch.equal(again.twin.weight, model.fc.weight)


def test_without_safetensors(fitted, split, path, monkeypatch):
    save(fitted, path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save(fitted, path), lambda: load(path, split)):
        with pytest.raises(ImportError, match=r"pip install 'pood-plugins\[deploy\]'"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_another_device(fitted, data, path):
    model, _, _, queries = data
    expected = fitted(queries)
    save(fitted, path)
    loaded = load(path, split_model(copy.deepcopy(model).cuda()))
    assert loaded.bank_.is_cuda
    torch.testing.assert_close(loaded(queries.cuda()).cpu(), expected, rtol=1e-3, atol=1e-5)
    there = path.with_name("there")
    save(loaded, there)
    back = load(there, split_model(copy.deepcopy(model)))
    assert torch.equal(back(queries), expected)
