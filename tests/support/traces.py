"""Traces of no model: random numbers that fit together as a pass makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from spot_vit.report.record import (
    BlockTrace,
    ImageTrace,
    LayerCost,
    ModelTrace,
    StageTrace,
)
from spot_vit.report.trace import Trace

AT = (3, 6, 9)
DEPTH = 12


def random_trace(
    *,
    images: int = 3,
    grid: tuple[int, int] = (4, 5),
    patch: int = 16,
    heads: int = 3,
    keep: float = 0.7,
    classes: Sequence[str] | None = ("cat", "dog", "owl"),
    names: Sequence[str] | None = None,
    labels: bool = True,
    fuses: bool = False,
    scores: bool = True,
    sparse: bool = False,
    timed: bool = True,
    seed: int = 0,
) -> Trace:
    """A trace of images that lose patches at blocks 3, 6 and 9.

    Args:
        images: how many.
        grid: rows and columns of patches.
        patch: pixels along a patch's side.
        heads: of attention.
        keep: of each stage.
        classes: names; None leaves three classes without.
        names: of the images; numbers by default.
        labels: whether images have one.
        fuses: whether patches that leave are fused, with weights.
        scores: whether anything scored them.
        sparse: whether each patch sees only half of the keys.
        timed: whether layers have milliseconds.
        seed: of all numbers but the dense logits, which the images' numbers alone decide.
    """
    draw = np.random.default_rng(seed)
    count = 3 if classes is None else len(classes)
    ratios = [keep ** (k + 1) for k in range(len(AT))]
    model = ModelTrace(
        "random_vit", {"spot": {"method": "random", "keep": keep, "at": list(AT)}}, ratios, grid,
        ["class"], heads, None if classes is None else list(classes),
        _layers(grid, ratios, timed), _layers(grid, [1.0] * len(AT), timed),
    )  # fmt: skip
    found = []
    for i in range(images):
        dense = np.random.default_rng(1000 + i).normal(size=count).astype(np.float32)
        stages, blocks = _pass(draw, grid, heads, keep, count, fuses, scores, sparse)
        found.append(
            ImageTrace(
                str(i) if names is None else names[i],
                i % count if labels else None,
                draw.integers(0, 256, (grid[0] * patch, grid[1] * patch, 3)).astype(np.uint8),
                draw.normal(size=count).astype(np.float32),
                dense,
                stages,
                blocks,
            )
        )
    return Trace(model, found, {"processor": "none", "spot": "0"}, ["These numbers are random."])


def _pass(
    draw: np.random.Generator,
    grid: tuple[int, int],
    heads: int,
    keep: float,
    classes: int,
    fuses: bool,
    scores: bool,
    sparse: bool,
) -> tuple[list[StageTrace], list[BlockTrace]]:
    position = np.arange(grid[0] * grid[1], dtype=np.int32)
    stages, blocks = [], []
    for b in range(DEPTH):
        if b in AT:
            stages.append(_stage(draw, b, position, keep, classes, fuses, scores))
            position = position[stages[-1].kept]
        block = BlockTrace(b, 1, position, None)
        if b < AT[-1]:
            block.statistics = draw.exponential(size=(len(position), heads, 6)).astype(np.float32)
        if b in (*AT, DEPTH - 1):
            _attend(draw, block, heads, sparse)
        blocks.append(block)
    return stages, blocks


def _stage(
    draw: np.random.Generator,
    b: int,
    position: np.ndarray,
    keep: float,
    classes: int,
    fuses: bool,
    scores: bool,
) -> StageTrace:
    n = len(position)
    values = draw.normal(size=n).astype(np.float32)
    rank = np.argsort(np.argsort(-values)).astype(np.int32)
    kept = rank < round(n * keep)
    cut = float((values[kept].min() + values[~kept].max()) / 2)
    weight = np.where(kept, 0, draw.random(n)).astype(np.float32) if fuses else None
    effect = {name: draw.normal(size=n).astype(np.float32) for name in ("embed", "cls") if scores}
    return StageTrace(
        b, False, position, kept, "log-odds" if scores else None, values if scores else None,
        rank if scores else None, cut if scores else None, weight, effect,
        draw.integers(0, classes, n).astype(np.int32), draw.random(n).astype(np.float32),
    )  # fmt: skip


def _attend(draw: np.random.Generator, block: BlockTrace, heads: int, sparse: bool) -> None:
    n = 1 + len(block.position)
    logits = 2 * draw.normal(size=(heads, n, n))
    if sparse:
        logits[:, :, 1:][draw.random((heads, n, n - 1)) < 0.5] = -np.inf
        block.named = draw.integers(1, n, (n - 1, heads)).astype(np.int16)
        block.held = draw.random((n - 1, heads)).astype(np.float16)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    block.attention = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float16)


def _layers(grid: tuple[int, int], ratios: Sequence[float], timed: bool) -> list[LayerCost]:
    layers = [LayerCost("stem", 0, 0.02, 0.5 if timed else None)]
    patches = grid[0] * grid[1]
    for b in range(DEPTH):
        passed = sum(b >= at for at in AT)
        tokens = 1 + round(patches * (ratios[passed - 1] if passed else 1.0))
        ms = 0.2 + 0.01 * tokens if timed else None
        layers.append(LayerCost(f"blocks.{b}", tokens, 0.002 * tokens, ms))
    return [*layers, LayerCost("head", 0, 0.001, 0.1 if timed else None)]
