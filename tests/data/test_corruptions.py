"""Damage at test time: reproducible, growing, and only to the image."""

from __future__ import annotations

import pytest
import torch
from spot_vit.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedDigits
from spot_vit.data.digits import ClutteredDigits
from torch.utils.data import DataLoader

CLEAN = ClutteredDigits("test", 120)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_grows_and_touches_nothing_but_the_image(kind: str) -> None:
    clean = CLEAN.batch(range(60))
    distances = []
    for severity in SEVERITIES:
        batch = CorruptedDigits(CLEAN, kind, severity).batch(range(60))
        assert batch.image.shape == clean.image.shape and batch.image.dtype == torch.float32
        assert batch.image.isfinite().all()
        assert torch.equal(batch.label, clean.label)
        assert torch.equal(batch.foreground, clean.foreground)
        distances.append((batch.image - clean.image).square().mean().item())
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_sample_depends_on_its_index_alone(kind: str) -> None:
    data = CorruptedDigits(CLEAN, kind, 2)
    loaded = next(iter(DataLoader(data, batch_size=30, num_workers=1)))
    assert torch.equal(loaded[0], data.batch(range(30)).image)
    assert torch.equal(data[29].image, loaded[0][29]) and len(data) == 120


def test_strengths_are_what_they_say() -> None:
    clean = CLEAN.batch(range(60)).image
    noise = CorruptedDigits(CLEAN, "noise", 2).batch(range(60)).image - clean
    assert noise.std().item() == pytest.approx(0.06, rel=0.02) and abs(noise.mean()) < 0.001
    impulse = CorruptedDigits(CLEAN, "impulse", 3).batch(range(60)).image
    assert (impulse[clean == 0] == 1).float().mean().item() == pytest.approx(0.03, rel=0.06)
    assert torch.equal(impulse[impulse != 1], clean[impulse != 1])
    contrast = CorruptedDigits(CLEAN, "contrast", 2).batch(range(60)).image
    assert torch.allclose(contrast.std(dim=(1, 2, 3)), 0.75 * clean.std(dim=(1, 2, 3)), rtol=1e-4)
    assert torch.allclose(contrast.mean(dim=(1, 2, 3)), clean.mean(dim=(1, 2, 3)), atol=1e-5)
    lines = CorruptedDigits(CLEAN, "lines", 1).batch(range(60)).image[:, 0]
    assert ((lines == 1).all(dim=1).sum(dim=1) == 1).all()
    assert ((lines == 1).all(dim=2).sum(dim=1) == 1).all()
    bright = CorruptedDigits(CLEAN, "brightness", 1).batch(range(60)).image
    assert torch.allclose(bright, clean + 0.03)


def test_draws_differ_between_images_and_kinds() -> None:
    clean = CLEAN.batch(range(2)).image
    hits = [CorruptedDigits(CLEAN, "impulse", 3).batch(range(2)).image != clean]
    assert not torch.equal(hits[0][0], hits[0][1])


@pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("noise", 0), ("noise", 4)])
def test_what_is_not_there_is_named(kind: str, severity: int) -> None:
    with pytest.raises(ValueError, match="kind" if kind == "fog" else "severity"):
        CorruptedDigits(CLEAN, kind, severity)
