"""
Benchmarks with the interface of pytorch-ood's.
"""

from .digits import Digits
from .folder import FolderBenchmark
from .openood import (
    PackedCIFAR10,
    PartialCIFAR10,
    PartialCIFAR100,
    PartialImageNet,
    PartialImageNet200,
    openood,
)

__all__ = [
    "Digits",
    "FolderBenchmark",
    "PackedCIFAR10",
    "PartialCIFAR10",
    "PartialCIFAR100",
    "PartialImageNet",
    "PartialImageNet200",
    "openood",
]
