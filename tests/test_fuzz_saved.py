"""
Damaged and forged directories of saved detectors, see ``mutations.only_raises``. Damage must be
noticed. What was forged with the right checksums must be refused or loaded, and do nothing else.
"""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mutations import (
    REFUSED,
    TALLY,
    Folder,
    damaged,
    damaged_json,
    lying_safetensors,
    odd_values,
    only_raises,
    state_dict,
    torch_saved,
)
from safetensors.torch import load as safetensors_loaded
from safetensors.torch import save as safetensors_saved

from pood_plugins import persistence, registry, split_model
from pood_plugins.benchmark.digits import digits_classifier
from pood_plugins.cli import _describe
from pood_plugins.deployment import Deployed
from pood_plugins.model.preprocessing import Preprocessing
from pood_plugins.persistence import Saved, load, load_threshold, save
from pood_plugins.threshold import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

relaxed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

FILES = ("config.json", "state.safetensors", "model.safetensors")
OTHERS = [
    torch_saved(state_dict(), zipped=True),
    torch_saved(state_dict(), zipped=False),
    safetensors_saved(state_dict()),
    b"{}",
    b"text\n" * 9,
]


class Directory(Folder):
    """A saved detector with its classifier, of which one file at a time is another."""

    def __init__(self, path):
        super().__init__(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.split = split_model(digits_classifier(num_classes=3).eval())
        z, y = torch.rand(30, 32, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
        arguments = {"ood_prototype": torch.ones(32), "n_synthetic": 0.5, "k": 2}
        detector = registry.build("GROOD", self.split, **arguments).fit_features(z, y)
        self.z = z
        self.scores = detector.predict_features(z)
        self.place = path / "detector"
        save(
            detector,
            self.place,
            threshold=calibrate(self.scores, scores_ood=self.scores + 1),
            classifier={
                "arch": "digits",
                "classes": ["a", "b", "c"],
                "preprocessing": Preprocessing(8, (0.0,), (1.0,), channels=1).to_json(),
                "fit_on": ["a.png", "b.png"],
                "accuracy": 0.5,
            },
        )
        self.contents = {name: (self.place / name).read_bytes() for name in FILES}
        self.config = json.loads(self.contents["config.json"])

    def put(self, name, content, sealed=False):
        """The directory with another file, with its checksum or that of the old one."""
        for other, original in self.contents.items():
            if (self.place / other).is_dir():
                (self.place / other).rmdir()
            (self.place / other).write_bytes(original)
        (self.place / name).write_bytes(content)
        if sealed:
            config = copy.deepcopy(self.config)
            config["checksums"][name] = persistence._checksum_of_file(self.place / name)
            self.put_config(config)

    def put_config(self, config):
        """With the right checksum, if it can have one."""
        if isinstance(config, dict):
            seal = config.get("format")
            config = persistence._sealed(config)
            config["format"] = seal
        (self.place / "config.json").write_text(json.dumps(config))

    def read(self):
        """All that can be read of it."""
        saved = Saved(self.place)
        saved.check()
        with saved.reading():
            _describe(saved)
        model = digits_classifier(num_classes=3)
        saved.load_weights(model)
        return load(self.place, self.split), load_threshold(self.place), model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return Directory(tmp_path_factory.mktemp("saved"))


def read(directory, what, **options):
    return only_raises(what, directory.read, trap=directory.trap, path=directory.place, **options)


@relaxed
@given(data=st.data())
def test_damage_is_noticed(directory, data):
    name = data.draw(st.sampled_from(FILES))
    content = data.draw(damaged(directory.contents[name], OTHERS))
    directory.put(name, content)
    result = read(directory, "saved detector, damaged")
    if result is not REFUSED:
        # spaces between the values of config.json
        assert name == "config.json" or content == directory.contents[name]
        assert torch.equal(result[0].predict_features(directory.z), directory.scores)


@relaxed
@given(data=st.data())
def test_changed_config(directory, data):
    directory.put("config.json", data.draw(damaged_json(directory.config)))
    result = read(directory, "saved detector, changed config")
    assert result is REFUSED or Saved(directory.place).config == directory.config


@relaxed
@given(data=st.data())
def test_forged_config(directory, data):
    content = data.draw(damaged_json(directory.config))
    directory.put("config.json", content)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        config = None
    if isinstance(config, dict):
        directory.put_config(config)
    # of the version that it claims to be of
    read(directory, "saved detector, forged config", warns=(UserWarning,))


@relaxed
@given(data=st.data())
def test_forged_values(directory, data):
    """Attributes and arguments that nobody wrote, of the kinds that there are and of others."""
    directory.put("config.json", directory.contents["config.json"])
    config = copy.deepcopy(directory.config)
    part = config[data.draw(st.sampled_from(["attributes", "arguments"]))]
    names = st.sampled_from([*part, "encoder", "predict", "__class__", "build_record", "x\n"])
    kinds = ["tensor", "dict", "tuple", "range", "dtype", "dataclass", "detector", "neighbors"]
    kinds += ["float", "parameters", "pickle", "__reduce__"]
    value = st.recursive(
        odd_values,
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from([*kinds, "shape", "order", "fields"]), inner),
            st.lists(inner, max_size=3),
        ),
        max_leaves=6,
    )
    part[data.draw(names)] = data.draw(value)
    try:
        directory.put_config(config)
    except (ValueError, UnicodeEncodeError):  # no JSON can have it
        return
    read(directory, "saved detector, forged values", warns=(UserWarning,))


@relaxed
@given(data=st.data())
def test_forged_tensors(directory, data):
    name = data.draw(st.sampled_from(FILES[1:]))
    content = directory.contents[name]
    ways = [
        damaged(content, OTHERS),
        lying_safetensors(content),
        st.just(pickle.dumps(directory.trap)),
        st.just(torch_saved({"bank_": directory.trap}, zipped=True)),
    ]
    directory.put(name, data.draw(st.one_of(ways)), sealed=True)
    read(directory, "saved detector, forged tensors")


@relaxed
@given(data=st.data())
def test_forged_classifier(directory, data):
    """What pood score would load, and must not run."""
    directory.put("config.json", directory.contents["config.json"])
    config = copy.deepcopy(directory.config)
    if data.draw(st.booleans()):
        try:
            config["classifier"] = json.loads(data.draw(damaged_json(config["classifier"])))
        except (ValueError, RecursionError):
            return
    else:
        names = ["os:system", "pood_plugins.cli:main", "resnet20", "timm:resnet10t", "x/y", ""]
        names += ["hf-hub:x/y", "timm:hf-hub:x/y", "torchvision:alexnet", "WideResNet", ":"]
        config["classifier"]["arch"] = data.draw(st.sampled_from(names))
    size = config["classifier"]
    for name in ("preprocessing", "size"):
        size = size.get(name) if isinstance(size, dict) else None
    assume(not isinstance(size, (int, float)) or size < 64)  # larger ones are slow, and no harm
    directory.put_config(config)
    only_raises(
        "saved detector, forged classifier",
        lambda: Deployed.load(directory.place),
        trap=directory.trap,
        allowed=(ValueError, OSError, LookupError, ImportError),
        warns=(UserWarning,),
        remedy=False,
    )


@relaxed
@given(data=st.data())
def test_missing_files(directory, data):
    states = data.draw(st.tuples(*3 * [st.sampled_from(["there", "gone", "a folder"])]))
    directory.put("config.json", directory.contents["config.json"])
    for name, state in zip(FILES, states):
        if state != "there":
            (directory.place / name).unlink()
        if state == "a folder":
            (directory.place / name).mkdir()
    result = read(directory, "saved detector, files missing")
    assert (result is REFUSED) == (set(states) != {"there"})


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(codec="utf-8")),
        st.builds(range, st.integers(), st.integers(), st.integers(1, 9)),
        st.sampled_from([torch.float16, torch.bfloat16]),
        st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
        st.integers(-128, 127).map(lambda number: torch.tensor(number, dtype=torch.int8)),
        st.integers(0, 3).map(lambda n: torch.arange(12).reshape(3, 4).T[n:]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text("ab\n\u00e9"), st.integers(), st.none()), inner),
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and (
            persistence._bytes(a) == persistence._bytes(b)
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, float):
        return type(b) is float and (a.hex() == b.hex() or a != a and b != b)
    return type(a) is type(b) and a == b


@relaxed
@given(value=plain)
@example(value={"x": [torch.ones(2)], "y": (torch.zeros(2), {1: torch.ones(1)})})
def test_plain_values_come_back(directory, value):
    def there_and_back():
        tensors = {}
        text = json.dumps(persistence._encode(value, "x", tensors), allow_nan=False)
        content = safetensors_saved(persistence._separate(tensors))
        return persistence._decode(json.loads(text), safetensors_loaded(content))

    trap = directory.trap
    result = only_raises("saved detector, any values", there_and_back, trap=trap, allowed=())
    assert same(value, result)


def test_the_tests_notice(directory):
    """What they rely on: that a pickle would leave a trace, and that the original is read."""
    for name in FILES:
        directory.put(name, directory.contents[name])
    assert torch.equal(directory.read()[0].predict_features(directory.z), directory.scores)
    assert Deployed.load(directory.place).classes == ["a", "b", "c"]
    pickle.loads(pickle.dumps(directory.trap))
    with pytest.raises(AssertionError, match="was run"):
        read(directory, "test of the tests")
    del TALLY["test of the tests"]
