"""Blocks, attention and MLP of timm's ViT as `fast` runs them: fewer operators, the same values.

Each takes the place of one class, as adapters do, and calls its parts one by one where somebody
watches them or put something else there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerScale, Mlp
from timm.layers.activations import GELU, GELUTanh
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import spot_ext
from spot_vit.models.adapters.vit import (
    SpotAttention,
    SpotBlock,
    SpotVisionTransformer,
    SpotVisionTransformerDistilled,
)
from spot_vit.models.fast_plan import BlockPlan
from spot_vit.nn.attention import AttentionRequest, cut_inside
from spot_vit.nn.fast_relevance import FastTokenRelevance
from spot_vit.nn.packed import PackedLinear, Product
from spot_vit.nn.packed_patches import PackedPatches, makes_patches
from spot_vit.nn.positional import PositionTables
from spot_vit.nn.relevance import TokenRelevance
from spot_vit.nn.watch import untouched, whole


class FastMlp(Mlp):
    """An MLP whose GELU is part of its first product."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        fc1: Any = self.fc1
        packed = type(fc1) is PackedLinear and self.gelu is not None
        drops = type(self.drop1) in (nn.Dropout, nn.Identity)  # nothing, in eval mode
        if not (packed and drops and untouched(fc1, self.act, self.drop1)):
            return super().forward(x)
        return self.drop2(self.fc2(self.norm(fc1.fused(x, gelu=self.gelu))))

    @property
    def gelu(self) -> str | None:
        """Approximation of the activation, which is GELU; None where it no longer is."""
        return gelu_of(self.act)


class _Attention(nn.Module):
    """Attention that can compute the output of the first tokens alone."""

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        request: AttentionRequest | None = None,
    ) -> Tensor:
        """Output [B, N, C], or [B, P, C] where the request names P queries."""
        if request is not None and request.queries is not None:
            if self.fusable:
                return self.proj_drop(self.proj(self.values(x, request)))
            queries, request = request.queries, dataclasses.replace(request, queries=None)
            return self.forward(x, request=request)[:, :queries]
        further: Any = {"request": request} if isinstance(self, SpotAttention) else {}
        return super().forward(x, attn_mask, is_causal, **further)

    @property
    def fusable(self: Any) -> bool:
        """Whether `values` may take the place of the parts in front of the projection."""
        return type(self.qkv) is PackedLinear and untouched(self.qkv)

    def values(
        self: Any, x: Tensor, request: AttentionRequest | None, qkv: Product | None = None
    ) -> Tensor:
        """What the projection takes: [B, N, H * D], or [B, P, H * D] as `request.queries` says.

        `qkv` is what to call in place of the layer; nobody watches the modules then.
        """
        batch, tokens = x.shape[:2]
        heads, width = self.num_heads, self.head_dim
        queries = None if request is None else request.queries
        if queries is None:
            packed = (qkv or self.qkv)(x).view(batch, tokens, 3, heads, width)
            q, k, v = packed.unbind(2)
            if qkv is None or type(self.q_norm) is not nn.Identity:
                q = self.q_norm(q)
            if qkv is None or type(self.k_norm) is not nn.Identity:
                k = self.k_norm(k)
            out = self._map(q, k, v, request)
        else:
            x_first, inner = x[:, :queries].contiguous(), heads * width
            q = self.qkv.fused(x_first, rows=(0, inner)).view(batch, queries, heads, width)
            both = self.qkv.fused(x, rows=(inner, 3 * inner))
            k, v = both.view(batch, tokens, 2, heads, width).unbind(2)
            out = _attention_of_few(self.q_norm(q), self.k_norm(k), v, self.scale)
        if qkv is None or type(self.norm) is not nn.Identity:
            out = self.norm(out)
        if self.gate is None:
            return out
        return out * self.gate(x if queries is None else x[:, :queries]).sigmoid()

    def alone(self: Any, request: AttentionRequest) -> bool:
        """Whether the first queries see the same where the others are not computed."""
        return True


class FastAttention(_Attention, Attention):
    """timm's attention in a fast model."""

    def _map(self, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest | None) -> Tensor:
        return _attention(q, k, v, self.scale)


class FastSpotAttention(_Attention, SpotAttention):  # type: ignore[misc]
    """Attention of a converted model in a fast one."""

    def _map(self, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest | None) -> Tensor:
        request = request or self._own_request(q.shape[1])
        if request is None:
            return _attention(q, k, v, self.scale)
        asked = request.need_stats or request.cut or request.keep is not None
        if asked or self.sparse or self.recorder is not None:
            return self._attention(q, k, v, request, self.scale)
        return _attention(q, k, v, self.scale)

    def alone(self, request: AttentionRequest) -> bool:
        """As above: not with a recorder, which notes all, nor where removed tokens count."""
        counted = self.sparse and self.connectivity.config.removed_as_zeros and request.removed
        return self.recorder is None and not counted


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, N, H * D]: all queries see all keys, [B, N, H, D] each."""
    return spot_ext.attention_stats(q, k, v, scale=scale, need_stats=False)[0].flatten(2)


def _attention_of_few(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, P, H * D]: the queries [B, P, H, D] see all keys [B, N, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and q.dtype is torch.float32:
        # On some CPUs the bits of one or two queries depend on the threads in torch's attention.
        out = (q * scale @ k.transpose(-2, -1)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)


class _Block(nn.Module):
    """A pre-norm block that follows its plan where it has one."""

    def _planned(self: Any, x: Tensor) -> BlockPlan | None:
        """The plan of this block where it can be followed; made anew after a change."""
        if torch.compiler.is_compiling():
            return None
        plan = self.__dict__.get("_plan")
        if plan is None or not plan.watch.unchanged():
            plan = self.__dict__["_plan"] = BlockPlan(self)
        return plan if plan.serves(x) else None

    def _prefix(self: Any, x: Tensor, request: AttentionRequest) -> Tensor:
        """The block for the first tokens alone, by its modules."""
        y = self.attn(self.norm1(x), request=request)
        x = x[:, : request.queries] + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class FastBlock(_Block, Block):
    """timm's block in a fast model."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        queries: int | None = None,
    ) -> Tensor:
        """[B, N, C] to [B, N, C], or to the first `queries` of it."""
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        plan, request = self._planned(x), None
        if queries is not None:
            request = AttentionRequest(0, False, PositionTables(), queries=queries)
        if plan is not None:
            with plan.context():
                return plan.mix(plan.attend(x, request))
        if request is None:
            return super().forward(x)
        if isinstance(self.attn, FastAttention):
            return self._prefix(x, request)
        return super().forward(x)[:, :queries]


class FastSpotBlock(_Block, SpotBlock):
    """A converted block in a fast model."""

    def _dense(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        plan = None if args or arguments else self._planned(x)
        if plan is not None:
            with plan.context():
                return plan.mix(plan.attend(x, None))
        return super()._dense(x, *args, **arguments)

    def _sparse(
        self, x: Tensor, request: AttentionRequest, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        attn, queries, plan = self.attn, request.queries, self._planned(x)
        if not (isinstance(attn, FastSpotAttention) and attn.alone(request)):
            request.queries = None
        if plan is not None:
            with plan.context():
                x, kept = cut_inside(plan.attend(x, request), request)
                return plan.mix(x), kept
        if request.queries is not None:
            return self._prefix(x, request), None
        x, kept = super()._sparse(x, request, **arguments)
        return x[:, :queries], kept


class _Model(nn.Module):
    """A dense model that computes in its last block what the head reads, and no more."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images [B, 3, H, W] to logits, as timm gives them."""
        *blocks, last = self.blocks
        alone = type(last) is FastBlock and unseen(last, self.norm) and prefix_suffices(self)
        if not alone or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in blocks:
            x = block(x)
        return self.forward_head(self.norm(last(x, queries=self.num_prefix_tokens)))


class FastVisionTransformer(_Model, VisionTransformer):
    """timm's `VisionTransformer`, fast."""


class FastVisionTransformerDistilled(_Model, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled`, fast."""


def prefix_suffices(model: Any) -> bool:
    """Whether the head of a ViT reads prefix tokens alone."""
    if getattr(model, "attn_pool", None) is not None:
        return False
    return isinstance(model, VisionTransformerDistilled) or model.global_pool == "token"


def unseen(*modules: nn.Module) -> bool:
    """Whether nobody but a counter of ours sees what these modules and those inside give."""
    for module in modules:
        for part in module.modules():
            if not (part._forward_pre_hooks or part._forward_hooks):
                continue
            hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
            if any(not getattr(hook, "counts_only", False) for hook in hooks):
                return False
    return True


class FastSpotVisionTransformer(SpotVisionTransformer):
    """A converted `VisionTransformer`, fast."""

    def _prefix_alone(self) -> bool:
        return _last_alone(self)


class FastSpotVisionTransformerDistilled(SpotVisionTransformerDistilled):
    """A converted `VisionTransformerDistilled`, fast."""

    def _prefix_alone(self) -> bool:
        return _last_alone(self)


def _last_alone(model: Any) -> bool:
    last = model.blocks[-1]
    return type(last) is FastSpotBlock and unseen(last, model.norm) and prefix_suffices(model)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    Attention: FastAttention,
    Block: FastBlock,
    Mlp: FastMlp,
    SpotAttention: FastSpotAttention,
    SpotBlock: FastSpotBlock,
    SpotVisionTransformer: FastSpotVisionTransformer,
    SpotVisionTransformerDistilled: FastSpotVisionTransformerDistilled,
    TokenRelevance: FastTokenRelevance,
    nn.Conv2d: PackedPatches,
    VisionTransformer: FastVisionTransformer,
    VisionTransformerDistilled: FastVisionTransformerDistilled,
}
"""What takes the place of which class; exact classes only."""

SLOW = {fast: slow for slow, fast in FAST.items()}


def takes(module: Any) -> bool:
    """Whether a module of a class in `FAST` is as the fast class expects it."""
    if "forward" in module.__dict__:  # something put its own there (offloading)
        return False
    if isinstance(module, nn.Conv2d):
        return makes_patches(module) and untouched(module) and whole(module)
    if isinstance(module, Mlp):
        linear = type(module.fc1) is nn.Linear and type(module.fc2) is nn.Linear
        return linear and gelu_of(module.act) is not None
    if isinstance(module, Block):
        scales = type(module.ls1), type(module.ls2)
        paths = type(module.drop_path1), type(module.drop_path2)
        known = all(kind in (nn.Identity, LayerScale) for kind in scales)
        return known and all(kind in (nn.Identity, DropPath) for kind in paths)
    return True


def gelu_of(module: nn.Module) -> str | None:
    """How an activation approximates GELU, "none" or "tanh"; None where it is something else."""
    if type(module) is nn.GELU:
        return module.approximate
    return {GELU: "none", GELUTanh: "tanh"}.get(type(module))
