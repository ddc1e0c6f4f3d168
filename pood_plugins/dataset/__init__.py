"""
Data that the benchmarks need and pytorch-ood lacks.
"""

from .digits import GreyPatches, HandwrittenDigits, UniformNoise

__all__ = ["GreyPatches", "HandwrittenDigits", "UniformNoise"]
