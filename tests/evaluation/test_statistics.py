"""Paired differences, and their errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spot_vit.evaluation.statistics import paired_difference


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
