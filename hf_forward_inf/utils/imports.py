"""Importing a module of ours as soon as another package's is imported, and not before."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def import_after(watched: str, ours: str) -> None:
    """Import `ours` now if `watched` is imported already, else right after it is."""
    if watched in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Watcher(watched, ours))


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it leaves the watched module to the other finders, and has ours imported after it."""

    def __init__(self, watched: str, ours: str):
        self.watched, self.ours = watched, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(self.ours)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec
