"""
Finds the detectors, losses and benchmarks that installed distributions add to pytorch-ood.

A distribution adds a class with an entry point in the group ``pytorch_ood.detectors``,
``pytorch_ood.losses`` or ``pytorch_ood.benchmarks``. Nothing is imported before
:meth:`PluginInfo.load`: listing reads metadata, and for pytorch-ood itself source text.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import logging
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional

log = logging.getLogger(__name__)

# kind, which also names the subpackage of pytorch-ood -> entry-point group and base class
_KINDS = {
    "detector": ("pytorch_ood.detectors", "pytorch_ood.api:Detector"),
    "loss": ("pytorch_ood.losses", "torch.nn:Module"),
    "benchmark": ("pytorch_ood.benchmarks", "pytorch_ood.benchmark:Benchmark"),
}


@dataclass(frozen=True)
class PluginInfo:
    """
    What is known of a registered class without importing it.
    """

    name: str  #: name of the class
    kind: str  #: ``"detector"``, ``"loss"`` or ``"benchmark"``
    origin: str  #: normalised name of the distribution that adds it, e.g. ``"pytorch-ood"``
    version: str  #: version of that distribution
    target: str  #: where it is imported from, as ``module:attribute``

    @property
    def qualified_name(self) -> str:
        """``origin:name``, which stays unique when several distributions claim one name."""
        return f"{self.origin}:{self.name}"

    def load(self) -> type:
        """
        Import the class.

        :raises ImportError: if that fails or gives anything but a subclass of pytorch-ood's base
            class (:class:`torch.nn.Module` for losses). The text names distribution and target.
        """
        _, base_target = _KINDS[self.kind]
        base = EntryPoint("base", base_target, "").load()
        source = f"'{self.target}' of {self.origin} {self.version}"
        try:
            loaded = EntryPoint(self.name, self.target, "").load()
        except Exception as error:
            raise ImportError(
                f"{self.kind} {self.name} cannot be imported from {source} (repair or uninstall "
                f"it): {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise ImportError(
                f"{self.kind} {self.name} must be a subclass of {base_target.replace(':', '.')}, "
                f"which {source} is not (repair or uninstall it)"
            )
        return loaded


def list_detectors() -> List[str]:
    """Sorted names of all detectors, as ``distribution:Name`` where several claim one name."""
    return _names("detector")


def list_losses() -> List[str]:
    """Sorted names of all losses, as ``distribution:Name`` where several claim one name."""
    return _names("loss")


def list_benchmarks() -> List[str]:
    """Sorted names of all benchmarks, as ``distribution:Name`` where several claim one name."""
    return _names("benchmark")


def list_plugins(kind: str = "detector") -> Dict[str, PluginInfo]:
    """
    All classes of a kind by name, sorted, as ``distribution:Name`` where several claim one name.

    :param kind: ``"detector"``, ``"loss"`` or ``"benchmark"``
    :raises ValueError: if there is no such kind
    """
    index = _index(kind)
    infos = {info for found in index.values() for info in found}
    named = {i.name if len(index[_key(i.name)]) == 1 else i.qualified_name: i for i in infos}
    return dict(sorted(named.items()))


def get_info(
    name: str, kind: str = "detector", aliases: Optional[Mapping[str, str]] = None
) -> PluginInfo:
    """
    Describe a registered class without importing it.

    :param name: name of the class or ``distribution:Name``, in upper or lower case
    :param kind: ``"detector"``, ``"loss"`` or ``"benchmark"``
    :param aliases: other names, mapped to names of classes; a class of that very name goes first
    :raises LookupError: if no class, or more than one, has that name
    """
    index = _index(kind)
    targets = {_key(alias): target for alias, target in (aliases or {}).items()}
    found = index.get(_key(name)) or index.get(_key(targets.get(_key(name), name)), [])
    if len(found) == 1:
        return found[0]
    if found:
        claims = " and ".join(sorted(info.qualified_name for info in found))
        raise LookupError(f"{kind} '{name}' is claimed by {claims}: write one of these names")
    choices = {_key(choice): choice for choice in [*_names(kind), *(aliases or {})]}
    near = [choices[key] for key in difflib.get_close_matches(_key(name), choices)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {_names(kind)}"
    raise LookupError(f"no {kind} is called '{name}': {hint}")


def load(name: str, kind: str = "detector") -> type:
    """Import a registered class, see :func:`get_info` and :meth:`PluginInfo.load`."""
    return get_info(name, kind).load()


def _key(name: str) -> str:
    origin, _, bare = name.rpartition(":")
    return f"{_normalized(origin)}:{bare}".casefold() if origin else bare.casefold()


def _normalized(distribution: str) -> str:
    """Name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _names(kind: str) -> List[str]:
    return list(list_plugins(kind))


def _index(kind: str) -> Dict[str, List[PluginInfo]]:
    """Classes by their bare and by their qualified names."""
    if kind not in _KINDS:
        raise ValueError(f"unknown kind '{kind}': choose from {', '.join(_KINDS)}")
    index: Dict[str, List[PluginInfo]] = {}
    # one entry per qualified name, also if pytorch-ood should come to register its own classes
    for info in {i.qualified_name: i for i in [*_plugins(kind), *_upstream(kind)]}.values():
        for name in (info.name, info.qualified_name):
            index.setdefault(_key(name), []).append(info)
    return index


def _plugins(kind: str) -> Iterator[PluginInfo]:
    group, _ = _KINDS[kind]
    origins = set()
    for distribution in importlib.metadata.distributions():
        try:
            entry_points = [e for e in distribution.entry_points if e.group == group]
            if not entry_points:
                continue
            origin, version = _normalized(distribution.metadata["Name"]), distribution.version
        except Exception as error:
            log.warning(f"Skipped a distribution with unreadable metadata: {error!r}")
            continue
        if origin not in origins:  # a second copy further down sys.path is not the one imported
            origins.add(origin)
            for entry_point in entry_points:
                yield PluginInfo(entry_point.name, kind, origin, version, entry_point.value)


def _upstream(kind: str) -> Iterator[PluginInfo]:
    spec = importlib.util.find_spec("pytorch_ood")
    if spec is None or not spec.submodule_search_locations:
        return
    version = importlib.metadata.version("pytorch-ood")
    base = _KINDS[kind][1].rpartition(":")[2]
    for name in _exported_classes(Path(spec.submodule_search_locations[0]) / kind):
        if name != base:
            yield PluginInfo(name, kind, "pytorch-ood", version, f"pytorch_ood.{kind}:{name}")


def _exported_classes(package: Path) -> List[str]:
    """Names of the classes, not functions, that a package imports from its own modules."""
    exported: List[str] = []
    for node in ast.parse((package / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            names = [alias.name for alias in node.names]
            module = package.joinpath(*node.module.split("."))
            if module.is_dir():
                classes = _exported_classes(module)
                exported += [name for name in names if name in classes]
            else:
                source = module.with_suffix(".py").read_text("utf-8")
                # ``A = B`` gives a class a second name
                pattern = r"^(class {0}\b|{0} = \w+$)"
                exported += [n for n in names if re.search(pattern.format(n), source, re.M)]
    return exported
