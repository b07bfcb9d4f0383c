"""The dense teacher of an objective: checked against the student, frozen, asked."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.training.losses import Teacher
from spot_vit.utils.modes import unwrap


class FrozenTeacher:
    """A dense model that is put in eval mode and frozen once it is known not to be the student.

    Args:
        model: timm model, or where logits are enough any module that gives them (a tensor, or an
            object or mapping with `logits`), wrapped or not; None for no teacher.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model: Any = None if model is None else unwrap(model)
        self._student: weakref.ref[nn.Module] | None = None  # the one that was checked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_student": None}

    def freeze(self, student: nn.Module) -> None:
        """Puts the teacher in eval mode and switches its gradients off.

        Args:
            student: the model that learns from it, wrapped or not.

        Raises:
            ValueError: the two share parameters; the teacher is then left as it was.
        """
        inside = unwrap(student)
        if self.model is None or (self._student is not None and self._student() is inside):
            return
        own = {id(parameter): name for name, parameter in inside.named_parameters()}
        shared = [own[id(p)] for p in self.model.parameters() if id(p) in own]
        if shared:
            what = "is the student itself" if inside is self.model else "shares parameters with it"
            raise ValueError(
                f"teacher: the model {what} ({shared[0]}, …), and freezing it would freeze the "
                "student; take copy.deepcopy(model) before sparsify"
            )
        self.model.eval().requires_grad_(False)
        self._student = weakref.ref(inside)

    @torch.no_grad()
    def view(self, student: nn.Module, images: Tensor, tokens: bool = True) -> Teacher | None:
        """Logits, and tokens where they are asked for, that the teacher gives for images.

        Args:
            student: as in `freeze`, which runs first.
            images: [B, channels, H, W].
            tokens: whether tokens are needed.

        Returns:
            What it gives; None without a teacher.

        Raises:
            ValueError: tokens are needed, and the model has none.
            TypeError: there are no logits in what the model gives.
        """
        self.freeze(student)
        if self.model is None:
            return None
        if not tokens:
            return Teacher(_logits(self.model(images), self.model), None)
        features = None
        if hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head"):
            features = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim != 3:
            raise ValueError(
                f"teacher: {type(self.model).__name__} has no tokens [B, P+N, C] that the "
                "student's could be compared with; give a ViT of the student's grid and width, or "
                "leave the token term out: weights=LossWeights(mse=0) (--token-weight 0)"
            )
        return Teacher(_logits(self.model.forward_head(features), self.model), features)


def _logits(output: Any, model: nn.Module) -> Tensor:
    """The logits in what a model gives."""
    found = output.get("logits") if isinstance(output, Mapping) else output
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"teacher: expected logits [B, classes] from {type(model).__name__}, alone or as "
            f"`logits`, got {type(output).__name__}"
        )
    return found
