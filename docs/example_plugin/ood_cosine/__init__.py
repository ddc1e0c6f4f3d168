"""Cosine similarity to the class means, as a detector for pytorch-ood."""

from .detector import CosinePrototypes

__all__ = ["CosinePrototypes"]
