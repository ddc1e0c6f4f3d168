"""
GROOD, NERO and GReg as plugins for pytorch-ood.

The public names are imported on first use, so that ``import pood_plugins`` loads neither torch nor
pytorch-ood.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "GROOD": "detector",
    "NERO": "detector",
    "Digits": "benchmark",
    "FolderBenchmark": "benchmark",
    "SplitModel": "model",
    "split_model": "model",
    "build": "registry",
    "list_benchmarks": "registry",
    "list_detectors": "registry",
    "list_losses": "registry",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
