"""Statistics of each token's attention over the layers: the evidence besides its embedding.

Columns are [latest | mean | variance] (arXiv 2511.10488: statistics of the current layer and their
moments across layers; window, head layout and scaling are our choice, see SpotConfig).
"""

from __future__ import annotations

import torch
from torch import Tensor

import spot_ext
from spot_vit.config import SpotConfig

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


class History:
    """Running evidence of one forward pass; local to it, so checkpointing and threads are safe.

    Mean and variance are Welford updates: plain sums of squares lose digits, since the variances
    are tiny beside the squares. Memory: 3 (all so far) or m + 1 tensors [B, N, H, 6].
    """

    def __init__(self, config: SpotConfig) -> None:
        self.config = config
        self.latest: Tensor | None = None
        self._window: list[Tensor] = []
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, stats: Tensor, count: Tensor | int) -> None:
        """Adds a block's statistics [B, N, H, 6], which ran over `count` tokens."""
        config = self.config
        x = scale_statistics(
            stats.detach() if config.detach_stats else stats, count, config.scaling
        )
        if config.heads == "mean":
            x = x.mean(dim=2, keepdim=True)
        self.latest = x
        if "moments" not in config.features:
            return
        if isinstance(config.history, int):
            self._window = [*self._window, x][-config.history :]
            return
        self._count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = x, torch.zeros_like(x)
            return
        delta = x - self._mean
        self._mean = self._mean + delta / self._count
        self._squares = self._squares + delta * (x - self._mean)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.config.history, int):
            window = torch.stack(self._window)
            return window.mean(dim=0), window.var(dim=0, correction=0)
        assert self._mean is not None and self._squares is not None
        return self._mean, self._squares / self._count

    def features(self) -> Tensor | None:
        """[B, N, F] evidence for a decision, or None when the config asks for none."""
        if not self.config.uses_statistics:
            return None
        assert self.latest is not None, "a decision with statistics needs a block before it"
        parts = []
        if "cls" in self.config.features:
            parts.append(self.latest[..., :2].flatten(2))
        if "rowcol" in self.config.features:
            parts.append(self.latest[..., 2:].flatten(2))
        if "moments" in self.config.features:
            parts += [moment.flatten(2) for moment in self._moments()]
        return torch.cat(parts, dim=-1)

    def decided(self, index: Tensor | None) -> None:
        """Follows a decision: keeps the rows of `index` [B, M] (None keeps all)."""
        if index is not None:

            def rows(x: Tensor | None) -> Tensor | None:
                return None if x is None else spot_ext.compact_tokens(x, index, num_prefix=0)

            self.latest, self._mean, self._squares = map(
                rows, (self.latest, self._mean, self._squares)
            )
            self._window = [spot_ext.compact_tokens(x, index, num_prefix=0) for x in self._window]
        if self.config.history == "since_last":
            self._count, self._mean, self._squares = 0, None, None
