"""
Keeps on disk what takes long to compute, so that a second run over other detectors takes seconds,
and an interrupted one goes on where it was: the features of each data set, and the scores of
detectors that need images.

An entry is found again only if everything that it depends on is the same: weights and structure of
the network, the images (the list of the files, with their labels, sizes and times of change, or
the bytes in memory), how they are transformed, and the packages. If any of these changes, what is
in the cache is not used, but computed anew. Entries are written at once, without pickle, and their
checksums are read back: one that is damaged is rebuilt.

What has no name of its own can't be recognised, and is computed every time: data sets other than
image files, image packs and tensors (and subsets and concatenations of these), and transforms that
do not say what they do, such as functions.

..  autoclass:: pood_plugins.evaluation.cache.Cache
    :members:

..  autofunction:: pood_plugins.evaluation.cache.of_module

..  autofunction:: pood_plugins.evaluation.cache.of_dataset
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ..training.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "pytorch-ood", "pood-plugins")


class Cache:
    """
    A folder of computed values. Without a folder, everything is computed.
    """

    def __init__(self, directory: str | os.PathLike | None):
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
        if self.directory is None or None in key.values():
            return compute()
        key = {**key, **{package: version(package) for package in _PACKAGES}}
        path = self.directory / f"{_file_name(name)}-{_hash(json.dumps(key, sort_keys=True))}.zip"
        if path.exists():
            try:
                entry = load_checkpoint(path)
                if entry["key"] == key:
                    return entry["value"]
                log.warning(f"{path} belongs to something else and is computed anew.")
            except (ValueError, KeyError, TypeError) as error:
                log.warning(f"{path} is damaged and computed anew: {error}")
        value = compute()
        save_checkpoint(path, {"key": key, "value": value})
        return value


def of_module(module: Any) -> str | None:
    """
    :param module: a network, or part of one
    :return: fingerprint of its weights, its buffers and its structure, ``None`` if it is no module
    """
    if not isinstance(module, nn.Module):
        return None
    parts = [f"{type(module).__module__}.{type(module).__qualname__}", str(module)]
    state = module.state_dict()
    parts += [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in state.items()]
    return _hash(*parts, *state.values())


def of_dataset(dataset: Dataset) -> str | None:
    """
    :param dataset: a data set
    :return: fingerprint of its images, labels and transform, ``None`` if these can't be told
    """
    if isinstance(dataset, ConcatDataset):
        parts = [of_dataset(part) for part in dataset.datasets]
        return None if None in parts else _hash(*parts)
    if isinstance(dataset, Subset):
        whole = of_dataset(dataset.dataset)
        return None if whole is None else _hash(whole, torch.as_tensor(dataset.indices))
    if isinstance(dataset, TensorDataset):
        return _hash(*dataset.tensors)
    transform = repr(getattr(dataset, "transform", None))
    if " at 0x" in transform or "<function" in transform:
        return None  # an address says nothing of what a function does
    if hasattr(dataset, "files") and hasattr(dataset, "labels"):
        stats = [os.stat(file) for file in dataset.files]
        lines = [
            f"{file} {label} {stat.st_size} {stat.st_mtime_ns}"
            for file, label, stat in zip(dataset.files, dataset.labels, stats)
        ]
        return _hash(transform, *lines)
    x, y = getattr(dataset, "x", None), getattr(dataset, "y", None)
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return _hash(transform, f"{x.dtype} {x.shape}", x, y)
    return None


def of_settings(settings: Mapping[str, Any]) -> str | None:
    """
    :param settings: settings by name
    :return: fingerprint of their values, ``None`` if there is one without a lasting name
    """
    parts: list[str | Tensor] = []
    for name, value in settings.items():
        text = f"{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        if " at 0x" in text:
            return None
        parts += [f"{name} = {text}"] + ([value] if isinstance(value, Tensor) else [])
    return _hash(*parts)


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            part = flat.view(torch.uint8).numpy() if flat.numel() else b""
        data = part.encode() if isinstance(part, str) else bytes(part)
        digest.update(f"{len(data)} ".encode())  # or "ab", "c" would equal "a", "bc"
        digest.update(data)
    return digest.hexdigest()[:32]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
