"""Latency of models, side by side."""

from __future__ import annotations

import copy
import time

import torch
from spot_vit.measure.latency import compare_latency, compare_training
from torch import Tensor, nn


def test_latency_runs_the_models_in_turn_in_eval_mode() -> None:
    calls = []

    class Sleeper(nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, images: Tensor) -> Tensor:
            assert not self.training and torch.is_inference_mode_enabled()
            calls.append(self.name)
            time.sleep(self.seconds)
            return images

    models = {"fast": Sleeper("fast", 0.01), "slow": Sleeper("slow", 0.04)}
    result = compare_latency(models, torch.zeros(1), rounds=5, warmup=2)
    assert calls == ["fast", "slow"] * 7
    assert result["fast"].ratio == 1 and result["fast"].median >= 10
    assert result["slow"].ratio > 1 and result["slow"].low >= 40
    assert all(model.training for model in models.values())


def test_training_steps_leave_the_models_as_they_were() -> None:
    torch.manual_seed(0)
    models = {
        name: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        for name in ("one", "other")
    }
    models["other"].eval()
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    seen = []

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        assert model.training
        seen.append(next(name for name, known in models.items() if known is model))
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.register_hook(lambda grad: seen.append("backward"))
        return loss, {}

    found = compare_training(
        models, dict.fromkeys(models, objective), torch.randn(8, 4), torch.arange(8) % 2,
        rounds=3, warmup=1,
    )  # fmt: skip
    assert seen == ["one", "backward", "other", "backward"] * 4
    assert found["one"].ratio == 1 and found["other"].median > 0
    assert models["one"].training and not models["other"].training
    for name, model in models.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key]), key
        assert all(parameter.grad is None for parameter in model.parameters())
