"""
Data that the benchmarks need and pytorch-ood lacks.
"""

from .digits import GreyPatches, HandwrittenDigits, UniformNoise
from .endoscopy import GastroVision, KvasirV2
from .packs import ImagePack, PackLoader, RandomCropFlip, read_pack

__all__ = [
    "GastroVision",
    "GreyPatches",
    "HandwrittenDigits",
    "ImagePack",
    "KvasirV2",
    "PackLoader",
    "RandomCropFlip",
    "UniformNoise",
    "read_pack",
]
