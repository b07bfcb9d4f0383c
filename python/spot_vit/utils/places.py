"""Where models keep their parts: timm's names, and those of the few classes that are not timm's."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a class that is not timm's keeps its parts.

    Attributes:
        blocks: attribute path of its blocks.
        prefix: tokens in front of the patches, registers left out.
    """

    blocks: str
    prefix: int


_VIT = "transformers.models.vit.modeling_vit"
_DINOV2 = "transformers.models.dinov2.modeling_dinov2"
_REGISTERS = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
_SIGLIP = "transformers.models.siglip.modeling_siglip"
_DINOV3 = "transformers.models.dinov3_vit.modeling_dinov3_vit"

PLACES: dict[str, Place] = {
    "torchvision.models.vision_transformer.VisionTransformer": Place("encoder.layers", 1),
    f"{_VIT}.ViTModel": Place("layers", 1),
    f"{_VIT}.ViTForImageClassification": Place("vit.layers", 1),
    f"{_DINOV2}.Dinov2Model": Place("encoder.layer", 1),
    f"{_DINOV2}.Dinov2ForImageClassification": Place("dinov2.encoder.layer", 1),
    f"{_REGISTERS}.Dinov2WithRegistersModel": Place("encoder.layer", 1),
    f"{_REGISTERS}.Dinov2WithRegistersForImageClassification": Place(
        "dinov2_with_registers.encoder.layer", 1
    ),
    f"{_SIGLIP}.SiglipVisionModel": Place("encoder.layers", 0),
    f"{_SIGLIP}.SiglipForImageClassification": Place("vision_model.encoder.layers", 0),
    f"{_DINOV3}.DINOv3ViTModel": Place("model.layer", 1),
}
"""Such classes by their full name, so that their packages need not be imported."""

_ATTENTION = ("attn", "self_attention", "attention", "self_attn")
_PROJECTION = ("proj", "out_proj", "o_proj")
_HEADS = ("num_heads", "num_attention_heads")


def place_of(model: Any) -> Place | None:
    """The place of a class of `PLACES`, or of a subclass; None for any other."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((PLACES[name] for name in names if name in PLACES), None)


def blocks_in(model: Any) -> Any:
    """The blocks of a model, with their wrappers."""
    place = place_of(model)
    return attrgetter("blocks" if place is None else place.blocks)(model)


def attention_name(block: Any) -> str:
    """The name of a block's attention."""
    return next((name for name in _ATTENTION if name in block._modules), _ATTENTION[0])


def attention_of(block: Any) -> Any:
    """The attention of a block."""
    return getattr(block, attention_name(block))


def projection_of(attention: Any) -> Any:
    """The last layer of an attention module."""
    return getattr(attention, next(name for name in _PROJECTION if hasattr(attention, name)))


def heads_of(attention: Any) -> int:
    """The number of its heads."""
    count: int = getattr(attention, next(name for name in _HEADS if hasattr(attention, name)))
    return count


def prefix_of(model: Any) -> int:
    """The number of tokens in front of the patches."""
    place = place_of(model)
    if place is None:
        own: int = model.num_prefix_tokens
        return own
    registers: int = getattr(getattr(model, "config", None), "num_register_tokens", 0)
    return place.prefix + registers
