"""fvcore's counter of multiply-accumulates, which reads traces of the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from support.models import images
from support.ranks import KINDS, converted

import spot_ext

fvcore = pytest.importorskip("fvcore.nn")

PRODUCTS = ("linear", "conv", "matmul", "bmm", "einsum", "scaled_dot_product_attention")
SIZE = (3, 64, 64)


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Of torch's attention, which fvcore has no rule for."""
    batch, heads, queries, width = inputs[0].type().sizes()
    return 2 * batch * heads * queries * inputs[1].type().sizes()[2] * width


def counted(kind: str) -> tuple[dict[str, int], int]:
    """Products by operator as fvcore counts them, and our count, of one image."""
    model = converted(kind).eval()
    with spot_ext.definitions():
        analysis = fvcore.FlopCountAnalysis(model, images(model, 1))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
        found = dict(analysis.by_operator())
    return found, spot_vit.count_flops(model, SIZE).total


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_products_are_counted(kind: str):
    """Products alone in the same numbers; definitions of predictors and named keys do more."""
    found, ours = counted(kind)
    products = sum(count for name, count in found.items() if name in PRODUCTS)
    if kind == "random":
        assert products == ours
    else:
        assert abs(products / ours - 1) < 0.04
    assert set(found) - set(PRODUCTS) <= {"layer_norm"}
