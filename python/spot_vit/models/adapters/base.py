"""Adapters: subclasses that take the place of timm classes, found by exact class and fingerprint.

A timm release that changes one of the overridden methods or the children an adapter calls is
noticed at conversion, not by wrong results.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spot_vit.nn.attention import AttentionRequest, BlockResult, attend, cut_inside
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.operands import Recorder
from spot_vit.nn.pooling import refuse_attn_pool
from spot_vit.nn.positional import PositionTables


@dataclasses.dataclass(frozen=True)
class AdapterEntry:
    """Entry of a table of adapters: one timm class and the subclass that takes its place.

    Attributes:
        target: exact class to convert.
        adapter: importable subclass assigned to `__class__`, so that models pickle.
        signatures: parameter names of the overridden methods, as they were when the adapter was
            written.
        children: submodules and attributes the adapter uses.
        refuse: reason not to convert an instance, or None.
        refuse_sparse: reason why this attention cannot be made sparse, or None.
    """

    target: type[nn.Module]
    adapter: type[nn.Module]
    signatures: dict[str, tuple[str, ...]]
    children: tuple[str, ...]
    refuse: Callable[[Any], str | None] = lambda module: None
    refuse_sparse: str | None = None

    def mismatch(self, module: nn.Module) -> str | None:
        """Why `module` cannot be converted, or None."""
        for method, expected in self.signatures.items():
            found = tuple(inspect.signature(getattr(self.target, method)).parameters)[1:]
            if found != expected:
                return f"its {method}{found} is not the {method}{expected} SPOT was written for"
        if missing := [name for name in self.children if not hasattr(module, name)]:
            return f"it has no {', '.join(missing)}"
        return self.refuse(module)


MODELS: dict[type[nn.Module], AdapterEntry] = {}
BLOCKS: dict[type[nn.Module], AdapterEntry] = {}
ATTENTIONS: dict[type[nn.Module], AdapterEntry] = {}

UNSUPPORTED = {
    "DiffAttention": "differential attention subtracts two softmaxes, so a row is no distribution",
    "ParallelScalingBlock": "attention and MLP run side by side from one projection",
    "DiffParallelScalingBlock": "attention and MLP run side by side from one projection",
    "ParallelThingsBlock": "it has several attentions side by side",
    "EvaBlockPostNorm": "there is no adapter for its norms after the branches",
    "Qwen3VitEncoder": "it merges neighbouring tokens, which needs the full grid",
}
"""Why some timm classes have no adapter, by name: a class need not exist in every timm."""


def register(table: dict[type[nn.Module], AdapterEntry], entry: AdapterEntry) -> None:
    """Adds an adapter to one of the tables."""
    table[entry.target] = entry


def names(text: str) -> tuple[str, ...]:
    """Parameter and attribute names: the words of a text."""
    return tuple(text.split())


class BlockAdapter(nn.Module):
    """Mixin of block adapters: a block that answers requests.

    `stage` is the number of the decision taken at this block, or None; `relevance` is its
    predictor, where the method has one. Both live on the block: models may be cut short.
    """

    stage: int | None
    relevance: nn.Module | None

    if TYPE_CHECKING:  # what an adapter provides

        def _attend(
            self, x: Tensor, request: AttentionRequest, **arguments: Any
        ) -> tuple[Tensor, Tensor | None]:
            """The first half of the block: x plus its attention branch, and statistics."""

        def _mix(self, x: Tensor) -> Tensor:
            """The second half: x plus its MLP branch."""

    def forward(
        self, x: Tensor, *args: Any, request: AttentionRequest | None = None, **arguments: Any
    ) -> Any:
        """Tokens [B, N, C], by timm's own forward method; with a request a `BlockResult`."""
        if request is None:
            return super().forward(x, *args, **arguments)
        x, stats = self._attend(x, request, **arguments)
        x, kept = cut_inside(x, stats, request)
        return BlockResult(self._mix(x), stats, kept)


class LayerScaleBlockAdapter(BlockAdapter):
    """Mixin of adapters of pre-norm blocks with scales `gamma_1` and `gamma_2`, or None."""

    norm1: nn.Module
    attn: nn.Module
    gamma_1: Tensor | None
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    gamma_2: Tensor | None
    drop_path2: nn.Module

    def _attend(
        self, x: Tensor, request: AttentionRequest, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        y, stats = self.attn(self.norm1(x), request=request, **arguments)
        return x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y), stats

    def _mix(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class AttentionAdapter(nn.Module):
    """Mixin of attention adapters: attention that answers requests, and may be sparse.

    `connectivity` predicts what queries see, where `sparsify_attention` put a predictor; `recorder`
    is there while `record_operands` wants q and k.
    """

    connectivity: ConnectivityPredictor
    recorder: Recorder | None = None

    if TYPE_CHECKING:  # what an adapter provides

        def _attend(
            self, x: Tensor, request: AttentionRequest, *args: Any, **arguments: Any
        ) -> tuple[Tensor, Tensor | None]:
            """Output [B, N, C], and statistics; further arguments are timm's, masks refused."""

    @property
    def sparse(self) -> bool:
        """Whether queries may see less than all keys."""
        return "connectivity" in self._modules

    def forward(
        self,
        x: Tensor,
        *args: Any,
        request: AttentionRequest | None = None,
        **arguments: Any,
    ) -> Any:
        """Output [B, N, C]; with a request also the statistics [B, N, H, 6], or None for them.

        Without a request, and with nothing sparse, it runs timm's own forward method.
        """
        if request is not None:
            return self._attend(x, request, *args, **arguments)
        request = self._own_request(x.shape[1])
        if request is None:
            return super().forward(x, *args, **arguments)
        return self._attend(x, request, *args, **arguments)[0]

    def _own_request(self, num_tokens: int) -> AttentionRequest | None:
        """The request that timm's own block cannot make: sparse attention, or operands to note."""
        if self.recorder is not None:
            return AttentionRequest(self.recorder.num_prefix, False, PositionTables())
        if self.sparse and self.connectivity.sparse(num_tokens):
            return AttentionRequest(self.connectivity.num_prefix, False, PositionTables())
        return None

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Output and statistics of q, k, v [B, N, H, D], see `attend`."""
        if self.recorder is not None:
            self.recorder(q, k, request.num_prefix, scale)
        connectivity = self.connectivity if self.sparse else None
        return attend(q, k, v, request, scale, connectivity=connectivity)


def refuse_dropout(attention: Any) -> str | None:
    """Reason not to convert an attention module, or None."""
    if attention.attn_drop.p > 0:
        return "attention dropout (attn_drop > 0) has no counterpart in attention with statistics"
    return None


def refuse_model(model: Any) -> str | None:
    """Reason not to convert a model with timm's `patch_drop` and `attn_pool`, or None."""
    return refuse_patch_drop(model) or refuse_attn_pool(model.attn_pool)


def refuse_patch_drop(model: Any) -> str | None:
    """Reason not to convert a model that drops patches at random, or None."""
    if model.patch_drop is None or isinstance(model.patch_drop, nn.Identity):
        return None
    return "patch_drop_rate is not 0: random dropping and SPOT would fight over the same tokens"
