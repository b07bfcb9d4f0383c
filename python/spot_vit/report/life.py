"""What the page's script is given: the numbers behind each patch of a card."""

from __future__ import annotations

from typing import Any

from spot_vit.report.encode import (
    LEVELS,
    attention_uri,
    bits,
    packed_statistics,
    round_one,
    rounded,
)
from spot_vit.report.record import BlockTrace, ImageTrace, ModelTrace, StageTrace
from spot_vit.report.stages import VIRIDIS, stage_colours, stage_title
from spot_vit.report.views import Titled

STATISTIC_TITLES = (
    "class token → patch",
    "patch → class token",
    "mean of its row",
    "variance of its row",
    "mean of its column",
    "variance of its column",
)
"""Of `STATISTICS`; a row is what the patch attends to, a column who attends to it."""

EVIDENCE_TITLES = {
    "embed": "embedding",
    "cls": "class token",
    "rowcol": "rows, columns",
    "moments": "moments",
}

SCORES = {"log-odds": "log-odds of staying", "attention": "attention of the class token"}
"""What scores are, in words."""


def models_data(traces: list[Titled], mode: str) -> dict[str, Any]:
    """What holds for all images: classes, grid, tokens, scales of colour."""
    return {
        "mode": mode,
        "levels": LEVELS,
        "viridis": VIRIDIS,
        "statistics": STATISTIC_TITLES,
        "models": [_model(title, trace.model) for title, trace in traces],
    }


def _model(title: str, model: ModelTrace) -> dict[str, Any]:
    return {
        "title": title,
        "grid": list(model.grid),
        "prefix": model.prefix,
        "heads": model.heads,
        "classes": model.classes,
        "depth": sum(layer.name.startswith("blocks.") for layer in model.layers),
    }


def image_data(image: ImageTrace) -> dict[str, Any]:
    """What one model did with one image."""
    colours = stage_colours(len(image.stages))
    return {
        "stages": [_stage(s, colour) for s, colour in zip(image.stages, colours, strict=True)],
        "blocks": [_block(block) for block in image.blocks],
    }


def _stage(stage: StageTrace, colour: str) -> dict[str, Any]:
    share = None
    if stage.weight is not None:
        share = rounded(100 * stage.weight / max(float(stage.weight.sum()), 1e-12))
    return {
        "title": stage_title(stage),
        "block": stage.block,
        "colour": colour,
        "position": stage.position.tolist(),
        "kept": bits(stage.kept),
        "scored": SCORES.get(stage.scored or ""),
        "score": None if stage.score is None else rounded(stage.score),
        "rank": None if stage.rank is None else stage.rank.tolist(),
        "cut": round_one(stage.cut),
        "share": share,
        "effect": {
            EVIDENCE_TITLES.get(group, group): rounded(effect)
            for group, effect in stage.effect.items()
        },
        "vote": stage.vote.tolist(),
        "voteShare": rounded(100 * stage.vote_share),
    }


def _block(block: BlockTrace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "block": block.block,
        "front": block.front,
        "position": block.position.tolist(),
    }
    if block.statistics is not None:
        packed, low, high = packed_statistics(block.statistics)
        found["statistics"] = {"bytes": packed, "low": low, "high": high}
    if block.attention is not None:
        uri, largest = attention_uri(block.attention)
        found["attention"] = {"picture": uri, "largest": largest}
    if block.named is not None and block.held is not None:
        found["named"] = block.named.tolist()
        found["held"] = [rounded(100 * one) for one in block.held]
    return found
