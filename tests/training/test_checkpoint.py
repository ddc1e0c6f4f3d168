import io
import json
import math
import os
import pickle
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pood_plugins.training.checkpoint import (
    load_checkpoint,
    replacing,
    save_checkpoint,
    unpack_state,
)

numbers = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans())
plain = st.one_of(numbers, st.text(), st.none())
states = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3),
    ),
)


@given(state=states)
def test_state_comes_back(state, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "state"
    save_checkpoint(path, state)
    assert repr(load_checkpoint(path)) == repr(state)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
    + [torch.bool, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (0, 4), (2, 1, 3)])
def test_tensors_come_back_bit_by_bit(dtype, shape, tmp_path):
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    save_checkpoint(tmp_path / "c", {"a": [tensor, tensor.clone()], 3: tensor})
    loaded = load_checkpoint(tmp_path / "c")
    for copy in loaded["a"]:
        assert copy.dtype == dtype and torch.equal(copy, tensor)
    loaded["a"][0].zero_()  # it is a tensor of its own, and may be written to
    assert torch.equal(loaded["a"][1], tensor)


def test_special_values_and_parts_of_tensors(tmp_path):
    values = torch.tensor([[math.nan, math.inf], [-math.inf, -0.0]])
    parts = [values.T, values[:, 1], values[1:], torch.nn.Parameter(values)]
    save_checkpoint(tmp_path / "c", [parts, math.inf, OrderedDict(b=1, a=2), Counter({3: 1})])
    loaded, infinity, ordered, counter = load_checkpoint(tmp_path / "c")
    for part, copy in zip(parts, loaded):
        assert torch.equal(part.view(torch.int32), copy.view(torch.int32))
    assert infinity == math.inf and list(ordered) == ["b", "a"] and counter == {3: 1}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.nn.ReLU(), print])
def test_anything_else_is_refused_and_leaves_the_file_alone(value, tmp_path):
    save_checkpoint(tmp_path / "c", 1)
    with pytest.raises(ValueError, match=f"tensors, numbers and text.*{type(value).__name__}"):
        save_checkpoint(tmp_path / "c", {"a": [value]})
    assert load_checkpoint(tmp_path / "c") == 1


def test_there_is_no_pickle_in_it(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": torch.arange(4), "b": ["text", 1.5]})
    with zipfile.ZipFile(tmp_path / "c") as archive:
        for name in archive.namelist():
            with pytest.raises(Exception):
                pickle.loads(archive.read(name))
        assert archive.read("tensor0") == torch.arange(4).numpy().tobytes()


STATE = {"weights": torch.arange(12.0), "text": ["epoch", 3]}


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    n_noticed = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "damaged" in str(error)
            n_noticed += 1
        else:  # in the archive's dates and the like
            assert torch.equal(loaded["weights"], STATE["weights"])
            assert loaded["text"] == STATE["text"]
    assert n_noticed > len(content) / 2


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_cut_off_file(share, tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def zip_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        pickle.dumps({"a": 1}),
        zip_of(),
        zip_of(state_json="{}"),
        zip_of(state_json="[1]"),
        zip_of(state_json='{"format": "another", "state": 1}'),
        zip_of(
            state_json='{"format": "pood-plugins checkpoint 1", '
            '"state": {"tensor": 0, "dtype": "load", "shape": [1]}}',
            tensor0=b"1234",
        ),
    ],
    ids=["empty", "text", "pickle", "zip", "no format", "list", "other", "dtype"],
)
def test_files_of_other_kinds(content, tmp_path):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_file_of_torch_save(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "c")


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file"
    with replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


# what a file or a state may hold

DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
QUANTIZED = {dtype for dtype in DTYPES if str(dtype).startswith("torch.q")}


@pytest.mark.parametrize("dtype", sorted(DTYPES - QUANTIZED, key=str), ids=str)
def test_every_type_comes_back(dtype, tmp_path):
    content = torch.arange(32, dtype=torch.uint8) % 2
    save_checkpoint(tmp_path / "c", content.view(dtype))
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.dtype == dtype and torch.equal(loaded.view(torch.uint8), content)


@pytest.mark.parametrize("dtype", sorted(QUANTIZED, key=str), ids=str)
def test_no_file_makes_a_quantized_tensor(dtype, tmp_path):
    value = {"tensor": 0, "dtype": str(dtype)[6:], "shape": [4]}
    state = json.dumps({"format": "pood-plugins checkpoint 1", "state": value})
    (tmp_path / "c").write_bytes(zip_of(state_json=state, tensor0=bytes(4)))
    with pytest.raises(ValueError, match="of no type that a checkpoint holds"):
        load_checkpoint(tmp_path / "c")


def test_conjugated_tensor(tmp_path):
    tensor = torch.tensor([1 + 2j, 3 - 1j])
    save_checkpoint(tmp_path / "c", [tensor.conj(), tensor.conj().imag])
    conjugated, negated = load_checkpoint(tmp_path / "c")
    assert conjugated.tolist() == [1 - 2j, 3 + 1j] and negated.tolist() == [-2, 1]


@pytest.mark.parametrize(
    "make", [lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, device="meta")]
)
def test_tensors_without_plain_bytes_are_refused(make, tmp_path):
    save_checkpoint(tmp_path / "c", 1)
    with pytest.raises(ValueError, match="holds plain tensors, .* make it dense"):
        save_checkpoint(tmp_path / "c", {"a": make()})
    assert load_checkpoint(tmp_path / "c") == 1


def test_state_that_is_nested_too_deeply(tmp_path):
    state = []
    for _ in range(5000):
        state = [state]
    with pytest.raises(ValueError, match="nested too deeply: make it flat"):
        save_checkpoint(tmp_path / "c", state)
    assert not (tmp_path / "c").exists()


def test_small_files_take_little_memory(tmp_path):
    save_checkpoint(tmp_path / "c", torch.zeros(9))
    with zipfile.ZipFile(tmp_path / "c") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "c", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="it is compressed"):
        load_checkpoint(tmp_path / "c")

    described = json.loads(members["state.json"])
    described["state"] = [described["state"]] * 2
    members = {"state_json": json.dumps(described), "tensor0": members["tensor0"]}
    (tmp_path / "c").write_bytes(zip_of(**members))
    with pytest.raises(ValueError, match="tensor0 is there twice"):
        load_checkpoint(tmp_path / "c")


def test_text_of_a_file_is_cut_and_cleaned(tmp_path):
    state = json.dumps({"format": "\x1b[31m\n" + "x" * 9999, "state": 1})
    (tmp_path / "c").write_bytes(zip_of(state_json=state))
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path / "c")
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    assert "its format is" in str(caught.value) and "start again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", zip_of(), zip_of(state_json="[1]")])
def test_damaged_messages(content):
    with pytest.raises(ValueError, match="what another process sent is damaged"):
        unpack_state(content)
