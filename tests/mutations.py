"""
Files that are damaged or made up, for tests of whatever reads files, and the rule that all of them
are held to: a valid result or one of the documented exceptions, whose text names the file and says
what to do; no warning, nothing run, no more memory and time than the file deserves.

A test of another loader takes a few lines, see ``test_checkpoint_of_damaged_bytes``:

    @given(data=st.data())
    def test_x(data, folder):
        path = folder.write("x.zip", data.draw(damaged(CONTENT, OTHERS)))
        result = only_raises("x", lambda: read_x(path), path=path)
"""

from __future__ import annotations

import atexit
import copy
import io
import json
import math
import os
import re
import resource
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

#: how often each loader ended in which way: "read", "read, with a warning", or the exception
TALLY: defaultdict[str, Counter] = defaultdict(Counter)

#: what :func:`only_raises` gives where a file was refused
REFUSED = object()

#: megabytes by which the memory of the process may rise for one file of a few kilobytes, and
#: seconds of computing that it may take
MOST_MEGABYTES, MOST_SECONDS = 1000, 20

if "POOD_FUZZ_TALLY" in os.environ:  # of benchmarks/reliability.py

    @atexit.register
    def _write_tally() -> None:
        Path(os.environ["POOD_FUZZ_TALLY"]).write_text(json.dumps(TALLY))


REMEDY = re.compile(
    r"\b(add|choose|copy|correct|download|give|install|leave|make|name|remove|rename|replace|save|use)\b",
    re.IGNORECASE,
)


class Trap:
    """An object whose pickle leaves a trace if it is run: a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


class Folder:
    """Where the files of a test are written, and what nothing that reads them may create."""

    def __init__(self, path: Path):
        self.path = path
        self.trap = Trap(path / "trace")

    def write(self, name: str, content: bytes) -> Path:
        (self.path / name).write_bytes(content)
        return self.path / name


def only_raises(
    loader: str,
    read: Callable[[], Any],
    *,
    trap: Trap,
    path: Path | None = None,
    allowed: tuple[type[Exception], ...] = (ValueError, OSError),
    warns: tuple[type[Warning], ...] = (),
    remedy: bool = True,
) -> Any:
    """
    Reads, and counts how it ended.

    :param loader: name to count under
    :param read: what is tried
    :param trap: what must not be run
    :param path: file that the text of an exception must name
    :param allowed: exceptions that are documented
    :param warns: warnings that are, too
    :param remedy: whether the text of an exception must say what to do
    :return: what was read, or :data:`REFUSED`
    """
    outcome, result, error = "unhandled", REFUSED, None
    memory, start = _peak(), time.process_time()
    try:
        # as warnings are for users: as errors, they would be caught like those of a damaged file
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = read()
                outcome = "read, with a warning" if caught else "read"
            except allowed as problem:
                error = problem
        seconds, rise = time.process_time() - start, _peak() - memory
        was_run = trap.trace.exists()
        if was_run:  # the next file is judged for itself
            trap.trace.rmdir()
        assert not was_run, "what is in the file was run"
        assert seconds < MOST_SECONDS, f"it took {seconds:.0f} s"
        # what other tests in the process took is not seen below their peak
        assert rise < MOST_MEGABYTES, f"memory rose by {rise:.0f} MB"
        unexpected = [f"{w.category.__name__}: {w.message}" for w in caught]
        assert not [w for w in caught if not issubclass(w.category, warns)], unexpected
        if error is not None:
            outcome = "unhandled"
            _check_text(str(error), path, remedy)
            outcome = next(kind.__name__ for kind in allowed if isinstance(error, kind))
    except BaseException:
        outcome = "unhandled"
        raise
    finally:
        TALLY[loader][outcome] += 1
    return result


def _check_text(text: str, path: Path | None, remedy: bool) -> None:
    assert text.strip() and len(text) <= 1000 and text.count("\n") <= 2, text[:3000]
    assert path is None or str(path) in text, f"the file is not named: {text}"
    assert not remedy or REMEDY.search(text), f"it does not say what to do: {text}"
    # of what is in a file: whoever gives an odd name as an argument may see it again
    assert path is None or all(c.isprintable() or c in "\n\t" for c in text), repr(text)


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# bytes


def _place(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    """Begin and end of a run of bytes, mostly a short one."""
    begin = draw(st.integers(0, len(content)))
    longest = len(content) - begin
    length = draw(st.one_of(st.integers(0, min(8, longest)), st.integers(0, longest)))
    return begin, begin + length


@st.composite
def damaged(draw: st.DrawFn, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """
    :param content: of a valid file
    :param others: contents of files of other kinds
    :return: content with one to three damages, which may cancel out
    """
    for _ in range(draw(st.integers(1, 3))):
        begin, end = _place(draw, content)
        run = content[begin:end]
        kind = draw(st.sampled_from(_DAMAGES))
        if kind == "cut off":
            content = content[:begin]
        elif kind == "cut off in front":
            content = content[begin:]
        elif kind == "flipped":
            mask = draw(st.integers(1, 255))
            content = content[:begin] + bytes(b ^ mask for b in run) + content[end:]
        elif kind == "overwritten":
            new = draw(st.binary(min_size=len(run[:16]), max_size=len(run[:16])))
            content = content[:begin] + new + content[begin + len(new) :]
        elif kind == "inserted":
            content = content[:begin] + draw(st.binary(max_size=16)) + content[begin:]
        elif kind == "deleted":
            content = content[:begin] + content[end:]
        elif kind == "repeated":
            content = content[:end] + run * draw(st.integers(1, 3)) + content[end:]
        elif kind == "zeroed":
            content = content[:begin] + bytes(len(run)) + content[end:]
        elif kind == "number":
            # lengths and counts are mostly little-endian, and the largest are the worst
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
            size = 1 if number < 256 and draw(st.booleans()) else 4 if number < 2**32 else 8
            order = draw(st.sampled_from(["little", "big"]))
            content = (
                content[:begin] + number.to_bytes(size, order) + content[begin + size :]  # type: ignore[arg-type]
            )
        elif kind == "swapped":
            content = content[end:] + run + content[:begin]
        elif kind == "spliced" and others:
            other = draw(st.sampled_from(others))
            content = content[:begin] + other[draw(st.integers(0, len(other))) :]
        elif kind == "other":
            content = draw(st.sampled_from([b"", *others]))
        elif kind == "random":
            content = draw(st.binary(max_size=64))
    return content


_DAMAGES = ["cut off", "cut off in front", "flipped", "overwritten", "inserted", "deleted"]
_DAMAGES += ["repeated", "zeroed", "number", "swapped", "spliced", "other", "random"]


# JSON

_DEEP = 3000  # deeper than Python's stack

#: values that a program may trip over
odd_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", "x" * 5000, "\n\x1b[31m\x00\ud800", {}, [], [[]]]),
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308]),
    st.sampled_from([math.nan, math.inf, -math.inf, {"": None}, ["a", 1], {"tensor": 0}]),
    st.sampled_from(["float32", "quint8", "bits8", "_dynamo", "load", "Tensor", "dtype", "F4"]),
    st.integers(),
    st.text(max_size=5),
)


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """
    :param value: of a valid file
    :return: JSON in which one to three values are others, gone, doubled or renamed
    """
    value = json.loads(json.dumps(value))
    text = None
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return json.dumps(draw(odd_values)).encode()
        inside, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["changed"] * 4 + ["removed", "renamed", "doubled", "deep"]))
        if kind == "removed":
            del inside[key]
        elif kind == "renamed" and isinstance(inside, dict):
            inside[draw(st.sampled_from(["", "tensor", "x\n" * 900, "../x"]))] = inside.pop(key)
        elif kind == "doubled" and isinstance(inside, list):
            inside.insert(key, inside[key])
        elif kind == "deep":
            inside[key], text = "DEEP", "[" * _DEEP + "]" * _DEEP
        else:
            # a copy, as the next damage may be in it
            inside[key] = copy.deepcopy(draw(st.one_of(odd_values, st.just(10**4000))))
    result = json.dumps(value)
    return (result if text is None else result.replace('"DEEP"', text)).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found


# zip archives


def zipped(members: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """
    :return: archive whose checksums are right
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with the same name
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def unzipped(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


_NAMES = ["", "x", "state.json", "tensor0", "meta.npz", "x.npy", "../x", "/x", "C:\\x", "a/" * 999]
_NAMES += ["data.pkl", "x.webp", "\n\x1b", "ä", "x\x00y"]


@st.composite
def damaged_zip(
    draw: st.DrawFn, content: bytes, trap: Trap, others: Sequence[bytes] = ()
) -> bytes:
    """
    :param content: of a valid archive
    :return: archive in which one to three members are gone, renamed, doubled or changed, with
        the right checksums; it may be compressed, and its sizes may be lies
    """
    try:
        members = unzipped(content)
    except Exception:  # an earlier damage is in it
        return content
    for _ in range(draw(st.integers(1, 3))):
        if not members:
            break
        i = draw(st.integers(0, len(members) - 1))
        name, inside = members[i]
        kind = draw(st.sampled_from(["changed"] * 4 + ["removed", "renamed", "doubled"]))
        if kind == "removed":
            del members[i]
        elif kind == "renamed":
            usual = [other for other, _ in members]
            members[i] = draw(st.sampled_from(usual + _NAMES)), inside
        elif kind == "doubled":
            members.append((name, draw(damaged(inside, others))))
        else:
            members[i] = name, draw(damaged_member(name, inside, trap, others))
    compression = draw(
        st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    )
    whole = zipped(members, compression)
    return draw(lying_zip(whole)) if draw(st.integers(0, 5)) == 0 else whole


def damaged_member(
    name: str, content: bytes, trap: Trap, others: Sequence[bytes]
) -> st.SearchStrategy[bytes]:
    """Damage that fits what a member is."""
    import pickle

    ways = [damaged(content, others), st.just(pickle.dumps(trap)), st.sampled_from([b"", *others])]
    if name.endswith(".json") and _is_json(content):
        ways += 3 * [damaged_json(json.loads(content))]
    if name.endswith(".npy"):
        ways += 3 * [arrays(trap).map(npy), lying_npy()]
    if name.endswith(".npz") and zipfile.is_zipfile(io.BytesIO(content)):
        ways += 3 * [damaged_zip(content, trap, others)]
    return st.one_of(ways)


def _is_json(content: bytes) -> bool:
    try:  # an earlier damage may be in it
        return isinstance(json.loads(content), (dict, list))
    except (ValueError, RecursionError):
        return False


@st.composite
def lying_zip(draw: st.DrawFn, content: bytes) -> bytes:
    """An archive one of whose directory entries has a wrong size, offset, method or flag."""
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    if not entries:
        return content
    begin = draw(st.sampled_from(entries))
    place, size = draw(st.sampled_from([(8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (42, 4)]))
    most = 256**size - 1
    number = draw(st.sampled_from([0, 1, 8, 12, 14, 99, most // 2, most - 1, most]))
    number = number.to_bytes(size, "little")
    return content[: begin + place] + number + content[begin + place + size :]


def bomb(name: str, megabytes: int, begin: bytes = b"") -> bytes:
    """An archive that is a thousandth of its content: one member, mostly zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = compressor.compress(begin) + compressor.flush(zlib.Z_FULL_FLUSH)
    zeros = bytes(10**6)
    block = compressor.compress(zeros) + compressor.flush(zlib.Z_FULL_FLUSH)
    data = head + block * megabytes + b"\x03\x00"
    checksum = zlib.crc32(begin)
    for _ in range(megabytes):
        checksum = zlib.crc32(zeros, checksum)
    sizes = checksum, len(data), len(begin) + megabytes * 10**6, len(name), 0
    local = b"PK\x03\x04" + struct.pack("<5H3I2H", 20, 0, 8, 0, 33, *sizes) + name.encode() + data
    entry = struct.pack("<6H3I5H2I", 20, 20, 0, 8, 0, 33, *sizes, 0, 0, 0, 0, 0)
    entry = b"PK\x01\x02" + entry + name.encode()
    end = struct.pack("<4H2IH", 0, 0, 1, 1, len(entry), len(local), 0)
    return local + entry + b"PK\x05\x06" + end


# arrays


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


_DTYPES = ["u1", "i1", "u2", "i4", "i8", "u8", ">i4", "f2", "f4", "f8", "c8", "?", "S3", "U2"]
_DTYPES += ["V4", "M8[s]", "m8[D]", "i4,f4", "S0"]


@st.composite
def arrays(draw: st.DrawFn, trap: Trap) -> np.ndarray:
    """Small arrays of any type and shape, some of them with a trap in it."""
    if draw(st.integers(0, 5)) == 0:
        array = np.empty(draw(st.integers(1, 4)), dtype=object)
        array[:] = trap
        return array
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    dtype = np.dtype(draw(st.sampled_from(_DTYPES)))
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=min(size, 8), max_size=8)) * (size // 8 + 1)
    if size == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(content[:size], dtype=dtype).reshape(shape)


_TYPES = ["|u1", "<i8", "|O", "|V0", "<U999999999", "i4, O", "'", [("a", "O")], [], None, 5, "@x"]


@st.composite
def lying_npy(draw: st.DrawFn) -> bytes:
    """An array whose header does not belong to its content."""
    numbers = st.sampled_from([0, 1, 3, 8, -1, 2**31, 2**40, 2**63, 10**30, None, 0.5, "x"])
    header = {
        "descr": draw(st.sampled_from(_TYPES)),
        "fortran_order": draw(st.sampled_from([False, True, None, 2])),
        "shape": draw(st.lists(numbers, max_size=4).map(tuple)),
    }
    text = repr(header)
    if draw(st.integers(0, 7)) == 0:
        text = draw(
            st.sampled_from(
                ["(" * 5000, "{" * 90, "{'descr': " + "9" * 9000 + "}", "2L", "[].x()", "{1: 1/0}"]
            )
        )
    encoded = text.encode() + b"\n"
    version = draw(st.sampled_from([1, 1, 2, 3, 9]))
    length = len(encoded) if draw(st.integers(0, 5)) else draw(st.sampled_from([0, 9, 2**16 - 1]))
    packed = struct.pack("<H" if version == 1 else "<I", length)
    return b"\x93NUMPY" + bytes([version, 0]) + packed + encoded + draw(st.binary(max_size=64))


# images


@st.composite
def damaged_png(draw: st.DrawFn, content: bytes) -> bytes:
    """A PNG in which a chunk is gone, doubled or changed, with the right checksum."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        chunks.append((kind, data))
        place += 12 + length
    i = draw(st.integers(0, len(chunks) - 1))
    what = draw(st.sampled_from(["changed"] * 4 + ["removed", "doubled", "text bomb"]))
    if what == "removed":
        del chunks[i]
    elif what == "doubled":
        chunks.insert(i, chunks[i])
    elif what == "text bomb":
        kind = draw(st.sampled_from([b"zTXt", b"iCCP", b"iTXt"]))
        between = b"\x00\x01\x00\x00\x00" if kind == b"iTXt" else b"\x00\x00"
        chunks.insert(1, (kind, b"x" + between + zlib.compress(bytes(10**7))))
    else:
        chunks[i] = chunks[i][0], draw(damaged(chunks[i][1]))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# weights


def network() -> nn.Module:
    """The network that the weights are of, by its name ``mutations:network``."""
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = network().state_dict()
    return {
        name: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for name, v in state.items()
    }


def torch_saved(value: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _odd_tensors() -> dict[str, Callable[[torch.Tensor], Any]]:
    return {
        "complex": lambda t: t.to(torch.complex64),
        "integers": lambda t: t.to(torch.int64),
        "boolean": lambda t: t > 0,
        "half": lambda t: t.half(),
        "double": lambda t: t.double(),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        # torch 2.8 and later
        "float4": lambda t: t.to(torch.uint8).view(getattr(torch, "float4_e2m1fn_x2", torch.int8)),
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "one for all": lambda t: torch.zeros(()).expand(t.shape),
        "huge": lambda t: torch.zeros(()).expand(2**40),
        "empty": lambda t: t[:0],
        "parameter": lambda t: nn.Parameter(t, t.is_floating_point()),
        "transposed": lambda t: t.T if t.ndim == 2 else t,
        "not finite": lambda t: t * math.nan,
    }


@st.composite
def odd_states(draw: st.DrawFn, trap: Trap) -> Any:
    """A state dict, or nearly one."""
    state: dict[Any, Any] = state_dict()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(state)))
        kind = draw(st.sampled_from(["tensor"] * 3 + ["removed", "renamed", "added", "value"]))
        if kind == "tensor" and isinstance(state[name], torch.Tensor):
            change = draw(st.sampled_from(list(_odd_tensors().values())))
            value = state[name].detach()
            whole = value.layout == torch.strided and not value.is_meta
            if value.dtype == torch.float32 and whole and len(value) < 9:
                state[name] = change(value.clone())
        elif kind == "removed" and len(state) > 1:
            del state[name]
        elif kind == "renamed":
            names = ["", "x\n\x1b[2J" * 900, 5, None, (1, 2), f"module.{name}", "fc.x"]
            state[draw(st.sampled_from(names))] = state.pop(name)
        elif kind == "added":
            state["x" * draw(st.sampled_from([1, 9000]))] = torch.zeros(1)
        elif kind == "value":
            state[name] = draw(st.one_of(odd_values, st.just(trap), st.just({"x": trap})))
    wrapped: list[Any] = [state, state, {"state_dict": state}, {"state_dict": trap}]
    wrapped += [list(state.values()), {"state_dict": {"state_dict": state}}, {}, network()]
    return draw(st.sampled_from(wrapped))


@st.composite
def lying_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header is changed, or has another length than it says."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = draw(damaged_json(header)) if draw(st.booleans()) else content[8 : 8 + length]
    lengths = [len(text)] * 6 + [0, 1, len(text) + 1, 10**8, 2**32, 2**63, 2**64 - 1]
    return struct.pack("<Q", draw(st.sampled_from(lengths))) + text + data
