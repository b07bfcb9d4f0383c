"""What training of connectivity predictors needs of a forward pass: dense attention, q and k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from spot_vit.look import Look


class Operands(NamedTuple):
    """What a block's attention map is made of: softmax(scale * q k^T), without masks.

    Attributes:
        q: [B, N, H, D] after qk norm and rotary embedding, before `scale`.
        k: [B, N, H, D] likewise, repeated where heads share keys.
        scale: of the logits.
        num_prefix: P, leading tokens whose queries are dense.
    """

    q: Tensor
    k: Tensor
    scale: float
    num_prefix: int


class Recorder:
    """Notes the operands of one block in a dictionary; a block that is run again overwrites."""

    def __init__(self, block: int, num_prefix: int, operands: dict[int, Operands]) -> None:
        self.block, self.num_prefix, self.operands = block, num_prefix, operands

    def __call__(self, q: Tensor, k: Tensor, look: Look, scale: float) -> None:
        """Called by the block's attention."""
        self.operands[self.block] = Operands(q, k, scale, look.num_prefix)


@contextmanager
def dense_attention(model: Any) -> Iterator[Any]:
    """Within it, attention of `model` is dense: predictors are not asked.

    Token removal goes on. Gives the model.
    """
    predictors = [block.attn.connectivity for block in model.blocks if _is_sparse(block.attn)]
    before = [predictor.enabled for predictor in predictors]
    for predictor in predictors:
        predictor.enabled = False
    try:
        yield model
    finally:
        for predictor, enabled in zip(predictors, before, strict=True):
            predictor.enabled = enabled


@contextmanager
def record_operands(model: Any) -> Iterator[dict[int, Operands]]:
    """Within it, forward passes note q and k of every block, by its index.

    Works on a timm model too, such as a dense teacher. Memory is linear in the number of tokens:
    q and k as they are, with their graph outside `torch.no_grad()`. Not for compiled models.

    Args:
        model: a timm model of a supported class, converted or not.
    """
    from spot_vit.adapters.find import attention_adapters

    operands: dict[int, Operands] = {}
    modules = [block.attn for block in model.blocks]
    classes = [type(module) for module in modules]
    adapters = attention_adapters(model)
    try:
        for b, (module, entry) in enumerate(zip(modules, adapters, strict=True)):
            module.__class__ = entry.adapter
            module.recorder = Recorder(b, model.num_prefix_tokens, operands)
        yield operands
    finally:
        for module, original in zip(modules, classes, strict=True):
            module.__class__ = original
            vars(module).pop("recorder", None)


def _is_sparse(attention: Any) -> bool:
    return getattr(attention, "sparse", False)
