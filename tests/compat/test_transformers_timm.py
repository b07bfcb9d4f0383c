"""Sparse models inside `TimmWrapper` of transformers: saved, and read back sparse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.models.hub import hub_config
from spot_vit.models.loop import SpotLoop

transformers = pytest.importorskip("transformers")

SIZES = {"img_size": [64, 96], "embed_dim": 48, "depth": 4, "num_heads": 3}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
CONVERSIONS = {
    "SPOT": (spot_vit.sparsify, {"keep": 0.6, "scaling": "n"}),
    "DynamicViT": (spot_vit.sparsify, {"keep": 0.6, "method": "dynamicvit", "at": [1, 2]}),
    "EViT": (spot_vit.sparsify, {"keep": 0.6, "method": "evit"}),
    "Sparsifiner": (spot_vit.sparsify_attention, {"keep_rate": 0.3, "reduce_n": 2}),
}


def wrapper(kind: Any, architecture: str = "vit_tiny_patch16_224", **model_args: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(
        architecture=architecture, model_args={**SIZES, **model_args}, num_labels=5
    )
    return kind(config).eval()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IMAGES)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("kind", ["TimmWrapperForImageClassification", "TimmWrapperModel"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_converted_model_is_read_back_as_it_was(
    tmp_path: Path, conversion: str, kind: str
) -> None:
    kind_of_wrapper = getattr(transformers, kind)
    model = wrapper(kind_of_wrapper)
    dense = output(model)
    convert, fields = CONVERSIONS[conversion]
    convert(model.timm_model, **fields)
    recorded = hasattr(timm.models, "get_model_args")  # since 1.0.31
    model.config.update(hub_config(model.timm_model, **({} if recorded else SIZES)))
    model.save_pretrained(tmp_path)
    again, found = kind_of_wrapper.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for config in ("spot_config", "sparsifiner_config"):
        own = getattr(model.timm_model, config, None)
        assert getattr(again.timm_model, config, None) == own
    assert torch.equal(output(again.eval()), output(model))
    assert output(model).shape != dense.shape or not torch.equal(output(model), dense)
    again.save_pretrained(tmp_path / "two")  # what was read is written without help
    twice = kind_of_wrapper.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(output(twice), output(model))


def test_without_the_configuration_predictors_are_unexpected(tmp_path: Path) -> None:
    """Why `hub_config` is needed: the name of the dense model builds the dense model."""
    model = wrapper(transformers.TimmWrapperForImageClassification)
    spot_vit.sparsify(model.timm_model, keep=0.6)
    model.save_pretrained(tmp_path)
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not isinstance(again.timm_model, SpotLoop)
    assert any(".relevance." in key for key in found["unexpected_keys"])


def test_models_by_our_names(tmp_path: Path) -> None:
    kind = transformers.TimmWrapperForImageClassification
    model = wrapper(kind, "spot_deit_small_patch16_224", keep=0.6, at=[1, 3])
    assert model.timm_model.spot_config.at == (1, 3)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert again.timm_model.spot_config == model.timm_model.spot_config
    assert torch.equal(output(again), output(model))


def test_the_loss_of_the_wrapper_reaches_predictors() -> None:
    model = wrapper(transformers.TimmWrapperForImageClassification)
    spot_vit.sparsify(model.timm_model, keep=0.6)
    loss = model.train()(IMAGES, labels=torch.tensor([1, 2])).loss
    loss.backward()
    gradient = model.timm_model.blocks[1].relevance.fc1.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    block = re.findall(r"```py\n(.*?)```", page, re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    model = wrapper(transformers.TimmWrapperForImageClassification)
    names: dict[str, Any] = {"wrapper": model, "spot_vit": spot_vit, "hub_config": hub_config}
    exec(block, names)
    assert names["wrapper"] is not model
    assert torch.equal(output(names["wrapper"].eval()), output(model))
