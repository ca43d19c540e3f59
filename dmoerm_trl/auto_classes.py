"""
Register DMoERM with transformers' Auto classes as soon as both packages are imported, in either order. The configuration is
registered first; building one registers the models. This does not make `import dmoerm_trl` import any library.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

THEIRS = "transformers.models.auto.configuration_auto"
OURS = "dmoerm_trl.modeling.configuration_dmoerm"


class _Finder(MetaPathFinder):
    """Import hook that imports our configuration right after the module of `AutoConfig`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != THEIRS or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(OURS)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Register DMoERM with the Auto classes, now if they are imported, otherwise when they are."""
    if THEIRS in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, _Finder())
