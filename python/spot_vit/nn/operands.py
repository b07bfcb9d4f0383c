"""What a forward pass may note of attention: its operands q and k, or the maps themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spot_ext.sparse_attention import named_keys
from spot_vit.nn.attention import AttentionRequest, named_index, names_keys, prefix_share
from spot_vit.nn.connectivity import ConnectivityPredictor


class Operands(NamedTuple):
    """What a block's attention map is made of: softmax(scale * q k^T), without masks.

    Attributes:
        q: [B, N, H, D] after qk norm and rotary embedding, before `scale`.
        k: [B, N, H, D] likewise, repeated where heads share keys.
        scale: of the logits.
        num_prefix: P, leading tokens whose queries are dense.
    """

    q: Tensor
    k: Tensor
    scale: float
    num_prefix: int


class Recorder:
    """What attention calls with its operands while someone watches; this class is the base.

    Args:
        block: index of the block that is watched.
        num_prefix: P, the model's prefix tokens, where timm's own block asks for nothing.
    """

    def __init__(self, block: int, num_prefix: int) -> None:
        self.block, self.num_prefix = block, num_prefix

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        request: AttentionRequest,
        scale: float,
        bias: Tensor | None,
        connectivity: ConnectivityPredictor | None,
    ) -> None:
        """Notes what the block's attention calls it with; arguments are those of `attend`."""
        raise NotImplementedError


class OperandRecorder(Recorder):
    """Notes the operands of one block in a dictionary; a block that is run again overwrites."""

    def __init__(self, block: int, num_prefix: int, operands: dict[int, Operands]) -> None:
        super().__init__(block, num_prefix)
        self.operands = operands

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        request: AttentionRequest,
        scale: float,
        bias: Tensor | None,
        connectivity: ConnectivityPredictor | None,
    ) -> None:
        """Notes q and k; refuses a bias, which they do not hold."""
        if bias is not None:
            raise ValueError(
                f"attention of block {self.block} adds a bias to its logits, which q and k do not "
                "hold; spot_vit.attention_maps gives maps with everything in them"
            )
        self.operands[self.block] = Operands(q, k, scale, request.num_prefix)


class AttentionMap(NamedTuple):
    """Attention of one block as it was used, exactly.

    Attributes:
        weights: [B, H, n, n] rows of queries, which sum to 1 (a query that sees nothing: 0; prefix
            queries with `removed_as_zeros`: less, the rest is on tokens that were removed).
        position: [B, m] int64 grid positions of the patches, the last m of the n tokens; N and
            above are tokens of no position, which EViT made. In front of them stand the prefix and
            tokens that soft sparsification fused.
    """

    weights: Tensor
    position: Tensor


class MapRecorder(Recorder):
    """Computes the attention map of one block; costs the whole map in memory."""

    def __init__(self, block: int, num_prefix: int, maps: dict[int, AttentionMap]) -> None:
        super().__init__(block, num_prefix)
        self.maps = maps

    @torch.no_grad()
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        request: AttentionRequest,
        scale: float,
        bias: Tensor | None,
        connectivity: ConnectivityPredictor | None,
    ) -> None:
        """Notes the map: logits with their bias, over the keys that are named and not hidden."""
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = scale * (q.transpose(1, 2).to(wide) @ k.permute(0, 2, 3, 1).to(wide))
        if bias is not None:
            logits = logits + bias
        num_tokens, front = q.shape[1], request.num_prefix
        seen = torch.ones_like(logits, dtype=torch.bool)
        as_zeros = False
        if connectivity is not None and names_keys(q, request, connectivity):
            seen = named_keys(named_index(q, k, request, connectivity), num_tokens)
            as_zeros = request.removed and connectivity.config.removed_as_zeros
        if request.keep is not None:
            kept = F.pad(request.keep > 0.5, (front, 0), value=True)[:, None, None]
            seen = seen & (kept | torch.eye(num_tokens, dtype=torch.bool, device=q.device))
        weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        if connectivity is not None and as_zeros:
            weights[:, :, :front] *= prefix_share(q, k, request, scale, connectivity)[..., None]
        position = request.position
        if position is None:
            position = torch.arange(num_tokens - front, device=q.device).expand(len(q), -1)
        self.maps[self.block] = AttentionMap(weights.masked_fill(~seen, 0), position)
