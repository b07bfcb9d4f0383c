"""Adapters: subclasses that take the place of timm classes, found by class and fingerprint.

A timm release that changes one of the overridden methods or the children an adapter calls is
noticed at conversion, not by wrong results.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spot_vit.models.step import BlockStep
from spot_vit.nn.attention import AttentionRequest, attend, cut_inside
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.operands import Attended, Recorder
from spot_vit.nn.pooling import refuse_attn_pool
from spot_vit.nn.positional import PositionTables
from spot_vit.nn.predictor import plain_layer


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
    """Mixin of block adapters: a block that takes its part in a sparse pass.

    `stage` is the number of the decision taken at this block, or None; `relevance` is its
    predictor, where the method has one; `cuts` says whether the decision removes anything at the
    present budget. They live on the block: models may be cut short.
    """

    stage: int | None
    relevance: nn.Module | None
    cuts: bool

    if TYPE_CHECKING:  # what an adapter provides

        def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
            """The first half of the block: x plus its attention branch."""

        def _mix(self, x: Tensor) -> Tensor:
            """The second half: x plus its MLP branch."""

    def forward(
        self, x: Tensor, *args: Any, step: BlockStep | None = None, **arguments: Any
    ) -> Tensor:
        """Tokens [B, N, C] to tokens, by timm's own forward method where nothing else is asked.

        With a `step` it decides, cuts or masks, and leaves what it did in `step.after`.
        """
        if step is None:
            if self.cuts and not torch.compiler.is_compiling():
                self._warn()
            return self._dense(x, *args, **arguments)
        state = step.start(x)
        step.decide(state, self.relevance)
        request = step.request(state)
        arguments |= state.tables.arguments(step.block)
        if step.plain(state):
            x, kept = self._dense(state.x, *args, **arguments), None
        else:
            x, kept = self._sparse(state.x, request, **arguments)
        state.x = x
        step.finish(state, request, kept)
        return x

    def _dense(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        """The whole block, as the library it came from wrote it."""
        return super().forward(x, *args, **arguments)

    def _sparse(
        self, x: Tensor, request: AttentionRequest, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Both halves of the block, and the positions that a cut between them kept."""
        x, kept = cut_inside(self._attend(x, request, **arguments), request)
        return self._mix(x), kept

    def _warn(self) -> None:
        warnings.warn(
            f"a block of a SPOT model decides (stage {self.stage}), but was called on its own: it "
            "ran densely. Call the model, or spot_vit.TokenPass from a loop of your own",
            stacklevel=4,
        )


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

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y = self.attn(self.norm1(x), request=request, **arguments)
        return x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)

    def _mix(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class AttentionAdapter(nn.Module):
    """Mixin of attention adapters: attention that answers requests, and may be sparse.

    `connectivity` predicts what queries see, where `sparsify_attention` put a predictor; `recorder`
    is there while `record_operands` or `attention_maps` watches.
    """

    connectivity: ConnectivityPredictor
    recorder: Recorder | None = None

    if TYPE_CHECKING:  # what an adapter provides

        def _attend(
            self, x: Tensor, request: AttentionRequest, *args: Any, **arguments: Any
        ) -> Tensor:
            """Output [B, N, C]; further arguments are timm's, masks refused."""

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
    ) -> Tensor:
        """Output [B, N, C], by timm's own forward method where nothing else is asked.

        With a request it attends as that says, and notes its statistics there.
        """
        if request is None:
            request = self._own_request(x.shape[1])
        if request is None:
            return super().forward(x, *args, **arguments)
        return self._attend(x, request, *args, **arguments)

    def _own_request(self, num_tokens: int) -> AttentionRequest | None:
        """The request that timm's own block cannot make: sparse attention, or operands to note."""
        if self.recorder is not None:
            return AttentionRequest(self.recorder.num_prefix, False, PositionTables())
        if self.sparse and self.connectivity.sparse(num_tokens):
            return AttentionRequest(self.connectivity.num_prefix, False, PositionTables())
        return None

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: AttentionRequest,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Output [B, N, H * D] of q, k, v [B, N, H, D], see `attend`."""
        connectivity = self.connectivity if self.sparse else None
        if self.recorder is not None:
            self.recorder.note(Attended(q, k, request, scale, bias, connectivity))
        return attend(q, k, v, request, scale, bias, connectivity)


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


def project_qkv(attention: Any, x: Tensor, separate: bool = False) -> Tensor:
    """[B, N, 3 * H * D] by a layer `qkv` whose bias is kept apart: in parts, none for the keys.

    As timm does it, one product with the layer's weight, unless something stands in the layer's
    place or watches it; then that is called. `separate` calls it always.
    """
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    if separate or not plain_layer(attention.qkv):
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)
