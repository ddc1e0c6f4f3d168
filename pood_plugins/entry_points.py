"""
Finds the classes that installed packages add to pytorch-ood by entry points in the groups
``pytorch_ood.detectors``, ``pytorch_ood.losses`` and ``pytorch_ood.benchmarks``.

..  autofunction:: pood_plugins.entry_points.find_plugins
..  autoclass:: pood_plugins.entry_points.PluginInfo
    :members:
"""

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, distribution, distributions
from typing import List

_warn = lru_cache(maxsize=None)(logging.getLogger(__name__).warning)  # of each fault once

# kind -> entry-point group and base class
KINDS = {
    "detector": ("pytorch_ood.detectors", "pytorch_ood.api:Detector"),
    "loss": ("pytorch_ood.losses", "torch.nn:Module"),
    "benchmark": ("pytorch_ood.benchmarks", "pytorch_ood.benchmark:Benchmark"),
}


@dataclass(frozen=True)
class PluginInfo:
    """What is known of a registered class without importing it."""

    name: str  #: name of the class
    kind: str  #: ``"detector"``, ``"loss"`` or ``"benchmark"``
    origin: str  #: normalised name of the distribution that adds it, e.g. ``"my-package"``
    version: str  #: version of that distribution
    target: str  #: where it is imported from, as ``module:attribute``

    @property
    def qualified_name(self) -> str:
        """``origin:name``, which stays unique when several distributions claim one name."""
        return f"{self.origin}:{self.name}"

    def load(self) -> type:
        """
        :return: the class, imported
        :raises ImportError: if that fails or gives no subclass of pytorch-ood's base class
        """
        base = EntryPoint("base", KINDS[self.kind][1], "").load()
        try:
            loaded = EntryPoint(self.name, self.target, "").load()
            if not (isinstance(loaded, type) and issubclass(loaded, base)):
                raise TypeError(f"no subclass of {KINDS[self.kind][1].replace(':', '.')}")
        except Exception as error:
            raise ImportError(
                f"{self.kind} {self.name} cannot be loaded from '{self.target}' of {self.origin} "
                f"{self.version} (repair or uninstall it): {type(error).__name__}: {error}"
            ) from error
        return loaded


def find_plugins(kind: str = "detector") -> List[PluginInfo]:
    """
    :param kind: ``"detector"``, ``"loss"`` or ``"benchmark"``
    :return: registered classes of that kind, read from metadata; several may have one name
    :raises ValueError: if there is no such kind
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind '{kind}': choose from {', '.join(KINDS)}")
    group, found = KINDS[kind][0], {}
    for copy in distributions():
        try:
            if any(point.group == group for point in copy.entry_points):
                origin = re.sub(r"[-_.]+", "-", copy.metadata["Name"]).lower()
                first = distribution(origin)  # on sys.path, so the copy that is imported
                about = (kind, origin, first.version)
                points = [point for point in first.entry_points if point.group == group]
                found[origin] = [PluginInfo(p.name, *about, p.value) for p in points]
        except Exception as error:  # a broken one must not hide the others
            _warn(f"Skipped a distribution in {copy.locate_file('')}, unreadable: {error!r}")
    return [plugin for plugins in found.values() for plugin in plugins]
