"""
Classifiers by name: where a name is looked up, which files are weights, and that nothing in a file
is run.
"""

import dataclasses
import itertools
import os
import pickle
import sys

import pytest
import pytorch_ood.model
import timm
import torch
import torchvision
from pytorch_ood.model import WideResNet, get_model_info
from safetensors.torch import save_file
from torch import nn

from pood_plugins.model import resnet20, resnet56
from pood_plugins.model.preprocessing import Preprocessing
from pood_plugins.model.resnet_cifar import CIFARResNet
from pood_plugins.model.zoo import construct, load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "wrn-40-2/cifar10/crossentropy"
MODULE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
        self.train()

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))

def any_name(**options):
    return Tiny(**options)

def seven():
    return Tiny(7)

def ready():
    model = Tiny()
    nn.init.constant_(model.fc.weight, 3)
    return model

def demanding(num_classes, width):
    return Tiny(num_classes)

def number():
    return 5

def broken():
    raise RuntimeError("no luck")

constant = 5
"""


@pytest.fixture(scope="module")
def network():
    """A network that has not the weights, nor running statistics, that it begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet20(10)
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.fixture
def weights(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_package.nets"
    for name in ("a_package", "a_package.nets"):
        sys.modules.pop(name, None)


def assert_same_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def saved(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


# architectures


@pytest.mark.parametrize(("arch", "make"), [("resnet20", resnet20), ("resnet56", resnet56)])
def test_own_networks_have_a_known_preprocessing(tmp_path, arch, make):
    model, preprocessing = load_classifier(arch, saved(make(7), tmp_path / "w.pt"), 7)
    assert isinstance(model, CIFARResNet) and model.linear.out_features == 7
    assert not model.training
    assert preprocessing == Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "torchvision:mobilenet_v3_small"])
def test_torchvision(tmp_path, arch):
    theirs = torchvision.models.mobilenet_v3_small(num_classes=3)
    model, preprocessing = load_classifier(arch, saved(theirs, tmp_path / "w.pt"), 3)
    assert type(model) is type(theirs) and preprocessing is None and not model.training
    assert_same_weights(model, theirs.state_dict())


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_torchvision_without_auxiliary_classifiers(tmp_path, arch):
    """torchvision's files have them, and networks that were trained without have not."""
    whole = torchvision.models.get_model(arch, num_classes=3, init_weights=False)
    state = whole.state_dict()
    rest = {name: value for name, value in state.items() if not name.lower().startswith("aux")}
    assert 0 < len(rest) < len(state)
    for number, content in enumerate((state, rest)):
        torch.save(content, tmp_path / f"{number}.pt")
        model, _ = load_classifier(arch, str(tmp_path / f"{number}.pt"), 3)
        assert_same_weights(model, rest)


@pytest.mark.parametrize("arch", ["test_vit", "timm:test_vit", "timm:resnet18"])
def test_timm(tmp_path, arch):
    theirs = timm.create_model(arch.removeprefix("timm:"), num_classes=3)
    model, preprocessing = load_classifier(arch, saved(theirs, tmp_path / "w.pt"), 3)
    assert type(model) is type(theirs) and preprocessing is None and not model.training
    assert_same_weights(model, theirs.state_dict())


def test_classes_of_pytorch_ood(tmp_path):
    theirs = WideResNet(num_classes=3)
    model, preprocessing = load_classifier("WideResNet", saved(theirs, tmp_path / "w.pt"), 3)
    assert isinstance(model, WideResNet) and preprocessing is None
    assert_same_weights(model, theirs.state_dict())


def test_order_of_the_sources(tmp_path, monkeypatch):
    """Its own first, then torchvision, pytorch-ood and timm; a prefix names one of them."""

    def origin(arch):
        with pytest.raises(ValueError, match="there is no file"):
            load_classifier(arch, str(tmp_path / "nix.pt"), 3)
        (source,) = made
        made.clear()
        return source

    made = []
    names = {"a": "abcd", "b": "bcd", "c": "cd", "d": "d"}

    def source(letter):
        def make(name, num_classes):
            made.extend([letter] * (name in names[letter]))
            return nn.Linear(1, num_classes) if name in names[letter] else None

        return make

    from pood_plugins.model import zoo

    assert list(zoo._SOURCES) == ["pood_plugins", "torchvision", "pytorch_ood", "timm"]
    monkeypatch.setattr(zoo, "_SOURCES", dict(zip(zoo._SOURCES, map(source, "abcd"))))
    assert [origin(name) for name in "abcd"] == ["a", "a", "a", "a"]
    names["a"] = ""
    assert [origin(name) for name in "bcd"] == ["b", "b", "b"]
    names["b"] = "b"
    assert [origin(name) for name in "bcd"] == ["b", "c", "c"]
    assert [origin("torchvision:b"), origin("timm:d")] == ["b", "d"]
    with pytest.raises(LookupError, match="no architecture is called 'timm:c'"):
        load_classifier("timm:c", str(tmp_path / "nix.pt"), 3)


def test_name_that_two_have_is_that_of_torchvision(tmp_path):
    """Both have a resnet18, with parameters of the same names."""
    path = saved(torchvision.models.resnet18(num_classes=3), tmp_path / "w.pt")
    for arch, expected in (
        ("resnet18", torchvision.models.ResNet),
        ("torchvision:resnet18", torchvision.models.ResNet),
        ("timm:resnet18", timm.models.ResNet),
    ):
        assert type(load_classifier(arch, path, 3)[0]) is expected


def test_without_timm(tmp_path, monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "timm", None)
    for arch in ("test_vit", "timm:test_vit"):
        with pytest.raises(LookupError, match=rf"'{arch}': choose .*pip install timm"):
            load_classifier(arch, weights, 10)
    assert load_classifier("resnet20", weights, 10)


@pytest.mark.parametrize(
    "arch",
    [
        "resnet21",
        "torchvision:resnet20",
        "torchvision:test_vit",
        "torchvision:fcn_resnet50",  # no classifier
        "timm:vit_b_16",
        "GRUClassifier",  # needs more than the number of classes
        "ClassCenters",
        "Module",
        "list_models",
        "",
    ],
)
def test_unknown_names(weights, arch):
    with pytest.raises(LookupError, match=f"no architecture is called '{arch}': choose one of re"):
        load_classifier(arch, weights, 10)


def test_callable_of_a_module(module):
    for name, classes, expected in [
        ("Tiny", 6, 6),
        ("Tiny", None, 4),
        ("any_name", 6, 6),
        ("seven", 6, 7),
        ("seven", None, 7),
    ]:
        model, preprocessing = load_classifier(f"{module}:{name}", None, classes)
        assert model.fc.out_features == expected
        assert preprocessing is None and not model.training
    assert (load_classifier(f"{module}:ready", None)[0].fc.weight == 3).all()


def test_callable_with_weights(module, tmp_path):
    state = {"fc.weight": torch.full((4, 3), 2.0), "fc.bias": torch.arange(4.0)}
    torch.save(state, tmp_path / "w.pt")
    model, _ = load_classifier(f"{module}:ready", str(tmp_path / "w.pt"))
    assert_same_weights(model, state)
    with pytest.raises(
        ValueError, match=r"these classes: fc.weight has shape \(4, 3\) there, and"
    ):
        load_classifier(f"{module}:seven", str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nix", LookupError, "nets:nix can't be imported .*nix.*: correct --arch"),
        ("number", ValueError, "nets:number gives a int: it must be a torch.nn.Module"),
        ("constant", ValueError, "nets:constant is a int: it must be a class or a function"),
        ("demanding", ValueError, r"nets:demanding can't be called .* argument: 'width'\): give"),
        ("broken", RuntimeError, "no luck"),
    ],
)
def test_callables_that_are_none(module, name, error, message):
    with pytest.raises(error, match=message):
        load_classifier(f"{module}:{name}", None, 4)


def test_modules_that_are_none():
    with pytest.raises(LookupError, match="a_package.other:f can't be imported .*No module named"):
        load_classifier("a_package.other:f", None, 4)


# what must be given


def test_missing_architecture_weights_and_classes(weights):
    with pytest.raises(ValueError, match="no architecture: name it by --arch"):
        load_classifier(None, None, 10)
    with pytest.raises(ValueError, match="no architecture: name it by --arch"):
        load_classifier(None, weights, 10)
    with pytest.raises(ValueError, match="no weights for resnet20: name their file by --weights"):
        load_classifier("resnet20", None, 10)
    with pytest.raises(ValueError, match="resnet20 needs the number of classes .*: --classes N"):
        load_classifier("resnet20", weights)


def test_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nix.pt"):
        with pytest.raises(ValueError, match=f"there is no file {path}: name that of the weights"):
            load_classifier("resnet20", str(path), 10)


def test_key_of_pytorch_ood(monkeypatch):
    model, keys = nn.Linear(1, 1), []
    monkeypatch.setattr(pytorch_ood.model, "load_model", lambda key: (keys.append(key), model)[1])
    for key in (KEY, "wrn-40-2/cifar100/oe", "resnet-18/imagenet200/vos/s0"):
        preprocessing = Preprocessing.of_pytorch_ood(get_model_info(key).preprocessing)
        assert load_classifier(None, key) == (model, preprocessing)
        assert keys.pop() == key
    # a file goes first, and an architecture says that it is one
    for key in (f"{KEY}/s9", "wrn-40-2/cifar10/cross", "nix/model.pt", "/nix/model.pt"):
        with pytest.raises(ValueError, match=f"^{key} is neither a file nor a key"):
            load_classifier(None, key)
    with pytest.raises(ValueError, match="wrn-40-2/cifar10' is ambiguous"):
        load_classifier(None, "wrn-40-2/cifar10")
    with pytest.raises(ValueError, match=f"there is no file {KEY}"):
        load_classifier("resnet20", KEY, 10)
    assert keys == []


def test_key_without_known_preprocessing(monkeypatch):
    entry = dataclasses.replace(get_model_info(KEY), preprocessing=None)
    monkeypatch.setattr(pytorch_ood.model, "get_model_info", lambda _: entry)
    monkeypatch.setattr(pytorch_ood.model, "load_model", lambda _: nn.Linear(1, 1))
    assert load_classifier(None, KEY)[1] is None


def test_construct():
    assert isinstance(construct(KEY), WideResNet)
    assert construct("resnet20", 7).linear.out_features == 7
    assert construct("torchvision:resnet18", 5).fc.out_features == 5
    with pytest.raises(ValueError, match="needs the number of classes"):
        construct("resnet20")
    with pytest.raises(ValueError, match="gives a str: it must be a torch.nn.Module"):
        construct("platform:python_version")


def test_published_weights_of_torchvision(monkeypatch):
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    urls = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **_: (urls.append(url), state)[1],
    )
    for arch, weights in (
        ("resnet18", "IMAGENET1K_V1"),
        ("torchvision:resnet18", "DEFAULT"),
    ):
        model, preprocessing = load_classifier(arch, weights)
        assert torch.equal(model.fc.weight, state["fc.weight"]) and not model.training
        assert "resnet18" in urls.pop()
        expected = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256)
        assert preprocessing == expected
    with pytest.raises(ValueError, match="there is no file IMAGENET1K_V7"):
        load_classifier("resnet18", "IMAGENET1K_V7", 1000)


def test_published_weights_of_timm(monkeypatch):
    create_model, given = timm.create_model, []

    def create(name, pretrained=False, **options):
        given.append((name, pretrained))
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    model, preprocessing = load_classifier("timm:resnet10t", "pretrained")
    assert given == [("resnet10t", True)] and not model.training
    config = timm.data.resolve_model_data_config(model)
    assert preprocessing == Preprocessing.of_timm(config)
    with pytest.raises(ValueError, match="there is no file pretrained"):
        load_classifier("resnet20", "pretrained", 10)


# state dicts


def plain(state, path):
    torch.save(state, path)


def wrapped(state, path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": state}, path)


def parallel(state, path):
    torch.save({f"module.{name}": value for name, value in state.items()}, path)


def wrapped_parallel(state, path):
    torch.save({"state_dict": {f"module.{n}": value for n, value in state.items()}}, path)


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def double(state, path):
    torch.save({name: value.double() for name, value in state.items()}, path)


def parameters(state, path):
    torch.save({name: nn.Parameter(v, v.is_floating_point()) for name, v in state.items()}, path)


@pytest.mark.parametrize(
    "write",
    [
        plain,
        wrapped,
        parallel,
        wrapped_parallel,
        legacy,
        double,
        parameters,
        save_file,
    ],
)
def test_files_of_weights(network, tmp_path, write):
    path = tmp_path / ("w.safetensors" if write is save_file else "w.pt")
    write(network.state_dict(), path)
    model, _ = load_classifier("resnet20", str(path), 10)
    assert_same_weights(model, network.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), network(x))


@pytest.mark.parametrize("write", [plain, save_file])
def test_files_of_old_versions(network, tmp_path, write):
    """These lack a buffer that inference does not need."""
    state = {n: v for n, v in network.state_dict().items() if not n.endswith("batches_tracked")}
    assert len(state) == len(network.state_dict()) - 19
    path = tmp_path / ("w.safetensors" if write is save_file else "w.pt")
    write(state, path)
    model, _ = load_classifier("resnet20", str(path), 10)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), network(x))


def test_weights_of_another_architecture(weights, tmp_path):
    # 36 layers more, each with a convolution and four tensors of a batch normalization
    with pytest.raises(ValueError) as caught:
        load_classifier("resnet56", weights, 10)
    assert str(caught.value) == (
        f"{weights} does not hold weights of resnet56: 180 missing (layer1.3.conv1.weight, "
        "layer1.3.bn1.weight, ...), none too many. Name the architecture that they belong to by "
        "--arch"
    )
    path = saved(resnet56(), tmp_path / "large.pt")
    with pytest.raises(ValueError, match=r"weights of resnet20: none missing, 216 too many \(la"):
        load_classifier("resnet20", path, 10)
    with pytest.raises(ValueError, match=r"resnet18: \d+ missing \(.*, \d+ too many \(layer1.2.c"):
        load_classifier("torchvision:resnet18", weights, 10)


def test_lost_and_added_tensors(network, tmp_path):
    state = network.state_dict()
    lost = {name: value for name, value in state.items() if name != "bn1.running_var"}
    torch.save(lost, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"resnet20: 1 missing \(bn1.running_var\), none too many"
    ):
        load_classifier("resnet20", str(tmp_path / "w.pt"), 10)
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"none missing, 1 too many \(extra\)"):
        load_classifier("resnet20", str(tmp_path / "w.pt"), 10)


def test_wrong_number_of_classes(weights):
    with pytest.raises(
        ValueError,
        match=r"for these classes: linear.weight has shape \(10, 64\) there, and \(100, 64\) in",
    ):
        load_classifier("resnet20", weights, 100)


# files that are no weights


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], torch.zeros(3), {}, {"a": 1}, {1: torch.zeros(1)}, {"state_dict": [1]}, 5],
)
def test_files_without_a_state_dict(tmp_path, content):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        load_classifier("resnet20", str(path), 10)
    assert str(caught.value) == (
        f"{path} is damaged or no state dict (it holds no state dict): copy it again, or save a "
        "state dict"
    )


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    """One bit, in the middle of the weights. torch does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content):
    return b""


def text(content):
    return b"no weights\n" * 50


@pytest.mark.parametrize(
    ("write", "damage"),
    [
        *itertools.product([plain, legacy, save_file], [truncated, empty, text]),
        (plain, flipped),  # others have no checksums
    ],
)
def test_damaged_files(network, tmp_path, write, damage):
    path = tmp_path / ("w.safetensors" if write is save_file else "w.pt")
    write(network.state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        load_classifier("resnet20", str(path), 10)
    assert str(caught.value).startswith(f"{path} is damaged or no state dict (")
    assert str(caught.value).endswith("): copy it again, or save a state dict")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 220


class Payload:
    """What does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_nothing_in_a_file_is_run(network, tmp_path, zipped, suffix):
    path, trace = tmp_path / f"w{suffix}", tmp_path / "trace"
    content = {**network.state_dict(), "payload": Payload(str(trace))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is damaged or no state dict") as caught:
        load_classifier("resnet20", str(path), 10)
    assert not trace.exists()
    assert "weights_only" not in str(caught.value)  # nor is it said how to run it
    if suffix != ".safetensors":  # the file would have done it
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_nothing_in_a_pickle_is_run(tmp_path):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"conv1.weight": Payload(str(trace))}))
    with pytest.raises(ValueError, match="it is not of torch.save, or holds other objects than"):
        load_classifier("resnet20", str(path), 10)
    assert not trace.exists()


def test_whole_modules_are_refused(network, tmp_path):
    torch.save(network, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="other objects than tensors.: copy it again, or save a "):
        load_classifier("resnet20", str(tmp_path / "w.pt"), 10)


def test_without_safetensors(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'pood-plugins\[deploy\]'"):
        load_classifier("resnet20", str(tmp_path / "w.safetensors"), 10)
