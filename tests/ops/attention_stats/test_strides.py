"""attention_stats gives the same for any strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.attention_stats.drawn import mask
from support.attention import with_leaves
from support.comparison import assert_close
from support.data import random
from support.gradients import cotangents
from torch import Tensor

from spot_ext import attention_stats

_B, _N, _H, _D = 2, 37, 3, 20

_VIEWS: dict[str, Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]] = {
    "packed": lambda make: make("qkv", _B, _N, 3, _H, _D).unbind(2),
    "packed by heads": lambda make: make("qkv", _B, _N, _H, 3, _D).unbind(3),
    "packed in the last dimension": lambda make: make("qkv", _B, _N, _H, _D, 3).unbind(4),
    "heads first": lambda make: tuple(make(x, _B, _H, _N, _D).transpose(1, 2) for x in "qkv"),
    "channels first": lambda make: tuple(make(x, _B, _H, _D, _N).movedim(3, 1) for x in "qkv"),
    "keys and values of one head": lambda make: (
        make("q", _B, _N, _H, _D),
        *(make(x, _B, _N, 1, _D).expand(_B, _N, _H, _D) for x in "kv"),
    ),
    "queries of one image, one key": lambda make: (
        make("q", 1, _N, _H, _D).expand(_B, _N, _H, _D),
        make("k", _B, 1, _H, _D).expand(_B, _N, _H, _D),
        make("v", _B, _N, _H, 2 * _D)[..., ::2],
    ),
    "one channel": lambda make: (
        *(make(x, _B, _N, _H, 1).expand(_B, _N, _H, _D) for x in "qk"),
        make("v", _B, _N, _H, 1).expand(_B, _N, _H, _D),
    ),
    "not aligned": lambda make: (
        make("q", _B, _N, _H, _D + 1)[..., 1:],
        make("k", _B, _N + 1, _H, _D)[:, 1:],
        make("v", _B, _N, _H + 1, _D + 3)[:, :, 1:, 2:-1],
    ),
}

_BIASES: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "expanded over images": lambda make: make("b", 1, _H, _N, _N).expand(_B, _H, _N, _N),
    "expanded over heads": lambda make: make("b", _B, 1, _N, _N).expand(_B, _H, _N, _N),
    "one row": lambda make: make("b", 1, _H, 1, _N).expand(1, _H, _N, _N),
    "one column": lambda make: make("b", _B, _H, _N, 1).expand(_B, _H, _N, _N),
    "transposed": lambda make: make("b", _B, _H, _N, _N).mT,
    "heads last": lambda make: make("b", _N, _N, _H).permute(2, 0, 1)[None],
    "every second column": lambda make: make("b", 1, _H, _N, 2 * _N)[..., ::2],
    "a corner of a larger one": lambda make: make("b", _B, _H, _N + 3, _N + 5)[..., 2:-1, 4:-1],
}

_KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda keep: torch.stack([keep, 1 - keep], dim=-1)[..., 0],
    "transposed": lambda keep: keep.T.contiguous().T,
    "expanded over images": lambda keep: keep[:1].expand(_B, -1),
    "all from one": lambda keep: torch.ones_like(keep[:1, :1]).expand(_B, _N - 1),
    "with the prefix": lambda keep: torch.nn.functional.pad(keep, (1, 0), value=1.0)[:, 1:],
}


def _maker(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    return lambda name, *shape: random(f"{name} {shape}", shape, dtype, device)


def _assert_strides_do_not_matter(
    values: dict[str, Any], kind: str = "random", tolerance: float | None = None
) -> None:
    """The same as with contiguous copies of all arguments and incoming gradients."""
    names = [name for name in ("q", "k", "v", "keep", "bias") if values.get(name) is not None]
    dense = {name: values[name].clone(memory_format=torch.contiguous_format) for name in names}
    results = []
    for arguments, copy in ((values, False), (values | dense, True)):
        call, leaves = with_leaves(arguments, *names)
        outputs = attention_stats(**call)
        sent = cotangents(outputs, kind)
        if copy:
            sent = [x.clone(memory_format=torch.contiguous_format) for x in sent]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, sent)])
    if tolerance is None:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(values["q"].dtype, 2e-2)
    for number, (mine, theirs) in enumerate(zip(*results, strict=True)):
        limit = tolerance if mine.dtype == values["q"].dtype else max(tolerance, 1e-5)
        assert_close(mine, theirs, limit, f"output or gradient {number}")
    assert all(value.any() for value in results[1][4:])  # gradients of v, keep and bias


def _three(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    make = _maker(dtype, device)
    q, k, v = _VIEWS["packed"](make)
    return {"q": q, "k": k, "v": v, "keep": mask(_B, _N - 1, dtype, device)}


_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("view", _VIEWS.values(), ids=_VIEWS)
def test_any_strides_of_q_k_and_v(
    view: Any, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = view(_maker(dtype, device))
    assert q.shape == k.shape == v.shape == (_B, _N, _H, _D)
    assert not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
    keep = mask(_B, _N - 1, dtype, device) if masked else None
    _assert_strides_do_not_matter({"q": q, "k": k, "v": v, "keep": keep})


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("view", _BIASES.values(), ids=_BIASES)
def test_any_strides_of_the_bias(view: Any, dtype: torch.dtype, device: torch.device) -> None:
    bias = view(_maker(dtype, device))
    assert not bias.is_contiguous()
    _assert_strides_do_not_matter(_three(dtype, device) | {"bias": bias})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("view", _KEEPS.values(), ids=_KEEPS)
def test_any_strides_of_the_mask(view: Any, dtype: torch.dtype, device: torch.device) -> None:
    """With q in float32, so that masks of another dtype are strided too."""
    keep = view(mask(_B, _N - 1, dtype, device))
    assert keep.shape == (_B, _N - 1) and not keep.is_contiguous()
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    _assert_strides_do_not_matter(
        _three(torch.float32, device) | {"keep": keep}, tolerance=tolerance
    )


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("kind", ["expanded", "transposed", "partial"])
def test_any_strides_of_incoming_gradients(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    bias = _BIASES["transposed"](_maker(dtype, device))
    _assert_strides_do_not_matter(_three(dtype, device) | {"bias": bias}, kind)
