"""
Everything that is installed, by name: the classes that pytorch-ood has itself, and those that
distributions add to it by entry points.

Nothing is imported before :meth:`PluginInfo.load`: listing reads metadata, and for pytorch-ood
itself source text.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, Optional

from . import entry_points

if TYPE_CHECKING:
    from .entry_points import PluginInfo as PluginInfo


def _pytorch_ood() -> Optional[Path]:
    """Folder of the installed pytorch-ood, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("pytorch_ood")
    # without an origin, it is a folder of that name on sys.path and no package
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _finder() -> ModuleType:
    """
    What finds entry points: ``pytorch_ood.registry``, as which :mod:`pood_plugins.entry_points` is
    offered to pytorch-ood, where it has taken it, and ours otherwise.
    """
    folder = _pytorch_ood()
    path = folder / "registry.py" if folder is not None else None
    source = path.read_text("utf-8") if path is not None and path.is_file() else ""
    if not all(name in source for name in ("def find_plugins(", "class PluginInfo", "KINDS = ")):
        return entry_points  # there is none, or it is another one
    name = "pytorch_ood.registry"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        # for whoever imports it later, so that there is one PluginInfo
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


_FINDER = _finder()
if not TYPE_CHECKING:
    PluginInfo = _FINDER.PluginInfo


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
    plugins = _FINDER.find_plugins(kind)
    index: Dict[str, List[PluginInfo]] = {}
    # one entry per qualified name, also if pytorch-ood should come to register its own classes
    for info in {i.qualified_name: i for i in [*plugins, *_upstream(kind)]}.values():
        for name in (info.name, info.qualified_name):
            index.setdefault(_key(name), []).append(info)
    return index


def _upstream(kind: str) -> Iterator[PluginInfo]:
    folder = _pytorch_ood()
    if folder is None:
        return
    try:
        version = importlib.metadata.version("pytorch-ood")
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        found = re.search(
            r'^__version__ = "(.+)"', (folder / "__init__.py").read_text("utf-8"), re.M
        )
        version = found[1] if found else "unknown"
    base = _FINDER.KINDS[kind][1].rpartition(":")[2]
    for name in _exported_classes(folder / kind):
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
