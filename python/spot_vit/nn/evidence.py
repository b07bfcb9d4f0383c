"""Evidence of a token besides its embedding: statistics of its attention over the layers.

Columns are [latest | mean | variance] (arXiv 2511.10488: statistics of the current layer and their
moments across layers; window, head layout and scaling are our choice, see SpotConfig).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import spot_ext
from spot_vit.config.spot import SpotConfig
from spot_vit.utils.twin import twin

_IS_VARIANCE = (False, False, False, True, False, True)  # of the six statistics


def scale_statistics(stats: Tensor, count: Tensor | int, scaling: str) -> Tensor:
    """Brings statistics of n tokens to a size that does not depend on n.

    Args:
        stats: [B, N, H, 6] as `attention_stats` gives them.
        count: n, the tokens they run over: an int or [B].
        scaling: "n", "log1p" or "raw".

    Returns:
        [B, N, H, 6]; uniform attention gives 1 for the means and 0 for the variances with "n".
    """
    if scaling == "raw":
        return stats
    n = count.to(stats.dtype).reshape(-1, 1, 1, 1) if isinstance(count, Tensor) else count
    variance = torch.tensor(_IS_VARIANCE, device=stats.device).to(stats.dtype)
    scaled = stats * (n * (variance * (n - 1) + 1))  # n, or n * n for variances
    return scaled.log1p() if scaling == "log1p" else scaled


def columns_of(config: SpotConfig, heads: int) -> dict[str, list[int]]:
    """Columns of the evidence [B, N, F] of each group that is among them, by its name."""
    width = 1 if config.heads == "mean" else heads
    latest = ["cls"] * 2 * ("cls" in config.evidence)
    latest += ["rowcol"] * 4 * ("rowcol" in config.evidence)
    found: dict[str, list[int]] = {}
    for head in range(width):
        for column, group in enumerate(latest):
            found.setdefault(group, []).append(head * len(latest) + column)
    if "moments" in config.evidence:
        first = width * len(latest)
        found["moments"] = list(range(first, first + 12 * width))
    return found


class _Seen(NamedTuple):
    """Statistics of a block.

    Attributes:
        stats: [B, N, H, 6]; as the block gave them, or scaled with the cuts followed.
        tokens: patch tokens they ran over, for those that are not scaled yet.
        cuts: how many cuts they have followed.
    """

    stats: Tensor
    tokens: int | None
    cuts: int


class EvidenceHistory:
    """Running evidence of one forward pass; local to it, so checkpointing and threads are safe.

    In inference a decision makes its evidence in one operator. Elsewhere statistics are scaled as
    they come, and cuts are followed when the next decision asks, so none are after the last.
    Memory: one tensor [B, N, H, 6] for every block of the window, less than one activation.
    """

    def __init__(self, config: SpotConfig) -> None:
        self.config = config
        wants_moments = "moments" in config.evidence
        window = config.history if isinstance(config.history, int) else None
        self._length = window if wants_moments else 1
        self._window: list[_Seen] = []
        self._cuts: list[Tensor] = []

    def copy(self) -> EvidenceHistory:
        """A history that goes on from here, and leaves this one as it is."""
        new = twin(self)
        new._window, new._cuts = [*self._window], [*self._cuts]
        return new

    def update(self, stats: Tensor, count: Tensor | int) -> None:
        """Adds a block's statistics [B, N, H, 6], which ran over `count` tokens."""
        stats = stats.detach() if self.config.detach_stats else stats
        gradient = stats.requires_grad and torch.is_grad_enabled()
        if isinstance(count, int) and not gradient and not torch.compiler.is_compiling():
            self._window.append(_Seen(stats, count, len(self._cuts)))
        else:
            self._window.append(_Seen(self._scaled(stats, count), None, len(self._cuts)))
        if self._length is not None:
            del self._window[: -self._length]

    def features(self) -> Tensor | None:
        """[B, N, F] evidence for a decision, or None when the config asks for none."""
        config = self.config
        if not config.uses_statistics:
            return None
        assert len(self._window) > 0, "a decision with statistics needs a block before it"
        first = 0 if "cls" in config.evidence else 2
        last = 6 if "rowcol" in config.evidence else 2
        moments = "moments" in config.evidence
        counts = [seen.tokens for seen in self._window if seen.tokens is not None]
        if len(counts) == len(self._window):
            return spot_ext.token_evidence(
                [seen.stats for seen in self._window],
                counts,
                [seen.cuts for seen in self._window],
                self._cuts,
                scaling=config.scaling,
                mean_heads=config.heads == "mean",
                latest=(first, last),
                moments=moments,
            )
        self._window = [self._settled(seen) for seen in self._window]
        parts = [] if first == last else [self._window[-1].stats[..., first:last]]
        if moments:
            window = torch.stack([seen.stats for seen in self._window])
            # Two passes: a sum of squares would lose digits, variances are tiny beside the squares.
            # Not torch.var_mean, which is slow along the first dimension.
            mean = window.mean(dim=0)
            parts += [mean, (window - mean).square().mean(dim=0)]
        return torch.cat([part.flatten(2) for part in parts], dim=-1)

    def decided(self, index: Tensor | None) -> None:
        """Notes a decision: only the rows of `index` [B, M] are left (None keeps all)."""
        if index is not None:
            self._cuts.append(index)
        if self.config.history == "since_last":
            self._window = []

    def _scaled(self, stats: Tensor, count: Tensor | int) -> Tensor:
        x = scale_statistics(stats, count, self.config.scaling)
        return x.mean(dim=2, keepdim=True) if self.config.heads == "mean" else x

    def _settled(self, seen: _Seen) -> _Seen:
        """The same, scaled and with all cuts followed."""
        x = seen.stats if seen.tokens is None else self._scaled(seen.stats, seen.tokens)
        for index in self._cuts[seen.cuts :]:
            x = spot_ext.compact_tokens(x, index, num_prefix=0)
        return _Seen(x, None, len(self._cuts))
