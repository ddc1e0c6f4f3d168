"""
Classifiers by name, as the command line gives them.

==============================  ===================================================================
Architecture                    What it is
==============================  ===================================================================
``resnet20``, ``resnet56``      :mod:`CIFAR ResNets <pood_plugins.model.resnet_cifar>`
``digits``                      :func:`~pood_plugins.benchmark.digits.digits_classifier`
``resnet50``, ``vit_b_16`` ...  a classifier of torchvision, or else of timm (which is an extra)
``WideResNet`` ...              a class of :mod:`pytorch_ood.model`
``package.module:callable``     whatever this returns when called with ``num_classes``
==============================  ===================================================================

``torchvision:NAME`` and ``timm:NAME`` choose where both have a name. Weights are one of these:

==================================  ===============================================================
Weights                             What they are
==================================  ===============================================================
a file                              a state dict, written by ``torch.save`` or safetensors
``IMAGENET1K_V2``, ``DEFAULT`` ...  torchvision's for the architecture
``pretrained``                      timm's for the architecture
``wrn-40-2/cifar10/crossentropy``   a key of pytorch-ood's model zoo, which brings the architecture
...                                 along
==================================  ===============================================================

All but a file are downloaded, and bring their preprocessing along. Files of ``torch.save`` are
read with ``weights_only=True``, so that nothing in them is run.

..  autofunction:: pood_plugins.model.zoo.load_classifier

..  autofunction:: pood_plugins.model.zoo.construct
"""

from __future__ import annotations

import inspect
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..training.checkpoint import short
from . import resnet_cifar
from .preprocessing import Preprocessing


def _digits(num_classes: int) -> nn.Module:
    from ..benchmark.digits import digits_classifier

    return digits_classifier(num_classes=num_classes)


#: preprocessing of the first published weights for the CIFAR ResNets of this package
_CIFAR_RESNET = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: networks of this package, and their preprocessing
_OWN: dict[str, tuple[Callable[[int], nn.Module], Preprocessing]] = {
    "resnet20": (resnet_cifar.resnet20, _CIFAR_RESNET),
    "resnet56": (resnet_cifar.resnet56, _CIFAR_RESNET),
    "digits": (_digits, Preprocessing(8, (0.0,), (1.0,), channels=1)),
}


def load_classifier(
    arch: str | None, weights: str | None, num_classes: int | None = None
) -> tuple[nn.Module, Preprocessing | None]:
    """
    :param arch: architecture, see above; not needed for a key of pytorch-ood's model zoo
    :param weights: see above; not needed for ``package.module:callable``, which may have loaded
        its own
    :param num_classes: number of classes that the weights were trained on; a callable may do
        without
    :return: classifier in evaluation mode, and its preprocessing, ``None`` if it is not known
    :raises LookupError: if there is no such architecture
    :raises ValueError: if weights are missing, damaged or those of another network
    :raises OSError: if the file can't be opened
    """
    is_file = weights is not None and Path(weights).exists()
    if weights is not None and not is_file and "/" in weights and arch is None:
        from pytorch_ood.model import get_model_info, load_model

        _check_key(weights)
        preprocessing = get_model_info(weights).preprocessing
        known = None if preprocessing is None else Preprocessing.of_pytorch_ood(preprocessing)
        return load_model(weights), known
    if arch is None:
        raise ValueError("there is no architecture: name it by --arch, e.g. --arch resnet20")
    if weights is None and ":" not in arch:
        raise ValueError(f"there are no weights for {arch}: name their file by --weights")
    if weights is not None and not is_file:
        for published in (_published_by_torchvision, _published_by_timm):
            found = published(arch, weights)
            if found is not None:
                return found[0].eval(), found[1]
    model = construct(arch, num_classes)
    if weights is not None:
        _load_state(model, Path(weights), arch)
    return model.eval(), _OWN[arch][1] if arch in _OWN else None


def construct(arch: str, num_classes: int | None = None) -> nn.Module:
    """
    :param arch: architecture, or a key of pytorch-ood's model zoo, see above
    :param num_classes: number of classes; a key and a callable may do without
    :return: the network with weights as its constructor leaves them
    :raises LookupError: if there is no such architecture
    :raises ValueError: if it can't be constructed
    """
    if "/" in arch and ":" not in arch:
        from pytorch_ood.model import get_model_info

        _check_key(arch)
        entry = get_model_info(arch)
        module, _, name = entry.arch_class.rpartition(".")
        made: nn.Module = getattr(import_module(module), name)(**entry.arch_kwargs)
        return made
    model = _construct(arch, num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arch} gives a {type(model).__name__}: it must be a torch.nn.Module")
    return model


def _check_key(key: str) -> None:
    from pytorch_ood.model import list_models

    if not any(f"{known}/".startswith(f"{key}/") for known in list_models()):
        raise ValueError(
            f"{key} is neither a file nor a key of pytorch-ood's model zoo: correct --weights"
        )


def _published_by_torchvision(arch: str, weights: str) -> tuple[nn.Module, Preprocessing] | None:
    from torchvision import models

    where, _, name = arch.rpartition(":")
    if where not in ("", "torchvision") or name not in models.list_models(module=models):
        return None
    choices = models.get_model_weights(name)
    if weights not in choices.__members__:
        return None
    chosen = choices[weights]
    return models.get_model(name, weights=chosen), Preprocessing.of_torchvision(
        chosen.transforms()
    )


def _published_by_timm(arch: str, weights: str) -> tuple[nn.Module, Preprocessing] | None:
    where, _, name = arch.rpartition(":")
    if where not in ("", "timm") or weights != "pretrained":
        return None
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{arch} needs timm: pip install 'pood-plugins[deploy]'") from error
    if not timm.is_model(name):
        return None
    model = timm.create_model(name, pretrained=True)
    return model, Preprocessing.of_timm(timm.data.resolve_model_data_config(model))


def _construct(arch: str, num_classes: int | None) -> Any:
    where, colon, name = arch.partition(":")
    if not colon:
        where, name = "", arch
    if where in ("", "torchvision", "timm"):
        if num_classes is None:
            raise ValueError(f"{arch} needs the number of classes of its weights: --classes N")
        for source, make in _SOURCES.items():
            if where in ("", source):
                found = make(name, num_classes)
                if found is not None:
                    return found
        raise LookupError(
            f"no architecture is called {arch!r}: choose one of {', '.join(_OWN)}, torchvision, "
            "timm (pip install timm) or pytorch_ood.model, or package.module:callable"
        )
    try:
        build: Any = getattr(import_module(where), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # also of its name
        raise LookupError(f"{arch} can't be imported ({error}): correct --arch") from error
    if not callable(build):
        raise ValueError(f"{arch} is a {type(build).__name__}: it must be a class or a function")
    takes_classes = num_classes is not None and _takes_classes(build)
    arguments = {"num_classes": num_classes} if takes_classes else {}
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{arch} can't be called with num_classes alone ({error}): give its other arguments "
            "defaults"
        ) from error
    return build(**arguments)


def _takes_classes(construct: Callable[..., Any]) -> bool:
    parameters = inspect.signature(construct).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_name or "num_classes" in parameters


def _own(name: str, num_classes: int) -> nn.Module | None:
    return _OWN[name][0](num_classes) if name in _OWN else None


def _torchvision(name: str, num_classes: int) -> nn.Module | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    two = name in ("googlenet", "inception_v3")  # they train with a second head or two
    extra = {"aux_logits": False, "init_weights": False} if two else {}
    made: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **extra)
    return made


def _pytorch_ood(name: str, num_classes: int) -> nn.Module | None:
    import pytorch_ood.model

    found: Any = getattr(pytorch_ood.model, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module) and _takes_classes(found)):
        return None
    try:
        inspect.signature(found).bind(num_classes=num_classes)
    except TypeError:  # it needs more than that
        return None
    return found(num_classes=num_classes)


def _timm(name: str, num_classes: int) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model(name, num_classes=num_classes) if timm.is_model(name) else None


# in this order, as far as they have the name
_SOURCES: dict[str, Callable[[str, int], nn.Module | None]] = {
    "pood_plugins": _own,
    "torchvision": _torchvision,
    "pytorch_ood": _pytorch_ood,
    "timm": _timm,
}


#: further heads in torchvision's files, of no use for inference
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def _load_state(model: nn.Module, path: Path, arch: str) -> None:
    state, own = _read_state(path), model.state_dict()
    state = {n: v for n, v in state.items() if n in own or not n.startswith(_AUXILIARY)}
    # not in files of old versions of torch, and of no use for inference
    wanted = {
        name: value
        for name, value in own.items()
        if name in state or not name.endswith("num_batches_tracked")
    }
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"{path} does not hold weights of {arch}: {_some(missing, 'missing')}, "
            f"{_some(unknown, 'too many')}. Name the architecture that they belong to by --arch"
        )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path} does not hold weights of {arch} for these classes: {name} has shape "
                f"{tuple(state[name].shape)} there, and {tuple(value.shape)} in the network. Name "
                "the architecture and the benchmark that they were trained for"
            )
        if value.is_floating_point() and not state[name].is_floating_point():
            raise ValueError(
                f"{path} does not hold weights of {arch}: {name} is of {state[name].dtype} there, "
                f"and of {value.dtype} in the network. Save weights as floating-point numbers"
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # sparse, or without content
        raise ValueError(
            f"{path} does not hold weights of {arch} ({short(error)}): save a state dict of dense "
            "tensors"
        ) from error


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name that of the weights by --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = _load(path)
            if isinstance(state, Mapping):
                state = state.get("state_dict", state)  # as training scripts wrap it
        if not _is_state(state):
            raise ValueError("it holds no state dict")
        tensors: dict[str, Any] = {
            name.removeprefix("module."): value for name, value in state.items()
        }
    except ImportError as error:
        raise ImportError(
            "reading .safetensors needs pip install 'pood-plugins[deploy]'"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text is how to run what is in it
            reason = "it is not of torch.save, or holds other objects than tensors"
        raise ValueError(
            f"{path} is damaged or no state dict ({short(reason, 120)}): copy it again, or save "
            "a state dict"
        ) from error
    return tensors


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.save never does that, and a small file could take any amount of memory
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed")
            damaged = archive.testzip()  # which torch does not look at
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles and archives that are then refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and len(state) > 0
        and all(isinstance(name, str) for name in state)
        and all(isinstance(value, torch.Tensor) for value in state.values())
    )


def _some(names: Sequence[str], what: str) -> str:
    if not names:
        return f"none {what}"
    some = ", ".join(short(name, 80) for name in names[:2])
    return f"{len(names)} {what} ({some}{', ...' if len(names) > 2 else ''})"
