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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
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


def save_checkpoint(path: str | os.PathLike, state: Any) -> None:
    """
    Writes a state, at once.

    :param path: file to write; its folder is created if need be
    :param state: tensors, numbers, text, and dictionaries, lists and tuples of these
    :raises ValueError: if the state holds anything else
    """
    text, tensors = _take_apart(state)
    with replacing(path) as file:
        _write(file, text, tensors)


def load_checkpoint(path: str | os.PathLike) -> Any:
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
                f"{path} is damaged or no checkpoint of a training run ({error}): remove it and "
                "start again, or name another file"
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
    """
    return _read(io.BytesIO(content))


def _take_apart(state: Any) -> tuple[str, list[Tensor]]:
    tensors: list[Tensor] = []
    return json.dumps({"format": _FORMAT, "state": _encode(state, tensors)}), tensors


def _write(file: BinaryIO, text: str, tensors: list[Tensor]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("state.json", text)
        for i, tensor in enumerate(tensors):
            archive.writestr(f"tensor{i}", _to_bytes(tensor))


def _read(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        content = json.loads(archive.read("state.json"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        return _decode(content["state"], archive)


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    """
    :param value: a state
    :param tensors: takes up the tensors in it
    :return: the state in JSON, where an object is what JSON itself does not have
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        dtype = str(value.dtype).removeprefix("torch.")
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


def _decode(value: Any, archive: zipfile.ZipFile) -> Any:
    if isinstance(value, list):
        return [_decode(item, archive) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        data = bytearray(archive.read(f"tensor{value['tensor']}"))
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    if "tuple" in value:
        return tuple(_decode(value["tuple"], archive))
    return {_decode(k, archive): _decode(v, archive) for k, v in value["dict"]}


def _to_bytes(tensor: Tensor) -> bytes:
    # not every dtype of torch is one of numpy
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
