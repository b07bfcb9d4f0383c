"""Objectives and their teachers."""

from __future__ import annotations

import pytest
import torch
from spot_vit.training.objectives import SpotObjective
from torch import Tensor, nn


def test_a_teacher_is_frozen_and_gets_no_gradient() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(1, 6), nn.Linear(6, 3)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.embed(x)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.head(x[:, 0])

    class Student(Dense):
        def forward(self, x: Tensor, aux: bool) -> object:
            tokens = self.forward_features(x)
            mask = torch.ones(len(x), 4)

            class Output:
                logits, masks, index, logp = self.forward_head(tokens), [mask], (), ()

            Output.tokens = tokens  # type: ignore[attr-defined]
            return Output

    teacher, student = Dense(), Student()
    teacher.train()
    student.load_state_dict(teacher.state_dict())
    objective = SpotObjective([0.5], teacher)
    loss, parts = objective(student, torch.randn(2, 5, 1), torch.tensor([0, 2]))
    loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    # The student still equals its teacher: nothing to distil.
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6) and parts["mse"].item() == 0
    assert parts["ratio"].item() == pytest.approx(0.25)
