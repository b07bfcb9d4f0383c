"""The configuration of a SPOT model: what to drop, where, and on what evidence."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

from spot_vit.config.fields import Fields, exact, relation, setting
from spot_vit.config.methods import FEATURES, METHODS, STATISTICS, Method

SCALINGS = ("log1p", "n", "raw")
HEADS = ("concat", "mean")
TRAIN_DECISIONS = ("gumbel", "topk")
SOFT = ("none", "fuse")
NOISE = {"gumbel": 1.0, "topk": 0.5}
"""Scale of the noise by `train_decision`: the published draw, and what did well (our choice)."""


@dataclasses.dataclass(frozen=True)
class SpotConfig(Fields):
    """Configuration of a SPOT model; frozen, and a round trip through JSON loses nothing.

    Attributes:
        method: how tokens are scored. "spot" (arXiv 2511.10488): a predictor on embeddings and
            attention statistics. "dynamicvit" (arXiv 2106.02034): the same predictor on embeddings
            alone, which is DynamicViT's. "evit" (arXiv 2202.07800): attention of the class token,
            averaged over the heads of the block that cuts; nothing is learned, and training cuts
            as inference does. "random": the baseline below all of them, a new draw per pass.
        keep: ρ, so that stage k keeps ⌊N ρ^k⌋ of N patch tokens (published; with "evit" ⌈ρ n⌉ of
            the n that reach the stage, as published there), or one cumulative ratio per stage,
            never rising.
        at: blocks before which a decision is taken ("evit": inside of which, between attention and
            MLP), ascending; None for L//4, L//2, 3L//4 (DynamicViT's choice; that of SPOT's paper
            is not known to us).
        features: evidence given to SPOT's predictor, a subset of "embed" (token embeddings), "cls"
            (attention to and from the class token), "rowcol" (row and column mean and variance),
            both of the preceding block, and "moments" (mean and variance of all six over the
            history).
        history: blocks that enter the moments: "all" so far, "since_last" decision, or the last m
            (our choice; the window is not published).
        heads: "concat" keeps the heads apart, "mean" averages them (our choice).
        d_remap: width of the remapped embedding, None for the model's width (our choice).
        scaling: "n" multiplies means by n and variances by n², "log1p" takes the logarithm of that,
            "raw" leaves them (our choice).
        detach_stats: stop gradients at the statistics.
        soft: "fuse" adds one token per stage, the mean of what the stage removes weighted by the
            keep probability (our choice of a soft form, near SPViT's package token); "none" adds
            nothing; None is the method's published form: "evit" fuses its removed tokens, weighted
            by the class token's attention, into a token that competes in later stages.
        train_decision: "gumbel" draws each token (published); "topk" keeps exactly the budget of
            noisy scores with a sigmoid straight-through at the cut (our choice).
        tau: temperature of the Gumbel softmax (DynamicViT's 1).
        noise: scale of the noise of the decisions in training, 0 for none; None is the default of
            `train_decision`, see `NOISE`. Inference has none.
    """

    method: str = setting("spot", choices=lambda: tuple(METHODS))
    keep: float | tuple[float, ...] = setting(
        0.7, low=1e-6, high=1, expected="in (0, 1], a number from 1e-06 on or a list of them"
    )
    at: tuple[int, ...] | None = setting(
        None,
        low=0,
        ascending=True,
        expected="a non-empty list of block indices that ascend, or None",
    )
    features: tuple[str, ...] = setting(FEATURES, choices=FEATURES, distinct=True)
    history: str | int = setting(
        "all",
        choices=("all", "since_last"),
        low=1,
        expected="'all', 'since_last' or a positive int",
    )
    heads: str = setting("concat", choices=HEADS)
    d_remap: int | None = setting(
        None, low=2, high=2**14, even=True, expected="an even int from 2 to 16384, or None"
    )
    scaling: str = setting("log1p", choices=SCALINGS)
    detach_stats: bool = False
    soft: str | None = setting(None, choices=SOFT)
    train_decision: str = setting("gumbel", choices=TRAIN_DECISIONS)
    tau: float = setting(1.0, above=0, high=1e6)
    noise: float | None = setting(None, low=0, high=1e6)

    @relation("method", "features")
    def _evidence_is_chosen(self) -> str | None:
        if self.row.chooses_evidence or set(self.features) == set(FEATURES):
            return None
        return f"features are SPOT's; method {self.method!r} has its own evidence"

    @relation("keep")
    def _keep_falls(self) -> str | None:
        ratios = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if all(later <= sooner for sooner, later in itertools.pairwise(ratios)):
            return None
        return f"keep must not rise from stage to stage, got {list(ratios)}"

    @relation("keep", "at")
    def _stages_agree(self) -> str | None:
        if self.at is None or not isinstance(self.keep, tuple) or len(self.keep) == len(self.at):
            return None
        return f"keep names {len(self.keep)} stages, at names {len(self.at)}"

    @relation("method", "features", "at")
    def _statistics_come_first(self) -> str | None:
        if self.at is None or self.at[0] > 0 or not self.uses_statistics:
            return None
        return (
            "at must not contain 0: no block comes before it, so there are no attention "
            f"statistics for features {list(self.evidence)}"
        )

    @property
    def row(self) -> Method:
        """The method's row in the table of methods."""
        return METHODS[self.method]

    @property
    def evidence(self) -> tuple[str, ...]:
        """What the predictors see, in the order of FEATURES; empty where there are none."""
        own = self.features if self.row.chooses_evidence else self.row.evidence
        return tuple(feature for feature in FEATURES if feature in own)

    @property
    def learned(self) -> bool:
        """Whether predictors decide: then training masks tokens, otherwise it removes them."""
        return bool(self.evidence)

    @property
    def cuts_inside(self) -> bool:
        """Whether a stage cuts inside its block, between attention and MLP."""
        return self.row.cuts_inside

    @property
    def fuses(self) -> bool:
        """Whether a stage leaves a token in place of those it removes."""
        return self.row.fuses if self.soft is None else self.soft == "fuse"

    @property
    def uses_statistics(self) -> bool:
        """Whether predictors see any attention statistics."""
        return any(feature in STATISTICS for feature in self.evidence)

    @property
    def noise_scale(self) -> float:
        """Scale of the noise that training adds to log-odds before it decides."""
        return NOISE[self.train_decision] if self.noise is None else self.noise

    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Block indices of the decisions in a model of `depth` blocks."""
        at = self.at
        if at is None and depth < 2:
            raise ValueError(
                "a model of one block has no block after the first, where decisions are by "
                "default; name at=[0], with features=['embed'] or another method without statistics"
            )
        if at is None:
            at = tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3)}))
        if at[-1] >= depth:
            raise ValueError(f"at names block {at[-1]}, the model has {depth}")
        return at

    def ratios(self, stages: int) -> tuple[Fraction, ...]:
        """Exact cumulative keep ratio of each stage."""
        if isinstance(self.keep, tuple):
            if len(self.keep) != stages:
                raise ValueError(f"keep names {len(self.keep)} stages, the model has {stages}")
            return tuple(exact(ratio) for ratio in self.keep)
        return tuple(exact(self.keep) ** k for k in range(1, stages + 1))

    def keep_ratios(self) -> list[float]:
        """Cumulative keep ratios of the stages of a converted model (whose `at` is filled in)."""
        return [float(ratio) for ratio in self.ratios(len(self.at or ()))]

    def num_features(self, num_heads: int) -> int:
        """F, the statistics columns per token: [latest | mean | variance], each [H, 6] or less."""
        width = 1 if self.heads == "mean" else num_heads
        latest = 2 * ("cls" in self.evidence) + 4 * ("rowcol" in self.evidence)
        return width * (latest + 12 * ("moments" in self.evidence))
