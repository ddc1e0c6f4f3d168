"""
GROOD, NERO and GReg as plugins for pytorch-ood.

The public names are imported on first use, so that ``import pood_plugins`` loads neither torch nor
pytorch-ood.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import Digits as Digits
    from .benchmark import FolderBenchmark as FolderBenchmark
    from .detector import GROOD as GROOD
    from .detector import NERO as NERO
    from .model import SplitModel as SplitModel
    from .model import split_model as split_model
    from .registry import build as build
    from .registry import list_benchmarks as list_benchmarks
    from .registry import list_detectors as list_detectors
    from .registry import list_losses as list_losses

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


if not TYPE_CHECKING:  # or every name would do, and be of any type

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
