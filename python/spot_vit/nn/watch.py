"""Whether modules are what they were: what was prepared from them once is right as long as so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def untouched(*modules: nn.Module | None) -> bool:
    """Whether nobody hooks or replaces what these modules do, so that they may be fused."""
    for module in modules:
        if module is None:
            continue
        own = module.__dict__
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            return False
    return True


def whole(module: nn.Module) -> bool:
    """Whether the parameters of a layer are plain floats: not quantised, sharded or the like."""
    return all(
        parameter.is_floating_point() and not is_traceable_wrapper_subclass(parameter)
        for parameter in module.parameters(recurse=False)
    )


def tensor_state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes whenever the values of a parameter may have changed."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Watch:
    """Notices that children of some modules were replaced, hooked or given other weights.

    Asking costs a few microseconds for a block of a ViT, so it can be asked in every pass.

    Args:
        places: names of children by parent; a child may be missing.
        called: children that are called as modules, and so may be hooked.

    Attributes:
        untouched: whether nobody hooked or replaced what the children do, as `untouched` has it.
    """

    def __init__(
        self, places: dict[nn.Module, tuple[str, ...]], called: tuple[nn.Module, ...] = ()
    ) -> None:
        self._places = [
            (parent._modules, name, parent._modules.get(name), type(parent._modules.get(name)))
            for parent, names in places.items()
            for name in names
        ]
        found = {child for _, _, child, _ in self._places if child is not None}
        self._own = [module.__dict__ for module in found]
        self._hooks = [own[hooks] for own in self._own for hooks in _HOOKS]
        self._touched = self._touches()
        self.untouched = untouched(*(child for child in found if child not in called))
        self._parameters: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._versions: list[tuple[Tensor, int]] = []
        for module in found:
            for name, value in module._parameters.items():
                if value is not None:
                    self._parameters.append((module._parameters, name, value, value.data_ptr()))
                    if not value.is_inference():
                        self._versions.append((value, value._version))

    @property
    def differentiated(self) -> bool:
        """Whether a gradient by a parameter of the children may be asked for now."""
        return torch.is_grad_enabled() and any(p.requires_grad for _, _, p, _ in self._parameters)

    def unchanged(self) -> bool:
        """Whether all is as it was when the watch was made."""
        for children, name, child, kind in self._places:
            if children.get(name) is not child or type(child) is not kind:
                return False
        for parameters, name, value, place in self._parameters:
            if parameters.get(name) is not value or value.data_ptr() != place:
                return False
        for value, version in self._versions:
            if value._version != version:
                return False
        return self._touches() == self._touched

    def _touches(self) -> tuple[Any, Any]:
        """Numbers of hooks on the children, and which have a forward method of their own."""
        hooks = [*map(len, self._hooks)] if any(self._hooks) else None
        return hooks, [place for place, own in enumerate(self._own) if "forward" in own]
