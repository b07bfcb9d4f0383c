"""Evidence of a token besides its embedding: statistics of its attention over the layers.

Columns are [latest | mean | variance] (arXiv 2511.10488: statistics of the current layer and their
moments across layers; window, head layout and scaling are our choice, see SpotConfig).
"""

from __future__ import annotations

import torch
from torch import Tensor

import spot_ext
from spot_vit.config.spot import SpotConfig

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


class EvidenceHistory:
    """Running evidence of one forward pass; local to it, so checkpointing and threads are safe.

    Memory: one tensor [B, N, H, 6] for every block of the window, less than one activation. Cuts
    are followed when the next decision asks, so none are after the last.
    """

    def __init__(self, config: SpotConfig) -> None:
        self.config = config
        wants_moments = "moments" in config.evidence
        window = config.history if isinstance(config.history, int) else None
        self._length = window if wants_moments else 1
        self._window: list[Tensor] = []
        self._followed: list[int] = []  # cuts that each of the window has followed
        self._cuts: list[Tensor] = []

    def copy(self) -> EvidenceHistory:
        """A history that goes on from here, and leaves this one as it is."""
        new = EvidenceHistory(self.config)
        new._window, new._followed = [*self._window], [*self._followed]
        new._cuts = [*self._cuts]
        return new

    def update(self, stats: Tensor, count: Tensor | int) -> None:
        """Adds a block's statistics [B, N, H, 6], which ran over `count` tokens."""
        config = self.config
        x = scale_statistics(
            stats.detach() if config.detach_stats else stats, count, config.scaling
        )
        if config.heads == "mean":
            x = x.mean(dim=2, keepdim=True)
        self._window.append(x)
        self._followed.append(len(self._cuts))
        if self._length is not None:
            del self._window[: -self._length], self._followed[: -self._length]

    def features(self) -> Tensor | None:
        """[B, N, F] evidence for a decision, or None when the config asks for none."""
        config = self.config
        if not config.uses_statistics:
            return None
        assert len(self._window) > 0, "a decision with statistics needs a block before it"
        self._follow()
        first = 0 if "cls" in config.evidence else 2
        last = 6 if "rowcol" in config.evidence else 2
        parts = [] if first == last else [self._window[-1][..., first:last]]
        if "moments" in config.evidence:
            window = torch.stack(self._window)
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
            self._window, self._followed = [], []

    def _follow(self) -> None:
        for i, followed in enumerate(self._followed):
            for index in self._cuts[followed:]:
                self._window[i] = spot_ext.compact_tokens(self._window[i], index, num_prefix=0)
            self._followed[i] = len(self._cuts)
