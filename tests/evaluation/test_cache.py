"""What is kept is found again, and never taken for anything else."""

import functools
import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pytorch_ood.dataset.img.imagelist import ImageListDataset
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pood_plugins import registry, split_model
from pood_plugins.benchmark.folder import ImageFiles
from pood_plugins.dataset import ImagePack
from pood_plugins.evaluation import cache as module
from pood_plugins.evaluation.cache import Cache, of_dataset, of_module, of_value

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = {"data": "d", "model": "m"}
VALUE = {"z": torch.arange(12.0).reshape(3, 4), "y": [torch.arange(3)], "seconds": 0.5, "t": "ä"}


def same(a, b):
    """Whether two values are equal to the last bit."""
    return of_value(a) == of_value(b)


def never():
    raise AssertionError("computed although it is there")


def files(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


# entries


def test_value_is_kept_and_found(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert Cache(folder).get("features", KEY, lambda: VALUE) is VALUE
    assert len(files(folder)) == 1 and files(folder)[0].startswith("features-")
    assert same(Cache(folder).get("features", KEY, never), VALUE)
    # the order of the key's parts means nothing
    assert same(Cache(str(folder)).get("features", dict(reversed(KEY.items())), never), VALUE)


def test_without_a_folder_everything_is_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = iter([{"n": 1}, {"n": 2}])
    got = [Cache(None).get("features", KEY, lambda: next(values)) for _ in range(2)]
    assert got == [{"n": 1}, {"n": 2}] and files(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [{"data": "e", "model": "m"}, {"data": "m", "model": "d"}, {"data": "d"}, {**KEY, "x": "y"}],
)
def test_another_key_is_another_entry(tmp_path, other):
    Cache(tmp_path).get("features", KEY, lambda: {"n": 1})
    assert Cache(tmp_path).get("features", other, lambda: {"n": 2}) == {"n": 2}
    assert Cache(tmp_path).get("features", KEY, never) == {"n": 1}


@pytest.mark.parametrize(
    "package", ["torch", "torchvision", "pillow", "pytorch-ood", "pood-plugins"]
)
def test_another_version_computes_again(tmp_path, monkeypatch, package):
    Cache(tmp_path).get("features", KEY, lambda: {"n": 1})
    real = module.version
    monkeypatch.setattr(module, "version", lambda p: "9.9" if p == package else real(p))
    assert Cache(tmp_path).get("features", KEY, lambda: {"n": 2}) == {"n": 2}


def test_what_is_unknown_is_not_kept(tmp_path, caplog):
    for n in range(2):
        key = {"data": None, "model": "m"}
        assert Cache(tmp_path).get("features train", key, lambda: {"n": n}) == {"n": n}
    assert files(tmp_path) == []
    assert "features train can't be kept: data can't be recognised" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_to_compute_leaves_nothing(tmp_path, error):
    def fail():
        raise error("no luck")

    with pytest.raises(error):
        Cache(tmp_path).get("features", KEY, fail)
    assert files(tmp_path) == []
    assert Cache(tmp_path).get("features", KEY, lambda: {"n": 2}) == {"n": 2}


# damage


@pytest.fixture
def entry(tmp_path):
    Cache(tmp_path).get("features", KEY, lambda: VALUE)
    (path,) = tmp_path.iterdir()
    return path


def get_rebuilt(path, caplog):
    """The value from behind a damaged file, and whether it was computed, which is logged."""
    calls = []
    caplog.clear()
    value = Cache(path.parent).get("features", KEY, lambda: calls.append(1) or VALUE)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(calls) and all(str(path) in r.message for r in warnings)
    assert same(value, VALUE)
    assert same(Cache(path.parent).get("features", KEY, never), VALUE)
    assert files(path.parent) == [path.name]
    return bool(calls)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_entry(entry, caplog, share):
    content = entry.read_bytes()
    entry.write_bytes(content[: int(share * len(content))])
    assert get_rebuilt(entry, caplog)


def test_no_flipped_byte_is_used(entry, caplog):
    content = entry.read_bytes()
    with zipfile.ZipFile(entry) as archive:
        # of tensors and text, and of all else that there is in the archive
        places = [archive.getinfo(name).header_offset + 70 for name in archive.namelist()]
    n_rebuilt = 0
    places += list(range(0, len(content), len(content) // 40))
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        entry.write_bytes(damaged)
        n_rebuilt += get_rebuilt(entry, caplog)
    assert n_rebuilt > len(places) / 2


class Payload:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 1000),
        lambda path: path.write_bytes(pickle.dumps(Payload())),
        lambda path: torch.save({"key": KEY, "value": Payload()}, path),
        lambda path: module.save_checkpoint(path, ["a", "list"]),
        lambda path: module.save_checkpoint(path, 7),
        lambda path: module.save_checkpoint(path, torch.ones(2)),
        lambda path: module.save_checkpoint(
            path, {"key": module.load_checkpoint(path)["key"], "value": None}
        ),
        lambda path: module.save_checkpoint(path, {"value": {"n": 1}}),
        lambda path: module.save_checkpoint(path, {"key": KEY, "value": {"n": 1}}),
    ],
    ids=["empty", "zeros", "pickle", "torch.save", "list", "number"]
    + ["tensor", "no value", "no key", "old version"],
)
def test_other_content_under_the_right_name(entry, caplog, write, monkeypatch):
    monkeypatch.chdir(entry.parent)
    write(entry)
    assert get_rebuilt(entry, caplog)
    assert not Path("was_run").exists()


def test_entry_of_something_else_under_the_right_name(entry, caplog):
    other = Cache(entry.parent / "other")
    other.get("features", {"data": "e", "model": "m"}, lambda: {"n": 1})
    (path,) = other.directory.iterdir()
    path.replace(entry)
    path.parent.rmdir()
    assert get_rebuilt(entry, caplog)
    assert "belongs to something else" in caplog.text


# writing


def test_interrupted_write_leaves_the_old_file(entry, monkeypatch):
    entry.write_bytes(b"damaged")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Cache(entry.parent).get("features", KEY, lambda: VALUE)
    assert files(entry.parent) == [entry.name] and entry.read_bytes() == b"damaged"


def test_full_disk_loses_no_value(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        assert Cache(tmp_path).get("features", KEY, lambda: VALUE) is VALUE
    assert files(tmp_path) == [] and "no space left" in caplog.text
    Cache(tmp_path).get("features", KEY, lambda: VALUE)
    assert same(Cache(tmp_path).get("features", KEY, never), VALUE)


def test_folder_that_is_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    assert Cache(tmp_path / "file").get("features", KEY, lambda: VALUE) is VALUE
    assert (tmp_path / "file").read_text() == "mine" and "not kept" in caplog.text


def test_several_processes_leave_a_whole_entry(entry, monkeypatch, caplog):
    monkeypatch.setattr("os.getpid", threading.get_ident)  # threads, each with its own number
    key = module.load_checkpoint(entry)["key"]
    errors = []

    def write(n):
        try:
            for _ in range(20):
                module.save_checkpoint(entry, {"key": key, "value": {"z": torch.full((9999,), n)}})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    found = [Cache(entry.parent).get("features", KEY, never)["z"]]
    while any(thread.is_alive() for thread in threads):
        found.append(Cache(entry.parent).get("features", KEY, never)["z"])
    for thread in threads:
        thread.join()
    assert not errors and not caplog.text
    assert files(entry.parent) == [entry.name]
    for z in found:
        assert same(z, VALUE["z"]) or len(z.unique()) == 1


# fingerprints of values


values = st.recursive(
    st.one_of(
        st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=3), st.none()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(a=values, b=values)
def test_values_are_equal_if_and_only_if_they_look_so(a, b):
    assert (of_value(a) == of_value(b)) == (repr(a) == repr(b))


long = torch.zeros(2000)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.3, 0.1 + 0.2),
        (1, 1.0),
        (1, True),
        (1.0, np.float32(1.0)),
        ("1", 1),
        (["ab", "c"], ["a", "bc"]),
        ([[1], 2], [[1, 2]]),
        ([], ()),
        ({1, 2}, {1, 3}),
        ({1, 2}, frozenset({1, 2})),
        (torch.float32, torch.float64),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.tensor(0.1), torch.tensor(0.1).nextafter(torch.tensor(1.0))),
        ([long], [long.index_fill(0, torch.tensor(1000), 1e-9)]),
        ({"deep": [[long]]}, {"deep": [[long.index_fill(0, torch.tensor(1000), 1e-9)]]}),
        (np.zeros(2000), np.where(np.arange(2000) == 1000, 1e-9, 0)),
        (np.zeros(2, np.int32), np.zeros(2, np.float32)),
        (F.relu, F.silu),
        (F.gelu, F.linear),
        (torch.relu, torch.tanh),
        (functools.partial(F.pad, pad=(1, 1)), functools.partial(F.pad, pad=(1, 2))),
        (functools.partial(F.pad, pad=(1, 1)), functools.partial(F.softmax, pad=(1, 1))),
        (nn.Linear, nn.Bilinear),
        (Path("a"), Path("b")),
        (transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.BICUBIC),
    ],
    ids=repr,
)
def test_values_that_look_or_weigh_the_same(a, b):
    assert of_value(a) is not None and of_value(b) is not None
    assert of_value(a) != of_value(b)


def local_function(n):
    def function(x):
        return x + n

    return function


def plain_local_function():
    def function(x):
        return x + 1

    return function


def local_class():
    class Local(nn.Module):
        pass

    return Local


class Cycle:
    def __init__(self):
        self.me = [self]


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        [{"deep": (lambda x: x,)}],
        local_function(1),
        local_class(),
        local_class()(),
        functools.partial(local_function(1), 2),
        transforms.Lambda(lambda x: x),
        (n for n in range(3)),
        threading.Lock(),
        np.array([{}], dtype=object),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_nobody_can_recognise(value):
    assert of_value(value) is None


def test_values_that_contain_themselves():
    endless = []
    endless.append(endless)
    assert of_value(endless) is None
    assert of_value(Cycle()) == of_value(Cycle()) is not None


def test_local_functions_without_variables_are_known_by_their_place():
    """GradNorm and GradUncertainty, the slowest, have one by default."""
    assert of_value(plain_local_function()) == of_value(plain_local_function()) is not None
    split = split_model(classifier())
    for name in ("GradNorm", "GradUncertainty"):
        assert of_value(registry.build(name, split)) is not None


class Temporary:
    """Is taken apart into what is gone afterwards, so that the next may be in its place."""

    def __init__(self, n):
        self.n = n

    def __reduce__(self):
        return Temporary, (torch.tensor(self.n),)


def test_objects_are_not_taken_for_others():
    x, y = torch.zeros(2), torch.ones(2)
    assert of_value([x, y, x]) != of_value([x, y, y])
    assert of_value([Temporary(n) for n in range(9)]) != of_value([Temporary(0)] * 9)
    found = [of_value([Temporary(1), Temporary(n), Temporary(3)]) for n in range(9)]
    assert len(set(found)) == 9


def test_the_order_of_sets_means_nothing():
    assert list({0, 8}) != list({8, 0})
    assert of_value({0, 8}) == of_value({8, 0})


def test_equal_lists_need_not_be_shared():
    pair = (1, 2)
    assert of_value([pair, pair]) == of_value([(1, 2), tuple([1, 2])])


# fingerprints of networks


class Net(nn.Module):
    """Has whatever a network may have besides weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Linear(3, 2)
        self.register_buffer("table", torch.zeros(4), persistent=False)
        self.mean = [0.5, 0.25]
        self.std = torch.ones(2)
        self.scale = 1.0
        self.activation = F.relu

    def __repr__(self):
        return "Net()"


class Twin(Net):
    pass


def net(kind=Net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).eval()


def watch(*_):
    pass


def swap(layers):
    layers[0], layers[2] = layers[2], layers[0]


def changed(change):
    network = net()
    with torch.no_grad():
        change(network)
    return network


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.layers[0].weight[2, 0, 1, 1].mul_(1 + 1e-6),
        lambda n: n.head.bias[1].add_(1),
        lambda n: n.layers[1].running_var[0].add_(1),
        lambda n: n.layers[1].num_batches_tracked.add_(1),
        lambda n: n.table[3].add_(1),
        lambda n: n.mean.__setitem__(1, 0.2500001),
        lambda n: n.std[1].add_(1e-6),
        lambda n: setattr(n, "scale", 1.0000001),
        lambda n: setattr(n, "activation", F.gelu),
        lambda n: setattr(n.head, "bias", None),
        lambda n: n.layers.__setitem__(2, nn.GELU()),
        lambda n: setattr(n.layers[0], "stride", (2, 2)),
        lambda n: setattr(n.layers[1], "eps", 1e-3),
        lambda n: setattr(n, "table", n.table.int()),
        lambda n: setattr(n, "table", n.table.reshape(2, 2)),
        lambda n: swap(n.layers),
        lambda n: n.layers.append(nn.Identity()),
        lambda n: n.head.register_forward_hook(watch),
        lambda n: n.layers[1].train(),
    ],
    ids="weight bias variance count table mean std scale activation no-bias GELU stride eps "
    "dtype shape order identity hook mode".split(),
)
def test_any_change_of_a_network_is_noticed(change):
    fingerprint = of_module(changed(change))
    assert fingerprint is not None
    assert fingerprint != of_module(net())
    # and it is the change that does it
    assert fingerprint == of_module(changed(change)) and of_module(net()) == of_module(net())


def test_another_class_with_the_same_weights():
    assert repr(net()) == repr(net(Twin))
    assert of_module(net(Twin)) != of_module(net())


def test_split_models_and_their_parts():
    model = classifier()
    split = split_model(model)
    parts = [split, split.encoder, split.early, split.late, split.feature_maps, split.map_head]
    before = [of_module(part) for part in parts]
    assert None not in before and len(set(before)) == len(parts)
    # neither tracing it again, which numbers hooks, nor running it makes it another one
    split_model(model)
    split(torch.zeros(2, 1, 32, 32))
    assert [of_module(part) for part in parts] == before
    with torch.no_grad():
        model[0][0].weight[0, 0, 0, 0] += 1
    assert of_module(split.encoder) not in before


def test_a_hook_that_is_gone_leaves_no_trace():
    network = net()
    before = of_module(network)
    network.head.register_forward_hook(watch).remove()
    assert of_module(network) == before
    first, second = changed(lambda n: n.head.register_forward_hook(watch)), net()
    nn.Identity().register_forward_hook(watch)
    second.head.register_forward_hook(watch)
    assert of_module(first) == of_module(second)
    network.head.register_forward_hook(lambda *_: None)
    assert of_module(network) is None


@pytest.mark.parametrize("value", [None, F.relu, net().forward, 3, TensorDataset(torch.ones(1))])
def test_no_modules(value):
    assert of_module(value) is None


def test_edited_code_is_noticed(tmp_path, monkeypatch):
    """Of a network, a transform or a detector that somebody develops, and of its base."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    base = "class Base:\n    def __call__(self, x):\n        return {} * x\n"
    own = "from somebodys_base import Base\nclass Mine(Base):\n    factor = {}\n"
    found = []
    for factors in [(2, 1), (3, 1), (3, 1), (3, 2)]:
        for name, code, factor in zip(("somebodys_base", "somebodys_own"), (base, own), factors):
            (tmp_path / f"{name}.py").write_text(code.format(factor))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        found.append(of_value(importlib.import_module("somebodys_own").Mine()))
    for name in ("somebodys_base", "somebodys_own"):
        sys.modules.pop(name)
    assert None not in found
    assert found[1] == found[2] and len(set(found)) == 3


SCRIPT = """
import json, sys
import torch
from torch import nn
from torchvision import transforms
from pood_plugins import registry, split_model
from pood_plugins.dataset import ImagePack
from pood_plugins.evaluation.cache import of_dataset, of_module, of_value
def classifier():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 3)).eval()

for _ in range(int(sys.argv[1])):  # what runs before must not matter
    split_model(classifier())
    nn.Identity().register_forward_hook(print)
split = split_model(classifier())
x = torch.arange(96).reshape(2, 4, 4, 3).to(torch.uint8).numpy()
pack = ImagePack(x, [0, 1], transforms.Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
detectors = [registry.build(name, split) for name in ("ODIN", "ReAct", "GradNorm", "NACUE")]
found = [of_module(split.encoder), of_dataset(pack), *map(of_value, detectors)]
found.append(of_value({"b", "c", "a"}))
print(json.dumps(found))
"""


def test_another_process_finds_the_same(capsys):
    """Whatever the order of its sets, and whatever ran before."""
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    command = [sys.executable, "-c", SCRIPT, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkey_argv, sys.argv = sys.argv, ["", "0"]
    try:
        with torch.random.fork_rng():
            exec(SCRIPT, {})
    finally:
        sys.argv = monkey_argv
    here = json.loads(capsys.readouterr().out)
    assert json.loads(done.stdout) == here and None not in here


# fingerprints of data sets


def tensors(n=6):
    return TensorDataset(torch.arange(n * 4.0).reshape(n, 1, 2, 2), torch.arange(n))


def pack(transform=None):
    x = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    return ImagePack(x, np.array([0, 1]), transform)


class Scaled(Subset):
    def __init__(self, dataset, indices, scale):
        super().__init__(dataset, indices)
        self.scale = scale


class Noisy(TensorDataset):
    pass


def with_label(dataset, label):
    dataset.tensors[1][2] = label
    return dataset


def with_byte(dataset):
    dataset.x[1, 3, 3, 2] ^= 1
    return dataset


def with_pack_label(dataset):
    dataset.y[1] = 5
    return dataset


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (tensors(), with_label(tensors(), 7)),
        (tensors(), tensors(5)),
        (tensors(), TensorDataset(tensors().tensors[0].flatten(1), tensors().tensors[1])),
        (tensors(), TensorDataset(tensors().tensors[0].view(torch.int32), tensors().tensors[1])),
        (tensors(), Noisy(*tensors().tensors)),
        (Subset(tensors(), [0, 1]), Subset(tensors(), [0, 2])),
        (Subset(tensors(), [0, 1]), Subset(tensors(), [1, 0])),
        (Subset(tensors(), [1]), Subset(tensors(), torch.tensor([1, 0], dtype=torch.int32))),
        (Subset(tensors(), range(3)), Subset(tensors(), range(0, 3, 2))),
        (Subset(tensors(), [0, 1]), Subset(with_label(tensors(), 7), [0, 1])),
        (Subset(tensors(), [0, 1]), Scaled(tensors(), [0, 1], 1)),
        (Scaled(tensors(), [0, 1], 1), Scaled(tensors(), [0, 1], 2)),
        (ConcatDataset([tensors(), tensors(5)]), ConcatDataset([tensors(5), tensors()])),
        (ConcatDataset([tensors(), tensors(5)]), ConcatDataset([tensors()])),
        (pack(), with_byte(pack())),
        (pack(), with_pack_label(pack())),
        (pack(), pack().relabel(-1)),
        (pack(), pack().subset([1, 0])),
        (pack(), pack().resize(3)),
        (pack(), pack(transforms.Normalize(0.5, 1.0))),
        (pack(transforms.Normalize(0.5, 1.0)), pack(transforms.Normalize(0.5, 1.0000001))),
    ],
    ids="label length shape dtype class index order kind range below subclass attribute concat "
    "part byte pack-label relabel subset size transform parameter".split(),
)
def test_any_change_of_data_is_noticed(a, b):
    assert of_dataset(a) is not None and of_dataset(b) is not None
    assert of_dataset(a) != of_dataset(b)


def test_equal_data_are_the_same():
    assert of_dataset(tensors()) == of_dataset(tensors())
    assert of_dataset(pack()) == of_dataset(pack().subset([0, 1]))
    twice = [ConcatDataset([Subset(tensors(), [1, 2]), pack()]) for _ in range(2)]
    assert of_dataset(twice[0]) == of_dataset(twice[1]) is not None


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 10)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    (tmp_path / "list.txt").write_text("a 0\nb 1\nc 2\n")
    return tmp_path


def image_files(folder, names="abc", labels=(0, 1, 2), transform=None):
    return ImageFiles([folder / name for name in names], labels, transform)


def image_list(folder, **arguments):
    return ImageListDataset(str(folder), str(folder / "list.txt"), **arguments)


def double(label):
    return 2 * label


def open_grey(path):
    return Path(path).read_bytes()


@pytest.mark.parametrize("make", [image_files, image_list])
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "b").write_bytes(b"b" * 11),
        lambda folder: os.utime(folder / "b", ns=(10**18, 10**18 + 1)),
        lambda folder: (folder / "list.txt").write_text("a 0\nb 2\nc 2\n"),
        lambda folder: (folder / "list.txt").write_text("b 1\na 0\nc 2\n"),
        lambda folder: (folder / "list.txt").write_text("a 0\nb 1\n"),
    ],
    ids="size time label order length".split(),
)
def test_any_change_of_files_is_noticed(folder, make, change):
    if make is image_files:  # reads what the list says

        def make(folder):
            lines = [line.split() for line in (folder / "list.txt").read_text().splitlines()]
            names, labels = zip(*lines)
            return image_files(folder, names, [int(label) for label in labels])

    before = of_dataset(make(folder))
    assert before == of_dataset(make(folder)) is not None
    size = (folder / "b").stat().st_size
    change(folder)
    if (folder / "b").stat().st_size != size:  # the time alone would tell
        os.utime(folder / "b", ns=(10**18, 10**18))
    assert of_dataset(make(folder)) not in (before, None)


def test_how_files_are_read_is_noticed(folder):
    resize = [transforms.Resize(size) for size in (4, 5)]
    sets = [
        image_list(folder),
        image_list(folder, transform=resize[0]),
        image_list(folder, transform=resize[1]),
        image_list(folder, target_transform=double),
        image_list(folder, loader=open_grey),
        image_files(folder),
        image_files(folder, transform=resize[0]),
        image_files(folder, transform=resize[1]),
    ]
    found = [of_dataset(dataset) for dataset in sets]
    assert None not in found and len(set(found)) == len(sets)


def test_same_names_elsewhere_are_other_files(folder, monkeypatch):
    """Also if sizes and times are those of an archive, and so the same everywhere."""
    found = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        Path("a").write_bytes(name.encode())
        os.utime("a", ns=(10**18, 10**18))
        found.append(of_dataset(ImageFiles([Path("a")], [0])))
    assert None not in found and found[0] != found[1]


def test_a_missing_file_is_left_to_who_reads_it(folder):
    assert of_dataset(image_files(folder, "abd")) is None


class Homemade(Dataset):
    def __init__(self, files):
        self.files, self.labels, self.x, self.y = files, [0] * len(files), np.ones(1), np.ones(1)

    def __len__(self):
        return len(self.files)


def test_unknown_data_sets(folder):
    (folder / "images" / "class").mkdir(parents=True)
    (folder / "images" / "class" / "a.png").write_bytes(b"")
    unknown = [Homemade([folder / "a"]), ImageFolder(str(folder / "images")), [(1, 2)]]
    unknown.append(type("Local", (TensorDataset,), {})(torch.ones(2)))
    for dataset in unknown:
        assert of_dataset(dataset) is None
        assert of_dataset(ConcatDataset([tensors(), dataset])) is None
        assert of_dataset(Subset(dataset, [0])) is None


# fingerprints of transforms


class Opaque:
    """Says the same whatever it does."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, x):
        return x + self.shift

    def __repr__(self):
        return "Opaque()"


def weighted(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())


tiny = torch.tensor([0.5]), torch.tensor([0.50001])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Opaque(1), Opaque(2)),
        (transforms.Compose([Opaque(1)]), transforms.Compose([Opaque(2)])),
        (transforms.Lambda(torch.abs), transforms.Lambda(torch.neg)),
        (transforms.Normalize(tiny[0], 1.0), transforms.Normalize(tiny[1], 1.0)),
        (v2.Normalize(tiny[0], [1.0]), v2.Normalize(tiny[1], [1.0])),
        (v2.ToDtype(torch.float32), v2.ToDtype(torch.float64)),
        (weighted(0), weighted(1)),
    ],
    ids="own compose function digits v2 dtype weights".split(),
)
def test_transforms_that_look_the_same(a, b):
    assert repr(a) == repr(b)
    found = [of_dataset(pack(transform)) for transform in (a, b)]
    assert None in found or found[0] != found[1]


def shift(x, by=1):
    return x + by


@pytest.mark.parametrize(
    "transform",
    [
        shift,
        functools.partial(shift, by=2),
        Opaque(1),
        transforms.Compose([transforms.Resize(8), transforms.ToTensor(), Opaque(3)]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    ],
    ids="function partial class compose v2".split(),
)
def test_transforms_that_have_a_name(transform):
    assert of_dataset(pack(transform)) == of_dataset(pack(transform)) is not None


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x,
        local_function(2),
        functools.partial(local_function(2)),
        functools.partial(lambda x, by: x, by=1),
        transforms.Lambda(lambda x: x),
        transforms.Compose([transforms.Resize(8), lambda x: x]),
        local_class()(),
    ],
    ids="lambda local partial partial-lambda Lambda compose class".split(),
)
def test_transforms_that_nobody_can_recognise(folder, transform):
    assert of_dataset(pack(transform)) is None
    assert of_dataset(image_files(folder, transform=transform)) is None
    assert of_dataset(image_list(folder, transform=transform)) is None
    assert of_dataset(image_list(folder, target_transform=transform)) is None
    assert of_dataset(image_list(folder, loader=transform)) is None
