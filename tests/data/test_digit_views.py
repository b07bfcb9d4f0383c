"""Cluttered digits as models and recipes take them."""

from __future__ import annotations

import torch
from spot_vit.data.digit_views import DigitSplit
from spot_vit.data.digits import ClutteredDigits
from spot_vit.data.loaders import TrainLoader


def test_native_images_are_those_of_the_data_set() -> None:
    split = DigitSplit("test", {"val_length": 30, "num_fragments": 2, "canvas": 32}, 7)
    view = split.dataset(split.native())
    plain = ClutteredDigits("test", 30, num_fragments=2, canvas=32).batch(range(30))
    images, labels = zip(*view.__getitems__(range(30)), strict=True)
    assert torch.equal(torch.stack(images), plain.image) and list(labels) == plain.label.tolist()
    assert view[4][1] == labels[4] and torch.equal(view[4][0], images[4])
    assert view.filename(4) == "digits test 4"


def test_the_runs_seed_is_trainings_alone() -> None:
    native = DigitSplit("train", {}, 0).native()
    first, other, own = (
        DigitSplit("train", settings, seed).dataset(native)[0][0]
        for settings, seed in (({}, 0), ({}, 1), ({"seed": 1}, 0))
    )
    assert not torch.equal(first, other) and torch.equal(own, other)
    tests = [DigitSplit("test", {"seed": seed}, seed).dataset(native)[0][0] for seed in (0, 1)]
    assert torch.equal(*tests)


def test_other_sizes_channels_and_ranges() -> None:
    split = DigitSplit("test", {}, 0)
    config = {"input_size": (3, 96, 80), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}
    image = split.dataset(config)[5][0]
    assert image.shape == (3, 96, 80)
    grey = image * torch.tensor(config["std"]).view(3, 1, 1)
    grey = grey + torch.tensor(config["mean"]).view(3, 1, 1)
    torch.testing.assert_close(grey[0], grey[2])
    small = torch.nn.functional.interpolate(grey[None], (64, 64), mode="bilinear")[0, 0]
    native = split.dataset(split.native())[5][0][0]
    assert (small - native).abs().mean() < 0.05 and grey.max() > 0.8


def test_images_that_are_not_fresh_come_back() -> None:
    native = DigitSplit("train", {}, 0).native()
    for fresh in (True, False):
        split = DigitSplit("train", {"length": 20, "fresh": fresh}, 0)
        loader = TrainLoader(split.dataset(native), 20)
        first, later = (next(loader.epoch(epoch)) for epoch in (0, 4))
        a = first.images[first.indices.argsort()]
        b = later.images[later.indices.argsort()]
        assert torch.equal(a, b) != fresh


def test_the_ramp_goes_on_over_epochs() -> None:
    split = DigitSplit("train", {"length": 200, "ramp": 800}, 0)
    plain = DigitSplit("train", {"length": 200, "num_fragments": 0}, 0)
    native = split.native()
    clutter = []
    for epoch in range(5):
        views = [s.dataset(native).at_epoch(epoch) for s in (split, plain)]
        ink = [torch.stack([i for i, _ in v.__getitems__(range(200))]).sum() for v in views]
        clutter.append((ink[0] - ink[1]).item())
    assert 0 < clutter[0] < clutter[1] < clutter[2] < clutter[3]
    assert abs(clutter[4] / clutter[3] - 1) < 0.3  # all of it from image 800 on
