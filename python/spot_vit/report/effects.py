"""What a predictor's scores owe to each group of evidence: leave one group out, ask it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spot_vit.config.spot import SpotConfig
from spot_vit.nn.evidence import columns_of
from spot_vit.utils.modes import blocks_of


class Scoring(NamedTuple):
    """One call of a predictor.

    Attributes:
        predictor: that was called.
        tokens: [B, n, C] patches that it scored.
        features: [B, n, F] evidence, or None.
        keep: [B, n] mask of the tokens that are alive, or None for all.
        logp: [B, n, 2] what it said.
    """

    predictor: nn.Module
    tokens: Tensor
    features: Tensor | None
    keep: Tensor | None
    logp: Tensor

    @property
    def log_odds(self) -> Tensor:
        """[B, n] log-odds of keeping."""
        return self.logp[..., 0] - self.logp[..., 1]

    @property
    def keep_probability(self) -> Tensor:
        """[B, n] probability of keeping."""
        return self.logp[..., 0].exp()


@contextmanager
def watch_scorers(model: Any) -> Iterator[dict[int, Scoring]]:
    """A context in which the calls of predictors are noted, by block; they are not changed."""
    seen: dict[int, Scoring] = {}

    def note(b: int, predictor: nn.Module, args: Any, logp: Tensor) -> None:
        tokens, features, keep = args
        seen[b] = Scoring(predictor, tokens, features, keep, logp)

    handles = [
        block.relevance.register_forward_hook(partial(note, b))
        for b, block in enumerate(blocks_of(model))
        if getattr(block, "relevance", None) is not None
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evidence_effects(scoring: Scoring, config: SpotConfig, heads: int) -> dict[str, Tensor]:
    """How much the log-odds of each patch owe to each group of evidence.

    A group is left out by putting its mean over the patches of the image in its place, so that it
    tells them no longer apart; the effect is the log-odds with the group less those without (our
    choice). Effects need not add up: groups interact.

    Args:
        scoring: a call of the predictor.
        config: of the model.
        heads: of its attention.

    Returns:
        [B, n] log-odds by group, for the groups that the method uses.
    """
    effects = {}
    columns = columns_of(config, heads)
    for group in config.evidence:
        tokens, features = scoring.tokens, scoring.features
        if group in columns:
            assert features is not None
            features = features.clone()
            some = features[..., columns[group]]
            features[..., columns[group]] = some.mean(dim=1, keepdim=True).expand_as(some)
        else:
            tokens = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
        logp = scoring.predictor.forward(tokens, features, scoring.keep)
        effects[group] = scoring.log_odds - (logp[..., 0] - logp[..., 1])
    return effects
