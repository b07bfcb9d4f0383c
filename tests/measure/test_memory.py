"""Peak memory of a call: what was freed before counts again, what stays does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spot_vit.measure import memory
from spot_vit.measure.memory import peak_growth

MEGA = 2**20


def allocate(megabytes: int, pieces: int = 1) -> None:
    """Touches so much memory, and frees it."""
    size = megabytes * MEGA // pieces // 4
    parts = [torch.ones(size) for _ in range(pieces)]
    assert len(parts) == pieces


@pytest.mark.parametrize("pieces", [1, 1000])
def test_memory_that_was_used_before_counts_again(pieces: int) -> None:
    allocate(96, pieces)
    found = [peak_growth(lambda: allocate(64, pieces)) for _ in range(3)]
    assert all(growth is not None and 62 * MEGA < growth < 76 * MEGA for growth in found)


def test_what_is_held_before_does_not_count() -> None:
    held = torch.ones(64 * MEGA // 4)
    growth = peak_growth(lambda: held.sum())
    assert growth is not None and growth < 8 * MEGA


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nothing")
    called: list[int] = []
    assert peak_growth(lambda: called.append(1)) is None
    assert called == [1]


def test_what_a_device_allocates(gpu: torch.device) -> None:
    growth = peak_growth(lambda: torch.ones(16 * MEGA, device=gpu), gpu)
    assert growth == 64 * MEGA
