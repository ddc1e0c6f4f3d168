"""
Out-of-distribution detectors. One method is one module with one class and its pure functions.
"""

from .grood import GROOD, grood_gradients, mixup_prototype, noise_prototype
from .nero import NERO, nero_relevance

__all__ = [
    "GROOD",
    "NERO",
    "grood_gradients",
    "mixup_prototype",
    "nero_relevance",
    "noise_prototype",
]
