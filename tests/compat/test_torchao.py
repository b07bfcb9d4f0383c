"""int8 weights of torchao, of whole models and of their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.nn.predictor import plain_layer
from support.models import images
from support.ranks import KINDS, LEARNED, converted
from torch import Tensor, nn

pytest.importorskip("torchao")

from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor

PRECISIONS = {"weights": Int8WeightOnlyConfig, "dynamic": Int8DynamicActivationInt8WeightConfig}
CUTTING = [kind for kind in LEARNED if kind != "sparsifiner"]


def quantised(kind: str, precision: str, part: str = "model") -> Any:
    model = converted(kind).float().eval()
    quantize_(model if part == "model" else model.blocks, PRECISIONS[precision]())
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("part", ["model", "blocks"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", CUTTING)
@torch.no_grad()
def test_logits_of_the_same_tokens_are_near(kind: str, precision: str, part: str):
    """Given the decisions of the model with plain weights; near ties may fall otherwise."""
    plain, model = converted(kind).float().eval(), quantised(kind, precision, part)
    x = images(plain)
    expected = plain(x, aux=True)
    found = difference(model(x, kept=expected.index), expected.logits)
    assert 1e-4 < found < 0.03
    own = model(x, aux=True)
    assert own.logits.isfinite().all()
    same = [
        set(a) & set(b)
        for a, b in zip(own.index[0].tolist(), expected.index[0].tolist(), strict=True)
    ]
    assert all(len(shared) >= own.index[0].shape[1] - 1 for shared in same)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_sparse_attention(precision: str):
    plain, model = converted("sparsifiner").float().eval(), quantised("sparsifiner", precision)
    x = images(plain)
    assert 1e-4 < difference(model(x), plain(x)) < 0.03
    before = model(x)
    assert not torch.equal(spot_vit.set_keep(model, attention=0.2)(x), before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["spot", "dynamicvit"])
@torch.no_grad()
def test_predictors_give_what_their_layers_give(kind: str, precision: str):
    """Their weights are int8 as well, so that they are called layer by layer."""
    model, plain = quantised(kind, precision), converted(kind).float().eval()
    relevance, reference = model.blocks[1].relevance, plain.blocks[1].relevance
    assert isinstance(relevance.fc1.weight, TorchAOBaseTensor)
    assert not plain_layer(relevance.fc1) and plain_layer(reference.fc1)
    tokens = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    shape = (2, 9, relevance.num_features)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    given = features if relevance.num_features else None
    found = relevance(tokens, given, None)
    if precision == "weights":  # the same numbers in plain layers: the op's result
        for name, layer in reference.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(relevance.get_submodule(name).weight.dequantize())
        assert (found - reference(tokens, given, None)).abs().max() < 1e-4
    else:
        assert difference(found, reference(tokens, given, None)) < 0.03


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_budgets_and_files(kind: str, precision: str, tmp_path: Any):
    """The budget may change, and a state dict is read back."""
    torch.manual_seed(5)
    model = quantised(kind, precision)
    x = images(model)
    if kind != "sparsifiner":
        spot_vit.set_keep(model, 1.0)
        assert (
            1e-4
            < difference(model(x), spot_vit.set_keep(converted(kind).float().eval(), 1.0)(x))
            < 0.03
        )
        spot_vit.set_keep(model, 0.6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = converted(kind).float().eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), assign=True)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(other(x), expected)
