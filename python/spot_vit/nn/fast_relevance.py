"""Token relevance in a fast model: the module's layers as products by packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from spot_vit.nn.packed import product_of, serves, untracked
from spot_vit.nn.relevance import TokenRelevance
from spot_vit.nn.watch import Watch

_LAYERS = ("norm", "remap", "fc1", "fc2", "fc3")


class FastTokenRelevance(TokenRelevance):
    """`TokenRelevance` for inference; the same values to rounding, and the same module besides.

    Attributes:
        kind: who multiplies, as in `PackedLinear`; "plain" leaves the module as it was.
    """

    kind = "plain"

    def forward(self, tokens: Tensor, features: Tensor | None, keep: Tensor | None) -> Tensor:
        """Log-probabilities [B, N, 2] of keeping and of dropping, as the base class gives them."""
        plan = None if keep is not None or self.kind == "plain" else self._planned()
        like = tokens if features is None or self.norm is not None else features
        if plan is None or not serves(like, plan.dtype, plan.watch.differentiated):
            return super().forward(tokens, features, keep)
        with untracked():
            return plan.run(tokens, features)

    def _planned(self) -> _Plan | None:
        """The plan of this module, made anew after a change; None where there can be none."""
        if torch.compiler.is_compiling():
            return None
        plan = self.__dict__.get("_plan")
        if plan is None or not plan.watch.unchanged():
            plan = self.__dict__["_plan"] = _Plan(self)
        return plan if plan.ready else None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class _Plan:
    """Packed weights of a module, right as long as its watch sees no change."""

    def __init__(self, module: FastTokenRelevance) -> None:
        self.watch = Watch({module: _LAYERS})
        self.dtype = module.fc1.weight.dtype
        self.ready = module.fc1.weight.is_cpu and self.watch.untouched and module.plain
        if not self.ready:
            return
        kind, self._norm = module.kind, module.norm
        with torch.no_grad():
            if module.remap is not None:
                self._remap = product_of(kind, module.remap.weight, module.remap.bias, "none")
            self._fc1 = product_of(kind, module.fc1.weight, module.fc1.bias, "none")
            self._fc2 = product_of(kind, module.fc2.weight, module.fc2.bias, "none")
            self._fc3 = product_of(kind, module.fc3.weight, module.fc3.bias)

    def run(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        parts = [] if features is None else [features.to(self.dtype)]
        if self._norm is not None:
            norm = self._norm
            x = torch.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            local, shared = self._remap(x).chunk(2, dim=-1)
            parts = [local, shared.mean(dim=1, keepdim=True).expand_as(local), *parts]
        logits = self._fc3(self._fc2(self._fc1(torch.cat(parts, dim=-1))))
        return logits.float().log_softmax(dim=-1)
