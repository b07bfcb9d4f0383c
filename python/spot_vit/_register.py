"""Registers the named models with timm, without importing timm or torch for it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from spot_vit.utils.requirements import timm_trouble

_MODULES = (
    "spot_vit.models.digits_vit",
    "spot_vit.models.lvvit",
    "spot_vit.models.named",
)  # they import timm, and register when imported


def register_with_timm() -> None:
    """Registers now if timm is there, else as soon as it is imported."""
    if sys.modules.get("timm") is not None:
        _register()
    else:
        sys.meta_path.insert(0, _WhenTimmIsImported())


def _register() -> None:
    try:
        for name in _MODULES:
            importlib.import_module(name)
    except ImportError as cause:  # timm itself shall be usable; what needs more of it raises
        if (words := timm_trouble(cause)) is None:
            raise
        warnings.warn(f"{words} (its models are not registered)", RuntimeWarning, stacklevel=2)


class _WhenTimmIsImported(importlib.abc.MetaPathFinder):
    """Has the other finders find timm, and registers behind its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # a spec may be asked for without an import
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
