"""How an adapter is tied to a timm class: by exact class and by a fingerprint of what it overrides.

A timm release that changes one of the overridden methods or the children an adapter calls is
noticed at conversion, not by wrong results.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class ClassAdapter:
    """One timm class and the subclass that takes its place.

    Attributes:
        target: exact class to convert.
        adapter: importable subclass assigned to `__class__`, so that models pickle.
        signatures: parameter names of the overridden methods, as they were when the adapter was
            written.
        children: submodules and attributes the adapter uses.
        refuse: reason not to convert an instance, or None.
    """

    target: type[nn.Module]
    adapter: type[nn.Module]
    signatures: dict[str, tuple[str, ...]]
    children: tuple[str, ...]
    refuse: Callable[[Any], str | None] = lambda module: None

    def mismatch(self, module: nn.Module) -> str | None:
        """Why `module` cannot be converted, or None."""
        for method, expected in self.signatures.items():
            found = tuple(inspect.signature(getattr(self.target, method)).parameters)[1:]
            if found != expected:
                return f"its {method}{found} is not the {method}{expected} SPOT was written for"
        if missing := [name for name in self.children if not hasattr(module, name)]:
            return f"it has no {', '.join(missing)}"
        return self.refuse(module)


MODELS: dict[type[nn.Module], ClassAdapter] = {}
BLOCKS: dict[type[nn.Module], ClassAdapter] = {}
ATTENTIONS: dict[type[nn.Module], ClassAdapter] = {}


def register(table: dict[type[nn.Module], ClassAdapter], entry: ClassAdapter) -> None:
    """Adds an adapter to one of the tables."""
    table[entry.target] = entry
