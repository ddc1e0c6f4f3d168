"""
Benchmarks that pytorch-ood lacks, as subclasses of :class:`pytorch_ood.benchmark.Benchmark`.
"""

from .digits import Digits

__all__ = ["Digits"]
