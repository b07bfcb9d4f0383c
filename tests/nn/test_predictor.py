"""Predictors are told from the backbone by what they are, not by what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import Predictor, predictor_parameters
from spot_vit.nn.relevance import TokenRelevance
from support.models import build
from support.wrapped import WRAPPERS, wrapped
from torch import nn


def converted() -> tuple[Any, set[str]]:
    """A model with both kinds of predictors, and the names of what it had before."""
    model = build()
    before = {name for name, _ in model.named_parameters()}
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    return spot_vit.sparsify_attention(model, 0.4, reduce_n=2), before


def test_predictors_own_what_a_conversion_adds() -> None:
    model, before = converted()
    names = {name for name, _ in model.named_parameters()}
    assert set(predictor_parameters(model)) == names - before
    kinds = [predictor_parameters(model, kind) for kind in (TokenRelevance, ConnectivityPredictor)]
    assert kinds[0] and kinds[1] and not set(kinds[0]) & set(kinds[1])
    assert {**kinds[0], **kinds[1]} == predictor_parameters(model)
    assert all(model.get_parameter(name) is p for name, p in predictor_parameters(model).items())


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_hide_no_predictor(kind: str) -> None:
    model, _ = converted()
    with wrapped(model, kind) as outside:
        assert len(predictor_parameters(outside)) == len(predictor_parameters(model))


def test_a_new_kind_of_predictor_gets_the_rate_of_predictors() -> None:
    class Another(Predictor):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(2, 2)

    model = spot_vit.sparsify(build(), keep=0.6, at=[1, 2])
    model.blocks[3].gate_of_mine = another = Another()
    groups = {group["name"]: group["params"] for group in spot_vit.param_groups(model)}
    for name, parameter in (("", another.scale.weight), ("_no_decay", another.scale.bias)):
        assert any(p is parameter for p in groups[f"predictor{name}"])
        assert not any(p is parameter for p in groups[f"backbone{name}"])
