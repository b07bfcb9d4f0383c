"""Published layouts, restated and filled at random, against the models they are converted to."""

from __future__ import annotations

import os
import pickle
import zipfile
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import spot_vit
import timm
import torch
from spot_vit import convert_checkpoint
from spot_vit.models.checkpoint_files import KEYS, PREFIXES
from spot_vit.models.checkpoint_layouts import SOURCES
from support.published import (
    Sparse,
    dynamicvit_scores,
    inference,
    random_state,
    training_checkpoint,
)
from torch import Tensor, nn

SIZES = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
NAMES = {"deit": "deit_small_patch16_224", "lvvit": "lvvit_small", "evit": "deit_small_patch16_224"}


def build(kind: str = "deit", **extra: Any) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(NAMES[kind], **{**SIZES, **extra}).double().eval()


def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "skip_lam"), [("deit", 1), ("evit", 1), ("lvvit", 2)])
@torch.no_grad()
def test_dense_weights_compute_what_was_published(kind: str, skip_lam: int):
    state = random_state("lvvit" if kind == "lvvit" else "deit")
    model = build(kind)
    returned = convert_checkpoint(training_checkpoint(state), kind, model)
    expected = inference(state, image(), 3, skip_lam=skip_lam)
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=1e-10)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in returned.items())


@torch.no_grad()
def test_dynamicvit_on_deit_computes_what_was_published():
    state = random_state("deit", stages=3)
    model = spot_vit.sparsify(build(), method="dynamicvit", keep=0.7)
    assert model.spot_config.at == (1, 2, 3)
    convert_checkpoint(training_checkpoint(state), "dynamicvit", model)
    expected = inference(state, image(), 3, at=(1, 2, 3), keep=(11, 7, 5))
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_dynamicvit_predictor_with_a_mask():
    state = random_state("deit", stages=1)
    model = spot_vit.sparsify(build(), at=[2], method="dynamicvit")
    convert_checkpoint(state, "dynamicvit", model)
    tokens = torch.randn(2, 16, 48, dtype=torch.float64)
    keep = (torch.rand(2, 16) > 0.4).double()
    found = model.blocks[2].relevance(tokens, None, keep)
    expected = dynamicvit_scores(state, "score_predictor.0", tokens, keep)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("kind", "skip_lam"), [("deit", 1), ("lvvit", 2)])
@torch.no_grad()
def test_sparsifiner_computes_what_was_published(kind: str, skip_lam: int, shared: bool):
    state = random_state(kind, rank=8, shared=shared)
    settings = {"reduce_n": 2, "coef_topk": 3, "share_inout_proj": shared}
    model = spot_vit.sparsify_attention(build(kind), 0.25, **settings)
    convert_checkpoint(training_checkpoint(state), "sparsifiner", model)
    expected = inference(state, image(), 3, skip_lam=skip_lam, sparse=Sparse(5, 3))
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=1e-10)
    dense = inference(state, image(), 3, skip_lam=skip_lam)
    assert (expected - dense).abs().max() > 1e-3
    if not shared:
        separate = spot_vit.sparsify_attention(build(kind), 0.25, **settings)
        converted = convert_checkpoint(state, "sparsifiner")
        separate.load_state_dict(converted, strict=False)
        assert torch.equal(separate(image()), model(image()))


def test_sparsifiner_files_and_models_that_share_or_do_not():
    shared, apart = (random_state("deit", rank=8, shared=s) for s in (True, False))
    assert not any(key.endswith("proj_back_n") for key in convert_checkpoint(shared, "sparsifiner"))
    model = spot_vit.sparsify_attention(build(), reduce_n=2)  # it may grow apart in training
    convert_checkpoint(shared, "sparsifiner", model)
    predictor = model.blocks[2].attn.connectivity
    assert torch.equal(predictor.proj_back_n, predictor.proj_n)
    model = spot_vit.sparsify_attention(build(), reduce_n=2, share_inout_proj=True)
    with pytest.raises(ValueError, match=r"unexpected blocks.0.attn.connectivity.proj_back_n"):
        convert_checkpoint(apart, "sparsifiner", model)
    with pytest.raises(ValueError, match=r"connectivity.*sparsify_attention\(model\)"):
        convert_checkpoint(apart, "sparsifiner", build())
    with pytest.raises(ValueError, match=r"mask_predictor.*layout of source='sparsifiner'"):
        convert_checkpoint(apart, "deit")
    spot = spot_vit.sparsify(spot_vit.sparsify_attention(build(), reduce_n=2))
    before = {k: v.clone() for k, v in spot.state_dict().items() if ".relevance." in k}
    convert_checkpoint(apart, "sparsifiner", spot)
    assert all(torch.equal(spot.state_dict()[k], v) for k, v in before.items())
    connectivity = {k: v.clone() for k, v in spot.state_dict().items() if ".connectivity." in k}
    convert_checkpoint(random_state("deit"), "deit", spot)
    assert all(torch.equal(spot.state_dict()[k], v) for k, v in connectivity.items())


def test_predictor_places_without_a_model():
    state = random_state("lvvit", depth=16, dim=16, stages=3)
    keys = convert_checkpoint(state, "dynamicvit")
    places = {key.split(".")[1] for key in keys if ".relevance." in key}
    assert places == {"4", "8", "12"}
    keys = convert_checkpoint(state, "dynamicvit", at=[1, 2, 9])
    assert {key.split(".")[1] for key in keys if ".relevance." in key} == {"1", "2", "9"}
    assert "blocks.9.relevance.fc3.bias" in keys and len(keys) == len(state)
    with pytest.raises(ValueError, match=r"3 predictors.*\[1, 2\]"):
        convert_checkpoint(state, "dynamicvit", at=[1, 2])


def test_dense_weights_leave_the_predictors_of_a_spot_model_alone():
    model = spot_vit.sparsify(build())
    before = {k: v.clone() for k, v in model.state_dict().items() if ".relevance." in k}
    convert_checkpoint(random_state("deit"), "deit", model)
    assert before and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def distilled_state(patches: int = 16) -> dict[str, Tensor]:
    state = random_state("deit", patches=patches)
    state["dist_token"] = torch.ones(1, 1, 48)
    state["pos_embed"] = torch.ones(1, 2 + patches, 48)
    state["head_dist.weight"], state["head_dist.bias"] = torch.ones(7, 48), torch.ones(7)
    return state


def test_distilled_and_deit3_keys():
    state = distilled_state()
    distilled = timm.create_model("deit_small_distilled_patch16_224", **SIZES)
    convert_checkpoint(state, "deit", distilled)
    assert (distilled.dist_token == 1).all()

    state = random_state("deit")
    state["pos_embed"] = state["pos_embed"][:, 1:]
    for b in range(4):
        state[f"blocks.{b}.gamma_1"] = torch.full((48,), 1.0 + b)
        state[f"blocks.{b}.gamma_2"] = torch.full((48,), -1.0 - b)
    deit3 = timm.create_model("deit3_small_patch16_224", **SIZES)
    convert_checkpoint(state, "deit", deit3)
    assert (deit3.blocks[2].ls1.gamma == 3).all() and (deit3.blocks[2].ls2.gamma == -3).all()
    again = timm.create_model("deit3_small_patch16_224", **SIZES)
    convert_checkpoint(deit3.state_dict(), "deit", again)  # as timm names it
    own = deit3.state_dict()
    assert all(torch.equal(own[name], value) for name, value in again.state_dict().items())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_files(tmp_path: Path, wrapper: str | None):
    state = random_state("lvvit")
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({wrapper: wrapped} if wrapper else wrapped, tmp_path / "weights.pth.tar")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    for file in ("weights.pth.tar", "weights.safetensors"):
        read = convert_checkpoint(tmp_path / file, "lvvit")
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)
    torch.save(training_checkpoint(state), tmp_path / "weights.pth")
    assert convert_checkpoint(str(tmp_path / "weights.pth"), "lvvit").keys() == state.keys()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, zipped: bool):
    evil, file = tmp_path / "executed", tmp_path / "weights.pth"
    content = {"model": {"head.weight": torch.ones(1), "x": Malicious(evil)}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"was executed.*mkdir$"):
        convert_checkpoint(file, "deit")
    assert not evil.exists()
    pickle.loads(pickle.dumps(Malicious(evil)))
    assert evil.exists()  # it would have


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_scalars_of_numpy_and_paths_may_lie_beside_the_weights(tmp_path: Path, module: str):
    """As the official scripts write them, with NumPy 1 and 2."""
    state = random_state("deit")
    beside = {
        "best_acc": np.float64(81.2),
        "epoch": np.int64(300),
        "optimizer": {"param_groups": [{"lr": np.float64(1e-5), "fused": np.bool_(True)}]},
        "args": Namespace(output_dir=Path("runs/deit"), lr=np.float32(1e-3)),
    }
    file = tmp_path / "weights.pth"
    torch.save({"model": state, **beside}, file)
    own = b"numpy._core.multiarray" if np.__version__ >= "2" else b"numpy.core.multiarray"
    _replace_in_pickle(file, own, f"{module}.multiarray".encode())
    found = convert_checkpoint(file, "deit")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def _replace_in_pickle(file: Path, old: bytes, new: bytes) -> None:
    """Names another module in the pickle of a zip that torch wrote."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "beside",
    [np.array([object()]), np.array([1.0]), np.random.RandomState(0), Fraction(1, 3), Ellipsis],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(tmp_path: Path, beside: Any):
    file = tmp_path / "weights.pth"
    torch.save({"model": random_state("deit"), "best": beside}, file)
    with pytest.raises(ValueError, match="nothing in it was executed"):
        convert_checkpoint(file, "deit")


def test_a_training_checkpoint_as_scripts_write_it(tmp_path: Path):
    """With the optimiser's state, whose rates NumPy's cosine set, and an average of the model."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(image()).sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = np.float64(1e-3) * np.cos(0.3)
    state = model.state_dict()
    content = {
        "model": {name: value + 1 for name, value in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_ema": {f"module.{name}": value for name, value in state.items()},
        "scaler": {"scale": np.float32(65536.0)},
        "best_acc": np.float64(81.25),
        "args": Namespace(output_dir=Path("runs"), lr=np.float64(1e-3), eval=False),
    }
    torch.save(content, tmp_path / "weights.pth")
    other = build()
    convert_checkpoint(tmp_path / "weights.pth", "deit", other, key="model_ema")
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, name: str):
    file = tmp_path / name
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(file, "deit")
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} was not read.* damaged"):
            convert_checkpoint(file, "deit")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list"):
        convert_checkpoint(tmp_path / "list.pth", "deit")
    with pytest.raises(ValueError, match=r"no tensors.*epoch"):
        convert_checkpoint({"epoch": 3}, "deit")


def test_a_wrong_file_lists_what_is_missing_and_what_is_unexpected():
    deit, lvvit = random_state("deit"), random_state("lvvit")
    with pytest.raises(ValueError, match="source must be one of"):
        convert_checkpoint(deit, "swin")
    with pytest.raises(
        ValueError, match=r"missing aux_head.*unexpected blocks.0.attn.qkv.bias, blocks.0.ex"
    ) as caught:
        convert_checkpoint({**deit, "blocks.0.extra": torch.ones(1)}, "lvvit")
    assert "layout of" not in str(caught.value)
    with pytest.raises(ValueError, match=r"and \d+ more.*layout of source='lvvit'"):
        convert_checkpoint(lvvit, "deit")
    with pytest.raises(ValueError, match=r"score_predictor.0.*layout of source='dynamicvit'"):
        convert_checkpoint(random_state("deit", stages=2), "evit")
    resnet = timm.create_model("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"missing blocks.0.*unexpected bn1.bias"):
        convert_checkpoint(resnet, "deit")


def test_a_model_that_does_not_fit_is_left_as_it_was():
    state = random_state("deit", patches=36)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"pos_embed.*6 x 6 patches instead of 4 x 4.*set_input"):
        convert_checkpoint(state, "deit", model)
    with pytest.raises(ValueError, match=r"head.weight is \(9, 48\).*\(7, 48\).*reset_classifier"):
        convert_checkpoint(random_state("deit", classes=9), "deit", model)
    with pytest.raises(ValueError, match=r"missing blocks.3.attn.proj.bias"):
        convert_checkpoint(random_state("deit", depth=3), "deit", model)
    with pytest.raises(ValueError, match=r"unexpected blocks.1.relevance.*sparsify\(model"):
        convert_checkpoint(random_state("deit", stages=3), "dynamicvit", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    narrow = spot_vit.sparsify(model, method="dynamicvit", d_remap=24)
    with pytest.raises(ValueError, match=r"blocks.1.relevance.remap.weight is \(48, 48\)"):
        convert_checkpoint(random_state("deit", stages=3), "dynamicvit", narrow)


@pytest.mark.parametrize("stages", [3, 2])
def test_dynamicvit_weights_leave_predictors_that_see_more_alone(
    stages: int, caplog: pytest.LogCaptureFixture
):
    state = random_state("deit", stages=stages)
    model = spot_vit.sparsify(build())  # has statistics, DynamicViT's predictor has none
    before = {k: v.clone() for k, v in model.state_dict().items() if ".relevance." in k}
    loaded = convert_checkpoint(training_checkpoint(state), "dynamicvit", model)
    after = model.state_dict()
    assert before and all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(after["blocks.2.attn.qkv.weight"], state["blocks.2.attn.qkv.weight"])
    assert loaded.keys() == after.keys() - before.keys()
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "method 'spot'" in said and "predictors stay new" in said
    assert "method='dynamicvit'" in said


@pytest.mark.parametrize("method", ["evit", "random"])
def test_dynamicvit_weights_where_nothing_is_learned_name_the_method(method: str):
    model = spot_vit.sparsify(build(), method=method)
    with pytest.raises(ValueError, match=rf"'{method}' has no predictors.*method='dynamicvit'"):
        convert_checkpoint(random_state("deit", stages=3), "dynamicvit", model)


def test_distilled_weights_and_models_that_are_not():
    state = distilled_state()
    with pytest.raises(
        ValueError, match=r"weights are distilled \(dist_token, head_dist"
    ) as caught:
        convert_checkpoint(state, "deit", build())
    assert "image size" not in str(caught.value) and "deit_small_distilled" in str(caught.value)
    model = timm.create_model("deit_small_distilled_patch16_224", **SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="the model is distilled") as caught:
        convert_checkpoint(random_state("deit"), "deit", model)
    assert "image size" not in str(caught.value)
    with pytest.raises(ValueError, match=r"weights are distilled.*6 x 6 patches instead of 4 x 4"):
        convert_checkpoint(distilled_state(36), "deit", build())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", [*KEYS, "weights of mine"])
def test_weights_under_a_key(key: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="spot_vit")
    state, other = random_state("deit"), random_state("deit", depth=3)
    given = key if key not in KEYS else None
    found = convert_checkpoint({key: state, "args": {"lr": 1}, "epoch": 3}, "deit", key=given)
    assert found.keys() == state.keys()
    assert f"{len(state)} tensors, under {key!r}" in caplog.text
    with pytest.raises(ValueError, match=r"no weights under key='ema'; there are \['.*'args'\]"):
        convert_checkpoint({key: state, "args": {"lr": 1}}, "deit", key="ema")
    nested = {"runs": {key: state}} if given is None else {"runs": {"model": {"net": state}}}
    assert convert_checkpoint(nested, "deit", key="runs").keys() == state.keys()
    if key == KEYS[0]:
        return
    both = {KEYS[0]: other, key: state}
    assert convert_checkpoint(both, "deit").keys() == other.keys()
    assert convert_checkpoint(both, "deit", key=key).keys() == state.keys()
    assert given or f"there are {[key]} too" in caplog.text


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "model.backbone.module."])
def test_prefixes_of_wrappers(prefix: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="spot_vit")
    state = random_state("deit")
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    found = convert_checkpoint(wrapped, "deit")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    said = [part for part in PREFIXES if part in prefix]
    assert all(repr(part) in caplog.text for part in said) and "without the prefix" in caplog.text
    mixed = {n if n.startswith("head.") else f"{prefix}{n}": v for n, v in state.items()}
    assert convert_checkpoint(mixed, "deit").keys() == state.keys()
    with pytest.raises(ValueError, match=r"missing head.bias.*") as caught:
        convert_checkpoint({n: v for n, v in wrapped.items() if "head.bias" not in n}, "deit")
    assert "without the prefix" in str(caught.value)
    with pytest.raises(ValueError, match=r"holds norm.bias several times"):
        convert_checkpoint({**wrapped, "norm.bias": state["norm.bias"]}, "deit")


def test_averaged_models_of_torch_and_wrapped_models():
    model, other = build(), build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(model))
    convert_checkpoint(averaged.state_dict(), "deit", other)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in other.state_dict().items())


@torch.no_grad()
def test_sparsifiner_without_channel_projections_computes_what_was_published():
    """With reduce_c=1 queries and keys are taken as they are."""
    state = random_state("deit", rank=8)
    plain = {name: value for name, value in state.items() if ".proj_c_" not in name}
    for name in state.keys() - plain.keys():  # what projects nothing computes the same
        state[name] = (
            torch.eye(16).double() if name.endswith("weight") else torch.zeros(16).double()
        )
    settings = {"reduce_n": 2, "coef_topk": 3}
    model = spot_vit.sparsify_attention(build(), 0.25, reduce_c=1, **settings)
    convert_checkpoint(plain, "sparsifiner", model)
    expected = inference(state, image(), 3, sparse=Sparse(5, 3))
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=1e-10)
    reduced = spot_vit.sparsify_attention(build(), 0.25, **settings)
    with pytest.raises(ValueError, match=r"missing .*proj_c_k.*convert with reduce_c=1"):
        convert_checkpoint(plain, "sparsifiner", reduced)
    with pytest.raises(ValueError, match=r"unexpected .*proj_c_k.*convert with reduce_c=2"):
        convert_checkpoint(random_state("deit", rank=8), "sparsifiner", model)
    square = {  # the public code's layers at reduction 1, which project to as many channels
        name: torch.randn(16, 16, dtype=torch.float64) / 4 if name.endswith("weight") else value
        for name, value in state.items()
        if ".proj_c_" in name
    }
    with pytest.raises(ValueError, match=r"convert with reduce_c=1, project=True"):
        convert_checkpoint({**state, **square}, "sparsifiner", model)
    wide = spot_vit.sparsify_attention(build(), 0.25, reduce_c=1, project=True, **settings)
    convert_checkpoint({**state, **square}, "sparsifiner", wide)
    expected = inference({**state, **square}, image(), 3, sparse=Sparse(5, 3))
    torch.testing.assert_close(wide(image()), expected, rtol=0, atol=1e-10)
    del plain["blocks.1.attn.mask_predictor.proj_n"]
    with pytest.raises(ValueError, match=r"missing blocks.1.attn.mask_predictor.proj_n"):
        convert_checkpoint(plain, "sparsifiner")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float):
    state = random_state("deit")
    state["blocks.2.mlp.fc1.weight"][3, 5] = number
    torch.save({"model_ema": state}, tmp_path / "weights.pth")
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = r"weights.pth holds NaN or infinite numbers in blocks.2.mlp.fc1.weight: "
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "weights.pth", "deit", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_of_our_own_models_name_the_way():
    own = spot_vit.sparsify(build()).state_dict()
    with pytest.raises(ValueError, match=r"unexpected .*relevance.*model.load_state_dict takes it"):
        convert_checkpoint(own, "deit")


def test_the_page_says_what_is_accepted():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for source in SOURCES:
        assert f"`{source}`" in page
    for names in (KEYS, PREFIXES):
        assert ", ".join(f"`{name}`" for name in names) in page
