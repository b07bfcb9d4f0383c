"""Evidence of a decision: statistics of the blocks before it, one row for every token left.

    stats, counts, followed = [], [], []  # of each block
    ...
    evidence = token_evidence(stats, counts, followed, cuts)  # [B, M, F]

A token's row is found in each block by following it back through the cuts made since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spot_ext import _check, _definitions, _register
from spot_ext.compact import compact_tokens_reference

STATISTICS = 6
SCALINGS = ("n", "log1p", "raw")
_OPTIONS = [bool, int, int, bool]  # types of mean_heads, latest and moments

# ---- public function -----------------------------------------------------------------------------


def token_evidence(
    stats: Sequence[Tensor],
    counts: Sequence[int],
    followed: Sequence[int],
    cuts: Sequence[Tensor],
    *,
    scaling: str = "log1p",
    mean_heads: bool = False,
    latest: tuple[int, int] = (0, 6),
    moments: bool = True,
) -> Tensor:
    """Scaled statistics of the last block, and their mean and variance over the blocks.

    Args:
        stats: of each block, oldest first, [B, P + N, H, 6] float32, float64, float16 or bfloat16
            from `attention_stats`; P may differ. Dense in the last two dimensions is copy-free.
        counts: N of each block: its last N tokens are patch tokens, the others are skipped.
        followed: of each block, how many of the cuts came before it; ascending.
        cuts: of each cut [B, kept] int64, positions among the patch tokens left before it.
        scaling: "n" multiplies means by N and variances by N * N; "log1p" takes `log(1 + x)` of
            that; "raw" leaves them.
        mean_heads: average the scaled statistics over the heads, so that H is 1 below.
        latest: which of the six of the last block are given, as (first, end); (0, 0) for none.
        moments: whether mean and variance (divided by the number of blocks) of all six are given.

    Returns:
        [B, M, F] contiguous, of the dtype of `stats`: M tokens are left behind the last cut, and
        F = H * (end - first + 12 * moments): latest, mean and variance, each by head. For
        inference: a backward pass through it raises.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: sizes or counts that do not fit, an unknown scaling; on CPU also a position out
            of range. On CUDA the row of such a token is NaN, unless SPOT_CHECK=1.
        RuntimeError: a gradient is asked for.
    """
    if type(latest) is not tuple or len(latest) != 2:
        _check_pair(latest)
    args = (stats, counts, followed, cuts, scaling, mean_heads, *latest, moments)
    if _check.eager() and not _plain(*args):
        _check_evidence(*args)
    try:
        return _definitions.run("token_evidence", _defined, stats[0], args)
    except (RuntimeError, ValueError):
        if _check.eager():
            _check_evidence(*args)  # the same in the words and types of the other functions
        raise


# ---- reference: the definition -------------------------------------------------------------------


def token_evidence_reference(
    stats: Sequence[Tensor],
    counts: Sequence[int],
    followed: Sequence[int],
    cuts: Sequence[Tensor],
    *,
    scaling: str = "log1p",
    mean_heads: bool = False,
    latest: tuple[int, int] = (0, 6),
    moments: bool = True,
) -> Tensor:
    """Definition of `token_evidence` in plain PyTorch."""
    return _evidence(stats, counts, followed, cuts, scaling, mean_heads, *latest, moments)


def _evidence(
    stats: Sequence[Tensor],
    counts: Sequence[int],
    followed: Sequence[int],
    cuts: Sequence[Tensor],
    scaling: str = "log1p",
    mean_heads: bool = False,
    latest_first: int = 0,
    latest_last: int = STATISTICS,
    moments: bool = True,
    compact: Callable[..., Tensor] = compact_tokens_reference,
) -> Tensor:
    """The definition with the arguments of the op."""
    blocks = []
    for x, count, before in zip(stats, counts, followed, strict=True):
        x = _scaled(x[:, x.shape[1] - count :], count, scaling)
        if mean_heads:
            x = x.mean(dim=2, keepdim=True)
        for index in cuts[before:]:
            x = compact(x, index, 0)
        blocks.append(x)
    parts = [blocks[-1][..., latest_first:latest_last]]
    if moments:
        window = torch.stack(blocks)
        mean = window.mean(dim=0)
        parts += [mean, (window - mean).square().mean(dim=0)]
    return torch.cat([part.flatten(2) for part in parts], dim=-1).to(stats[0].dtype)


def _defined(*args: Any, **options: Any) -> Tensor:
    """The definition, of arguments that no kernel has checked."""
    if _check.eager():
        _check_evidence(*args)
    return _evidence(*args, **options)


def _scaled(x: Tensor, count: int, scaling: str) -> Tensor:
    """Statistics of a block that ran over `count` patch tokens, in float32 or float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if scaling == "raw":
        return x
    column = torch.arange(STATISTICS, device=x.device)
    variance = ((column == 3) | (column == 5)).to(x.dtype)
    x = x * (count * (variance * (count - 1) + 1))  # count, and its square for variances
    return x.log1p() if scaling == "log1p" else x


# ---- checks --------------------------------------------------------------------------------------


def _plain(stats: Any, counts: Any, followed: Any, cuts: Any, scaling: Any, *options: Any) -> bool:
    """Whether types are right, so that the kernel can check the rest: a tenth of the time."""
    lists = type(stats) is type(cuts) is type(counts) is type(followed) is list
    return (
        lists
        and len(stats) > 0
        and {*map(type, stats), *map(type, cuts)} == {Tensor}
        and {*map(type, counts), *map(type, followed)} == {int}
        and type(scaling) is str
        and [*map(type, options)] == _OPTIONS
    )


def _check_pair(latest: object) -> None:
    if not isinstance(latest, tuple | list) or len(latest) != 2:
        raise TypeError(f"latest must be a pair of ints, (first, end), got {latest!r}")


def _check_list(name: str, value: object, length: int | None = None) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} entries (one for each of stats), "
                         f"got {len(value)}")  # fmt: skip


def _check_evidence(
    stats: Sequence[Tensor],
    counts: Sequence[int],
    followed: Sequence[int],
    cuts: Sequence[Tensor],
    scaling: str = "log1p",
    mean_heads: bool = False,
    first: int = 0,
    last: int = STATISTICS,
    moments: bool = True,
) -> Any:
    """Refuses what the op refuses; the tokens that are left behind the last cut."""
    _check_list("stats", stats)
    if not stats:
        raise ValueError("stats must hold the statistics of at least one block, got none")
    _check_list("counts", counts, len(stats))
    _check_list("followed", followed, len(stats))
    _check_list("cuts", cuts)
    _check_options(scaling, mean_heads, first, last, moments)
    for i, x in enumerate(stats):
        _check_statistics(f"stats[{i}]", x, stats[0])
        _check.count(f"counts[{i}]", counts[i], 0, x.shape[1], f" (the tokens of stats[{i}])")
    for k, index in enumerate(cuts):
        _check.tensor(f"cuts[{k}]", index, 2)
        _check.dtype(f"cuts[{k}]", index, torch.int64)
        _check.device(f"cuts[{k}]", index, "stats[0]", stats[0])
        _check.size(f"cuts[{k}]", index, 0, stats[0].shape[0], "the batch")
    left, before = counts[0], 0
    for i, (count, now) in enumerate(zip(counts, followed, strict=True)):
        _check.count(f"followed[{i}]", now, before, len(cuts), " (ascending, of the cuts)")
        if i and now > before:
            left = cuts[now - 1].shape[1]
        if isinstance(count, int) and isinstance(left, int) and count != left:
            raise ValueError(f"counts[{i}] must be {left} (the tokens left when that block ran), "
                             f"got {count}")  # fmt: skip
        before = now
    return cuts[-1].shape[1] if before < len(cuts) else left


def _check_statistics(name: str, x: Tensor, like: Tensor) -> None:
    _check.tensor(name, x, 4)
    _check.dtype(name, x, _check.FLOATING if x is like else like.dtype)
    _check.device(name, x, "stats[0]", like)
    _check.size(name, x, 0, like.shape[0], "the batch")
    _check.size(name, x, 2, like.shape[2], "the heads of stats[0]")
    _check.size(name, x, 3, STATISTICS, "the statistics")


def _check_options(scaling: str, mean_heads: bool, first: int, last: int, moments: bool) -> None:
    if not isinstance(scaling, str):
        raise TypeError(f"scaling must be a str, got {type(scaling).__name__}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be 'n', 'log1p' or 'raw', got '{scaling}'")
    _check.flag("mean_heads", mean_heads)
    _check.flag("moments", moments)
    _check.count("latest[1]", last, 0, STATISTICS)
    _check.count("latest[0]", first, 0, last)
    if first == last and not moments:
        raise ValueError("latest and moments ask for nothing")


# ---- fake ----------------------------------------------------------------------------------------


@_register.fake("token_evidence")
def _(
    stats: Sequence[Tensor],
    counts: Sequence[int],
    followed: Sequence[int],
    cuts: Sequence[Tensor],
    scaling: str = "log1p",
    mean_heads: bool = False,
    latest_first: int = 0,
    latest_last: int = STATISTICS,
    moments: bool = True,
) -> Tensor:
    left = _check_evidence(stats, counts, followed, cuts, scaling, mean_heads, latest_first,
                           latest_last, moments)  # fmt: skip
    heads = 1 if mean_heads else stats[0].shape[2]
    columns = latest_last - latest_first + (2 * STATISTICS if moments else 0)
    return stats[0].new_empty((stats[0].shape[0], left, heads * columns))


# ---- CUDA: no kernel of its own ------------------------------------------------------------------


@_register.cuda("token_evidence")
def _(*args: Any) -> Tensor:
    """The definition, with the kernel for the cuts: a row out of range is NaN."""
    return _defined(*args, compact=torch.ops.spot.compact_tokens)


# ---- autograd: for inference alone ---------------------------------------------------------------


@_register.autograd("token_evidence")
def _(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "spot::token_evidence is for inference and has no gradient; call it under "
        "torch.no_grad(), or spot_ext.token_evidence in `with spot_ext.definitions():` "
        "(or spot_ext.token_evidence_reference)"
    )


# ---- FLOPs ---------------------------------------------------------------------------------------


@_register.flops("token_evidence")
def _(*args: Any, **kwargs: Any) -> int:
    """No products: moving, scaling and averaging are free."""
    return 0
