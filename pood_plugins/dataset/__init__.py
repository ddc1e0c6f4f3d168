"""
Data that the benchmarks need and pytorch-ood lacks.
"""

from .digits import GreyPatches, HandwrittenDigits, UniformNoise
from .packs import ImagePack, PackLoader, RandomCropFlip, read_pack

__all__ = [
    "GreyPatches",
    "HandwrittenDigits",
    "ImagePack",
    "PackLoader",
    "RandomCropFlip",
    "UniformNoise",
    "read_pack",
]
