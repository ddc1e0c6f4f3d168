"""
Objective functions that train a classifier with auxiliary outliers.
"""

from .greg import GRegLoss

__all__ = ["GRegLoss"]
