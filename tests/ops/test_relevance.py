"""What is special to `token_relevance`; what holds for every op is in `test_generic.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.relevance import relevance_reference
from support.arguments import to_dtype
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, generator
from support.switches import threads
from torch import Tensor, nn

from spot_ext import token_relevance, token_relevance_reference

NAMES = (
    "tokens", "features", "keep", "norm_weight", "norm_bias", "remap_weight", "remap_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "fc3_weight", "fc3_bias",
)  # fmt: skip


def build(
    batch: int = 2,
    count: int = 9,
    channels: int | None = 8,
    remap: int = 6,
    features: int | None = 4,
    hidden: tuple[int, int] = (5, 3),
    keep: str = "random",
    dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
) -> dict[str, Tensor | None]:
    """Arguments by name; channels None: without embeddings."""
    seeded = generator(f"relevance {batch} {count} {channels} {remap} {features}")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=seeded, dtype=torch.float64) * scale

    values: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    width = features or 0
    if channels is not None:
        values["tokens"] = normal(batch, count, channels) * 2 + 1
        values["norm_weight"] = normal(channels, scale=0.2) + 1
        values["norm_bias"] = normal(channels, scale=0.2)
        values["remap_weight"] = normal(remap, channels, scale=max(channels, 1) ** -0.5)
        values["remap_bias"] = normal(remap, scale=0.2)
        width += remap
    if features is not None:
        values["features"] = normal(batch, count, features)
    if keep:
        drawn = torch.rand((batch, count), generator=seeded, dtype=torch.float64)
        share = {"random": 0.6, "all": 1.0, "none": 0.0, "soft": 0.0}[keep]
        values["keep"] = drawn if keep == "soft" else (drawn < share).double()
    for layer, rows in enumerate((*hidden, 2), start=1):
        values[f"fc{layer}_weight"] = normal(rows, width, scale=max(width, 1) ** -0.5)
        values[f"fc{layer}_bias"] = normal(rows, scale=0.2)
        width = rows
    return {k: v if v is None else v.to(device, dtype) for k, v in values.items()}


def leaves(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors among the arguments, asking for gradients."""
    return {name: x.requires_grad_() for name, x in values.items() if x is not None}


# ---- gradients ---------------------------------------------------------------------------------

_SHAPES: list[dict[str, Any]] = [
    {},
    {"keep": ""},
    {"keep": "all"},
    {"keep": "none"},
    {"keep": "soft"},
    {"features": None},
    {"features": 0},
    {"features": 0, "keep": ""},
    {"channels": None},
    {"channels": None, "keep": ""},
    {"channels": None, "batch": 1, "count": 1},
    {"channels": 7},
    {"channels": 33, "remap": 2},
    {"remap": 0},
    {"remap": 2, "features": 1, "hidden": (1, 1)},
    {"remap": 18, "hidden": (17, 9)},
    {"count": 1, "keep": ""},
    {"count": 1, "keep": "none"},
    {"count": 0},
    {"count": 0, "keep": ""},
    {"batch": 0},
    {"batch": 5, "count": 3, "keep": "soft"},
    {"batch": 1, "count": 35},
    {"hidden": (0, 3)},
]


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_gradcheck(shape: dict[str, Any], device: torch.device) -> None:
    values = build(device=device, **shape)
    given = leaves(values)

    def call(*tensors: Tensor) -> Tensor:
        return token_relevance(**(values | dict(zip(given, tensors, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(given.values()), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_there_are_no_second_derivatives(name: str, device: torch.device) -> None:
    values = build(device=device)
    leaf = leaves(values)[name]
    (first,) = torch.autograd.grad(
        token_relevance(**values).square().sum(), leaf, create_graph=True
    )
    assert first.any()
    words = "token_relevance is differentiable once.*token_relevance_reference"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(first.sum(), leaf)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
def test_errors_at_the_size_of_a_model(dtype: torch.dtype, device: torch.device) -> None:
    """By norm, so that luck of single roundings averages out: at most PyTorch's own error."""
    exact = build(2, 196, 96, 96, 36, (66, 33), device=device)
    values = {k: v if v is None else v.to(dtype) for k, v in exact.items()}
    exact = {k: v if v is None else v.double() for k, v in values.items()}
    grad = torch.randn(2, 196, 2, generator=generator("grad"), dtype=torch.float64).to(device)

    def outcome(call: Any, arguments: dict[str, Any]) -> list[Tensor]:
        given = leaves(to_dtype(arguments, next(iter(arguments.values())).dtype))
        logits = call(**given)
        sent = grad.to(logits.dtype)
        return [logits.detach(), *torch.autograd.grad(logits, list(given.values()), sent)]

    def reordered(**given: Any) -> Tensor:
        order = torch.randperm(66, generator=generator("order")).to(device)
        given["fc1_weight"], given["fc1_bias"] = (
            given["fc1_weight"][order],
            given["fc1_bias"][order],
        )
        given["fc2_weight"] = given["fc2_weight"][:, order]
        return token_relevance_reference(**given)

    truth = outcome(token_relevance_reference, exact)
    # In float64 the truth is PyTorch's own: its error shows with the same sums in another order.
    wide = dtype == torch.float64
    plain = outcome(reordered if wide else token_relevance_reference, values)
    actual = outcome(token_relevance, values)
    for name, mine, theirs, right in zip(("logits", *NAMES), actual, plain, truth, strict=True):
        error, allowed = ((x.double() - right).norm().item() for x in (mine, theirs))
        floor = 4 * torch.finfo(mine.dtype).eps * right.norm().item()
        assert mine.dtype == theirs.dtype
        assert error <= 1.5 * allowed + floor, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


def test_the_tail_of_gelu_keeps_its_digits(device: torch.device) -> None:
    """1 + erf(x / sqrt 2) cancels for negative x; the kernels' form does not."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float32, device=device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    weights = one, zero, one, zero, torch.ones(2, 1, device=device), torch.zeros(2, device=device)
    features = x[None, :, None]
    hidden2 = torch.ops.spot.token_relevance(None, features, *[None] * 5, *weights)[4].flatten()
    expected = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    error = ((hidden2.double() - expected) / expected)[x != 0].abs().max().item()
    assert error < 1e-5


def test_the_shared_half_is_a_mean_over_kept_tokens(device: torch.device) -> None:
    values = build(count=12, device=device)
    full = token_relevance(**values)
    keep = values["keep"]
    for image in range(2):
        index = keep[image].bool()
        alone = dict(values)
        alone["tokens"] = values["tokens"][image : image + 1, index]
        alone["features"] = values["features"][image : image + 1, index]
        alone["keep"] = None
        assert_close(token_relevance(**alone)[0], full[image, index])


def test_without_kept_tokens_the_shared_half_is_zero(device: torch.device) -> None:
    values = build(keep="none", device=device)
    some = build(keep="random", device=device)
    values["keep"][1] = some["keep"][1]
    cut = dict(values)
    cut["fc1_weight"] = values["fc1_weight"].clone()
    cut["fc1_weight"][:, 3:6] = 0
    logits = token_relevance(**values)
    assert logits.isfinite().all()
    assert_close(logits[0], token_relevance(**cut)[0])
    assert_close(logits[1:], token_relevance_reference(**values)[1:])


@pytest.mark.parametrize("name", ["tokens", "features", "keep"])
def test_nan_stays_in_its_image(name: str, device: torch.device) -> None:
    values = build(batch=3, count=40, device=device, dtype=torch.float32)
    clean = token_relevance(**values)
    values[name] = values[name].clone()
    values[name][1, 7] = math.nan
    logits = token_relevance(**values)
    for image in (0, 2):
        assert_same_bits(logits[image], clean[image])
    if name == "features":
        others = torch.arange(40, device=device) != 7
        assert logits[1, 7].isnan().all()
        assert_same_bits(logits[1, others], clean[1, others])
    else:
        assert logits[1].isnan().all()


class Predictor(nn.Module):
    """DynamicViT's predictor, restated: no attention statistics, remap as wide as the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[2] // 2
        local, shared = x[:, :, :half], x[:, :, half:]
        mean = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_predictor_of_dynamicvit(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    predictor = Predictor(384).to(device, dtype)
    assert sum(p.numel() for p in predictor.parameters()) == 241_250
    x = torch.randn(2, 50, 384, dtype=dtype, device=device)
    policy = (torch.rand(2, 50, 1, device=device) < 0.7).to(dtype)
    expected = predictor(x, policy)
    logits = token_relevance(x, None, policy[..., 0], *predictor.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(logits, expected, tolerance)
    sent = torch.randn_like(expected)
    parameters = list(predictor.parameters())
    assert_close(
        torch.autograd.grad(logits, parameters, sent),
        torch.autograd.grad(expected, parameters, sent),
        tolerance,
    )


# ---- determinism, dtypes, what is asked for ----------------------------------------------------


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


def test_the_backward_op_gives_what_is_asked_for(device: torch.device) -> None:
    args = OPS["token_relevance_backward"].sample("wider").args(device, torch.float64)
    everything = torch.ops.spot.token_relevance_backward(*args)
    for mask in range(16):
        wanted = [bool(mask >> place & 1) for place in range(4)]
        grads = torch.ops.spot.token_relevance_backward(*args[:20], *wanted)
        asked = (*wanted[:3], *[wanted[3]] * 10)
        for grad, whole, flag in zip(grads, everything, asked, strict=True):
            if flag:
                assert_same_bits(grad, whole)
            else:
                assert grad.numel() == 0


def test_the_op_returns_what_its_backward_needs(device: torch.device) -> None:
    values = build(device=device)
    for actual, expected in zip(
        torch.ops.spot.token_relevance(*values.values()),
        relevance_reference(*values.values()),
        strict=True,
    ):
        assert_close(actual, expected)
