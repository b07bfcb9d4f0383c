"""LV-ViT's two heads taken apart for distillation, as published code does."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from spot_vit.models.loop import SpotOutput
from spot_vit.models.lvvit import LVViT
from spot_vit.training.losses import TOKEN_TERMS, Teacher
from spot_vit.utils.modes import unwrap


def check_auxiliary(auxiliary: str | None) -> None:
    """Raises a ValueError unless it is None or a term for tokens."""
    if auxiliary is not None and auxiliary not in TOKEN_TERMS:
        raise ValueError(f"auxiliary must be None or one of {list(TOKEN_TERMS)}, got {auxiliary!r}")


def apart(student: nn.Module, output: SpotOutput) -> SpotOutput:
    """The output with the class head's logits alone, and auxiliary logits in place of tokens.

    Args:
        student: a LV-ViT, sparse or not, wrapped or not.
        output: what it returned: tokens [B, P+N, C], or of survivors.

    Returns:
        logits [B, classes] and tokens [B, N, classes], the rest as it was.
    """
    logits, tokens = _heads(student, output.tokens, "student")
    return dataclasses.replace(output, logits=logits, tokens=tokens)


def teacher_apart(teacher: nn.Module, view: Teacher) -> Teacher:
    """What `apart` gives, of a teacher's view."""
    assert view.tokens is not None  # objectives with `auxiliary` ask for them
    return Teacher(*_heads(teacher, view.tokens, "teacher"))


def _heads(model: Any, tokens: Tensor, who: str) -> tuple[Tensor, Tensor]:
    model = unwrap(model)
    if not isinstance(model, LVViT) or model.num_classes == 0 or model.global_pool != "token":
        raise TypeError(
            f"auxiliary: expected a {who} with LV-ViT's two heads, got {type(model).__name__}"
        )
    logits = model.head(model.head_drop(model.fc_norm(tokens[:, 0])))
    return logits, model.dense_logits(tokens)
