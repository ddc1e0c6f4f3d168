"""
Keeps on disk what takes long to compute, so that a second run over other detectors takes seconds,
and an interrupted one goes on where it was: the features of each data set, and the scores of
detectors that need images.

An entry is found again only if everything that it depends on is the same: weights, settings and
code of the network and of the detector, the images (the list of the files, with their labels,
sizes and times of change, or the bytes in memory), how they are transformed, and the packages. If
any of these changes, what is in the cache is not used, but computed anew. Entries are written at
once, without pickle, and their checksums are read back: one that is damaged is rebuilt.

Code is that of the files that classes and functions are defined in, not of what these files
import. What no place in a file tells can't be recognised, and is computed every time: lambdas,
local classes, local functions that refer to local variables, and whatever is defined in a
notebook. So are data sets other than image files, image lists, image packs and tensors (and
subsets and concatenations of these). A network that keeps something of its inputs in an attribute
is another one afterwards.

..  autoclass:: pood_plugins.evaluation.cache.Cache
    :members:

..  autofunction:: pood_plugins.evaluation.cache.of_value

..  autofunction:: pood_plugins.evaluation.cache.of_module

..  autofunction:: pood_plugins.evaluation.cache.of_dataset
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from pytorch_ood.dataset.img.imagelist import ImageListDataset
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ..benchmark.folder import ImageFiles
from ..dataset.packs import ImagePack
from ..model.split import SplitModel
from ..training.checkpoint import _to_bytes, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pytorch-ood", "pood-plugins")


class Cache:
    """
    A folder of computed values. Without a folder, everything is computed.
    """

    def __init__(self, directory: str | os.PathLike[str] | None):
        """
        :param directory: where to keep entries, created if need be
        """
        self.directory = None if directory is None else Path(directory).expanduser()

    def get(
        self, name: str, key: Mapping[str, str | None], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """
        :param name: begin of the file's name, for people
        :param key: all that the value depends on. If a part is ``None``, because it can't be
            told, the value is computed and not kept.
        :param compute: makes the value: tensors, numbers and text by name
        :return: the value, from the cache or computed
        """
        if self.directory is None:
            return compute()
        if unknown := [part for part, value in key.items() if value is None]:
            log.warning(f"{name} can't be kept: {', '.join(unknown)} can't be recognised.")
            return compute()
        key = {**key, **{package: version(package) for package in _PACKAGES}}
        digest = _hash([json.dumps(key, sort_keys=True)])
        path = self.directory / f"{_file_name(name)}-{digest}.zip"
        try:
            entry = load_checkpoint(path)
            if not (isinstance(entry, dict) and isinstance(entry.get("value"), dict)):
                raise ValueError("it holds no value")
            if entry.get("key") == key:
                value: dict[str, Any] = entry["value"]
                return value
            log.warning(f"{path} belongs to something else and is computed anew.")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning(f"{path} is damaged and computed anew: {error}")
        value = compute()
        try:
            save_checkpoint(path, {"key": key, "value": value})
        except OSError as error:  # a full disk is no reason to lose what was computed
            log.warning(f"{path} can't be written, so it is not kept: {error}")
        return value


def of_value(value: Any) -> str | None:
    """
    :param value: a network, a transform, a detector, settings
    :return: fingerprint of all that it is made of, and of the code of its classes and functions;
        ``None`` if part of it can't be told
    """
    try:
        return _hash(_parts(value, {}))
    except (_Unknown, RecursionError):
        return None


def of_module(module: Any) -> str | None:
    """
    :param module: a network, or part of one
    :return: fingerprint of its weights, its buffers, its settings and its code, ``None`` if it is
        no module or part of it can't be told
    """
    return of_value(module) if isinstance(module, nn.Module) else None


def of_dataset(dataset: Dataset[Any]) -> str | None:
    """
    :param dataset: a data set
    :return: fingerprint of its images, labels and transform, ``None`` if these can't be told
    """
    state = dict(getattr(dataset, "__dict__", {}))
    if isinstance(dataset, ConcatDataset):
        state["datasets"] = [of_dataset(part) for part in dataset.datasets]
        if None in state["datasets"]:
            return None
    elif isinstance(dataset, Subset):
        state["dataset"] = of_dataset(dataset.dataset)
        if state["dataset"] is None:
            return None
    elif isinstance(dataset, (ImageFiles, ImageListDataset)):
        try:
            state["files"] = [_of_file(file) for file in dataset.files]
        except OSError:  # who reads the images will say so
            return None
    elif not isinstance(dataset, (ImagePack, TensorDataset)):
        return None  # it may read what its attributes don't tell
    return of_value([type(dataset), state])


def _of_file(file: str | os.PathLike[str]) -> str:
    stat = os.stat(file)
    return f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}"


class _Unknown(Exception):
    """There is something that could not be recognised if it were met again."""


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str | bytes]:
    """
    What a value is made of, as :mod:`pickle` takes it apart. Nothing is ever put together again.

    :param value: anything
    :param seen: number of each object that was met, and the object: once it is gone, another may
        have its id
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        yield repr(value)
        return
    if kind in (list, tuple, dict):
        items = value.items() if kind is dict else value
        yield f"{kind.__name__} of {len(value)}"
        for item in items:
            yield from _parts(item, seen)
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value

    if isinstance(value, (type, FunctionType)):
        yield from _code(value)
        for base in getattr(value, "__bases__", ()):
            yield from _parts(base, seen)
    elif isinstance(value, Tensor):
        yield f"{kind.__name__} {value.dtype} {tuple(value.shape)}"
        if not value.is_meta:
            yield _certain(_to_bytes, value)
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise _Unknown
        yield f"{kind.__name__} {value.dtype.descr} {value.shape}"
        yield value.tobytes()
    elif isinstance(value, SplitModel):  # its parts follow from these
        yield from _parts([kind, value.model, value.early_name], seen)
    elif isinstance(value, nn.Module):
        yield from _parts(kind, seen)
        for name, part in vars(value).items():
            # hooks are numbered through all modules that there ever were
            hooks = "_hooks" in name and isinstance(part, dict)
            yield from _parts([name, list(part.values()) if hooks else part], seen)
    elif isinstance(value, (set, frozenset)):
        yield from _parts([kind, sorted(_hash(_parts(item, {})) for item in value)], seen)
    else:
        reduced = _certain(value.__reduce_ex__, 4)
        if isinstance(reduced, str):
            reduced = [getattr(value, "__module__", None), reduced]
        yield f"{kind.__module__}.{kind.__qualname__}"
        # the last two are iterators over items, of what is like a list or a dictionary
        yield from _parts([*reduced[:3], *map(list, filter(None, reduced[3:5]))], seen)


def _code(value: Any) -> Iterator[str | bytes]:
    """Name of a class or function, and the file that it is in."""
    module = sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    found: Any = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if (found is not value and not _is_plain(value, file)) or (
        file is None and value.__module__ == "__main__"
    ):
        raise _Unknown
    yield f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, FunctionType):
        yield f"line {value.__code__.co_firstlineno}"
    if file is not None and file.endswith(".py"):
        yield _certain(Path(file).read_bytes)


def _is_plain(value: Any, file: str | None) -> bool:
    """Whether it is a local function that its place in the file tells all about."""
    return (
        isinstance(value, FunctionType)
        and value.__code__.co_filename == file
        and value.__name__ != "<lambda>"  # of which there may be several in a line
        and not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    )


def _certain(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # of whatever kind: some objects can't be taken apart
        raise _Unknown from error


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)} ".encode())  # or "ab", "c" would equal "a", "bc"
        digest.update(data)
    return digest.hexdigest()[:32]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
