"""Pictures of every kind, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spot_vit.data.decoding import decoded
from spot_vit.data.fetch import Unreadable
from spot_vit.data.folders import open_folder
from spot_vit.data.pictures import Labels, Pictures
from spot_vit.data.seeded import kept_states, plant
from spot_vit.data.transforms import eval_transform, train_transform
from support.pictures import BROKEN, EXIF_ORIENTATION, ODD, folder, noise, write

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def pixels(path: Path, mode: str = "RGB") -> np.ndarray:
    return np.asarray(decoded(str(path), mode)).astype(int)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.filterwarnings("error")
def test_odd_pictures_become_tensors(tmp_path: Path, name: str, channels: int) -> None:
    write(tmp_path / "a" / name, 3)
    config = {**CONFIG, "input_size": (channels, 32, 32)}
    mode = "RGB" if channels == 3 else "L"
    transforms = [
        eval_transform(config),
        train_transform(config),
        train_transform(config, no_aug=True),
        train_transform(config, aa="rand-m9-mstd0.5-inc1", reprob=1.0),
    ]
    for transform in transforms:
        pictures = Pictures(open_folder(tmp_path).source, transform, mode=mode)
        with kept_states():
            plant(0)
            image, target = pictures[0]
        assert image.shape == (channels, 32, 32) and image.dtype == torch.float32
        assert image.isfinite().all() and target == 0
        assert name == "thin.png" or image.std() > 0.05  # a crop of that is one pixel


def test_grey_and_bilevel_are_the_same_in_all_channels(tmp_path: Path) -> None:
    write(tmp_path / "grey.jpg", 1)
    rgb = pixels(tmp_path / "grey.jpg")
    assert (rgb == rgb[..., :1]).all()
    assert abs(rgb[..., 0] - noise(1, channels=1)[..., 0].astype(int)).mean() < 5


def test_transparent_parts_show_white(tmp_path: Path) -> None:
    write(tmp_path / "alpha.png", 2)
    rgb = pixels(tmp_path / "alpha.png")
    assert (rgb[:20] == 255).all()
    assert (rgb[20:] == noise(2, channels=4)[20:, :, :3]).all()
    write(tmp_path / "palettealpha.png", 2)
    index = np.asarray(Image.open(tmp_path / "palettealpha.png"))
    transparent = index == index[0, 0]
    rgb = pixels(tmp_path / "palettealpha.png")
    assert transparent.any() and (rgb[transparent] == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    rgba = noise(5, channels=4)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    share = rgba[..., 3:] / 255
    expected = share * rgba[..., :3] + (1 - share) * 255
    assert abs(pixels(tmp_path / "a.png") - expected).max() <= 1


@pytest.mark.parametrize("name", ["bits16.png", "bits16.tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, 4)
    expected = noise(4, channels=1)[..., 0]
    assert (pixels(tmp_path / name, "L") == expected).all()
    assert (pixels(tmp_path / name)[..., 1] == expected).all()


def test_floats_up_to_one_are_shares(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((9, 7)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif", "L") == (values * 255).round()).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_they_were_taken(tmp_path: Path, orientation: int) -> None:
    upright = noise(6)
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 3),
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(upright).save(tmp_path / "a.png", exif=exif)
    assert (pixels(tmp_path / "a.png") == turn(upright)).all()


@pytest.mark.filterwarnings("error")
def test_a_broken_exif_tag_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Image.fromarray(noise(7)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert pixels(tmp_path / "a.jpg").shape == (40, 48, 3)


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    write(tmp_path / "cmyk.jpg", 8)
    assert abs(pixels(tmp_path / "cmyk.jpg") - noise(8).astype(int)).mean() < 8


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_unreadable_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a" / name, 9)
    pictures = Pictures(open_folder(tmp_path).source, eval_transform(CONFIG))
    with pytest.raises(Unreadable) as caught:
        pictures[0]
    assert caught.value.name == str(tmp_path / "a" / name)
    reason = {
        "truncated.jpg": "truncated",
        "text.jpg": "not a picture",
        "empty.png": "not a picture",
        "bomb.png": "decompression bomb",
    }[name]
    assert reason in caught.value.reason.lower() and "\n" not in str(caught.value)
    assert "0x" not in caught.value.reason


def test_a_picture_that_has_gone_is_unreadable(tmp_path: Path) -> None:
    folder(tmp_path)
    pictures = Pictures(open_folder(tmp_path).source)
    (tmp_path / "dog" / "dog001.jpg").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        pictures[5]
    assert pictures[4][0].size == (48, 40)


def test_very_thin_pictures_cost_no_gigabytes(tmp_path: Path) -> None:
    """Their middle is all that is seen; before, 1 x 200,000 grew to 224 x 44,800,000."""
    values = noise(3, 2000, 1)
    thin = Image.fromarray(values).resize((1, 200_000))
    image = eval_transform(CONFIG)(thin)
    assert image.shape == (3, 32, 32) and image.isfinite().all()
    around = thin.crop((0, 99_900, 1, 100_100))
    torch.testing.assert_close(image, eval_transform(CONFIG)(around), atol=0.05, rtol=0)


def test_ordinary_pictures_are_transformed_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_transform

    picture = Image.fromarray(noise(4))
    theirs = create_transform((3, 32, 32), mean=CONFIG["mean"], std=CONFIG["std"], crop_pct=0.9)
    assert torch.equal(eval_transform({**CONFIG, "crop_pct": 0.9})(picture), theirs(picture))


def test_mean_and_deviation_of_three_channels_serve_one() -> None:
    grey = Image.fromarray(noise(4, channels=1)[..., 0])
    config = {**CONFIG, "input_size": (1, 32, 32), "crop_pct": 1.0}
    image = eval_transform(config)(grey)
    plain = eval_transform({**config, "mean": (0.0,), "std": (1.0,)})(grey)
    torch.testing.assert_close(image, (plain - 0.4) / 0.3)


def test_positions_choose_pictures_and_their_names(tmp_path: Path) -> None:
    source = open_folder(folder(tmp_path)).source
    pictures = Pictures(source, positions=[6, 1])
    assert len(pictures) == 2
    assert [pictures.filename(i) for i in range(2)] == ["dog/dog002.jpg", "cat/cat001.jpg"]
    assert [pictures[i][1] for i in range(2)] == [1, 0]
    for index in (-1, 2):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            pictures[index]


def test_labels_are_put_in_order() -> None:
    assert [Labels([2, 0, 1])(label) for label in (0, 1, 2)] == [2, 0, 1]
    assert Labels()(np.int64(3)) == 3
    hot = Labels(num_classes=4)
    assert hot([0, 3, 3]).tolist() == [1, 0, 0, 1] and hot([]).tolist() == [0, 0, 0, 0]
    assert Labels([3, 1], num_classes=4)([0]).tolist() == [0, 0, 0, 1]
    assert Labels(num_classes=3, dense=True)([0.0, 0.5, 1.0]).tolist() == [0, 0.5, 1]
