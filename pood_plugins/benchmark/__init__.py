"""
Benchmarks with the interface of pytorch-ood's.
"""

from .digits import Digits
from .endoscopy import GastroVisionBenchmark, KvasirV2Benchmark
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
    "GastroVisionBenchmark",
    "KvasirV2Benchmark",
    "PackedCIFAR10",
    "PartialCIFAR10",
    "PartialCIFAR100",
    "PartialImageNet",
    "PartialImageNet200",
    "openood",
]
