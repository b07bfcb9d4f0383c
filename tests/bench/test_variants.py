"""The models of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.bench.variants import cost, variants
from spot_vit.models.sparsifiner import is_sparse
from spot_vit.utils.errors import UserError
from support.benched import NAME, SMALL, settings
from support.exported import small


def labels(**given: Any) -> list[str]:
    return [variant.label for variant in variants(settings(**given))]


def test_a_name_of_timm_has_random_weights_and_the_default_ratio() -> None:
    dense, sparse = variants(settings())
    assert dense.keep is None and not hasattr(dense.model, "spot_config")
    assert sparse.keep == 0.7 == sparse.model.spot_config.keep
    assert not dense.model.training and not sparse.model.training
    assert sparse.size == (3, 64, 64)
    again = variants(settings())[0].model.state_dict()
    for name, tensor in dense.model.state_dict().items():
        assert torch.equal(tensor, again[name])
    for name, parameter in dense.model.named_parameters():  # one set of weights for all
        assert sparse.model.get_parameter(name) is parameter
    assert cost(sparse.model, sparse.size)[0].total < cost(dense.model, dense.size)[0].total


def test_what_is_asked_for() -> None:
    assert labels(keep=(0.9, 0.5)) == ["dense", "keep 0.9", "keep 0.5"]
    assert labels(attention_keep=0.5) == ["dense", "attention keep 0.5"]
    assert labels(attention_keep=0.5, keep=(0.7,)) == ["dense", "keep 0.7, attention keep 0.5"]
    found = variants(settings(method="dynamicvit", at=(1,), dtype="bfloat16"))
    assert found[1].model.spot_config.method == "dynamicvit"
    assert found[1].model.spot_config.at == (1,)
    for variant in found:
        assert {p.dtype for p in variant.model.parameters()} == {torch.bfloat16}
    larger = variants(settings(img_size=96))[1]
    assert larger.size == (3, 96, 96) and larger.model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_a_saved_model_is_compared_with_its_own_dense_form(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    saved = small("both")
    spot_vit.save(path, saved)
    source = str(path)
    dense, own = variants(settings(model=source, model_kwargs={}))
    assert own.label == "keep 0.6, attention keep 0.5" and is_sparse(own.model)
    assert not is_sparse(dense.model) and not hasattr(dense.model, "spot_config")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(own.model(images), saved(images))
    assert torch.equal(dense.model(images), spot_vit.restore(saved)(images))
    other = variants(settings(model=source, model_kwargs={}, keep=(0.5,), attention_keep=0.75))
    assert other[1].label == "keep 0.5, attention keep 0.75"
    folder = variants(settings(model=str(tmp_path), model_kwargs={}))
    assert [variant.label for variant in folder] == ["dense", own.label]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "deit_tini_patch16_224"}, "neither a file or run folder, nor a model of timm"),
        ({"model_kwargs": {"nothing": 1}}, "cannot be built"),
        ({"at": (7,)}, "at names block 7, the model has 3"),
        ({"keep": (0.01,)}, "leaves none of 16 patch tokens"),
        ({"model": "resnet18", "model_kwargs": {}}, "resnet18: "),
        ({"model": f"spot_{NAME}", "method": "evit"}, "is sparse already, by its own"),
    ],
)
def test_what_does_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants(settings(**given))


def test_a_sparse_name_of_timm() -> None:
    assert labels(model=f"spot_{NAME}", model_kwargs=SMALL) == ["dense", "keep 0.7"]
