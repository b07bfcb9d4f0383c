"""Attention as the loop asks for it: the request to a block, and what the block gives back."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import spot_ext
from spot_ext.sparse_attention import named_keys
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.positional import PositionTables
from spot_vit.nn.removed import share_of_alive
from spot_vit.utils.tracing import refuse_symbols


class Cut(NamedTuple):
    """A cut inside a block, between attention and MLP (EViT).

    Attributes:
        num_keep: patch tokens to keep.
        fuse: leave one token in place of the others.
        kept: [B, num_keep] positions to keep among the patch tokens; None lets attention decide.
    """

    num_keep: int
    fuse: bool
    kept: Tensor | None


@dataclasses.dataclass
class AttentionRequest:
    """What is asked of attention besides its output, and what it notes in answer.

    Attributes:
        num_prefix: tokens in front of the patches, fused ones included.
        class_token: whether the first of them is a class token.
        tables: position tables of the tokens, for attention with a relative position bias.
        keep: [B, N] 0/1 mask of the patches that are still seen (training), or None.
        need_stats: whether SPOT's statistics are wanted.
        cut: a cut inside the block, or None.
        columns: [B, P+N] token of the full grid that each token is, the number of those for tokens
            of no grid; None while all are there. For attention with a connectivity predictor.
        num_patches: of the full grid, where `columns` is given.
        position: [B, n] grid positions of the patches; None while all are there.
        queries: how many of the first tokens need an output; None for all. Fast blocks alone are
            asked this, and only where nothing else is asked.
        stats: the answer: [B, P+N, H, 6] statistics, or None.
        score: the answer of a cut that decides by itself: [B, N] what patches were ranked by.
    """

    num_prefix: int
    class_token: bool
    tables: PositionTables
    keep: Tensor | None = None
    need_stats: bool = False
    cut: Cut | None = None
    columns: Tensor | None = None
    num_patches: int | None = None
    position: Tensor | None = None
    queries: int | None = None
    stats: Tensor | None = None
    score: Tensor | None = None

    @property
    def removed(self) -> bool:
        """Whether there is a prefix that could see patch tokens which were cut or are masked."""
        return self.num_prefix > 0 and (self.columns is not None or self.keep is not None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    scale: float,
    bias: Tensor | None = None,
    connectivity: ConnectivityPredictor | None = None,
) -> Tensor:
    """Attention with what the request asks for; statistics are noted in it.

    Args:
        q: [B, N, H, D].
        k: [B, N, H, D].
        v: [B, N, H, D].
        request: mask, statistics, cut.
        scale: of the logits.
        bias: [1|B, H, N, N] added to the logits, or None.
        connectivity: predictor of the keys that each query sees, or None for all keys.

    Returns:
        [B, N, H * D].
    """
    need_stats = request.need_stats or request.cut is not None
    if connectivity is not None and names_keys(q, request, connectivity):
        out, stats = attend_to_named(q, k, v, request, scale, connectivity, need_stats)
    elif request.keep is None and not need_stats:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return out.transpose(1, 2).flatten(2)
    else:
        out, stats = spot_ext.attention_stats(
            q,
            k,
            v,
            request.keep,
            bias,
            scale=scale,
            num_prefix=request.num_prefix,
            class_token=request.class_token,
            need_stats=need_stats,
        )
    request.stats = stats if need_stats else None
    return out.flatten(2)


def attend_to_named(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    scale: float,
    connectivity: ConnectivityPredictor,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys that the predictor names: [B, N, H, D], and statistics or nothing.

    Both backends give the same result: one reads those keys alone, the other all of them.
    With `removed_as_zeros` prefix queries see removed tokens as well, whose values are zero: that
    scales their rows, and so the first statistic, which is the class token's row.
    """
    out, stats = _attend_to_alive(q, k, v, request, scale, connectivity, need_stats)
    if request.removed and connectivity.config.removed_as_zeros:
        share = prefix_share(q, k, request, scale, connectivity)
        front = request.num_prefix
        scaled = out[:, :front] * share.transpose(1, 2)[..., None].to(out.dtype)
        out = torch.cat([scaled, out[:, front:]], dim=1)
        if need_stats and request.class_token:
            cls_out = stats[..., :1] * share[:, None, :, :1].to(stats.dtype)
            stats = torch.cat([cls_out, stats[..., 1:]], dim=-1)
    return out, stats


def _attend_to_alive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    scale: float,
    connectivity: ConnectivityPredictor,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """What `attend_to_named` gives where removed tokens are gone."""
    index = named_index(q, k, request, connectivity)
    if connectivity.backend(q, index.shape[3]) == "sparse":
        return spot_ext.sparse_attention(
            q,
            k,
            v,
            index,
            request.keep,
            scale=scale,
            num_prefix=request.num_prefix,
            class_token=request.class_token,
            need_stats=need_stats,
        )
    named = named_keys(index, q.shape[1])
    if request.keep is None and not need_stats:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=named, scale=scale)
        return out.transpose(1, 2), q.new_empty(0)
    may_be_empty = not connectivity.names_some(request.keep)
    at = request.num_prefix
    if may_be_empty:  # a query that names nothing sees a token that no other sees
        q, k, v, named = _with_a_token_for_nothing(q, k, v, named, at)
    bias = torch.zeros_like(named, dtype=q.dtype).masked_fill(~named, float("-inf"))
    out, stats = spot_ext.attention_stats(
        q,
        k,
        v,
        request.keep,
        bias,
        scale=scale,
        num_prefix=at + may_be_empty,
        class_token=request.class_token,
        need_stats=need_stats,
    )
    if may_be_empty:
        out = torch.cat([out[:, :at], out[:, at + 1 :]], dim=1)
        stats = torch.cat([stats[:, :at], stats[:, at + 1 :]], dim=1) if need_stats else stats
    return out, stats


def names_keys(q: Tensor, request: AttentionRequest, connectivity: ConnectivityPredictor) -> bool:
    """Whether the predictor is asked: some query of q [B, N, H, D] may see less than all keys."""
    return connectivity.sparse(q.shape[1], request.num_patches, request.removed)


def prefix_share(
    q: Tensor,
    k: Tensor,
    request: AttentionRequest,
    scale: float,
    connectivity: ConnectivityPredictor,
) -> Tensor:
    """[B, H, P] share of a prefix query's attention that tokens which are left have.

    For `removed_as_zeros`; see `share_of_alive`.
    """
    size = None
    if request.columns is not None:
        assert request.num_patches is not None, "num_patches is needed with columns"
        size = connectivity.num_prefix + request.num_patches
    return share_of_alive(q[:, : request.num_prefix], k, request.keep, request.columns, size, scale)


def named_index(
    q: Tensor, k: Tensor, request: AttentionRequest, connectivity: ConnectivityPredictor
) -> Tensor:
    """[B, H, N-P, K] keys that the predictor names for each patch query."""
    queries = q[:, request.num_prefix :]
    return connectivity(queries, k, request.columns, request.keep, request.num_patches)


def _with_a_token_for_nothing(
    q: Tensor, k: Tensor, v: Tensor, named: Tensor, at: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A token of zeros in front of token `at`, whose key those see that see no other.

    There is no softmax of nothing; theirs is one of zeros now, outside the statistics of patches.
    """
    nothing = ~named.any(dim=-1, keepdim=True)
    named = torch.cat([named[..., :at], nothing, named[..., at:]], dim=-1)
    all_of_it = torch.ones_like(named[:, :, :1])
    named = torch.cat([named[:, :, :at], all_of_it, named[:, :, at:]], dim=2)
    zeros = torch.zeros_like(q[:, :1])
    q, k, v = (torch.cat([x[:, :at], zeros, x[:, at:]], dim=1) for x in (q, k, v))
    return q, k, v, named


def cut_inside(x: Tensor, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """EViT's cut: the tokens the class token attends to most, averaged over heads, stay.

    The others are added up, weighted by that attention (not normalised, as published), into one
    token in front of the patches, which competes with them in later cuts.
    """
    cut = request.cut
    if cut is None:
        return x, None
    assert request.stats is not None
    request.score = score = request.stats[:, request.num_prefix :, :, 0].mean(dim=2)
    index = cut.kept
    if index is None:
        index = spot_ext.select_tokens(score, cut.num_keep)
    fused = None
    if cut.fuse:
        weight = score.to(x.dtype)
        fused = spot_ext.fuse_tokens(x, weight, index, request.num_prefix, normalize=False)[:, None]
    return spot_ext.compact_tokens(x, index, request.num_prefix, fused), index


def refuse_masks(attn_mask: Tensor | None, is_causal: bool = False) -> None:
    """Raises for the arguments of timm's forward methods that a sparse model cannot honour."""
    refuse_symbols(attn_mask, is_causal)
    if attn_mask is not None:
        raise ValueError("attn_mask is not supported by a sparse model: it builds its own masks")
    if is_causal:
        raise ValueError("is_causal is not supported by a sparse model: tokens are unordered")
