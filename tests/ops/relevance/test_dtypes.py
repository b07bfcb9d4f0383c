"""token_relevance with any number of threads and mixed dtypes."""

from __future__ import annotations

import pytest
import torch
from ops.relevance.drawn import build, leaves
from support.comparison import assert_same_bits
from support.data import FLOATING, generator
from support.switches import threads

from spot_ext import token_relevance


def test_threads_change_nothing_but_long_products() -> None:
    """Products over 8 or fewer terms are not split among threads, so only our own sums could be."""
    values = build(12, 196, keep="soft", dtype=torch.float32)
    given = leaves(values)
    grad = torch.randn(12, 196, 2, generator=generator("grad"))
    own = [name for name in given if not name.endswith("weight") or name in
           ("norm_weight", "fc3_weight")]  # fmt: skip
    results = []
    for count in (1, 2, 3, 4):
        with threads(count):
            logits = token_relevance(**values)
            results.append(
                [logits.detach(), *torch.autograd.grad(logits, [given[n] for n in own], grad)]
            )
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_autocast_takes_mixed_dtypes(ambient: torch.dtype, device: torch.device) -> None:
    """Tokens that a layer left in 16 bits beside float32 features and weights; keep as it is."""
    values = build(dtype=torch.float32, device=device)
    given = leaves(values)
    cast = {k: v.detach().to(ambient) if k != "keep" else v.detach() for k, v in values.items()}
    with torch.amp.autocast(device.type, dtype=ambient):
        logits = token_relevance(**(values | {"tokens": cast["tokens"]}))
        assert_same_bits(logits, token_relevance(**cast))
        logits.sum().backward()  # inside the region, where torch's products would be cast
    assert logits.dtype == torch.float32
    for name, leaf in given.items():
        if name != "tokens":
            assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="features must be"):
        token_relevance(**(values | {"tokens": cast["tokens"]}))


@pytest.mark.parametrize("dtype", FLOATING)
def test_keep_may_have_any_floating_dtype(dtype: torch.dtype, device: torch.device) -> None:
    values = build(dtype=torch.float32, device=device)
    expected = token_relevance(**values)
    keep = values["keep"].to(dtype).requires_grad_()
    logits = token_relevance(**(values | {"keep": keep}))
    assert_same_bits(logits, expected)
    (grad,) = torch.autograd.grad(logits[..., 0].sum(), keep)
    assert grad.dtype == dtype and grad.any()
