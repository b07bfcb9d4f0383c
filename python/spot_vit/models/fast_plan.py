"""A block of a fast ViT as the few calls that it comes to, as long as nobody changes its parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale
from torch import Tensor, nn

from spot_vit.nn.attention import AttentionRequest
from spot_vit.nn.packed import PackedLinear, serves, untracked
from spot_vit.nn.watch import Watch, untouched

_BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_ATTENTION = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop")
_MLP = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


class BlockPlan:
    """What a fast block does, looked up once: its norms and packed products.

    Asking every module in every pass whether its product may be fused takes longer than small
    products do; a plan asks once a block whether anything changed.

    Args:
        block: a block of `fast_blocks`; it has a plan where its attention and MLP are from there.

    Attributes:
        watch: of everything that went into the plan, also where there is none.
    """

    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        places = {block: _BLOCK, attn: _ATTENTION, mlp: _MLP}
        self.watch = Watch(places, called=(block.norm1, block.norm2))
        fast = hasattr(attn, "values") and getattr(mlp, "gelu", None) is not None
        fast = fast and self.watch.untouched and _known(block)
        self._ready = fast and all(map(_packed, (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)))
        if not self._ready:
            return
        weight = attn.qkv.weight
        self._block, self._attn = block, attn
        self._dtype = weight.dtype
        self._norm1, self._norm2 = _norm(block.norm1), _norm(block.norm2)
        around = [attn.q_norm, attn.k_norm, attn.norm, mlp.norm]
        self._calls = (
            isinstance(self._norm1, nn.Module)
            or isinstance(self._norm2, nn.Module)
            or any(type(module) is not nn.Identity for module in around)
            or attn.gate is not None
            or getattr(attn, "sparse", False)
        )
        self._mlp_norm = None if type(mlp.norm) is nn.Identity else mlp.norm
        self._qkv, self._fc1 = attn.qkv.product(), mlp.fc1.product(mlp.gelu)
        self._proj = attn.proj.product(scale=getattr(block.ls1, "gamma", None))
        self._fc2 = mlp.fc2.product(scale=getattr(block.ls2, "gamma", None))

    def serves(self, x: Tensor) -> bool:
        """Whether the plan may be followed for x, as long as it is that of the block."""
        ready = self._ready and not self._block.training
        return ready and serves(x, self._dtype, self.watch.differentiated)

    def context(self) -> AbstractContextManager[Any]:
        """Where to follow the plan: without autograd, unless modules are called, with hooks."""
        return nullcontext() if self._calls else untracked()

    def attend(self, x: Tensor, request: AttentionRequest | None) -> Tensor:
        """Tokens [B, N, C] plus the attention branch; the first P where the request says so."""
        attn, h = self._attn, self._norm1(x)
        if request is None or request.queries is None:
            return self._proj(attn.values(h, request, self._qkv), x)
        return self._proj(attn.values(h, request), x[:, : request.queries].contiguous())

    def mix(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] plus the MLP branch."""
        hidden = self._fc1(self._norm2(x))
        return self._fc2(hidden if self._mlp_norm is None else self._mlp_norm(hidden), x)


def _known(block: Any) -> bool:
    """Whether what a plan leaves out does nothing, and scales are in the weights."""
    nothing = (
        block.drop_path1, block.drop_path2, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2
    )  # fmt: skip
    kinds = (nn.Identity, nn.Dropout, DropPath)
    scales = (type(block.ls1), type(block.ls2))
    known = all(kind in (nn.Identity, LayerScale) for kind in scales)
    return known and all(type(module) in kinds for module in nothing)


def _packed(layer: Any) -> bool:
    return type(layer) is PackedLinear and layer.kind != "plain" and layer.weight.is_cpu


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """The module, or for layer normalisation that nobody watches what it calls."""
    plain = type(module) in (nn.LayerNorm, LayerNorm) and untouched(module)
    if not plain or getattr(module, "_fast_norm", False):
        return module
    shape, weight, bias = module.normalized_shape, module.weight, module.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias, module.eps, False)
