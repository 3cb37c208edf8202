"""Names that load when they are asked for, and work that waits for another package: the import of this one stays light.

Both are for the `__init__` of the package and of its rooms; see PEP 562 for the first.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`, by which its public names are imported on first use.

    Args:
        package: the package's `__name__`.
        homes: public name -> module within the package that defines it.
        submodules: modules that are attributes of the package too, imported by who asks.
    """

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *submodules})

    return __getattr__, __dir__


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run `action` once a top-level package is imported: at once where it is, else at the end of its first import.

    Asking twice for one package before it is imported keeps the last action, so that a reload does not pile them up.
    """
    waiting = [finder for finder in sys.meta_path if isinstance(finder, _FirstImport) and finder.name == name]
    for finder in waiting:
        sys.meta_path.remove(finder)
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _FirstImport(name, action))


class _FirstImport(MetaPathFinder):
    """Lets the other finders find a package and adds `action` to the end of its execution; leaves when that is done.

    An import that fails leaves it in place for the next one.
    """

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, None for every other module and where there is no such package."""
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._append_action(spec.loader)
        return spec

    def _append_action(self, loader: Any) -> None:
        """Patch this one loader, not its class, so that the module keeps the loader it would have had."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        loader.exec_module = exec_module
