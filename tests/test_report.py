"""Figures of the report: foreground kept, paired differences, latency, the picture, the table."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from spot_vit.data import ClutteredDigits
from spot_vit.latency import compare_latency, compare_training
from spot_vit.report import paired_difference, relevance, save_kept
from spot_vit.table import format_table
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Fixed(nn.Module):
    """Stands for a SPOT ViT that keeps the same patches of every image."""

    def __init__(self, *kept: list[int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.kept = kept

    def forward(self, images: Tensor, aux: bool = False) -> Any:
        masks = [torch.zeros(len(images), 16) for _ in self.kept]
        for mask, kept in zip(masks, self.kept, strict=True):
            mask[:, kept] = 1
        return SimpleNamespace(logits=torch.eye(10)[: len(images)], masks=masks)


def test_relevance_counts_foreground_patches() -> None:
    foreground = torch.zeros(3, 16, dtype=torch.bool)
    foreground[0, [0, 1, 2]] = True
    foreground[1, [0]] = True  # image 2 shows nothing
    samples = [(torch.zeros(1, 8, 8), 0, row) for row in foreground]
    model = Fixed([0, 1, 4, 5, 6, 7, 8, 9], [0, 4])
    result = relevance(model, DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
    assert result.foreground == pytest.approx([3 / 4, 2 / 4])
    assert result.random == pytest.approx([8 / 16, 2 / 16])
    assert model.training


def test_paired_difference_of_independent_images_is_the_textbook_one() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.rand(500, generator=draw) < 0.9, torch.rand(500, generator=draw) < 0.8
    difference, error = paired_difference(one, other, range(500))
    delta = one.double() - other.double()
    assert difference == pytest.approx(delta.mean().item())
    assert error == pytest.approx(delta.std().item() / 500**0.5)


def test_repeated_images_do_not_make_the_error_smaller() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.rand(300, generator=draw) < 0.9, torch.rand(300, generator=draw) < 0.8
    once = paired_difference(one, other, range(300))
    again = paired_difference(one.repeat(4), other.repeat(4), np.tile(np.arange(300), 4))
    assert again == pytest.approx(once)
    assert paired_difference(one, one, range(300)) == (0, 0)


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


def test_the_picture_shows_survivors_and_paints_the_rest(tmp_path: Path) -> None:
    batch = ClutteredDigits("test", patch_size=16).batch(range(3))
    for name, kept in {"all": list(range(16)), "none": []}.items():
        save_kept(tmp_path / f"{name}.png", Fixed(kept), batch)
    all_kept, none_kept = (imread(tmp_path / f"{name}.png") for name in ("all", "none"))
    assert all_kept.shape == none_kept.shape
    blue = [((picture[..., 2] - picture[..., 0]) > 0.3).mean() for picture in (all_kept, none_kept)]
    assert blue[0] == 0 and blue[1] > 0.1


def test_table_columns_line_up() -> None:
    lines = format_table([["", "top-1"], ["dense", "97.00%"], ["SPOT", "9%"]]).split("\n")
    assert lines == [
        "        top-1",
        "-------------",
        "dense  97.00%",
        "SPOT       9%",
    ]
