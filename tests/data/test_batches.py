"""Batches of every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spot_vit.data.batches import images_and_target
from spot_vit.data.digits import ClutteredDigits
from support.data import random

IMAGES, TARGET = random("images", (4, 3, 8, 8), torch.float32), torch.tensor([3, 1, 0, 2])


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, TARGET),
        [IMAGES, TARGET, torch.ones(4)],
        {"image": IMAGES, "label": TARGET},
        {"images": IMAGES, "target": TARGET, "name": ["a", "b", "c", "d"]},
        {"pixel_values": IMAGES, "labels": TARGET},
    ],
)
def test_every_form_gives_images_and_target(batch: Any) -> None:
    images, target = images_and_target(batch)
    assert images is IMAGES and target is TARGET


@pytest.mark.parametrize("batch", [IMAGES, [IMAGES], (IMAGES,), {"pixel_values": IMAGES}])
def test_images_alone_have_no_target(batch: Any) -> None:
    images, target = images_and_target(batch)
    assert images is IMAGES and target is None


def test_named_tuples_are_tuples() -> None:
    batch = ClutteredDigits("test", 5).batch(range(5))
    images, target = images_and_target(batch)
    assert images is batch.image and target is batch.label


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("ab", "got str"),
        ((), "an empty tuple"),
        (None, "NoneType"),
        ({"picture": IMAGES, "label": TARGET}, r"images at one of .*\['picture', 'label'\]"),
        ({"image": IMAGES, "label": TARGET, "target": TARGET}, "the target at one of"),
        ({"image": IMAGES, "pixel_values": IMAGES}, "images at one of"),
    ],
)
def test_other_forms_are_refused_by_name(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        images_and_target(batch)
