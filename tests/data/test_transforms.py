"""Timm's transforms, and what ours add."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from spot_vit.data.seeded import kept_states, plant
from spot_vit.data.transforms import eval_transform, train_transform
from support.pictures import noise
from timm.data import create_transform

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def test_very_thin_pictures_cost_no_gigabytes() -> None:
    """Their middle is all that is seen; before, 1 x 200,000 grew to 224 x 44,800,000."""
    values = noise(3, 2000, 1)
    thin = Image.fromarray(values).resize((1, 200_000))
    image = eval_transform(CONFIG)(thin)
    assert image.shape == (3, 32, 32) and image.isfinite().all()
    around = thin.crop((0, 99_900, 1, 100_100))
    torch.testing.assert_close(image, eval_transform(CONFIG)(around), atol=0.05, rtol=0)


def test_ordinary_pictures_are_transformed_as_timm_does() -> None:
    picture = Image.fromarray(noise(4))
    theirs = create_transform((3, 32, 32), mean=CONFIG["mean"], std=CONFIG["std"], crop_pct=0.9)
    assert torch.equal(eval_transform({**CONFIG, "crop_pct": 0.9})(picture), theirs(picture))


def test_mean_and_deviation_of_three_channels_serve_one() -> None:
    grey = Image.fromarray(noise(4, channels=1)[..., 0])
    config = {**CONFIG, "input_size": (1, 32, 32), "crop_pct": 1.0}
    image = eval_transform(config)(grey)
    plain = eval_transform({**config, "mean": (0.0,), "std": (1.0,)})(grey)
    torch.testing.assert_close(image, (plain - 0.4) / 0.3)


def test_training_is_timms_with_the_same_draws() -> None:
    picture = Image.fromarray(noise(4))
    theirs = create_transform(
        (3, 32, 32),
        is_training=True,
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        scale=(0.3, 0.9),
        vflip=0.5,
        color_jitter=0.1,
        auto_augment="rand-m5-n1",
        interpolation="random",
        re_prob=1.0,
        re_mode="pixel",
        re_count=2,
    )
    ours = train_transform(
        CONFIG,
        scale=[0.3, 0.9],
        vflip=0.5,
        color_jitter=0.1,
        aa="rand-m5-n1",
        reprob=1.0,
        recount=2,
    )
    for seed in range(5):
        images = []
        for transform in (theirs, ours):
            with kept_states():
                plant(seed)
                images.append(transform(picture))
        assert torch.equal(*images)


def test_no_augmentation_draws_nothing() -> None:
    transform = train_transform(CONFIG, no_aug=True, aa="rand-m9-n3", reprob=1.0)
    picture = Image.fromarray(noise(4))
    with kept_states():
        plant(1)
        first = transform(picture)
        assert torch.equal(first, transform(picture)) and np.isfinite(first.numpy()).all()


@pytest.mark.parametrize("aa", ["rand-m10-n3-mstd1-inc1", "v0", "augmix-m10-w4-d2", "originalr"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_magnitude_can_be_drawn(aa: str, mode: str) -> None:
    """Pillow 13 refuses the posterize to 0 bits that timm asks for at magnitude 10."""
    config = {**CONFIG, "input_size": (len(mode) if mode == "RGB" else 1, 32, 32)}
    transform = train_transform(config, aa=aa, reprob=0.25)
    pictures = [Image.fromarray(noise(1, *size)).convert(mode) for size in ((40, 48), (1, 50))]
    with kept_states():
        for seed in range(60):
            plant(seed)
            for picture in pictures:
                assert transform(picture).isfinite().all()


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_posterize_keeps_so_many_bits(bits: int) -> None:
    transform = train_transform(CONFIG, aa="rand-m10-n1-inc1")
    operations = next(step.ops for step in transform.transforms if hasattr(step, "ops"))  # type: ignore[attr-defined]
    (ours,) = (op.aug_fn for op in operations if op.name == "PosterizeIncreasing")
    pixels = noise(3)
    found = np.asarray(ours(Image.fromarray(pixels), bits))
    assert (found == pixels & (256 - (1 << (8 - bits)))).all()
