"""What attention did in a forward pass: its operands, and its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from spot_vit.models.adapters.find import attention_adapters
from spot_vit.models.fast_blocks import SLOW
from spot_vit.nn.operands import (
    Attended,
    AttentionMap,
    Operands,
    Recorder,
    map_of,
    operands_of,
)
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import attention_of, prefix_of

T = TypeVar("T")


@contextmanager
def record_operands(model: Any) -> Iterator[dict[int, Operands]]:
    """A context in which forward passes note q and k of every block, by its index.

    Works on a timm model too, such as a dense teacher. Memory is linear in the number of tokens:
    q and k as they are, with their graph outside `torch.no_grad()`. Not for compiled models.

    Args:
        model: a timm model of a supported class, converted or not, wrapped or not.
    """
    with watched(model, operands_of) as operands:
        yield operands


@torch.no_grad()
def attention_maps(model: Any, images: Tensor) -> list[AttentionMap]:
    """Attention maps of all blocks, exactly as one pass uses them: dense, masked, cut or sparse.

    Hooks do not see them: fused kernels never hold a map. Here each block's is computed a second
    time, in plain PyTorch, from what its attention was given; the pass itself is not changed.

    Args:
        model: a timm model of a supported class, converted or not, wrapped or not; in the mode it
            is in (training masks tokens, inference removes them).
        images: [B, 3, H, W].

    Returns:
        A map for each block, float32 (float64 for float64).
    """
    inner = unwrap(model)
    with watched(inner, map_of) as maps:
        inner(images)
    return [maps[b] for b in sorted(maps)]


@contextmanager
def watched(
    model: Any, take: Callable[[Attended], T], wanted: Sequence[int] | None = None
) -> Iterator[dict[int, T]]:
    """A context that gives what is taken of each block's attention; a second run overwrites.

    Args:
        model: as for `record_operands`.
        take: makes of what attention was given whatever is kept.
        wanted: blocks to watch, by index; all by default.
    """
    model = unwrap(model)
    taken: dict[int, T] = {}

    def note(b: int, attended: Attended) -> None:
        taken[b] = take(attended)

    modules = [attention_of(block) for block in blocks_of(model)]
    classes = [type(module) for module in modules]
    try:
        for module in modules:  # as they are in a model that is not fast
            module.__class__ = SLOW.get(type(module), type(module))
        adapters = attention_adapters(model)
        for b, (module, entry) in enumerate(zip(modules, adapters, strict=True)):
            if wanted is not None and b not in wanted:
                module.__class__ = classes[b]
                continue
            module.__class__ = entry.adapter
            module.recorder = Recorder(prefix_of(model), partial(note, b))
        yield taken
    finally:
        for module, original in zip(modules, classes, strict=True):
            module.__class__ = original
            vars(module).pop("recorder", None)
