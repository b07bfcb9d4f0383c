"""What a forward pass may note of attention: its operands q and k, or the maps themselves."""

from __future__ import annotations

from collections.abc import Callable
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


class Attended(NamedTuple):
    """What attention was given, see `attend`; the arguments but v."""

    q: Tensor
    k: Tensor
    request: AttentionRequest
    scale: float
    bias: Tensor | None
    connectivity: ConnectivityPredictor | None


class Recorder(NamedTuple):
    """What attention calls while someone watches.

    Attributes:
        num_prefix: P, the model's prefix tokens, where timm's own block asks for nothing.
        note: is given what each run of the block attends with.
    """

    num_prefix: int
    note: Callable[[Attended], None]


def operands_of(attended: Attended) -> Operands:
    """The operands; refuses a bias, which they do not hold."""
    if attended.bias is not None:
        raise ValueError(
            "attention of this model adds a bias to its logits, which q and k do not hold; "
            "spot_vit.attention_maps gives maps with everything in them"
        )
    return Operands(attended.q, attended.k, attended.scale, attended.request.num_prefix)


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


@torch.no_grad()
def map_of(attended: Attended) -> AttentionMap:
    """The map: logits with their bias, over the keys that are named and not hidden.

    Costs the whole map in memory.
    """
    return map_from(attended, logits_of(attended))


@torch.no_grad()
def logits_of(attended: Attended) -> Tensor:
    """[B, H, n, n] scaled products of queries and keys, with their bias, of all pairs."""
    q, k, bias = attended.q, attended.k, attended.bias
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = attended.scale * (q.transpose(1, 2).to(wide) @ k.permute(0, 2, 3, 1).to(wide))
    return logits if bias is None else logits + bias


@torch.no_grad()
def map_from(attended: Attended, logits: Tensor) -> AttentionMap:
    """`map_of` from what `logits_of` gave."""
    q, k, request, scale, _, connectivity = attended
    num_tokens, front = q.shape[1], request.num_prefix
    seen: Tensor | None = None  # all
    as_zeros = False
    if connectivity is not None and names_keys(q, request, connectivity):
        seen = named_keys(named_index(q, k, request, connectivity), num_tokens)
        as_zeros = request.removed and connectivity.config.removed_as_zeros
    if request.keep is not None:
        kept = F.pad(request.keep > 0.5, (front, 0), value=True)[:, None, None]
        visible = kept | torch.eye(num_tokens, dtype=torch.bool, device=q.device)
        seen = visible if seen is None else seen & visible
    if seen is not None:
        logits = torch.where(seen, logits, float("-inf"))
    weights = logits.softmax(dim=-1)
    if connectivity is not None and as_zeros:
        weights[:, :, :front] *= prefix_share(q, k, request, scale, connectivity)[..., None]
    position = request.position
    if position is None:
        position = torch.arange(num_tokens - front, device=q.device).expand(len(q), -1)
    return AttentionMap(weights if seen is None else torch.where(seen, weights, 0), position)
