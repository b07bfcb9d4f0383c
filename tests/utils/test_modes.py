"""The model inside its wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spot_vit.utils.modes import unwrap
from support.wrapped import WRAPPERS, wrapped
from torch import nn


@pytest.mark.parametrize("kind", WRAPPERS)
def test_unwrap_finds_the_model(kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with wrapped(model, kind) as outside:
        inside = unwrap(outside)
        assert type(inside) is nn.Sequential
        assert (inside is model) == (kind != "EMA")  # which holds a copy


def test_unwrap_goes_through_several() -> None:
    model: Any = nn.Linear(2, 2)
    with wrapped(model, "DDP") as outside:
        assert unwrap(torch.compile(nn.DataParallel(outside))) is model


def test_what_is_no_wrapper_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert unwrap(model) is model
    model.module = 3  # type: ignore[assignment]
    assert unwrap(model) is model
