"""Adapters of subclasses: a class of the user's own, converted as the class below it.

Fits where the subclass adds (an `__init__` of its own, other heads, other methods) and changes
nothing that takes part in the forward pass.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import Any

from torch import nn

from spot_vit.models.adapters.base import AdapterEntry, names

_APART = frozenset(
    names(
        "__init__ __new__ __module__ __qualname__ __doc__ __dict__ __weakref__ __annotations__ "
        "init_weights _init_weights fix_init_weight reset_parameters _init_buffers "
        "init_non_persistent_buffers load_pretrained no_weight_decay group_matcher extra_repr "
        "set_grad_checkpointing get_classifier reset_classifier set_distilled_training "
        "set_input_size set_window_size get_patch_size prewarm_patch_interpolator "
        "prune_intermediate_layers get_intermediate_layers __annotate__ __annotate_func__ "
        "__annotations_cache__ __static_attributes__ __firstlineno__ __parameters__"
    )
)
"""What a subclass may define though the class below does: no part of a forward pass."""

_OF_EVERY_MODULE = frozenset(names("__call__ _call_impl __reduce__ __reduce_ex__"))

_ADDED = frozenset(names("stage relevance cuts connectivity"))
"""Attributes that conversion adds to instances."""

_MADE: dict[tuple[type, type], type] = {}
_ORIGINAL: dict[type, type] = {}


def entry_for(entry: AdapterEntry, target: type[nn.Module]) -> AdapterEntry:
    """The entry of a subclass of `entry.target`, with an adapter made for it."""
    return dataclasses.replace(entry, target=target, adapter=_adapter(entry.adapter, target))


def original_of(adapter: type) -> type | None:
    """The user's class that an adapter was made for; None where it was not made here."""
    return _ORIGINAL.get(adapter)


def conflict(entry: AdapterEntry, module: nn.Module) -> str | None:
    """Why a module of a subclass of `entry.target` cannot be converted as that, or None."""
    target, cls = entry.target, type(module)
    below = [c for c in target.__mro__ if c not in nn.Module.__mro__]
    ours = [c for c in entry.adapter.__mro__ if c not in target.__mro__]
    own = [c for c in cls.__mro__ if c not in target.__mro__]
    taken = {name for c in (*below, *ours) for name in vars(c)} - _APART
    found = {
        name
        for c in own
        for name, value in vars(c).items()
        if name in taken | _OF_EVERY_MODULE
        and _written(value) is not _written(getattr(target, name, None))
    }
    if found:
        return (
            f"it is a {target.__name__} that overrides {', '.join(sorted(found))}, which SPOT "
            "overrides or calls, so what it does there would be lost"
        )
    added = {name for c in ours for name in vars(c)} - set(entry.children) - _APART | _ADDED
    places = (vars(module), module._modules, module._parameters, module._buffers)
    if clash := sorted(name for name in added if any(name in place for place in places)):
        return f"it has attributes of its own that SPOT needs to set: {', '.join(clash)}"
    return None


def _written(value: Any) -> Any:
    """A method as it was written: some base classes wrap what each subclass inherits."""
    return inspect.unwrap(value)


def _adapter(adapter: type, cls: type) -> type:
    """The class (adapter, cls), made once; its instances pickle wherever `cls` is importable."""
    made = _MADE.get((adapter, cls))
    if made is None:
        made = types.new_class(f"Spot{cls.__name__}", (adapter, cls), {}, _body(adapter, cls))
        _MADE[adapter, cls] = made
        _ORIGINAL[made] = cls
    return made


def _body(adapter: type, cls: type) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """As any object, with the two classes instead of one that no module names."""
        reduced: Any = object.__reduce_ex__(self, max(2, int(protocol)))
        if type(self) is not _MADE[adapter, cls]:  # changed once more, by fully_shard for example
            return reduced
        return _blank, (adapter, cls, *reduced[1][1:]), *reduced[2:]

    def fill(body: dict[str, Any]) -> None:
        body["__module__"] = adapter.__module__
        body["__doc__"] = f"A converted `{cls.__qualname__}`."
        body["__reduce_ex__"] = reduce

    return fill


def _blank(adapter: type, cls: type, *arguments: Any) -> Any:
    """An empty instance, for unpickling."""
    made = _adapter(adapter, cls)
    return made.__new__(made, *arguments)
