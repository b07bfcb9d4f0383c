"""`show` and `spot show`: any photo, right colours, one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spot_vit
import timm
import torch
from matplotlib.image import imread
from PIL import Image
from report.test_tracing import model_of
from spot_vit import UserError
from spot_vit.cli.main import main
from spot_vit.evaluation.drawing import DROPPED, Kept, kept_figure, painted, save_figure, shown
from spot_vit.report.photos import read_photos
from spot_vit.report.show import kept_of
from spot_vit.report.views import answer


def photo(path: Path, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def test_dropped_patches_are_painted_and_no_others() -> None:
    picture = np.random.default_rng(0).integers(0, 90, (50, 70, 3), dtype=np.uint8)
    kept = np.random.default_rng(1).random((5, 7)) > 0.5
    found = painted(picture, kept)
    for row in range(5):
        for column in range(7):
            place = slice(10 * row, 10 * row + 10), slice(10 * column, 10 * column + 10)
            expected = picture[place] if kept[row, column] else DROPPED
            assert (found[place] == expected).all()
    odd = painted(picture[:49, :66], kept)  # no multiple of the grid
    assert odd.shape == (49, 66, 3) and (odd[0, 0] == found[0, 0]).all()


def test_pictures_are_shown_in_their_colours() -> None:
    for name in (
        "vit_tiny_patch16_224",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224",
    ):
        cfg = timm.create_model(name, pretrained=False, depth=1, embed_dim=48, num_heads=3)
        colours = torch.rand(2, 3, 16, 16)
        mean, std = (
            torch.tensor(cfg.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
        )
        found = shown(cfg, (colours - mean) / std)
        expected = (255 * colours).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() <= 0.51
    grey = shown(object(), torch.rand(1, 1, 8, 8))
    assert grey.shape == (1, 8, 8, 3) and (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_any_photo_is_drawn(mode: str, tmp_path: Path) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    path = photo(tmp_path / f"a $\\photo$ {mode}.{ending}", mode=mode)
    model = model_of("spot")
    found = spot_vit.show(model, path, tmp_path / "kept.png")
    assert imread(tmp_path / "kept.png").shape[1] > 400
    assert found.images[0].name == path.name
    with torch.no_grad():
        expected = model(read_photos(model, [path]).images)
    np.testing.assert_array_equal(found.images[0].logits, expected[0])


@pytest.mark.parametrize("name", ["spot", "evit", "random"])
def test_a_figure_shows_what_the_trace_says(name: str) -> None:
    model = model_of(name)
    found = spot_vit.trace(model, torch.randn(1, 3, 64, 64), attention=())
    one = kept_of(found.images[0], found.model)
    for grid, stage in zip(one.stages, found.images[0].stages, strict=True):
        assert grid.shape == (4, 4)
        patches = stage.position[stage.kept]
        assert set(np.flatnonzero(grid)) == set(patches[patches < 16])
    figure = kept_figure([one, one, one], beside=2)
    assert len(figure.axes) == 2 * (2 * (1 + len(one.stages)) + 2)


def test_of_many_photos_some_are_drawn(tmp_path: Path) -> None:
    for k in range(30):
        photo(tmp_path / f"{k:02}.png")
    found = spot_vit.show(model_of("random"), tmp_path, tmp_path / "kept.png")
    names = [one.name for one in found.images]
    assert len(names) == 24 == len(set(names)) and names[0] == "00.png" and names[-1] == "28.png"


def test_endings_and_what_cannot_be_read(tmp_path: Path) -> None:
    figure = kept_figure([Kept(np.zeros((8, 8, 3), np.uint8), [np.ones((2, 2), bool)])])
    for ending in ("png", "svg", "pdf"):
        save_figure(figure, tmp_path / f"figure.{ending}")
        assert (tmp_path / f"figure.{ending}").stat().st_size > 500
    with pytest.raises(UserError, match=r"ends in \.png"):
        save_figure(figure, tmp_path / "figure.bmp")
    model = model_of("spot")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for source, words in (
        ("broken.jpg", "cannot be read"), ("empty", "no picture"), ("none.jpg", "no such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            spot_vit.show(model, tmp_path / source, tmp_path / "kept.png")
    said = answer(spot_vit.trace(model, torch.randn(1, 3, 64, 64)).model, np.array([0.0, 1.0]))
    assert (said.name, said.percent) == ("class 1", "73 %")


def test_the_command_draws_and_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=3)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    spot_vit.save("model.safetensors", model, classes=["cat", "dog", "<b>"])
    photo(tmp_path / "a.png")
    assert main(["show", "a.png", "--model", "model.safetensors", "--keep", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "patches kept: 8 -> 4" in printed and "written: kept.png" in printed
    assert any(name in printed for name in ("cat", "dog", "<b>"))
    spot_vit.save("dense.safetensors", spot_vit.restore(model))
    assert main(["show", "a.png", "--model", "dense.safetensors", "-o", "x.svg"]) == 0
    assert "is dense: made sparse by EViT" in capsys.readouterr().err
    for arguments, words in (
        (["b.png", "--model", "model.safetensors"], "no such file"),
        (["a.png", "--model", "none.safetensors"], "neither a file"),
        (["a.png", "--model", "model.safetensors", "-o", "x.bmp"], "ends in .png"),
        (["a.png", "--model", "model.safetensors", "--keep", "0.01"], "keep"),
    ):
        assert main(["show", *arguments]) == 2
        assert words in capsys.readouterr().err
