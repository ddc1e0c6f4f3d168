"""
Training with auxiliary outliers.
"""

from .finetune import DivergenceError, finetune
from .outliers import EnergyClusterSampler

__all__ = ["DivergenceError", "EnergyClusterSampler", "finetune"]
