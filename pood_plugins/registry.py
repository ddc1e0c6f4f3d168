"""
Everything that is installed, by name: pytorch-ood's own detectors, losses and benchmarks, and
those that plugins add through entry points.

.. code-block:: python

    from pood_plugins import registry
    from pood_plugins.model import split_model

    registry.list_detectors()  # ['ASH', 'DICE', ..., 'GROOD', ..., 'NERO', ...]
    registry.get_info("GROOD")  # PluginInfo(name='GROOD', ..., origin='pood-plugins', ...)
    detector = registry.build("GROOD", split_model(model), k=10)

Names may be written in upper or lower case, and detectors also by their names in the literature:
``MSP``, ``Energy`` or ``EBO``, ``MLS``, ``MDS`` and ``RMDS``. If two distributions claim one name,
the bare name is an error, and each is reached as ``distribution:Name``, for example
``pytorch-ood:KNN``.

A plugin is a class with an entry point in its distribution's ``pyproject.toml``, in the group
``pytorch_ood.detectors``, ``pytorch_ood.losses`` or ``pytorch_ood.benchmarks``:

.. code-block:: toml

    [project.entry-points."pytorch_ood.detectors"]
    MyDetector = "my_package.my_module:MyDetector"

Nothing is imported before a class is asked for, so a plugin that is broken fails by name when it
is loaded and leaves all others alone.

:func:`build` fills in the arguments of a detector's constructor that are parts of a split
classifier. It goes by the names that pytorch-ood gives them, so it builds plugins' detectors too:

- ``model``: the whole classifier, inputs to logits
- ``encoder``: inputs to features of shape :math:`B \\times D`
- ``head``: the last linear layer, features to logits; for detectors that work on feature maps or
  on several layers, feature maps to logits
- ``backbone``: inputs to feature maps of shape :math:`B \\times C \\times H \\times W`
- ``feature_layers``: consecutive layers, from inputs to feature maps
- ``layers``: the modules after which the network's stages end, to put hooks on
- ``w``, ``b``: weight and bias of the last linear layer
- ``num_classes``: the number of logits

An argument that is given goes before the part of the classifier, and one that has no default and
is no part has to be given. Two exceptions get a default here: ``p`` of DICE is 0.9, OpenOOD's
setting, and ``d`` of ViM is 1000 for features of :math:`D \\geq 2048` and 512 for
:math:`D \\geq 768`, as in the authors' code for ImageNet, and :math:`D / 2` below, as in OpenOOD
for LeNet and ResNet-18.

.. autofunction:: pood_plugins.registry.list_detectors

.. autofunction:: pood_plugins.registry.list_losses

.. autofunction:: pood_plugins.registry.list_benchmarks

.. autofunction:: pood_plugins.registry.list_plugins

.. autofunction:: pood_plugins.registry.get_info

.. autofunction:: pood_plugins.registry.load

.. autofunction:: pood_plugins.registry.build

.. autofunction:: pood_plugins.registry.display_name

.. autoclass:: pood_plugins.registry.PluginInfo
    :members:

.. autoclass:: pood_plugins.registry.BuildRecord
    :members:
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _loader
from ._loader import (
    PluginInfo,
    list_benchmarks,
    list_detectors,
    list_losses,
    list_plugins,
)

if TYPE_CHECKING:
    from pytorch_ood.api import Detector

    from .model.split import SplitModel

__all__ = [
    "BuildRecord",
    "PluginInfo",
    "build",
    "display_name",
    "get_info",
    "list_benchmarks",
    "list_detectors",
    "list_losses",
    "list_plugins",
    "load",
]

# class name -> name in the literature, where they differ
_LITERATURE_NAMES = {
    "EnergyBased": "Energy",
    "MaxLogit": "MLS",
    "MaxSoftmax": "MSP",
    "RMD": "RMDS",
}
_ALIASES = {alias: name for name, alias in _LITERATURE_NAMES.items()}
_ALIASES.update(EBO="EnergyBased", MDS="Mahalanobis")


def get_info(name: str, kind: str = "detector") -> PluginInfo:
    """
    Describe a detector, loss or benchmark without importing it.

    :param name: name of the class, ``distribution:Name`` or, for detectors, the name in the
        literature; in upper or lower case
    :param kind: ``"detector"``, ``"loss"`` or ``"benchmark"``
    :return: name, kind, origin (distribution), version and import target
    :raises LookupError: if the name is unknown (the text gives the nearest ones) or claimed by
        several distributions (the text gives their qualified names)
    :raises ValueError: if ``kind`` is unknown
    """
    return _loader.get_info(name, kind, _ALIASES if kind == "detector" else None)


def load(name: str, kind: str = "detector") -> type:
    """
    Import a detector, loss or benchmark.

    :param name: see :func:`get_info`
    :param kind: ``"detector"``, ``"loss"`` or ``"benchmark"``
    :return: the class
    :raises LookupError: if the name is unknown or claimed by several distributions
    :raises ImportError: if the import fails or gives no subclass of pytorch-ood's base class; the
        text names the distribution
    :raises ValueError: if ``kind`` is unknown
    """
    return get_info(name, kind).load()


def display_name(class_name: str) -> str:
    """
    Name of a detector as tables show it.

    :param class_name: name of the class, e.g. ``"MaxSoftmax"``
    :return: its name in the literature where that differs, e.g. ``"MSP"``, otherwise the same
    """
    return _LITERATURE_NAMES.get(class_name, class_name)


@dataclass(frozen=True)
class BuildRecord:
    """
    How :func:`build` made a detector. ``build(record.info.qualified_name, record.split,
    **record.hyperparameters)`` makes the same detector again.
    """

    #: the class and the distribution it comes from
    info: PluginInfo
    #: constructor arguments as given, and the defaults that :func:`build` chose
    hyperparameters: Mapping[str, Any]
    #: names of the constructor arguments that came from the split
    from_split: tuple[str, ...]
    #: the classifier
    split: SplitModel = field(repr=False)


def build(name: str, split: SplitModel, **hyperparameters: Any) -> Detector:
    """
    Construct a detector for a classifier. It is not fitted and the classifier's mode not changed:
    call ``split.eval()`` before fitting and scoring.

    All detectors built from one split hold the same ``model`` and ``encoder``, so that
    :meth:`Benchmark.evaluate <pytorch_ood.benchmark.Benchmark.evaluate>` runs each only once.

    :param name: see :func:`get_info`
    :param split: the classifier, see :func:`pood_plugins.model.split_model`
    :param hyperparameters: arguments for the detector's constructor
    :return: the detector; its attribute ``build_record`` is a :class:`BuildRecord`
    :raises LookupError: if the name is unknown or claimed by several distributions
    :raises ImportError: if the class cannot be imported
    :raises ValueError: if the constructor has no argument of a given name, or needs one that is
        neither given nor found in the split
    """
    from .model.split import SplitModel

    if not isinstance(split, SplitModel):
        raise ValueError(
            f"build needs a SplitModel, not {type(split).__name__}: pass split_model(model)"
        )
    info = get_info(name)
    detector_class = info.load()
    parameters = inspect.signature(detector_class).parameters
    parts = _parts(detector_class, split)

    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [given for given in hyperparameters if given not in parameters]
    if unknown and not takes_any:
        choices = [parameter for parameter in parameters if parameter not in parts]
        raise ValueError(
            f"{info.name} has no argument {', '.join(unknown)}: "
            f"it takes {', '.join(choices) or 'none'}"
        )

    hyperparameters = {**_defaults(detector_class, split), **hyperparameters}
    from_split = {}
    for parameter in parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or parameter.name in hyperparameters:
            continue
        required = parameter.default is parameter.empty
        part = parts.get(parameter.name)
        # a default other than None is left alone: ``b=1.0`` in some plugin is no bias
        if part is not None and (required or parameter.default is None):
            from_split[parameter.name] = part
        elif required:
            reason = _REASONS.get(parameter.name, "that is no part of a split classifier")
            if parameter.name in parts:
                reason = f"this model has no feature maps ({split.maps_reason})"
            raise ValueError(
                f"{info.name} needs {parameter.name}, but {reason}: pass {parameter.name}=..."
            )

    _warn_without_dropout(detector_class, split)
    detector = detector_class(**from_split, **hyperparameters)
    # an object, since Detector.to and Detector.device look into dicts and would find tensors there
    detector.build_record = BuildRecord(info, hyperparameters, tuple(from_split), split)
    return detector


# constructor argument -> why it cannot be read off a classifier
_REASONS = {
    "text_embeddings": "class text embeddings come from a vision-language model",
    "weights": "class weights for the energy come from training with VOS",
}


def _parts(detector_class: type, split: SplitModel) -> dict[str, Any]:
    """
    Constructor arguments that a split provides, None for what this network does not have.
    """
    from pytorch_ood.api import FeatureMapsDetector, StructuredDetector
    from pytorch_ood.detector import MultiMahalanobis

    on_maps = issubclass(detector_class, (FeatureMapsDetector, StructuredDetector))
    # detached: Detector.to would turn a Parameter into one that the model does not know
    w = split.head.weight.detach()
    b = w.new_zeros(len(w)) if split.head.bias is None else split.head.bias.detach()
    return {
        "model": split.layers if issubclass(detector_class, MultiMahalanobis) else split,
        "encoder": split.encoder,
        "head": split.map_head if on_maps else split.head,
        "backbone": split.feature_maps,
        "feature_layers": split.layers,
        "layers": split.stages,
        "w": w,
        "b": b,
        "num_classes": split.head.out_features,
    }


def _defaults(detector_class: type, split: SplitModel) -> dict[str, Any]:
    """
    Values for arguments that upstream requires although no part of the model determines them.
    """
    from pytorch_ood.detector import DICE, ViM

    if detector_class is DICE:
        return {"p": 0.9}
    if detector_class is ViM:
        width = split.head.in_features
        return {"d": 1000 if width >= 2048 else 512 if width >= 768 else width // 2}
    return {}


def _warn_without_dropout(detector_class: type, split: SplitModel) -> None:
    from pytorch_ood.detector import MCD
    from torch.nn.modules.dropout import _DropoutNd

    if issubclass(detector_class, MCD) and not any(
        isinstance(module, _DropoutNd) and module.p > 0 for module in split.modules()
    ):
        warnings.warn(
            "MCD compares predictions under dropout, but this model has no active dropout layer: "
            "unless its forward drops activations by other means, all scores are equal "
            "(AUROC 0.5)",
            stacklevel=3,
        )
