"""
Classifiers by name, as the command line gives them.

==============================  ===================================================================
Architecture                    What it is
==============================  ===================================================================
``resnet20``, ``resnet56``      :mod:`CIFAR ResNets <pood_plugins.model.resnet_cifar>`
``resnet50``, ``vit_b_16`` ...  a classifier of torchvision, or else of timm (which is an extra)
``WideResNet`` ...              a class of :mod:`pytorch_ood.model`
``package.module:callable``     whatever this returns when called with ``num_classes``
==============================  ===================================================================

``torchvision:NAME`` and ``timm:NAME`` choose where both have a name. Weights are a file with a
state dict, written by ``torch.save`` or safetensors, or a key of pytorch-ood's model zoo such as
``wrn-40-2/cifar10/crossentropy``, which brings architecture and preprocessing along and is
downloaded. Files of ``torch.save`` are read with ``weights_only=True``, so that nothing in them is
run.

..  autofunction:: pood_plugins.model.zoo.load_classifier

..  autoclass:: pood_plugins.model.zoo.Preprocessing
    :members:
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import transforms

from . import resnet_cifar

_OWN = {"resnet20": resnet_cifar.resnet20, "resnet56": resnet_cifar.resnet56}


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it. The wrong one scores silently wrong."""

    size: int  #: height and width of the input in pixels
    mean: tuple[float, ...]  #: subtracted from each channel, of images in :math:`[0, 1]`
    std: tuple[float, ...]  #: each channel is divided by

    @property
    def normalize(self) -> transforms.Normalize:
        """For tensors and batches of tensors in :math:`[0, 1]`, of the right size."""
        return transforms.Normalize(self.mean, self.std)

    @property
    def transform(self) -> transforms.Compose:
        """
        For RGB images of Pillow, as OpenOOD does it: the shorter side is resized (to 256 for 224
        pixels and in proportion for other sizes, small ones excepted), the center cropped.
        """
        resized = self.size if self.size <= 64 else round(self.size * 256 / 224)
        return transforms.Compose(
            [
                transforms.Resize(resized),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                self.normalize,
            ]
        )


#: Of the first published weights for the CIFAR ResNets of this package.
_CIFAR_RESNET = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_classifier(
    arch: str | None, weights: str | None, num_classes: int | None = None
) -> tuple[nn.Module, Preprocessing | Callable | None]:
    """
    :param arch: architecture, see above; not needed for a key of pytorch-ood's model zoo
    :param weights: state dict or key, see above; not needed for ``package.module:callable``, which
        may have loaded its own
    :param num_classes: number of classes that the weights were trained on; a callable may do
        without
    :return: classifier in evaluation mode, and its preprocessing: a transform for images of Pillow
        where pytorch-ood knows one, and ``None`` if it is not known
    :raises LookupError: if there is no such architecture
    :raises ValueError: if weights are missing, damaged or those of another network
    :raises OSError: if the file can't be opened
    """
    if weights is not None and not Path(weights).exists() and "/" in weights and arch is None:
        from pytorch_ood.model import load_model, load_transform

        return load_model(weights), load_transform(weights)
    if arch is None:
        raise ValueError("there is no architecture: name it by --arch, e.g. --arch resnet20")
    if weights is None and ":" not in arch:
        raise ValueError(f"there are no weights for {arch}: name their file by --weights")
    model = _construct(arch, num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arch} gives a {type(model).__name__}: it must be a torch.nn.Module")
    if weights is not None:
        _load_state(model, Path(weights), arch)
    return model.eval(), _CIFAR_RESNET if arch in _OWN else None


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
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{arch} can't be imported ({error}): correct --arch") from error
    takes_classes = num_classes is not None and _takes_classes(build)
    return build(num_classes=num_classes) if takes_classes else build()


def _takes_classes(construct: Callable) -> bool:
    parameters = inspect.signature(construct).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_name or "num_classes" in parameters


def _own(name: str, num_classes: int) -> nn.Module | None:
    return _OWN[name](num_classes) if name in _OWN else None


def _torchvision(name: str, num_classes: int) -> nn.Module | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    extra = {"aux_logits": False, "init_weights": False} if "inception" in name else {}
    extra = {**extra, "init_weights": False} if name == "googlenet" else extra
    return models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _pytorch_ood(name: str, num_classes: int) -> nn.Module | None:
    import pytorch_ood.model

    found: Any = getattr(pytorch_ood.model, name, None)
    is_model = inspect.isclass(found) and issubclass(found, nn.Module)
    return found(num_classes=num_classes) if is_model and _takes_classes(found) else None


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


def _load_state(model: nn.Module, path: Path, arch: str) -> None:
    state = _read_state(path)
    # not in files of old versions of torch, and of no use for inference
    wanted = {
        name: value
        for name, value in model.state_dict().items()
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
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name that of the weights by --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            # as training scripts wrap it
            state = state.get("state_dict", state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it holds no state dict")
    except ImportError as error:
        raise ImportError("reading .safetensors needs pip install pood-plugins[deploy]") from error
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else repr(error)
        raise ValueError(
            f"{path} is damaged or no state dict ({reason}): copy it again"
        ) from error
    return state


def _some(names: Sequence[str], what: str) -> str:
    if not names:
        return f"none {what}"
    return f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
