"""The models of a benchmark: the dense one, and the same weights with tokens or keys removed."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from spot_vit.config.bench import BenchSettings
from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.fields import near_names
from spot_vit.export.opened import Exported
from spot_vit.measure.flops import FlopCount, count_flops
from spot_vit.models.convert import restore, set_keep, sparsify
from spot_vit.models.sparsifiner import is_sparse, sparsify_attention
from spot_vit.runs.evaluated import load_evaluated, untrained
from spot_vit.utils.errors import UserError
from spot_vit.utils.sizes import input_size

DEFAULT_KEEP = (0.7,)


@dataclass
class Variant:
    """One model of a benchmark.

    Attributes:
        label: what it is in words: "dense", "keep 0.7".
        model: in eval mode; variants share their parameters.
        size: (channels, height, width) of an image.
        keep: ρ; None where no tokens are removed.
        attention_keep: share of keys; None where attention is dense.
    """

    label: str
    model: Any
    size: tuple[int, int, int]
    keep: float | tuple[float, ...] | None = None
    attention_keep: float | None = None

    def copied(self) -> Any:
        """A model of its own with the parameters of this one."""
        return shared_copy(self.model)


def shared_copy(model: nn.Module) -> Any:
    """A copy whose parameters and buffers are those of the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def variants(settings: BenchSettings) -> list[Variant]:
    """The dense model, then the sparse ones.

    Raises:
        UserError: there is no such model, or it does not fit the settings.
    """
    model = _load(settings)
    size = _size(model, settings)
    tokens, keys = hasattr(model, "spot_config"), is_sparse(model)
    if (tokens or keys) and (settings.method is not None or settings.at is not None):
        raise UserError(
            f"method, at: {settings.model} is sparse already, by its own; they are for dense models"
        )
    dense = restore(shared_copy(model)) if tokens or keys else model
    keeps: tuple[Any, ...] = settings.keep or DEFAULT_KEEP
    if settings.keep is None and tokens:
        keeps = (model.spot_config.keep,)
    elif settings.keep is None and (keys or settings.attention_keep is not None):
        keeps = (None,)  # sparse attention alone
    found = [Variant("dense", dense, size)]
    for keep in keeps:
        try:
            one = _sparse(model, keep, settings)
        except (ValueError, TypeError) as error:  # of the conversion, which says what is wrong
            raise UserError(f"{settings.model}: {error}") from error
        own = getattr(one, "sparsifiner_config", None)
        share = None if own is None else own.keep_rate
        words = {"keep": keep, "attention keep": share}
        label = ", ".join(f"{name} {_text(v)}" for name, v in words.items() if v is not None)
        found.append(Variant(label, one, size, keep, share))
    for variant in found:
        variant.model.to(settings.device, getattr(torch, settings.dtype)).eval()
        variant.model.requires_grad_(False)  # as fast has it, of the parameters they share
    return found


def cost(model: Any, size: tuple[int, int, int]) -> tuple[FlopCount, float | None]:
    """Multiply-accumulates of a model, and tokens that attend in a block, on average."""
    count = count_flops(model, size)
    tokens = [layer.tokens for layer in count.layers if layer.name.startswith("blocks.")]
    return count, statistics.mean(tokens) if tokens else None


def _load(settings: BenchSettings) -> Any:
    source, side = settings.model, settings.img_size
    if settings.pretrained or Path(source).exists():
        if settings.model_kwargs:
            raise UserError("model_kwargs are for a model of timm with random weights")
        asked = EvaluationSettings(checkpoint=source, img_size=side)
        model = load_evaluated(source, asked, None).model
        if isinstance(model, Exported):
            raise UserError(f"{source} is an exported file; name the model it was made of")
        return model
    if not timm.is_model(source):
        kinds = "a file or run folder, nor a model of timm"
        raise UserError(f"{source} is neither {kinds}{near_names(source, timm.list_models())}")
    return untrained(source, side, **settings.model_kwargs)


def _size(model: Any, settings: BenchSettings) -> tuple[int, int, int]:
    channels, height, width = input_size(model)
    side = settings.img_size
    return (channels, height, width) if side is None else (channels, side, side)


def _sparse(model: Any, keep: Any, settings: BenchSettings) -> Any:
    one = shared_copy(model)
    if settings.attention_keep is not None and not is_sparse(one):
        sparsify_attention(one, settings.attention_keep)
    elif settings.attention_keep is not None:
        set_keep(one, attention=settings.attention_keep)
    if keep is None:
        return one
    if hasattr(one, "spot_config"):
        return set_keep(one, keep)
    given: dict[str, Any] = {"method": settings.method, "at": settings.at}
    return sparsify(one, keep=keep, **{k: v for k, v in given.items() if v is not None})


def _text(keep: Any) -> str:
    """0.7, or 0.7/0.5/0.3 for a ratio at each stage."""
    return "/".join(f"{one:g}" for one in keep) if isinstance(keep, tuple) else f"{keep:g}"
