"""One file builds a model again: any of timm, dense or converted, however it was wrapped."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import spot_vit
import timm
import torch
from spot_vit.models.saved import load, read_card, save
from spot_vit.utils.errors import UserError
from support.models import FAMILIES, build, build_lvvit, images
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

pytestmark = pytest.mark.skipif(
    not hasattr(timm.models, "get_model_args"),
    reason="timm does not keep the arguments of a model",
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
SIZES = {**SMALL, "img_size": 64, "num_classes": 7}
DENSE, NAME = "deit_small_patch16_224", "spot_deit_small_patch16_224"
SPARSE = {"keep_rate": 0.4, "reduce_n": 2}


def spot(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(DENSE, **SIZES)
    return spot_vit.sparsify(model, **{"keep": 0.6, "scaling": "n", **fields}).eval()


def same(model: Any, other: Any) -> bool:
    state, theirs = model.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in state.items()
    )


@torch.no_grad()
def comes_back(path: Path, model: Any, x: torch.Tensor, **arguments: Any) -> Any:
    """The model from the file: the same weights, conversion and logits, to the bit."""
    save(path, model, **arguments)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    other = load(path)
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn from the user's numbers
    assert same(model, other) and not other.training
    for config in ("spot_config", "sparsifiner_config"):
        assert getattr(other, config, None) == getattr(model, config, None)
    assert torch.equal(other(x), model.eval()(x))
    return other


@pytest.mark.parametrize("family", ["class token", "NaFlex, avg", *FAMILIES])
@pytest.mark.parametrize("kind", ["dense", "spot", "sparse"])
def test_every_family_comes_back(tmp_path: Path, family: str, kind: str) -> None:
    model: Any = build(family)
    if kind == "spot":
        spot_vit.sparsify(model, keep=(0.7, 0.5), at=[1, 3], soft="fuse", noise=0.25)
    if kind == "sparse" and family != "BEiT":  # whose bias of the logits it does not take
        spot_vit.sparsify_attention(model, **SPARSE)
    comes_back(tmp_path / "x.safetensors", model, images(model))


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit", "random"])
def test_every_method_comes_back(tmp_path: Path, method: str) -> None:
    scaling = {"scaling": "n"} if method == "spot" else {}
    torch.manual_seed(0)
    model = timm.create_model(DENSE, **SIZES)
    spot_vit.sparsify(model, method=method, keep=0.5, at=[2], **scaling).eval()
    if method == "random":  # each pass drops others
        spot_vit.set_keep(model, 1.0)
    comes_back(tmp_path / "x", model, torch.randn(2, 3, 64, 64))


def test_both_conversions_named_models_and_others_come_back(tmp_path: Path) -> None:
    path, x = tmp_path / "x.safetensors", torch.randn(2, 3, 64, 64)
    comes_back(path, spot_vit.sparsify_attention(spot(), **SPARSE), x)
    named: Any = timm.create_model(
        "spot_sparsifiner_" + DENSE, **{**SIZES, **SPARSE, "keep": 0.5, "at": [1]}
    )
    comes_back(path, named, x)
    assert read_card(path).architecture == DENSE
    comes_back(path, spot_vit.restore(named), x)  # dense again
    other = timm.create_model("spot_vit", dense="vit_tiny_patch16_224", spot={"at": [2]}, **SIZES)
    comes_back(path, spot_vit.set_keep(other, (0.3,)), x)
    comes_back(path, build_lvvit(dtype=torch.float32), x)
    comes_back(path, timm.create_model("digits_vit", depth=2), torch.rand(1, 1, 64, 64))
    resnet = timm.create_model("resnet10t", num_classes=3)
    comes_back(path, resnet, torch.randn(1, 3, 64, 64))


ALONE = """
import sys, torch, spot_vit
from spot_vit.models.saved import load
model, batch = load(sys.argv[1]), torch.load(sys.argv[2])
with torch.inference_mode():
    assert torch.equal(model(batch["x"]), batch["logits"])
print(type(model).__name__, model.pretrained_cfg["label_names"], model.spot_config.keep)
"""


def test_a_process_that_knows_nothing_but_the_file(tmp_path: Path) -> None:
    path, batch = tmp_path / "x.safetensors", tmp_path / "x.pt"
    model, x = spot(), torch.randn(2, 3, 64, 64)
    classes = ["ä", "b", "c", "d", "e", "f", "g"]
    save(path, model, classes=classes)
    with torch.inference_mode():
        torch.save({"x": x, "logits": model(x)}, batch)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), str(batch)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "PYTHONUTF8": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0.6" and str(classes) in done.stdout


def test_changes_after_the_model_was_made_travel_too(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    model.reset_classifier(5, global_pool="avg")
    model.set_input_size((64, 96))
    x = torch.randn(2, 3, 64, 96)
    other = comes_back(path, model, x)
    assert timm.data.resolve_model_data_config(other)["input_size"] == (3, 64, 96)
    model.head = nn.Linear(48, 3)
    assert comes_back(path, model, x, classes=list("abc")).num_classes == 3


def test_classes_preprocessing_and_notes_travel(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    given = {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "interpolation": "bilinear"}
    save(path, model, classes=list("abcdefg"), data_config=given, config={"epoch": 3})
    other = load(path)
    card = read_card(path)
    assert card.config == {"epoch": 3} and card.classes == list("abcdefg")
    assert card.conversion["spot"]["keep"] == 0.6
    found = timm.data.resolve_model_data_config(other)
    assert {name: found[name] for name in given} == given
    assert found["std"] == (0.229, 0.224, 0.225) and found["input_size"] == (3, 64, 64)
    assert other.pretrained_cfg["label_names"] == list("abcdefg")
    assert timm.get_pretrained_cfg(DENSE).mean == (0.485, 0.456, 0.406)  # timm's own is as it was
    save(path, other)  # what it came with goes on
    assert read_card(path).classes == list("abcdefg") and read_card(path).data_config["mean"][0] < 1
    assert spot_vit.load_checkpoint(path, spot(1)) == {}


def wrapped(model: Any) -> dict[str, Any]:
    ema = ModelEmaV3(model)
    blocks = copy.deepcopy(model)
    for b, block in enumerate(blocks.blocks):
        blocks.blocks[b] = torch.compile(block)
    return {
        "compiled": torch.compile(model),
        "parallel": nn.DataParallel(model),
        "EMA": ema,
        "average": AveragedModel(model),
        "compiled blocks": blocks,
        "compiled EMA of parallel": torch.compile(ModelEmaV3(nn.DataParallel(model))),
    }


def test_wrappers_leave_no_trace(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    for name, one in wrapped(model).items():
        save(path, one)
        assert same(load(path), model), name
    for prefix in ("module.", "_orig_mod.module.", "model.", "backbone.", "module._orig_mod."):
        state = {prefix + name: value + 1 for name, value in model.state_dict().items()}
        save(path, model, state=state)
        expected = {name: value + 1 for name, value in model.state_dict().items()}
        assert all(torch.equal(v, expected[n]) for n, v in load(path).state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "model.module."]
)
def test_files_with_the_prefixes_of_wrappers_are_read(tmp_path: Path, prefix: str) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    save(path, model)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata)
    assert same(load(path), model)
    other = spot(1)
    spot_vit.load_checkpoint(path, other)
    assert same(other, model)
    given = {**SIZES, "keep": 0.6, "scaling": "n"}
    overlay = {"file": str(path)}
    named = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **given)
    assert same(named, model)


def test_timm_reads_the_file_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.manual_seed(0)
    model: Any = timm.create_model(NAME, depth=4, num_classes=3)
    save(path, model)
    given = {"depth": 4, "num_classes": 3}
    assert same(timm.create_model(NAME, checkpoint_path=str(path), **given), model)
    overlay = {"file": str(path)}
    assert same(
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **given), model
    )
    dense = timm.create_model(DENSE, depth=4, num_classes=3)
    save(path, dense)
    assert same(timm.create_model(DENSE, checkpoint_path=str(path), **given), dense)


def test_folders(tmp_path: Path) -> None:
    model, last = spot(), spot(1)
    save(tmp_path / "last.safetensors", last)
    assert same(load(tmp_path), last)
    save(tmp_path / "best.safetensors", model)
    assert same(load(tmp_path), model)
    hub, given = tmp_path / "hub", spot_vit.hub_config(model, **SIZES)
    timm.models.save_for_hf(model, str(hub), model_config=given, safe_serialization=True)
    assert same(load(hub, keep=0.5), model) and load(hub, keep=0.5).spot_config.keep == 0.5
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds none of best.safetensors, last.safetensors"):
        load(tmp_path / "empty")


def test_another_budget(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, spot_vit.sparsify_attention(spot(), **SPARSE))
    other = load(path, keep=0.5, attention_keep=0.25)
    assert other.spot_config.keep == 0.5 and other.sparsifiner_config.keep_rate == 0.25
    save(path, timm.create_model(DENSE, **SIZES))
    with pytest.raises(TypeError, match="expected a SPOT model"):
        load(path, keep=0.5)


def test_models_that_timm_cannot_build_again_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"this Linear is not one. save_checkpoint writes its wei"):
        save(path, nn.Linear(2, 2))
    with pytest.raises(UserError, match="this VisionTransformer is not one"):
        save(path, VisionTransformer(**SMALL))
    model = timm.create_model(DENSE, norm_layer=functools.partial(nn.LayerNorm, eps=1e-3), **SIZES)
    with pytest.raises(UserError, match=r"was made with norm_layer=functools.partial.*as plain"):
        save(path, model)
    changed = timm.create_model(DENSE, **SIZES)
    changed.blocks[1].extra = nn.Linear(3, 2)
    changed.blocks[2].mlp.fc1 = nn.Linear(48, 20)
    with pytest.raises(
        UserError,
        match=r"'deit_small_patch16_224' with .*unexpected: blocks.1.extra.bias, .*another shape: "
        r"blocks.2.mlp.fc1.bias",
    ):
        save(path, changed)
    assert os.listdir(tmp_path) == []


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    with pytest.raises(ValueError, match=r"classes: expected 7 names, as many as logits, got 2"):
        save(path, model, classes=["a", "b"])
    with pytest.raises(ValueError, match=r"data_config: expected some of .*got \['size'\]"):
        save(path, model, data_config={"size": 3})
    with pytest.raises(ValueError, match=r"96"):
        save(path, model, data_config={"input_size": (3, 96, 96)})
    assert os.listdir(tmp_path) == []


class Sharded(torch.Tensor):
    """What tells a sharded tensor from a whole one."""

    def full_tensor(self) -> torch.Tensor:
        raise AssertionError("gathering takes all processes")


def test_sharded_tensors_are_refused(tmp_path: Path) -> None:
    model = spot()
    state = {name: value.as_subclass(Sharded) for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"blocks.0.* and \d+ more are sharded.*get_model_state_dict"
    ):
        save(tmp_path / "x.safetensors", model, state=state)
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_loaded_are_one_line(tmp_path: Path) -> None:
    path, model = tmp_path / "x.safetensors", spot()

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("there is no file")
    save(path, model)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:1000], whole[:-8]):
        path.write_bytes(content)
        refused("was not read.* damaged")
    spot_vit.save_checkpoint(path, model)
    refused("does not say which model it is of, as files of spot_vit.save do")
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    save(path, model)
    refused("holds NaN or infinite numbers in head.bias")
    save(path, spot())
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = spot().state_dict()
    for change, words in (
        ({"architecture": '"vit_of_tomorrow"'}, "'vit_of_tomorrow', which timm .* does not know"),
        ({"conversion": json.dumps({"spot": {"new": 1}})}, "may not be the versions.*new"),
        ({"arguments": json.dumps({**SIZES, "embed_dim": 24})}, "does not fit"),
    ):
        safetensors.torch.save_file(state, path, {**metadata, **change})
        refused(words)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    spot_vit.save_checkpoint(path, tied)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    spot_vit.load_checkpoint(path, other)
    assert same(other, tied)
    model = spot()
    flat = torch.cat([value.flatten() for value in model.state_dict().values()])  # as of FSDP
    sizes = [value.numel() for value in model.state_dict().values()]
    parts = zip(model.state_dict().items(), flat.split(sizes), strict=True)
    save(path, model, state={name: part.view(value.shape) for (name, value), part in parts})
    assert same(load(path), model)
