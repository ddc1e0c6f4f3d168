"""
Models: splitting any classifier into the parts that detectors ask for.
"""

from .resnet_cifar import CIFARResNet, resnet20, resnet56
from .split import SplitModel, split_model

__all__ = ["CIFARResNet", "SplitModel", "resnet20", "resnet56", "split_model"]
