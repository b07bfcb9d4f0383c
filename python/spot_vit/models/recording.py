"""What attention did in a forward pass: its operands, and its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spot_vit.models.adapters.find import attention_adapters
from spot_vit.nn.operands import AttentionMap, MapRecorder, OperandRecorder, Operands, Recorder
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import attention_of, prefix_of


@contextmanager
def record_operands(model: Any) -> Iterator[dict[int, Operands]]:
    """A context in which forward passes note q and k of every block, by its index.

    Works on a timm model too, such as a dense teacher. Memory is linear in the number of tokens:
    q and k as they are, with their graph outside `torch.no_grad()`. Not for compiled models.

    Args:
        model: a timm model of a supported class, converted or not, wrapped or not.
    """
    operands: dict[int, Operands] = {}
    with _watched(model, lambda b, prefix: OperandRecorder(b, prefix, operands)):
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
    maps: dict[int, AttentionMap] = {}
    inner = unwrap(model)
    with _watched(inner, lambda b, prefix: MapRecorder(b, prefix, maps)):
        inner(images)
    return [maps[b] for b in sorted(maps)]


@contextmanager
def _watched(model: Any, recorder: Callable[[int, int], Recorder]) -> Iterator[None]:
    """A context in which every attention module has a recorder, made of block and prefix tokens."""
    model = unwrap(model)
    modules = [attention_of(block) for block in blocks_of(model)]
    classes = [type(module) for module in modules]
    adapters = attention_adapters(model)
    try:
        for b, (module, entry) in enumerate(zip(modules, adapters, strict=True)):
            module.__class__ = entry.adapter
            module.recorder = recorder(b, prefix_of(model))
        yield
    finally:
        for module, original in zip(modules, classes, strict=True):
            module.__class__ = original
            vars(module).pop("recorder", None)
