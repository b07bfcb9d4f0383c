"""What conversions are given wrongly, and the cure that the error names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit import SparsifinerConfig, SpotConfig
from support.models import build, images

CASES: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: spot_vit.sparsify(m, 0.7), TypeError, r"sparsify\(model, keep=0.7\)"),
    (lambda m: spot_vit.sparsify(m, "evit"), TypeError, r"method='evit'\)"),
    (lambda m: spot_vit.sparsify(m, {"keep": 0.7}), TypeError, r"\*\*\{'keep': 0.7\}\)"),
    (lambda m: spot_vit.sparsify(m, SparsifinerConfig()), TypeError, "sparsify_attention"),
    (lambda m: spot_vit.sparsify(m, at=3), ValueError, r"for one: \[3\]"),
    (lambda m: spot_vit.sparsify(m, at=[1, 2], keep=0.2), ValueError, "none of 16 .* at stage 1"),
    (
        lambda m: spot_vit.set_keep(spot_vit.sparsify(m, at=[1]), 0.05),
        ValueError,
        "none of 16 patch tokens at stage 0",
    ),
    (
        lambda m: spot_vit.sparsify_attention(m, SparsifinerConfig()),
        TypeError,
        r"sparsify_attention\(model, config=",
    ),
    (lambda m: spot_vit.sparsify_attention(m, config=0.5), TypeError, r"keep_rate=0.5\)"),
    (
        lambda m: spot_vit.sparsify_attention(m, config=SpotConfig()),
        TypeError,
        r"goes to sparsify\(model, config\)",
    ),
    (
        lambda m: spot_vit.restore(torch.compile(spot_vit.sparsify(m, at=[1]))),
        TypeError,
        "restore the SpotVisionTransformer inside",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[pattern for *_, pattern in CASES])
@torch.no_grad()
def test_errors_name_the_cure(case: tuple[Callable[[Any], Any], type[Exception], str]):
    call, kind, pattern = case
    model = build()
    x = images(model)
    before = model(x)
    with pytest.raises(kind, match=pattern):
        call(model)
    if hasattr(model, "spot_config"):
        spot_vit.restore(model)
    assert torch.equal(model(x), before)


def test_heads_that_are_too_wide_are_refused_at_once():
    wide = {"embed_dim": 520, "num_heads": 2}
    with pytest.raises(ValueError, match=r"heads of blocks.0 are 260 wide; .* at most 256"):
        spot_vit.sparsify(build(**wide))
    with pytest.raises(ValueError, match="named keys takes at most 256"):
        spot_vit.sparsify_attention(build(**wide), 0.5)
    dropped = spot_vit.sparsify(build(**wide), method="random", keep=0.5)
    assert dropped(images(dropped)).shape == (3, 7)


def test_a_model_of_one_block():
    with pytest.raises(ValueError, match="name at=\\[0\\]"):
        spot_vit.sparsify(build(depth=1))
    one = spot_vit.sparsify(build(depth=1), at=[0], features=["embed"], keep=0.5)
    assert one(images(one), aux=True).index[0].shape == (3, 8)
