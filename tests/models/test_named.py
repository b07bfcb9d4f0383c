"""Weights of one's own for models by name, from where timm finds weights."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import spot_vit
import timm
import torch
from spot_vit.models.hub import hub_config
from spot_vit.models.loop import SpotLoop
from timm.models import save_for_hf
from torch import Tensor

NAME, DENSE = "spot_deit_small_patch16_224", "deit_small_patch16_224"
SIZES = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
CLASSES = {"num_classes": 7}
RECORDED = hasattr(timm.models, "get_model_args")  # since 1.0.31 timm keeps what models were given
FIELDS = {"keep": 0.6, "scaling": "n"}


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def spot(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(NAME, **{**SIZES, **FIELDS, **more}).eval()


def loaded(file: Path, name: str = NAME, **more: Any) -> Any:
    torch.manual_seed(5)
    arguments = {**SIZES, **FIELDS, **more}
    overlay = {"file": str(file)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def same(model: Any, other: Any, where: str = "") -> bool:
    state, theirs = model.state_dict(), other.state_dict()
    names = [name for name in theirs if where in name]
    return bool(names) and all(torch.equal(state[name], theirs[name]) for name in names)


@pytest.mark.parametrize(
    "kind", ["save_checkpoint", "state dict", "training", "safetensors", "EMA"]
)
@torch.no_grad()
def test_files_of_sparse_models(tmp_path: Path, kind: str):
    model = spot()
    file = tmp_path / ("x.safetensors" if kind in ("save_checkpoint", "safetensors") else "x.pth")
    if kind == "save_checkpoint":
        spot_vit.save_checkpoint(file, model)
    elif kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), file)
    elif kind == "EMA":
        torch.save({"state_dict": spot(1).state_dict(), "state_dict_ema": model.state_dict()}, file)
    else:
        state = model.state_dict()
        torch.save(state if kind == "state dict" else {"state_dict": state, "epoch": 3}, file)
    other = loaded(file).eval()
    assert same(other, model) and isinstance(other, SpotLoop)
    x = images()
    assert torch.equal(other(x), model(x))
    assert other.pretrained_cfg["file"] == str(file)
    assert "state_dict" not in other.pretrained_cfg  # no second copy of all tensors


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_dense_weights_under_new_predictors(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / f"dense{suffix}"
    dense = timm.create_model(DENSE, **SIZES)
    write = torch.save if suffix == ".pth" else safetensors.torch.save_file
    write(dense.state_dict(), file)
    assert same(spot_vit.restore(loaded(file)), dense)
    assert "holds no predictors relevance: they are new" in caplog.text
    caplog.clear()
    assert same(loaded(file, method="evit", scaling="log1p"), dense) and not caplog.text


def test_what_timm_does_with_weights_it_does_here(tmp_path: Path):
    """Another number of classes, of channels, another image size, features, a state dict."""
    file, model = tmp_path / "x.safetensors", spot()
    spot_vit.save_checkpoint(file, model)
    more = loaded(file, num_classes=11)
    assert more.head.weight.shape == (11, 48) and same(more, model, "blocks")
    grey = loaded(file, in_chans=1)
    expected = model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, expected)
    wide = loaded(file, img_size=(64, 96))
    assert wide.pos_embed.shape == (1, 1 + 4 * 6, 48) and same(wide, model, "relevance")
    torch.testing.assert_close(wide.pos_embed[:, :1], model.pos_embed[:, :1])
    default = {k: v for k, v in {**SIZES, **FIELDS}.items() if k != "num_classes"}
    overlay = {"state_dict": model.state_dict()}
    own = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **default)
    assert same(own, model) and own.num_classes == 7
    features = loaded(file, features_only=True, out_indices=(1, 3))
    own_part = {k: v for k, v in model.state_dict().items() if "blocks" in k}
    assert all(torch.equal(features.model.state_dict()[k], v) for k, v in own_part.items())
    assert "state_dict" not in features.pretrained_cfg
    assert len(features(images())) == 2


def test_every_name_loads_its_own(tmp_path: Path):
    sizes = {k: v for k, v in SIZES.items() if k != "num_classes"}
    for name in ("spot_lvvit_small", "sparsifiner_lvvit_small", "spot_sparsifiner_" + DENSE):
        arguments = {**sizes, **CLASSES, **({"reduce_n": 2} if "sparsifiner" in name else {})}
        model, file = timm.create_model(name, **arguments), tmp_path / f"{name}.pth"
        torch.save(model.state_dict(), file)
        overlay = {"file": str(file)}
        other = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
        assert same(other, model), name


def test_another_conversion_is_refused_by_field(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="spot_vit")
    file, plain = tmp_path / "x.safetensors", tmp_path / "x.pth"
    model = spot()
    spot_vit.save_checkpoint(file, model)
    torch.save(model.state_dict(), plain)
    with pytest.raises(ValueError, match=r"x.safetensors .*scaling was 'n' and is 'raw'"):
        loaded(file, scaling="raw")
    assert (
        loaded(file, keep=0.5).spot_config.keep == 0.5 and "keep was 0.6 and is 0.5" in caplog.text
    )
    with pytest.raises(
        ValueError, match=r"x.pth .*unexpected blocks.3.relevance.*convert with at=\[1, 2, 3\]"
    ):
        loaded(plain, at=[1, 2])
    with pytest.raises(ValueError, match=r"x.pth .*blocks.1.relevance.fc1.weight is"):
        loaded(plain, heads="mean")
    with pytest.raises(ValueError, match=r"x.pth .*'evit' has no predictors"):
        loaded(plain, method="evit", scaling="log1p")


def test_files_that_cannot_be_loaded_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent.pth"):
        loaded(tmp_path / "absent.pth")
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match=rf"{name} was not read.* damaged"):
            loaded(tmp_path / name)
    state = spot().state_dict()
    state["blocks.1.relevance.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth holds NaN .* in blocks.1.relevance.fc1.weight"):
        loaded(tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match=r"No pretrained.*pretrained_cfg_overlay=dict\(file="):
        timm.create_model(NAME, pretrained=True)


# ---- folders as of the Hub -----------------------------------------------------------------------


@pytest.mark.skipif(not RECORDED, reason="timm does not write the arguments of a model")
@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_folders_of_named_models(tmp_path: Path, safe: bool):
    model = spot(at=[1, 2])
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same(other, model) and other.spot_config == model.spot_config
    new = timm.create_model(f"local-dir:{tmp_path}", keep=0.5)
    assert not same(new, model, "head.weight") and new.spot_config.keep == 0.5
    x = images()
    assert torch.equal(other(x), model(x))


def converted(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return spot_vit.sparsify(timm.create_model(name, **{**SIZES, **more}), **FIELDS).eval()


@pytest.mark.parametrize("kind", ["any", "named", "both", "attention", "again"])
@torch.no_grad()
def test_folders_of_converted_models(tmp_path: Path, kind: str):
    sparse: dict[str, Any] = {"keep_rate": 0.4, "reduce_n": 2}
    size = (64, 64 if kind in ("named", "attention") else 96)
    given = {} if RECORDED else {**SIZES, "img_size": size}
    config_of = functools.partial(hub_config, **given)
    if kind == "named":
        model = spot_vit.set_keep(spot(), 0.5)
    elif kind == "attention":
        model = timm.create_model("vit_tiny_patch16_224", **SIZES)
        spot_vit.sparsify_attention(model, **sparse)
    else:
        model = converted("vit_base_patch16_siglip_224", img_size=size)
    if kind == "both":
        spot_vit.sparsify_attention(model, **sparse)
    save_for_hf(model, str(tmp_path), model_config=config_of(model), safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    if kind == "again" and RECORDED:  # what was built from a folder is saved without help
        save_for_hf(other, str(tmp_path / "two"), safe_serialization=True)
        other = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).eval()
    assert same(other, model.eval())
    for config in ("spot_config", "sparsifiner_config"):
        assert getattr(other, config, None) == getattr(model, config, None)
    if RECORDED:
        assert config_of(other) == config_of(model)
    x: Tensor = torch.randn(2, 3, *size)
    assert torch.equal(other(x), model(x))


def test_models_that_have_no_such_folder():
    dense = timm.create_model(DENSE, **SIZES)
    with pytest.raises(TypeError, match="is dense; timm's own name builds it again"):
        hub_config(dense)
    with pytest.raises(ValueError, match=rf"{NAME} and is converted otherwise.*'{DENSE}'"):
        hub_config(spot_vit.sparsify_attention(spot()))
    model = converted(DENSE)
    del model.pretrained_cfg
    with pytest.raises(TypeError, match=r"timm.create_model did not make this"):
        hub_config(model)
    other = timm.create_model("spot_vit", dense=DENSE, spot={}, **SIZES)
    other._model_args = {}
    with pytest.raises(TypeError, match=r"say dense=..., the name that 'spot_vit' was given"):
        hub_config(other)
    with pytest.raises(ValueError, match=r"spot_vit needs spot=\{...\} or sparsifiner=\{...\}"):
        timm.create_model("spot_vit", dense=DENSE)
    with pytest.raises(
        RuntimeError, match=r"No pretrained.*sparsify on timm.create_model\('deit_s"
    ):
        timm.create_model("spot_vit", dense=DENSE, spot={}, pretrained=True)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But for its last block, which needs transformers: see tests/compat."""
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    of_a_run, by_name, folder, any_model, _ = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(NAME)
    spot_vit.save_checkpoint("x.safetensors", model)
    names: dict[str, Any] = {"timm": timm}
    spot_vit.save("model.safetensors", timm.create_model(NAME, num_classes=3))
    exec(of_a_run, names)
    for block in (by_name, folder):
        exec(block, names)
        assert same(names["model"], model)
    exec(any_model, names)
    assert names["model"].spot_config.keep == 0.7
    assert names["model"].sparsifiner_config.keep_rate == 0.25
