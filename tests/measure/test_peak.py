"""The most that this machine multiplies."""

from __future__ import annotations

import pytest
import torch
from spot_vit.measure import peak
from spot_vit.measure.peak import measured_peak
from spot_vit.nn.packed import candidates
from spot_vit.utils.timing import Times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_product_counts(dtype: torch.dtype) -> None:
    found = measured_peak(dtype, size=256)
    assert found.gmacs_per_s > 0 and found.size == 256
    assert found.by in ("torch", *candidates(dtype))


def test_the_rate_is_that_of_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(sides: dict, *args: object, **kwargs: object) -> dict[str, Times]:
        for side in sides.values():
            assert side(0).shape == (100, 100)  # that all of them multiply
        return {name: Times(wall=[0.5, 0.002 if name == "torch" else 0.4]) for name in sides}

    monkeypatch.setattr(peak, "take_turns", turns)
    found = measured_peak(torch.float32, size=100)
    assert found.by == "torch" and found.gmacs_per_s == pytest.approx(1e-3 / 0.002)
