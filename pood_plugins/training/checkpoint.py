"""
The state of a training run in one file, without pickle: a zip archive of ``state.json`` and the
bytes of each tensor. Nothing in it can run code, and damage shows in its checksums.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_FORMAT = "pood-plugins checkpoint 1"

# not the quantized ones: without scales, which no bytes hold, such a tensor ends the process
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
}


def short(text: object, most: int = 200) -> str:
    """
    :param text: from a file that may hold anything
    :param most: number of characters
    :return: as much of it as fits into a line of an error, without control characters
    """
    line = "".join(c if c.isprintable() else " " for c in str(text)[: most + 1]).strip()
    return line if len(line) <= most else f"{line[:most]} ..."


def reason(error: Exception) -> str:
    """
    :return: what went wrong, as part of a line
    """
    return short(str(error).strip() or repr(error))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """
    Writes a file at once: whatever happens, its content is the old one or the whole new one.

    :param path: file to write; its folder is created if need be
    :return: context with an empty file, which takes the place of ``path`` when the context ends
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the name may be all there is
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | os.PathLike[str], state: Any) -> None:
    """
    Writes a state, at once.

    :param path: file to write; its folder is created if need be
    :param state: tensors, numbers, text, and dictionaries, lists and tuples of these
    :raises ValueError: if the state holds anything else, such as sparse or quantized tensors
    """
    text, tensors = _take_apart(state)
    with replacing(path) as file:
        _write(file, text, tensors)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """
    :param path: file that :func:`save_checkpoint` wrote
    :return: the state, with tensors on CPU
    :raises ValueError: if the file is damaged or of another kind
    :raises OSError: if it cannot be opened
    """
    with open(path, "rb") as file:
        try:
            return _read(file)
        except Exception as error:  # what a damaged archive raises depends on where the damage is
            raise ValueError(
                f"{path} is damaged or no checkpoint of a training run ({reason(error)}): remove "
                "it and start again, or name another file"
            ) from error


def pack_state(state: Any) -> bytes:
    """
    :param state: see :func:`save_checkpoint`
    :return: content of the file that it would write
    :raises ValueError: likewise
    """
    file = io.BytesIO()
    _write(file, *_take_apart(state))
    return file.getvalue()


def unpack_state(content: bytes) -> Any:
    """
    :param content: what :func:`pack_state` made
    :return: the state, with tensors on CPU
    :raises ValueError: if it is damaged
    """
    try:
        return _read(io.BytesIO(content))
    except Exception as error:
        raise ValueError(
            f"what another process sent is damaged ({reason(error)}): give all processes the same "
            "version of this package"
        ) from error


def _take_apart(state: Any) -> tuple[str, list[Tensor]]:
    tensors: list[Tensor] = []
    try:
        return json.dumps({"format": _FORMAT, "state": _encode(state, tensors)}), tensors
    except RecursionError as error:
        raise ValueError("the state is nested too deeply: make it flat") from error


def _write(file: BinaryIO, text: str, tensors: list[Tensor]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("state.json", text)
        for i, tensor in enumerate(tensors):
            archive.writestr(f"tensor{i}", _to_bytes(tensor))


def _read(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        # nothing is compressed, so that a small file never takes much memory
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed")
        content = json.loads(archive.read("state.json"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        return _decode(content["state"], archive, set())


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    """
    :param value: a state
    :param tensors: takes up the tensors in it
    :return: the state in JSON, where an object is what JSON itself does not have
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"a checkpoint holds plain tensors, but part of the state is one of {dtype}, "
                f"{value.layout}, on {value.device}: make it dense"
            )
        tensors.append(value)
        return {"tensor": len(tensors) - 1, "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"a checkpoint holds tensors, numbers and text, but part of the state is a "
        f"{type(value).__name__}: {value!r}"
    )


def _decode(value: Any, archive: zipfile.ZipFile, read: set[str]) -> Any:
    """
    :param value: what :func:`_encode` made
    :param archive: where the tensors are
    :param read: names of those that were read: each is there once
    :return: the state
    """
    if isinstance(value, list):
        return [_decode(item, archive, read) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        name = f"tensor{value['tensor']}"
        if name in read or value["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is there twice or of no type that a checkpoint holds")
        read.add(name)
        data, dtype = bytearray(archive.read(name)), _DTYPES[value["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    if "tuple" in value:
        return tuple(_decode(value["tuple"], archive, read))
    return {_decode(k, archive, read): _decode(v, archive, read) for k, v in value["dict"]}


def _to_bytes(tensor: Tensor) -> bytes:
    # not every dtype of torch is one of numpy
    tensor = (
        tensor.detach().cpu().resolve_conj()
    )  # bytes don't tell that they are to be conjugated
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
