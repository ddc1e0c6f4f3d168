"""
A fitted detector on disk, without pickle: nothing in it can run code.

.. code-block:: python

    from pood_plugins import persistence, registry, split_model

    split = split_model(model.eval())
    detector = registry.build("GROOD", split).fit(train_loader)
    persistence.save(detector, "detectors/grood", threshold=threshold)

    # later, elsewhere
    split = split_model(load_my_model().eval().to("cuda"))
    detector = persistence.load("detectors/grood", split)  # on the device of the split
    threshold = persistence.load_threshold("detectors/grood")

The model is not saved, but recognised: a detector is loaded for the weights that it was fitted
with, and refused for others. ``pood fit`` saves the model, too, see
:mod:`pood_plugins.deployment`.

What can be saved
-----------------

A detector that :func:`registry.build <pood_plugins.registry.build>` made. What is saved are the
arguments it was built with, and all attributes that differ from those of a detector that has just
been built: tensors, numbers, text, and lists, tuples, dictionaries and ranges of these, in the
detector itself, in a detector inside it, and in data classes of its own module. This serves
GROOD, NERO, most of pytorch-ood's detectors and those of plugins. A detector that holds anything
else is refused, by name, before a file is written; of pytorch-ood's, this is OpenMax.

What is on disk
---------------

==================================  ===============================================================
``config.json``                     the detector's name and arguments, its attributes, the
                                    threshold, versions, fingerprints and checksums
``state.safetensors``               the tensors of these attributes
``model.safetensors``               weights of the classifier, if ``pood fit`` made the directory
==================================  ===============================================================

The directory appears at once, when all of it is written. One that is replaced is moved aside
before and removed afterwards: a crash in the very moment in between leaves it in a hidden folder
beside. Every byte is covered by a checksum, so that damage is noticed. A checksum is no signature:
it does not tell who wrote the directory.

.. autofunction:: pood_plugins.persistence.save

.. autofunction:: pood_plugins.persistence.load

.. autofunction:: pood_plugins.persistence.load_threshold

.. autoclass:: pood_plugins.persistence.Saved
    :members:

.. autofunction:: pood_plugins.persistence.fingerprint
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import registry
from .model.split import SplitModel
from .threshold import Threshold
from .training.checkpoint import reason, short

if TYPE_CHECKING:
    from pytorch_ood.api import Detector

__all__ = ["Saved", "fingerprint", "load", "load_threshold", "save"]

_FORMAT = "pood-plugins detector 1"
_CONFIG, _STATE, _MODEL = "config.json", "state.safetensors", "model.safetensors"
#: attributes that belong to the place and not to the fit
_NOT_SAVED = ("build_record", "_device")


def save(
    detector: Detector,
    path: str | os.PathLike[str],
    *,
    threshold: Threshold | None = None,
    classifier: Mapping[str, Any] | None = None,
) -> None:
    """
    Save a detector, fitted or not, as a directory. A saved detector that is there is replaced.

    :param detector: made by :func:`registry.build <pood_plugins.registry.build>`
    :param path: directory, created if need be
    :param threshold: for its scores
    :param classifier: what there is to say of the classifier, in terms of JSON; if given, its
        weights are saved, too
    :raises ValueError: if the detector can't be saved, with the reason, or the directory is there
        and is neither empty nor a saved detector
    :raises OSError: if nothing can be written
    :raises ImportError: without safetensors
    """
    safetensors = _safetensors()
    from safetensors import SafetensorError

    record = getattr(detector, "build_record", None)
    name = type(detector).__name__
    if not isinstance(record, registry.BuildRecord):
        raise ValueError(
            f"this {name} can't be saved, since its constructor's arguments are not known: make "
            f"it by registry.build({name!r}, split_model(model)) and fit that"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the first build gave, too
        fresh = registry.build(record.info.qualified_name, record.split, **record.hyperparameters)
    tensors: dict[str, Tensor] = {}
    try:
        arguments = {
            argument: _encode(value, f"argument {argument}", tensors)
            for argument, value in record.hyperparameters.items()
        }
        attributes = _changes(detector, fresh, "", tensors)
    except _NotPlain as error:
        raise ValueError(
            f"{name} can't be saved ({error}): fit it anew in each process, or save another "
            "detector"
        ) from error

    model = record.split.model
    files = {_STATE: tensors}
    if classifier is not None:
        files[_MODEL] = model.state_dict()
    path = Path(path).resolve()
    check_replaceable(path, losing_model=classifier is None)
    config = {
        "detector": {"name": record.info.qualified_name, "version": record.info.version},
        "arguments": arguments,
        "attributes": attributes,
        "threshold": None if threshold is None else dataclasses.asdict(threshold),
        "model": {**_of_model(record.split), "fingerprint": fingerprint(model)},
        "classifier": classifier,
        "versions": {p: version(p) for p in ("pood-plugins", "pytorch-ood", "torch")},
    }
    with _replacing_directory(path) as directory:
        checksums = {}
        for file, content in files.items():
            try:
                safetensors.save_file(_separate(content), directory / file)
            except SafetensorError as error:  # which is no OSError, but means one
                raise OSError(f"{path} can't be written: {error}") from error
            checksums[file] = _checksum_of_file(directory / file)
        config["checksums"] = checksums
        text = json.dumps(_sealed(config), indent=1, allow_nan=False)
        (directory / _CONFIG).write_text(text + "\n", encoding="utf-8")
        for file in files:  # which safetensors makes readable for its owner alone
            shutil.copymode(directory / _CONFIG, directory / file)


def load(path: str | os.PathLike[str], split: SplitModel) -> Detector:
    """
    Load a detector that :func:`save` saved.

    Nothing in its files is run. But its name chooses a class among those that are installed, and
    that is imported.

    :param path: directory
    :param split: classifier with the weights that the detector was fitted with
    :return: the detector, on the device of the split; on the same kind of device, it gives the
        same scores, bit for bit
    :raises ValueError: if the directory is no saved detector, is damaged or changed, is of another
        version of the format, belongs to other weights, or to a detector that is not installed
    :raises OSError: if a file can't be read
    :raises ImportError: if its plugin can't be imported, or without safetensors
    """
    return Saved(path).detector(split)


def load_threshold(path: str | os.PathLike[str]) -> Threshold | None:
    """
    :param path: directory of a saved detector
    :return: its threshold, None if it was saved without
    :raises ValueError: see :func:`load`
    :raises OSError: likewise
    """
    return Saved(path).threshold


class Saved:
    """
    A saved detector, of which ``config.json`` was read and checked.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """
        :param path: directory of a saved detector
        :raises ValueError: see :func:`load`
        :raises OSError: likewise
        """
        self.path = Path(path)
        if not (self.path / _CONFIG).is_file():
            raise ValueError(
                f"{path} is no saved detector, since it has no {_CONFIG}: name the directory that "
                "`pood fit` or persistence.save wrote"
            )
        with _reading(self.path):
            config = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict) or not isinstance(config.get("format"), str):
                raise _Refusal(
                    f"{path} is no saved detector, since its {_CONFIG} is something else: name "
                    "another directory"
                )
            if config["format"] != _FORMAT:
                raise _Refusal(
                    f"{path} has the format {config['format'][:80]!r}, and this version of "
                    f"pood-plugins reads {_FORMAT!r}: use the version that wrote it, or fit "
                    "the detector anew"
                )
            if config != _sealed(config) or not {_STATE, _MODEL} >= set(config["checksums"]):
                raise _changed(self.path / _CONFIG)
        #: content of ``config.json``
        self.config: dict[str, Any] = config

    def reading(self) -> AbstractContextManager[None]:
        """
        :return: context for reading more of it, in which any error becomes a ``ValueError`` that
            says that it is damaged
        """
        return _reading(self.path)

    def check(self) -> None:
        """
        Check that all files are what was written.

        :raises ValueError: if a file is missing, damaged or changed
        :raises OSError: if it can't be read
        """
        with _reading(self.path):
            for file in self.config["checksums"]:
                self._check(file)

    @property
    def threshold(self) -> Threshold | None:
        """The threshold, None if there is none."""
        with _reading(self.path):
            threshold = self.config["threshold"]
            if threshold is None:
                return None
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in threshold.items()
            }
            return Threshold(**values)

    def detector(self, split: SplitModel) -> Detector:
        """
        :param split: see :func:`load`, which this does
        :return: the detector
        """
        with _reading(self.path):
            known, saved = self.config["model"], self.config["detector"]
            of_version = str(saved["version"])
            if known["fingerprint"] != fingerprint(split.model):
                raise _Refusal(
                    f"{self.path} belongs to other weights, those of {_described(known)}, and "
                    f"not to this {_described(_of_model(split))}: use the classifier that the "
                    "detector was fitted with, or fit a detector for this one"
                )
            try:
                info = registry.get_info(saved["name"])
            except LookupError as error:
                raise _Refusal(
                    f"{self.path} holds the detector {short(saved['name'])}, which is not "
                    "installed: install the distribution before the colon"
                ) from error
            device = split.head.weight.device
            tensors = self._tensors(_STATE, device)
            arguments = {n: _decode(v, tensors) for n, v in self.config["arguments"].items()}
            detector = registry.build(info.qualified_name, split, **arguments)
            detector.to(device)
            _restore(detector, self.config["attributes"], tensors)
        if info.version != of_version:
            warnings.warn(
                f"{self.path} was saved with {info.origin} {short(of_version)}, and this is "
                f"{info.version}: compare some scores with earlier ones, or fit the detector anew",
                stacklevel=3,
            )
        return detector

    def load_weights(self, model: nn.Module) -> None:
        """
        :param model: is given the weights of the classifier that the detector was fitted with
        :raises ValueError: if they were not saved, are damaged, or belong to another network
        :raises OSError: if the file can't be read
        """
        with _reading(self.path):
            if _MODEL not in self.config["checksums"]:
                raise _Refusal(f"{self.path} holds no weights: make it by `pood fit`")
            model.load_state_dict(self._tensors(_MODEL, torch.device("cpu")))

    def _tensors(self, file: str, device: torch.device) -> dict[str, Tensor]:
        self._check(file)
        stored = _safetensors().load_file(self.path / file, device=str(device))
        # memory of torch's own, aligned as ever, and not that of a file that may change
        return {name: tensor.clone() for name, tensor in stored.items()}

    def _check(self, file: str) -> None:
        checksum = self.config["checksums"][file]
        if _checksum_of_file(self.path / file) != checksum:
            raise _changed(self.path / file)


def fingerprint(model: nn.Module) -> str:
    """
    :param model: any network
    :return: fingerprint of its weights and buffers with their names, the same on every device
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saved detectors need safetensors: pip install 'pood-plugins[deploy]'"
        ) from error
    return safetensors.torch


def _of_model(split: SplitModel) -> dict[str, Any]:
    return {
        "class": type(split.model).__name__,
        "features": split.head.in_features,
        "classes": split.head.out_features,
    }


def _described(model: Mapping[str, Any]) -> str:
    kind, features, classes = (short(model[name], 80) for name in ("class", "features", "classes"))
    return f"{kind} of {features} features and {classes} classes"


def _bytes(tensor: Tensor) -> memoryview:
    # not every dtype of torch is one of numpy
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares its memory with another."""
    separate: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return separate


def _sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with format and checksum."""
    config = {**config, "format": _FORMAT}
    config.pop("checksum", None)
    text = json.dumps(config, sort_keys=True)
    return {**config, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def _checksum_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Refusal(ValueError):
    """Says all there is to say."""


def _changed(file: Path) -> _Refusal:
    return _Refusal(
        f"{file} was changed or damaged, since its checksum is wrong: copy the directory again, "
        "or fit the detector anew"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What damage leads to depends on where it is. Here, it becomes one kind of error."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"{path} is not complete ({Path(error.filename or '').name} is missing): copy the "
            "directory again, or fit the detector anew"
        ) from error
    except (_Refusal, ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or no saved detector ({reason(error)}): copy the directory again, "
            "or fit the detector anew"
        ) from error


def check_replaceable(path: Path, losing_model: bool) -> None:
    """
    :param path: where a detector is to be saved
    :param losing_model: whether it is to be saved without its classifier
    :raises ValueError: if something is there that would be lost and is no saved detector
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name a directory for the detector")
    names = sorted(file.name for file in path.iterdir())
    others = [name for name in names if name not in (_CONFIG, _STATE, _MODEL)]
    if others:
        raise ValueError(
            f"{path} holds other files ({', '.join(others[:3])}), which would be lost: name "
            "another directory for the detector"
        )
    if names:
        try:
            Saved(path)
        except ValueError as error:  # somebody else's files may have the same names
            raise ValueError(
                f"{path} is there, and is no sound saved detector: remove it, or name another "
                "directory"
            ) from error
    if _MODEL in names and losing_model:
        raise ValueError(
            f"{path} holds the weights of its classifier, too, which would be lost: name another "
            "directory for the detector"
        )


@contextmanager
def _replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory that takes the place of another when the context ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new, old = (path.with_name(f".{path.name}.{token}.{what}") for what in ("new", "old"))
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            _sync(file)  # or, after a power failure, the names may be all there is
        _sync(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _NotPlain(Exception):
    """There is something that can't be written without pickle."""


def _changes(
    current: object, fresh: object, where: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """
    :param current: a detector
    :param fresh: the same detector as its constructor leaves it
    :param where: what is before the names of their attributes
    :param tensors: takes up tensors, by the place where they belong
    :return: attributes that differ, in terms of JSON
    """
    before = vars(fresh)
    return {
        name: _encode(value, where + name, tensors, current, before.get(name))
        for name, value in vars(current).items()
        if name not in _NOT_SAVED and not (name in before and _same(value, before[name]))
    }


def _restore(detector: object, attributes: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give a fresh detector the attributes that differ."""
    for name, value in attributes.items():
        method = callable(getattr(type(detector), name, None))
        if method or not name.isidentifier() or name.startswith("__") or name in _NOT_SAVED:
            raise ValueError(f"{name!r} is no name of an attribute")
        fresh = getattr(detector, name, None)
        setattr(detector, name, _decode(value, tensors, detector, fresh))


def _same(value: Any, other: Any) -> bool:
    """Whether they are the same or, in every bit, equal."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return (
            value.dtype == other.dtype
            and value.shape == other.shape
            and _bytes(value) == _bytes(other)
        )
    if isinstance(value, nn.Module):
        return _same(value.state_dict(), other.state_dict())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict):
        return list(value) == list(other) and all(map(_same, value.values(), other.values()))
    if isinstance(value, float):
        return bool(value.hex() == other.hex())
    if isinstance(value, FunctionType):  # such as a lambda in a constructor
        parts = ("__code__", "__defaults__", "__kwdefaults__")
        cells = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (value, other))
        return all(getattr(value, p) == getattr(other, p) for p in parts) and _same(*cells)
    # methods are equal if they are of the same object
    return isinstance(value, (bool, int, str, range, torch.dtype, MethodType)) and value == other


def _encode(
    value: Any, where: str, tensors: dict[str, Tensor], owner: Any = None, fresh: Any = None
) -> Any:
    """
    :param value: anything
    :param where: its place, for error messages
    :param tensors: takes up the tensors in it, by their places
    :param owner: detector that it is an attribute of
    :param fresh: what the constructor leaves in its place
    :return: the value in terms of JSON, where an object is what JSON itself does not have
    :raises _NotPlain: if it can't be
    """

    def items(values: Iterable[Any], of: str = where) -> list[Any]:
        return [_encode(v, f"{of}.{i}", tensors, owner) for i, v in enumerate(values)]

    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is list:
        return items(value)
    if kind is tuple:
        return {"tuple": items(value)}
    if kind is dict:
        return {"dict": [items(pair, f"{where}.{i}") for i, pair in enumerate(value.items())]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind in (Tensor, nn.Parameter) and value.layout == torch.strided:
        # products depend in their last digits on the order in memory, so that is kept
        order = sorted(range(value.ndim), key=lambda d: -value.stride(d))
        assert where not in tensors
        tensors[where] = value.permute(order)
        encoded = {"tensor": where, "shape": list(value.shape), "order": order}
        return {**encoded, "parameter": value.requires_grad} if kind is nn.Parameter else encoded
    if kind is nn.ParameterDict:
        return {"parameters": _encode(dict(value.items()), where, tensors)}
    if kind is type(fresh) and isinstance(value, _detector_class()):
        return {"detector": _changes(value, fresh, f"{where}.", tensors)}
    if dataclasses.is_dataclass(kind) and kind.__module__ == type(owner).__module__:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"dataclass": kind.__name__, "fields": _encode(fields, where, tensors, owner)}
    if _is_neighbors(value) and _is_neighbors(fresh):
        return {"neighbors": _encode(torch.from_numpy(value._fit_X), where, tensors)}
    raise _NotPlain(f"its {where} is a {kind.__module__}.{kind.__qualname__}")


def _decode(value: Any, tensors: dict[str, Tensor], owner: Any = None, fresh: Any = None) -> Any:
    """
    :param value: what :func:`_encode` returned
    :param tensors: by their places
    :param owner: detector that it becomes an attribute of
    :param fresh: what the constructor left in its place
    :return: the value
    """
    if isinstance(value, list):
        return [_decode(item, tensors, owner) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content), *more) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(content, tensors, owner))
    if kind == "dict":
        return {_decode(k, tensors, owner): _decode(v, tensors, owner) for k, v in content}
    if kind == "range":
        return range(*content)
    if kind == "dtype":
        return {str(dtype): dtype for dtype in _DTYPES}[f"torch.{content}"]
    if kind == "tensor":
        tensor = tensors[content].permute(
            [value["order"].index(d) for d in range(len(value["order"]))]
        )
        if list(tensor.shape) != value["shape"]:
            raise ValueError(f"{content} has the shape {tuple(tensor.shape)}")
        if "parameter" in value:
            return nn.Parameter(tensor, requires_grad=value["parameter"])
        return tensor
    if kind == "parameters":
        return nn.ParameterDict(_decode(content, tensors))
    if kind == "detector":
        _restore(fresh, content, tensors)
        return fresh
    if kind == "dataclass":
        found = getattr(sys.modules[type(owner).__module__], content)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ValueError(f"{content} is no data class")
        return found(**_decode(value["fields"], tensors, owner))
    if kind == "neighbors" and _is_neighbors(fresh):
        return fresh.fit(_decode(content, tensors).cpu().numpy())
    raise ValueError(f"{kind!r} is no kind of value")


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _detector_class() -> Any:
    from pytorch_ood.api import Detector

    return Detector


def _is_neighbors(value: Any) -> bool:
    """Whether it is what pytorch-ood's KNN keeps, all of which its data tell."""
    kind = type(value)
    return kind.__name__ == "NearestNeighbors" and kind.__module__.startswith("sklearn.")
