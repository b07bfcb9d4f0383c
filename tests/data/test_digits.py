"""ClutteredDigits: reproducible, split by source image, true about its foreground."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from spot_vit.data.digits import ClutteredDigits, DigitBatch
from torch.utils.data import DataLoader


def equal(one: DigitBatch, other: DigitBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_batch_holds_exactly_the_items(noise: float) -> None:
    data = ClutteredDigits("train", 5000, noise=noise, ramp=3000, seed=7)
    indices = [0, 4999, 17, 2999, 17]
    batch = data.batch(indices)
    for row, index in enumerate(indices):
        assert equal(DigitBatch(*(field[row] for field in batch)), data[index])


def test_shapes_and_types() -> None:
    sample = ClutteredDigits()[0]
    assert sample.image.shape == (1, 64, 64) and sample.image.dtype == torch.float32
    assert sample.label.shape == () and sample.label.dtype == torch.int64
    assert sample.foreground.shape == (64,) and sample.foreground.dtype == torch.bool
    assert ClutteredDigits().batch([]).image.shape == (0, 1, 64, 64)


def test_the_same_settings_give_the_same_samples_and_another_seed_gives_others() -> None:
    first, again = (ClutteredDigits(noise=0.1, seed=3).batch(range(50)) for _ in range(2))
    assert equal(first, again)
    other = ClutteredDigits(noise=0.1, seed=4).batch(range(50))
    assert torch.equal(first.label, other.label)
    assert (first.image != other.image).flatten(1).any(1).all()


def test_samples_do_not_depend_on_the_numpy_or_torch_version() -> None:
    """A checksum of pixels: published figures must stay comparable."""
    batch = ClutteredDigits("test", noise=0.0, seed=1).batch(range(100))
    assert batch.label[:10].tolist() == [4, 3, 1, 8, 4, 6, 0, 5, 1, 9]
    assert batch.foreground.sum().item() == 859
    assert batch.image.sum().item() == pytest.approx(31751.387, rel=1e-5)


def test_source_images_are_split() -> None:
    train, test = ClutteredDigits("train", 20_000, seed=1), ClutteredDigits("test", 1440, seed=2)
    ids = [set(data.sources(range(len(data))).tolist()) for data in (train, test)]
    assert not ids[0] & ids[1]
    assert len(ids[0]) == 1437 and len(ids[1]) == 360
    targets = load_digits().target
    for data in (train, test):
        assert np.array_equal(data.batch(range(500)).label, targets[data.sources(range(500))])
    shares = np.bincount(targets[list(ids[1])]) / 360
    assert shares.min() > 0.05 and shares.max() < 0.15


def test_fragments_come_from_the_same_split() -> None:
    """Pixels of test fragments are cut-outs of test sources, never of training ones."""
    data = ClutteredDigits("test", digit=8, fragment=8, canvas=64, num_fragments=1)
    clean = ClutteredDigits("test", digit=8, fragment=8, canvas=64, num_fragments=0)
    sources = load_digits().images.astype(np.float32) / 16
    held_out = {sources[i].tobytes() for i in data.sources(range(360))}
    found = 0
    for i in range(40):
        rest = (data[i].image - clean[i].image)[0].numpy()
        rows, cols = np.nonzero(rest)
        for top in range(max(rows.max() - 7, 0), min(rows.min(), 56) + 1):
            for left in range(max(cols.max() - 7, 0), min(cols.min(), 56) + 1):
                found += rest[top : top + 8, left : left + 8].tobytes() in held_out
    assert found >= 30  # the others overlap the digit


def test_foreground_is_where_the_digit_is() -> None:
    """Without clutter, the image itself says which patches show the digit."""
    cluttered = ClutteredDigits(num_fragments=20, patch_size=16, seed=5).batch(range(200))
    clean = ClutteredDigits(num_fragments=0, patch_size=16, seed=5).batch(range(200))
    ink = torch.nn.functional.avg_pool2d(clean.image, 16).flatten(1)
    certain = (ink - 0.05).abs() > 1e-6
    assert torch.equal(clean.foreground[certain], (ink > 0.05)[certain])
    assert torch.equal(cluttered.foreground, clean.foreground)
    assert (cluttered.image >= clean.image).all() and (cluttered.image > clean.image).any()
    assert clean.foreground.any(1).all()


def test_every_place_is_used() -> None:
    seen = ClutteredDigits("train", 2000).batch(range(2000)).foreground.float().mean(0)
    assert seen.min() > 0 and seen.max() < 0.5


def test_ramp_grows_the_clutter() -> None:
    settings = {"split": "train", "length": 1400, "seed": 2}
    ramp = ClutteredDigits(**settings, ramp=700)
    full, none = ClutteredDigits(**settings), ClutteredDigits(**settings, num_fragments=0)
    indices = range(1400)
    image, most, least = (data.batch(indices).image for data in (ramp, full, none))
    assert torch.equal(image[:100], least[:100])
    assert torch.equal(image[700:], most[700:])
    ink = [
        image[start : start + 100].sum() - least[start : start + 100].sum() for start in (100, 600)
    ]
    assert 0 < ink[0] < ink[1]


def test_noise_has_the_deviation_asked_for() -> None:
    clean, noisy = (ClutteredDigits(noise=noise).batch(range(30)).image for noise in (0.0, 0.2))
    difference = noisy - clean
    assert difference.std().item() == pytest.approx(0.2, rel=0.02)
    assert abs(difference.mean().item()) < 0.003


def test_among_distractors_the_corner_of_its_quarter_names_the_digit() -> None:
    settings = {
        "split": "train",
        "length": 500,
        "num_distractors": 3,
        "num_fragments": 3,
        "seed": 4,
    }
    batch = ClutteredDigits(**settings, patch_size=4).batch(range(500))
    patches = batch.image[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))  # [B, 16, 16]
    middle = patches[:, 7:9, 7:9].flatten(1)
    assert set(middle.unique().tolist()) == {0.0, 1.0}
    assert (middle.sum(1) == 1).all()
    asked = middle.argmax(1)
    assert asked.bincount().min() > 80
    quarter = batch.foreground.unflatten(1, (2, 8, 2, 8)).any(dim=4).any(dim=2).flatten(1)
    assert torch.equal(quarter.long(), torch.nn.functional.one_hot(asked, 4))


def test_distractors_are_whole_digits_in_the_other_quarters() -> None:
    settings = {"split": "test", "length": 200, "digit": 8, "canvas": 32, "num_fragments": 0}
    sources = load_digits().images.astype(np.float32) / 16
    held_out = {sources[i].tobytes() for i in ClutteredDigits("test").sources(range(360))}
    found = []
    for sample in (ClutteredDigits(**settings, num_distractors=3)[i] for i in range(40)):
        image = sample.image[0].numpy()
        whole = [
            2 * (top >= 16) + (left >= 16)
            for top, left in np.ndindex(25, 25)
            if image[top : top + 8, left : left + 8].tobytes() in held_out
        ]
        assert len(whole) == len(set(whole))  # never two in one quarter
        found.append(len(whole))
    assert max(found) == 4 and sum(found) > 100  # the sign covers a corner of the others


def test_distractors_change_neither_label_nor_foreground_and_grow_with_the_ramp() -> None:
    few, most, none = (
        ClutteredDigits(num_distractors=count, num_fragments=0, ramp=ramp).batch(range(100))
        for count, ramp in ((1, 0), (3, 0), (3, 10_000))
    )
    assert torch.equal(few.foreground, most.foreground) and torch.equal(few.label, most.label)
    ink = [batch.image.sum(dim=(1, 2, 3)) for batch in (none, few, most)]
    assert (ink[0] < ink[1]).all() and (ink[1] < ink[2]).all()


def test_workers_see_the_same_samples() -> None:
    data = ClutteredDigits("test", 30)
    batches = list(DataLoader(data, batch_size=8, num_workers=2))
    assert equal(DigitBatch(*map(torch.cat, zip(*batches, strict=True))), data.batch(range(30)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "valid"}, "split"),
        ({"digit": 80}, "digit=80"),
        ({"fragment": 0}, "fragment=0"),
        ({"patch_size": 7}, "patch_size"),
        ({"noise": -1.0}, "noise"),
        ({"num_distractors": 4}, "0 to 3, got 4"),
        ({"num_distractors": 1, "digit": 40}, "a canvas of 80"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClutteredDigits(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 30])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        ClutteredDigits("test", 30)[index]
