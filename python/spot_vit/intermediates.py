"""Block outputs of a sparse model as dense maps, in the forms timm gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor


def dense_intermediates(
    model: Any,
    x: Tensor,
    grid: tuple[int, int],
    indices: int | list[int] | None = None,
    *,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
) -> Any:
    """What `forward_intermediates` of a timm model returns, on the full grid.

    A token that was dropped keeps the last value it had, so maps stay dense. The final features are
    those of `forward_features`: survivors only, in eval.

    Args:
        model: a `SpotLoop`.
        x: images [B, 3, H, W].
        grid: rows and columns of patches.
        indices: blocks to take, or how many of the last.
        return_prefix_tokens: pair each map with its prefix tokens.
        norm: apply the final norm to each.
        stop_early: do not run blocks after the last one taken.
        output_fmt: "NCHW" or "NLC".
        intermediates_only: leave the final features out.
        output_dict: a dictionary instead of a tuple.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
    take, last = feature_take_indices(len(model.blocks), indices)
    run = model._run(x, take=take, stop=last + 1 if stop_early else None)
    full = [run.taken[b] for b in sorted(run.taken)]
    if norm:
        full = [model.norm(y) for y in full]
    num_prefix = model.num_prefix_tokens
    prefix = [y[:, :num_prefix] for y in full]
    maps = [y[:, num_prefix:] for y in full]
    if output_fmt == "NCHW":
        maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
    with_prefix = return_prefix_tokens and num_prefix > 0
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": maps}
        if with_prefix:
            result["image_intermediates_prefix"] = prefix
        if not intermediates_only:
            result["image_features"] = model.norm(run.tokens)
        return result
    outputs: Sequence[Any] = list(zip(maps, prefix, strict=True)) if with_prefix else maps
    return outputs if intermediates_only else (model.norm(run.tokens), outputs)
