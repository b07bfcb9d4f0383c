"""Blocks, attention and MLP of timm's ViT as `fast` runs them: fewer operators, the same values.

Each takes the place of one class, as adapters do, and calls its parts one by one where somebody
watches them or put something else there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
from spot_vit.nn.attention import AttentionRequest, attend
from spot_vit.nn.packed import PackedLinear, counted, untouched
from spot_vit.nn.positional import PositionTables


class FastMlp(Mlp):
    """An MLP whose GELU is part of its first product."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.drop2(self.fc2(self.hidden(x))) if self.fusable else super().forward(x)

    @property
    def fusable(self) -> bool:
        """Whether GELU can be part of the product now."""
        packed = type(self.fc1) is PackedLinear and type(self.fc2) is PackedLinear
        return packed and untouched(self.fc1, self.act, self.drop1)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., C] to what the second product takes."""
        fc1: Any = self.fc1
        return self.norm(fc1.fused(x, gelu=gelu_of(self.act)))


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

    def values(self: Any, x: Tensor, request: AttentionRequest | None) -> Tensor:
        """What the projection takes: [B, N, H * D], or [B, P, H * D] as `request.queries` says."""
        batch, tokens = x.shape[:2]
        heads, width = self.num_heads, self.head_dim
        queries = None if request is None else request.queries
        if queries is None:
            q, k, v = self.qkv(x).view(batch, tokens, 3, heads, width).unbind(2)
            out = self._map(self.q_norm(q), self.k_norm(k), v, request)
        else:
            x_first, inner = x[:, :queries].contiguous(), heads * width
            q = self.qkv.fused(x_first, rows=(0, inner)).view(batch, queries, heads, width)
            both = self.qkv.fused(x, rows=(inner, 3 * inner))
            k, v = both.view(batch, tokens, 2, heads, width).unbind(2)
            plain = AttentionRequest(0, False, PositionTables())
            out = attend(self.q_norm(q), self.k_norm(k), v, plain, self.scale)
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


class _Block(nn.Module):
    """A pre-norm block in four products, each with what follows it; scales are in the weights."""

    def _attend(self: Any, x: Tensor, request: AttentionRequest | None, **arguments: Any) -> Tensor:
        attn, h = self.attn, self.norm1(x)
        if request is not None and request.queries is not None:
            if attn.alone(request):
                x = x[:, : request.queries].contiguous()
            else:
                request.queries = None
        parts = attn, attn.proj, attn.proj_drop, self.ls1, self.drop_path1
        packed = attn.fusable and type(attn.proj) is PackedLinear
        if packed and untouched(*parts) and not counted():
            scale = getattr(self.ls1, "gamma", None)
            return attn.proj.fused(attn.values(h, request), scale=scale, residual=x)
        asked = {} if request is None else {"request": request}
        return x + self.drop_path1(self.ls1(attn(h, **asked)))

    def _mix(self: Any, x: Tensor) -> Tensor:
        mlp, h = self.mlp, self.norm2(x)
        packed = type(mlp) is FastMlp and mlp.fusable and not counted()
        if packed and untouched(mlp, mlp.fc2, mlp.drop2, self.ls2, self.drop_path2):
            scale = getattr(self.ls2, "gamma", None)
            return mlp.fc2.fused(mlp.hidden(h), scale=scale, residual=x)
        return x + self.drop_path2(self.ls2(mlp(h)))


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
        request = None
        if queries is not None:
            request = AttentionRequest(0, False, PositionTables(), queries=queries)
        return self._mix(self._attend(x, request))[:, :queries]


class FastSpotBlock(_Block, SpotBlock):
    """A converted block in a fast model."""

    def _dense(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        if args or arguments:
            return super()._dense(x, *args, **arguments)
        return self._mix(self._attend(x, None))


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
    VisionTransformer: FastVisionTransformer,
    VisionTransformerDistilled: FastVisionTransformerDistilled,
}
"""What takes the place of which class; exact classes only."""

SLOW = {fast: slow for slow, fast in FAST.items()}


def takes(module: Any) -> bool:
    """Whether a module of a class in `FAST` is as the fast class expects it."""
    if "forward" in module.__dict__:  # something put its own there (offloading)
        return False
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
