"""Files of every kind, as pictures that models take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from spot_vit.data.decoding import decoded
from support.pictures import EXIF_ORIENTATION, noise, write


def pixels(path: Path, mode: str = "RGB") -> np.ndarray:
    return np.asarray(decoded(str(path), mode)).astype(int)


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
