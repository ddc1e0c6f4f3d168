"""
Runs detectors on a benchmark and reports the results as one table.
"""

from .report import Report
from .runner import run

__all__ = ["Report", "run"]
