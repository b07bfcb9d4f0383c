"""The dense teacher of an objective: checked against the student, frozen, asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.training.losses import Teacher
from spot_vit.utils.modes import unwrap


class FrozenTeacher:
    """A dense model that is put in eval mode and frozen once it is known not to be the student.

    Args:
        model: timm model, wrapped or not; None for no teacher.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model: Any = None if model is None else unwrap(model)
        self._student = 0  # id of the one that was checked

    def freeze(self, student: nn.Module) -> None:
        """Puts the teacher in eval mode and switches its gradients off.

        Args:
            student: the model that learns from it, wrapped or not.

        Raises:
            ValueError: the two share parameters; the teacher is then left as it was.
        """
        inside = unwrap(student)
        if self.model is None or self._student == id(inside):
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
        self._student = id(inside)

    @torch.no_grad()
    def view(self, student: nn.Module, images: Tensor) -> Teacher | None:
        """Logits and tokens that the teacher gives for images; None without one.

        Args:
            student: as in `freeze`, which runs first.
            images: [B, channels, H, W].
        """
        self.freeze(student)
        if self.model is None:
            return None
        tokens = self.model.forward_features(images)
        return Teacher(self.model.forward_head(tokens), tokens)
