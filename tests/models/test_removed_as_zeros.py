"""Token pruning as Sparsifiner's public code has it: removed tokens stay, as zeros."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import spot_vit
import timm
import torch
import torch.nn.functional as F
from spot_vit import convert_checkpoint
from spot_vit.config.conversion import conversion_of
from spot_vit.models.sparsifiner import predictors
from spot_vit.nn.attention import AttentionRequest, attend_to_named
from support.published import Sparse, State, linear, norm, random_state, sparsifiner_factors, stem
from support.slow import most_slow
from support.sparsifiner import EVERY, Named, masking, picture, sparse, with_backend
from torch import Tensor

HEADS = 3


def published(
    state: State, image: Tensor, keep: dict[int, int], sparse: Sparse, least: float | None
) -> tuple[Tensor, list[Tensor]]:
    """Logits, and kept patches [B, n] of each stage, as the public code computes them.

    All tokens stay to the end. After block b the keep[b] patches that its class row attends to most
    are alive; the others are zero from there on, as queries, keys and values too. `least` names
    keys by threshold instead of a budget.
    """
    x = stem(state, image)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    alive, stages = None, []
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        name, tokens = f"blocks.{i}.attn", norm(state, f"blocks.{i}.norm1", x, 1e-6)
        q, k, v = linear(state, f"{name}.qkv", tokens).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        budget, there = sparse.budget, torch.ones(x.shape[:2], dtype=torch.bool)
        if alive is not None:
            there = F.pad(alive, (1, 0), value=True)
            q, k, v = (y * there[:, None, :, None] for y in (q, k, v))
            budget = min(budget, int(alive[0].sum()))
        coefficients, basis = projected_factors(state, f"{name}.mask_predictor", q, k, there)
        largest = coefficients.argsort(-1, descending=True)[..., : sparse.coef_topk]
        coefficients = coefficients * torch.zeros_like(coefficients).scatter(-1, largest, 1)
        basis = torch.where(basis.abs() > sparse.basis_threshold, basis.abs(), 0)
        approx = (coefficients @ basis).masked_fill(~there[:, None, None], -math.inf)
        seen = torch.ones(*q.shape[:3], q.shape[2], dtype=torch.bool)
        if least is None:
            best = approx.argsort(-1, descending=True)[..., :budget]
            seen[:, :, 1:] = torch.zeros_like(seen[:, :, 1:]).scatter(-1, best, True)
        else:
            seen[:, :, 1:] = approx > least
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
        weights = scores.softmax(-1).nan_to_num()
        x = x + linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))
        tokens = norm(state, f"blocks.{i}.norm2", x, 1e-6)
        hidden = F.gelu(linear(state, f"blocks.{i}.mlp.fc1", tokens))
        x = x + linear(state, f"blocks.{i}.mlp.fc2", hidden)
        if i in keep:
            score = weights[:, :, 0, 1:].mean(dim=1)
            if alive is not None:
                score = score.masked_fill(~alive, -math.inf)
            stages.append(score.argsort(-1, descending=True)[:, : keep[i]].sort(-1).values)
            alive = torch.zeros_like(score, dtype=torch.bool).scatter(1, stages[-1], True)
        if alive is not None:
            x = x * F.pad(alive, (1, 0), value=True)[..., None]
    return linear(state, "head", norm(state, "norm", x, 1e-6)[:, 0]), stages


def projected_factors(
    state: State, name: str, q: Tensor, k: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    """As `sparsifiner_factors`, with keys that are not there zero behind their projection too."""
    bare = {**state, f"{name}.proj_n": torch.eye(k.shape[2]).double()}
    columns = linear(bare, f"{name}.proj_c_k", k) * there[:, None, :, None]
    low = linear(bare, f"{name}.proj_c_q", q) @ (columns.mT @ state[f"{name}.proj_n"])
    _, basis = sparsifiner_factors(state, name, q, k)
    return (low * HEADS**-0.5)[:, :, 1:].softmax(-1), basis


def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)


def converted(state: State, keep: list[float], at: list[int], **settings: Any) -> Any:
    model: Any = timm.create_model(
        "deit_small_patch16_224", img_size=64, embed_dim=48, depth=5, num_heads=HEADS, num_classes=7
    )
    settings = {"reduce_n": 2, "coef_topk": 3, **settings}
    spot_vit.sparsify_attention(model.double().eval(), **settings)
    convert_checkpoint(state, "sparsifiner", model)
    return spot_vit.sparsify(model, method="evit", soft="none", keep=keep, at=at)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("rate", "budget", "least"), [(0.25, 5, None), (0.5, 9, None), (1.0, 17, None), (1.0, 0, 0.4)]
)
@torch.no_grad()
def test_it_computes_what_the_public_code_computes(
    rate: float, budget: int, least: float | None, backend: str
):
    """With stages that leave more and fewer tokens than the budget names, and none."""
    state = random_state("deit", rank=8, depth=5)
    mask = {} if least is None else {"mask": "threshold", "mask_threshold": least}
    settings = {"keep_rate": rate, "backend": backend, **mask}
    shares, places = [0.75, 0.375, 0.1875], [1, 2, 3]
    model = converted(state, shares, places, removed_as_zeros=True, **settings)
    found = model(image(), aux=True)
    logits, kept = published(state, image(), {1: 12, 2: 6, 3: 3}, Sparse(budget, 3), least)
    assert all(torch.equal(a, b) for a, b in zip(found.index, kept, strict=True))
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-10)
    ours = converted(state, shares, places, **settings)
    assert (ours(image(), kept=found.index) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("keep_rate", most_slow([0.3, 0.6, 1.0]))
@pytest.mark.parametrize("mask", ["topk", "threshold"])
@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_masked_training_equals_compacted_inference(
    variant: str, soft: str | None, mask: str, keep_rate: float
):
    threshold = {"mask": "threshold", "mask_threshold": 0.3} if mask == "threshold" else {}
    model = sparse(variant, keep_rate, removed_as_zeros=True, **threshold)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3], soft=soft)
    x = picture(model)
    out = model(x, aux=True)
    torch.testing.assert_close(model(x, kept=out.index), out.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(with_backend(model, "dense")(x), out.logits, rtol=0, atol=1e-10)
    for each in (masking(model), with_backend(model, "dense")):
        masked = each(x, kept=out.index)
        if variant == "no pooling":  # all tokens come back: compare the survivors
            if soft is not None:
                continue
            prefix = model.num_prefix_tokens
            rows = torch.cat([torch.arange(prefix).expand(3, -1), out.index[-1] + prefix], dim=1)
            masked = masked.gather(1, rows[..., None].expand(-1, -1, 7))
        torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("coef", [{"coef_topk": None}, {"coef_topk": None, "coef_threshold": 0.1}])
@torch.no_grad()
def test_masked_training_takes_the_coefficients_that_inference_takes(coef: dict[str, Any]):
    model = sparse(keep_rate=0.6, removed_as_zeros=True, **coef)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    x = picture(model)
    out = model(x, aux=True)
    masked = masking(model)(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit", "random"])
@torch.no_grad()
def test_every_method_of_token_removal_works_on_top(method: str):
    model = sparse(keep_rate=0.5, removed_as_zeros=True)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3], method=method)
    x = picture(model)
    out = model(x, aux=True)
    masked = model.train()(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)
    off = with_switch(model, False)(x, kept=out.index)
    assert (off - out.logits).abs().max() > 1e-6


def with_switch(model: Any, on: bool) -> Any:
    model = with_backend(model, "auto")
    for predictor in predictors(model).values():
        predictor.configure(predictor.config.replace(removed_as_zeros=on))
    return model


@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_without_removal_it_changes_no_bit(variant: str):
    model = sparse(variant)
    x = picture(model)
    expected = model(x)
    assert torch.equal(with_switch(model, True)(x), expected)
    spot_vit.sparsify(model, keep=1.0, at=[1, 2])
    assert torch.equal(with_switch(model, True)(x), expected)


@torch.no_grad()
def test_the_budget_counts_patch_tokens_that_are_left():
    model = sparse("registers, LayerScale", keep_rate=0.5, removed_as_zeros=True)
    spot_vit.sparsify(model, keep=[0.7, 0.2], at=[1, 3])
    shapes: dict[int, list[int]] = {}
    named: dict[int, list[int]] = {}

    def note(b: int, _: Any, inputs: Any, index: Tensor) -> None:
        shapes[b] = list(index.shape[2:])
        named[b] = (index >= 0).sum(-1).amax((1, 2)).tolist()

    for b, predictor in predictors(model).items():
        predictor.register_forward_hook(partial(note, b))
    x = picture(model)
    out = model(x, aux=True)
    # ceil(0.5 * 21) = 11 of 21 and of 16; 3 of the 8 that are left then.
    assert shapes == {0: [16, 11], 1: [11, 11], 2: [11, 11], 3: [3, 3], 4: [3, 3]}
    model.train()(x, kept=out.index)
    assert named == {0: [11] * 3, 1: [11] * 3, 2: [11] * 3, 3: [3] * 3, 4: [3] * 3}
    counts = [12, 16, 5]
    mask = (torch.arange(16) < torch.tensor(counts)[:, None]).double()
    q, k = torch.randn(2, 3, 21, 3, 16, dtype=torch.float64)
    index = predictors(model)[1](q[:, 5:], k, keep=mask)
    assert (index >= 0).sum(-1).amax((1, 2)).tolist() == [11, 11, 5]
    sure = predictors(with_switch(model, False))[1](q[:, 5:], k, keep=mask)
    assert torch.equal(index[:2], sure[:2])
    dropped = ~torch.isin(index[2], torch.arange(-1, 10, dtype=torch.int32))
    assert not dropped.any() and (index[2].diff(dim=-1)[index[2, ..., 1:] >= 0] > 0).all()


# ---- attention alone -----------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [3, 2, 14, 3, 8], the mask [2, 12] and names [2, 3, 12, 5] that it allows."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 14, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    keep = torch.ones(2, 12, dtype=dtype)
    keep[0, [1, 4, 5, 11]], keep[1, [0, 2]] = 0, 0
    kept = F.pad(keep, (2, 0), value=1)[:, None, None].expand(-1, 3, 12, -1)
    order = torch.rand(2, 3, 12, 14, generator=generator).masked_fill(kept == 0, -1)
    index = order.argsort(-1, descending=True)[..., :5].sort(-1).values.int()
    return qkv, keep, index


def with_zeros(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Map and output of the two prefix queries, over kept tokens and as many zeros as are gone."""
    weight = F.pad(keep, (2, 0), value=1)[:, None, None]
    mass = weight * torch.einsum("bihd,bjhd->bhij", q[:, :2], k).mul(scale).exp()
    total = mass.sum(-1, keepdim=True) + (1 - weight).sum(-1, keepdim=True)
    return mass / total, torch.einsum("bhij,bjhd->bihd", mass / total, v)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("want", [False, True])
def test_rows_of_the_prefix_and_their_gradients(want: bool, backend: str):
    """Patch queries are those of the default; the prefix's have the zeros, statistics too."""
    qkv, keep, index = operands()
    leaves = [x.clone().requires_grad_() for x in (*qkv, keep)]
    q, k, v, mask = leaves
    request = AttentionRequest(2, True, None, mask, want)
    zeros = Named(index, backend, removed_as_zeros=True)
    out, stats = attend_to_named(q, k, v, request, 0.4, zeros, want)
    plain, other = attend_to_named(q, k, v, request, 0.4, Named(index, backend), want)
    assert torch.equal(out[:, 2:], plain[:, 2:])
    map_, expected = with_zeros(q, k, v, mask, 0.4)
    torch.testing.assert_close(out[:, :2], expected, rtol=0, atol=1e-12)
    assert (out[:, :2] - plain[:, :2]).abs().max() > 1e-2
    pull = torch.randn(expected.shape, dtype=torch.float64)
    given, wanted = [out[:, :2]], [expected]
    if want:
        kept = keep[..., None] * map_[:, :, 0, 2:].transpose(1, 2)
        torch.testing.assert_close(stats[:, 2:, :, 0], kept, rtol=0, atol=1e-12)
        assert torch.equal(stats[..., 1:], other[..., 1:])
        given, wanted = [*given, stats[:, 2:, :, 0]], [*wanted, kept]
    pulls = [pull, *([torch.randn(2, 12, 3, dtype=torch.float64)] if want else [])]
    inputs = [q, k, v] if want else leaves  # statistics do not pull at the mask
    found = torch.autograd.grad(given, inputs, pulls)
    exact = torch.autograd.grad(wanted, inputs, pulls)
    torch.testing.assert_close(found[:3], exact[:3], rtol=0, atol=1e-11)
    if not want:
        assert found[3].isfinite().all() and (found[3][keep == 0] != 0).all()
        torch.testing.assert_close(found[3][keep > 0], exact[3][keep > 0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("keep_all", [False, True])
def test_logits_of_any_size_give_no_nan(size: float, keep_all: bool):
    qkv, keep, index = operands(torch.float32)
    keep = torch.ones_like(keep) if keep_all else keep
    leaves = [x.clone().requires_grad_() for x in (*qkv, keep)]
    zeros = Named(index, "sparse", removed_as_zeros=True)
    for sign in (1, -1):
        request = AttentionRequest(2, True, None, leaves[3])
        q, k = leaves[0].abs() * size, leaves[1].abs() * sign * size
        out, _ = attend_to_named(q, k, leaves[2], request, 1.0, zeros, False)
        if sign < 0 and not keep_all:  # nothing compares with zeros
            assert not out[:, :2].any()
        if keep_all:
            plain = Named(index, "sparse")
            same, _ = attend_to_named(q, k, leaves[2], request, 1.0, plain, False)
            torch.testing.assert_close(out, same, rtol=0, atol=1e-6)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@torch.no_grad()
def test_maps_leave_a_share_to_removed_tokens():
    model = sparse(keep_rate=0.5, removed_as_zeros=True)
    spot_vit.sparsify(model, keep=0.6, at=[2])
    maps = spot_vit.attention_maps(model, picture(model))
    for b, found in enumerate(maps):
        rows = found.weights.sum(-1)
        torch.testing.assert_close(rows[:, :, 1:], torch.ones_like(rows[:, :, 1:]))
        assert (rows[:, :, 0] < 0.99).all() if b >= 2 else (rows > 0.999).all()


def test_training_reaches_every_parameter_but_the_predictors():
    model = sparse(dtype=torch.float32, keep_rate=0.7, removed_as_zeros=True)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3]).train()
    out = model(picture(model, 8), aux=True)
    loss = out.logits.square().mean() + sum((m.mean() - 0.3) ** 2 for m in out.masks)
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".connectivity." in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_it_compiles_and_is_saved():
    model = spot_vit.sparsify(sparse(keep_rate=0.6, removed_as_zeros=True), keep=0.6, at=[1, 2])
    x = picture(model)
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-12)
    assert conversion_of(model)["sparsifiner"]["removed_as_zeros"] is True
