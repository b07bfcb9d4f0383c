"""Sparsifiner attention in converted models, alone and together with SPOT."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.connectivity import ConnectivityPredictor
from spot_vit.look import Look, attend_to_named
from spot_vit.operands import dense_attention, record_operands
from spot_vit.sparsifiner import predictors, set_grid
from spot_vit.sparsifiner_config import SparsifinerConfig
from test_lvvit import build as build_lvvit
from test_models import VARIANTS, build, images
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

BIASED = [variant for variant in VARIANTS if "BEiT" in variant]
FITTING = [variant for variant in VARIANTS if variant not in BIASED]
FAMILIES = ["class token", "registers, LayerScale", "EVA-02", "NaFlex, rotary", "LV-ViT"]
EVERY = [*FITTING, "LV-ViT"]


def make(variant: str = "class token", dtype: torch.dtype = torch.float64, **extra: Any) -> Any:
    if variant == "LV-ViT":
        return build_lvvit(dtype=dtype, depth=5, **extra)
    return build(variant, dtype, **extra)


def sparse(
    variant: str = "class token",
    keep_rate: float = 0.4,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> Any:
    """A model with sparse attention whose predictors are not near uniform, as trained ones."""
    model = spot_vit.sparsify_attention(make(variant, dtype), keep_rate, **overrides)
    generator = torch.Generator().manual_seed(5)
    for predictor in predictors(model).values():
        for parameter in predictor.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
    return model


def picture(model: Any, batch: int = 3, seed: int = 1) -> Tensor:
    return images(model, batch, seed)


def masking(model: Any) -> Any:
    """Training mode, but for a stem with BatchNorm, which would see other statistics."""
    model.train()
    if hasattr(model, "aux_head"):
        model.patch_embed.eval()
    return model


def with_backend(model: Any, backend: str) -> Any:
    model = copy.deepcopy(model)
    for predictor in predictors(model).values():
        predictor.configure(predictor.config.replace(backend=backend))
    return model


# ---- the predictor -------------------------------------------------------------------------------


def predictor_and_operands(
    config: SparsifinerConfig, batch: int = 2, grid: tuple[int, int] = (3, 4), num_prefix: int = 1
) -> tuple[ConnectivityPredictor, Tensor, Tensor]:
    torch.manual_seed(0)
    predictor = ConnectivityPredictor(8, 3, num_prefix, grid, config, dtype=torch.float64)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = num_prefix + grid[0] * grid[1]
    q, k = torch.randn(2, batch, tokens, 3, 8, dtype=torch.float64).unbind(0)
    return predictor, q[:, num_prefix:], k


def by_hand(predictor: ConnectivityPredictor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Coefficients as the public code computes them, in its order."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if predictor.proj_c_q is not None:
        q, k = predictor.proj_c_q(q), predictor.proj_c_k(k)
    return (q @ (k.mT @ predictor.proj_n) * scale).softmax(-1)


@pytest.mark.parametrize(("scale", "factor"), [("heads", 3**-0.5), ("channels", 4**-0.5)])
@torch.no_grad()
def test_coefficients_and_the_map_are_those_of_the_public_code(scale: str, factor: float):
    config = SparsifinerConfig(reduce_n=2, scale=scale)
    predictor, q, k = predictor_and_operands(config)
    expected = by_hand(predictor, q, k, factor)
    assert expected.shape == (2, 3, 12, 6)
    torch.testing.assert_close(predictor.coefficients(q, k), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(predictor.approx(q, k), expected @ predictor.proj_back_n.mT)
    tiles = [predictor.approx(q[:, a : a + 5], k) for a in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(tiles, dim=2), predictor.approx(q, k))


@torch.no_grad()
def test_the_papers_form_has_no_channel_reduction():
    config = SparsifinerConfig(reduce_n=3, reduce_c=1, scale="channels")
    predictor, q, k = predictor_and_operands(config)
    assert {name for name, _ in predictor.named_parameters()} == {"proj_n", "proj_back_n"}
    found = predictor.coefficients(q, k)
    torch.testing.assert_close(found, by_hand(predictor, q, k, 8**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "rule", [{"coef_topk": 2}, {"coef_topk": None}, {"coef_topk": None, "coef_threshold": 0.2}]
)
@torch.no_grad()
def test_columns_are_the_best_of_the_thresholded_map(rule: dict[str, Any], share: bool):
    config = SparsifinerConfig(
        keep_rate=0.3, reduce_n=2, share_inout_proj=share, basis_threshold=0.1, **rule
    )
    predictor, q, k = predictor_and_operands(config)
    assert ("proj_back_n" in dict(predictor.named_parameters())) != share
    coefficients = by_hand(predictor, q, k, 3**-0.5)
    if rule["coef_topk"] is not None:
        best = coefficients.topk(2).indices
        coefficients = torch.zeros_like(coefficients).scatter(
            -1, best, coefficients.gather(-1, best)
        )
    if "coef_threshold" in rule:
        coefficients = coefficients * (coefficients > 0.2)
    up = (predictor.proj_n if share else predictor.proj_back_n).abs()
    basis = (up * (up > 0.1)).mT
    assert torch.equal(predictor.basis(), basis) and 0 < (basis == 0).double().mean() < 0.5
    approx = coefficients @ basis
    index = predictor(q, k)
    assert index.dtype == torch.int32 and index.shape == (2, 3, 12, 4)  # ceil(0.3 * 13)
    expected = approx.argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    enough = ((approx > 0).sum(-1) >= 4).all() or "coef_threshold" in rule
    assert enough
    named = (approx > 0).sum(-1) >= 4  # elsewhere ties at zero decide
    assert torch.equal(index.long()[named], expected[named]) and named.double().mean() > 0.9


@torch.no_grad()
def test_a_threshold_instead_of_a_budget():
    config = SparsifinerConfig(reduce_n=2, mask="threshold", mask_threshold=0.25, coef_topk=3)
    predictor, q, k = predictor_and_operands(config)
    coefficients = predictor.coefficients(q, k)
    best = coefficients.topk(3).indices
    coefficients = torch.zeros_like(coefficients).scatter(-1, best, coefficients.gather(-1, best))
    seen = coefficients @ predictor.basis() > 0.25
    index = predictor(q, k).long()
    assert index.shape[-1] == 13
    found = torch.zeros(2, 3, 12, 14, dtype=torch.bool).scatter(-1, index % 14, True)[..., :13]
    assert torch.equal(found, seen) and 0.1 < seen.double().mean() < 0.9


@pytest.mark.parametrize(
    ("rate", "budget"),
    [(1.0, 197), (0.9, 178), (0.8, 158), (0.7, 138), (0.6, 119), (0.5, 99), (0.4, 79), (0.3, 60),
     (0.25, 50), (0.2, 40), (0.1, 20), (0.05, 10), (0.01, 2)],
)  # fmt: skip
def test_budgets_are_exact(rate: float, budget: int):
    predictor = ConnectivityPredictor(8, 1, 1, (14, 14), SparsifinerConfig(keep_rate=rate))
    assert predictor.budget(197, 196) == budget
    assert predictor.budget(60, 196) == min(budget, 60)  # of the full grid, capped by survivors
    assert predictor.sparse(197) == (rate < 1)
    exact = ConnectivityPredictor(8, 1, 0, (10, 10), SparsifinerConfig(keep_rate=0.07))
    assert exact.budget(100, 100) == 7  # 100 * 0.07 is 7.000000000000001 in floats


def test_the_index_has_no_gradient_and_the_map_has_all():
    predictor, q, k = predictor_and_operands(SparsifinerConfig(reduce_n=3))
    q, k = q.requires_grad_(), k.requires_grad_()
    assert not predictor(q, k).requires_grad
    inputs = (q, k, *predictor.parameters())
    names = [name for name, _ in predictor.named_parameters()]

    def approx(q: Tensor, k: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Approx(predictor), {f"inner.{n}": p for n, p in given.items()}, (q, k)
        )

    assert torch.autograd.gradcheck(approx, inputs)


class Approx(nn.Module):
    def __init__(self, inner: ConnectivityPredictor) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.approx(q, k)


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@torch.no_grad()
def test_removed_and_masked_tokens_take_no_part(num_prefix: int):
    config = SparsifinerConfig(keep_rate=0.2, reduce_n=2)
    predictor, q, k = predictor_and_operands(config, num_prefix=num_prefix)
    left = torch.tensor([[0, 3, 4, 7, 8, 11], [1, 2, 3, 5, 9, 10]])
    keep = torch.zeros(2, 12, dtype=torch.float64).scatter(1, left, 1)
    masked = predictor(q, k, keep=keep)
    prefix = torch.arange(num_prefix).expand(2, -1)
    columns = torch.cat([prefix, left + num_prefix], dim=1)
    some = columns[..., None, None]
    compacted = predictor(
        q.take_along_dim(left[..., None, None], 1), k.take_along_dim(some, 1), columns,
        num_patches=12,
    )  # fmt: skip
    back = columns[:, None, None].expand(-1, 3, 6, -1).gather(-1, compacted.long())
    rows = masked.long().take_along_dim(left[:, None, :, None], 2)
    assert torch.equal(rows, back)
    # A token that stands nowhere is last but for ties, and changes nothing about the others.
    nowhere = torch.full((2, 1), num_prefix + 12)
    longer = torch.cat([columns[:, :num_prefix], nowhere, columns[:, num_prefix:]], dim=1)
    keys = k.take_along_dim(columns[..., None, None], 1)
    keys = torch.cat([keys[:, :num_prefix], keys[:, :1] + 1, keys[:, num_prefix:]], dim=1)
    fused = predictor(
        q.take_along_dim(left[..., None, None], 1), keys, longer, num_patches=12
    ).long()
    assert (fused != num_prefix).all()
    assert torch.equal(fused - (fused > num_prefix).long(), compacted.long())


# ---- other grids ---------------------------------------------------------------------------------


@torch.no_grad()
def test_another_grid_resamples_the_rows_of_patches():
    predictor, _, _ = predictor_and_operands(SparsifinerConfig(reduce_n=3), num_prefix=2)
    same = predictor.weights(12)
    assert same[0] is predictor.proj_n and same[1] is predictor.proj_back_n
    down, up = predictor.weights(48)  # 6 x 8
    assert down.shape == up.shape == (50, 4)
    assert torch.equal(down[:2], predictor.proj_n[:2])
    assert torch.equal(up[:2], predictor.proj_back_n[:2])
    # Where a row of patches ramps, so does the larger one; sums keep their size.
    predictor.proj_n[2:] = torch.arange(12.0).reshape(3, 4).double().flatten()[:, None] % 4
    predictor.proj_back_n[2:] = predictor.proj_n[2:]
    down, up = predictor.weights(48)
    ramp = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], dtype=torch.float64)
    torch.testing.assert_close(up[2:, 0].reshape(6, 8), ramp.expand(6, -1))
    torch.testing.assert_close(down[2:] * 4, up[2:])
    torch.testing.assert_close(down[2:].sum(0), predictor.proj_n[2:].sum(0))


def test_grids_in_doubt_are_asked_about():
    predictor, _, _ = predictor_and_operands(SparsifinerConfig(reduce_n=3), grid=(4, 4))
    assert predictor.weights(36)[0].shape == (37, 5)
    with pytest.raises(ValueError, match=r"\(4, 8\) or \(8, 4\).*set_grid"):
        predictor.weights(32)
    model = sparse()
    wide = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    model.set_input_size(img_size=(64, 128))
    with pytest.raises(ValueError, match="set_grid"):
        model(wide)
    assert set_grid(model, (4, 8))(wide).shape == (2, 7)


@pytest.mark.parametrize("variant", ["class token", "EVA-02", "NaFlex, rotary", "LV-ViT"])
@torch.no_grad()
def test_other_image_sizes(variant: str):
    model = sparse(variant)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=6 * model.patch_embed.patch_size[0])
        x = picture(model)
    else:
        x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    keys, shapes = list(model.state_dict()), model.blocks[0].attn.connectivity.proj_n.shape
    out = model(x)
    torch.testing.assert_close(with_backend(model, "dense")(x), out, rtol=0, atol=1e-10)
    assert list(model.state_dict()) == keys
    assert model.blocks[0].attn.connectivity.proj_n.shape == shapes  # as loaded, as saved
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    out = model(x, aux=True)
    assert out.index[0].shape[1] == 21
    masked = masking(model)(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_keep_rate_1_is_bit_exact_and_restore_undoes(variant: str):
    model = make(variant, torch.float32)
    x = picture(model)
    expected, features = model(x), model.forward_features(x)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    assert spot_vit.sparsify_attention(model, 1.0) is model
    assert torch.equal(model(x), expected)
    assert torch.equal(model.forward_features(x), features)
    assert [key for key in model.state_dict() if ".connectivity." not in key] == keys
    spot_vit.set_keep(model, attention=0.3)
    assert not torch.equal(model(x), expected)
    spot_vit.sparsify(spot_vit.set_keep(model, attention=1.0), keep=1.0, at=[1, 2, 3])
    assert torch.equal(model(x), expected)
    spot_vit.restore(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    assert not hasattr(model, "sparsifiner_config") and not hasattr(model, "spot_config")


@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_backends_give_one_result(variant: str):
    model = sparse(variant, backend="sparse")
    x = picture(model)
    out = model(x)
    dense = with_backend(model, "dense")
    torch.testing.assert_close(dense(x), out, rtol=0, atol=1e-10)
    torch.testing.assert_close(with_backend(model, "auto")(x), out, rtol=0, atol=1e-10)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])  # with statistics
    dense = with_backend(model, "dense")
    expected = model(x, aux=True)
    found = dense(x, aux=True)
    assert all(torch.equal(a, b) for a, b in zip(found.index, expected.index, strict=True))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
    masked = masking(dense)(x, kept=expected.index)
    torch.testing.assert_close(masked, masking(model)(x, kept=expected.index), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", FAMILIES)
def test_backends_agree_where_a_query_names_nothing(variant: str):
    """A threshold may leave a query without keys; statistics, masks and gradients included."""
    model = sparse(variant, backend="sparse", mask="threshold", mask_threshold=0.45)
    empty: list[float] = []
    for predictor in predictors(model).values():
        predictor.register_forward_hook(
            lambda _, inputs, index: empty.append((index < 0).all(-1).double().mean().item())
        )
    x = picture(model)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(with_backend(model, "dense")(x), out, rtol=0, atol=1e-10)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    dense = with_backend(model, "dense")
    with torch.no_grad():
        expected, found = model(x, aux=True), dense(x, aux=True)
    assert all(torch.equal(a, b) for a, b in zip(found.index, expected.index, strict=True))
    torch.testing.assert_close(found.logp, expected.logp, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
    grads = []
    for each in (model, dense):
        logits = masking(each)(x, kept=expected.index)
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-10)
        logits.square().sum().backward()
        grads.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 20
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-9)
    some = [share for share in empty if 0 < share < 1]
    assert len(some) > len(empty) / 2


class Named:
    """In place of a predictor: names what it was told to."""

    def __init__(self, index: Tensor, backend: str) -> None:
        self.index, self.chosen = index, backend

    def __call__(self, *args: Any) -> Tensor:
        return self.index

    def backend(self, q: Tensor, num_named: int) -> str:
        return self.chosen

    def names_some(self, keep: Tensor | None) -> bool:
        return False


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("want", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_any_index_means_the_same_to_both_backends(
    num_prefix: int, want: bool, masked: bool, class_token: bool
):
    """Full, padded and empty rows: output, statistics, and gradients of q, k, v and the mask."""
    if class_token and num_prefix == 0:
        return
    generator = torch.Generator().manual_seed(num_prefix)
    tokens = num_prefix + 12
    qkv = torch.randn(3, 2, tokens, 3, 8, dtype=torch.float64, generator=generator)
    keep = (torch.rand(2, 12, generator=generator) < 0.7).double() if masked else None
    index = torch.rand(2, 3, 12, tokens, generator=generator).argsort(-1)[..., :5].int()
    if keep is not None:  # as a predictor: columns that are hidden are not named
        kept = torch.cat([keep.new_ones(2, num_prefix), keep], dim=1) > 0
        shown = kept[:, None, None].expand(2, 3, 12, -1).gather(-1, index.long())
        index = index.masked_fill(~shown, -1).sort(-1, descending=True).values
    length = torch.randint(0, 6, (2, 3, 12, 1), generator=generator)
    length[0, 0, 3], length[1, :, 7] = 0, 0
    index = index.masked_fill(torch.arange(5) >= length, -1)
    pulls = [torch.randn(2, tokens, 3, size, dtype=torch.float64, generator=generator)
             for size in (8, 6)]  # fmt: skip
    results = []
    for backend in ("sparse", "dense"):
        leaves = [x.clone().requires_grad_() for x in (*qkv, *([keep] if masked else []))]
        look = Look(num_prefix, class_token, None, leaves[3] if masked else None, want)
        out, stats = attend_to_named(*leaves[:3], look, 0.4, Named(index, backend), want)
        sent = pulls if want else pulls[:1]
        given = [out, stats] if want else [out]
        grads = torch.autograd.grad(given, leaves, sent)
        results.append([out, stats, *grads])
        assert not out[0, num_prefix + 3, 0].any() and not out[1, num_prefix + 7].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_names_some_is_what_it_says():
    nobody = torch.zeros(2, 12, dtype=torch.float64)
    for num_prefix in (0, 1):
        for mask in ("topk", "threshold"):
            config = SparsifinerConfig(mask=mask, mask_threshold=9.0, keep_rate=0.01, reduce_n=2)
            predictor, q, k = predictor_and_operands(config, num_prefix=num_prefix)
            for keep in (None, nobody):
                named = (predictor(q, k, keep=keep) >= 0).any(dim=-1).all().item()
                assert predictor.names_some(keep) == named


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_gradients_do_not_depend_on_the_backend(backend: str):
    grads = []
    for which in ("sparse", backend):
        model = spot_vit.sparsify(sparse(backend=which), keep=0.6, at=[1, 2]).train()
        x = picture(model)
        index = [torch.arange(9).expand(3, -1), torch.arange(5).expand(3, -1)]
        model(x, kept=index).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-9, msg=name)
    assert not any(".connectivity." in name for name in grads[0])
    assert any(".attn.qkv." in name for name in grads[0])


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@torch.no_grad()
def test_queries_see_what_is_named_and_prefix_queries_see_all(backend: str):
    model = sparse("registers, LayerScale", 0.25, backend=backend)
    attention, predictor = model.blocks[1].attn, model.blocks[1].attn.connectivity
    x = torch.randn(2, 21, 48, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 16)).unbind(2)
    index = predictor(q[:, 5:], k).long()
    assert index.shape == (2, 3, 16, 6)  # ceil(0.25 * 21)
    seen = torch.ones(2, 3, 21, 21, dtype=torch.bool)
    seen[:, :, 5:] = torch.zeros(2, 3, 16, 21, dtype=torch.bool).scatter(-1, index, True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = attention.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)
    with dense_attention(model):
        dense = attention(x)
    torch.testing.assert_close(dense[:, :5], expected[:, :5], rtol=0, atol=1e-12)
    assert (dense[:, 5:] - expected[:, 5:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("mask", ["topk", "threshold"])
@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_masked_training_equals_compacted_inference(variant: str, soft: str | None, mask: str):
    threshold = {"mask": "threshold", "mask_threshold": 0.3} if mask == "threshold" else {}
    model = sparse(variant, 0.3, **threshold)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3], soft=soft)
    x = picture(model)
    out = model(x, aux=True)
    given = model(x, kept=out.index)
    torch.testing.assert_close(given, out.logits, rtol=0, atol=1e-10)
    with dense_attention(model):
        assert (model(x, kept=out.index) - out.logits).abs().max() > 1e-6
    masked = masking(model)(x, kept=out.index, aux=True)
    if variant == "no pooling":  # all tokens come back: compare the survivors
        prefix = model.num_prefix_tokens
        rows = torch.cat([torch.arange(prefix).expand(3, -1), out.index[-1] + prefix], dim=1)
        front = masked.logits.shape[1] - 16
        if soft is None:
            masked.logits = masked.logits.gather(1, rows[..., None].expand(-1, -1, 7))
        assert front == prefix
    if variant != "no pooling" or soft is None:
        torch.testing.assert_close(masked.logits, out.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit", "random"])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
@torch.no_grad()
def test_every_method_of_token_removal_works_on_top(method: str, backend: str):
    model = sparse(keep_rate=0.5, backend=backend)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3], method=method)
    x = picture(model)
    out = model(x, aux=True)
    model.train()
    masked = model(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_budget_is_of_the_full_grid_and_capped_by_the_survivors():
    model = spot_vit.sparsify(sparse(keep_rate=0.4), keep=[0.7, 0.2], at=[1, 3])
    shapes: dict[int, list[int]] = {}
    for b, predictor in predictors(model).items():
        predictor.register_forward_hook(
            lambda _, inputs, index, b=b: shapes.update({b: list(index.shape[2:])})
        )
    model(picture(model))
    # ceil(0.4 * 17) = 7 of 17, of 12, and all of the 4 that are left: no predictor is asked.
    assert shapes == {0: [16, 7], 1: [11, 7], 2: [11, 7]}


@torch.no_grad()
def test_statistics_are_those_of_the_sparse_map():
    model = sparse(keep_rate=0.3)
    spot_vit.sparsify(model, keep=0.6, at=[2], features=["cls", "rowcol"])
    x = picture(model)
    out = model(x, aux=True)
    with record_operands(model) as operands:
        model(x)
    q, k, scale, prefix = operands[1]
    seen = torch.ones(3, 3, 17, 17, dtype=torch.bool)
    index = model.blocks[1].attn.connectivity(q[:, prefix:], k).long()
    seen[:, :, 1:] = torch.zeros(3, 3, 16, 17, dtype=torch.bool).scatter(-1, index, True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    map_ = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    patches = map_[:, :, 1:, 1:]
    parts = [map_[:, :, 0, 1:], map_[:, :, 1:, 0]]
    for dim in (-1, -2):
        parts += [patches.mean(dim), patches.var(dim, correction=0)]
    stats = torch.stack(parts, dim=-1).transpose(1, 2)
    scaled = (stats * torch.tensor([16.0, 16, 16, 256, 16, 256]).double()).log1p().flatten(2)
    logp = model.blocks[2].relevance(torch.empty(3, 16, 48).double(), scaled, None)
    torch.testing.assert_close(logp, out.logp[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("decision", ["gumbel", "topk"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_training_reaches_every_parameter_but_the_predictors(variant: str, decision: str):
    model = sparse(variant, dtype=torch.float32)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3], train_decision=decision).train()
    out = model(picture(model, 8), aux=True)
    loss = out.logits.square().mean() + sum((m.mean() - 0.3) ** 2 for m in out.masks)
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".connectivity." in name:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_set_keep_of_tokens_and_attention():
    model = sparse(keep_rate=1.0)
    x = picture(model)
    dense = model(x)
    spot_vit.sparsify(model, keep=1.0, at=[1, 2, 3])
    assert spot_vit.set_keep(model, tokens=0.7, attention=0.25) is model
    assert (model.spot_config.keep, model.sparsifiner_config.keep_rate) == (0.7, 0.25)
    both = model(x)
    fresh = spot_vit.sparsify(sparse(keep_rate=0.25), keep=0.7, at=[1, 2, 3])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), both)
    spot_vit.set_keep(model, 1.0, attention=1)
    assert torch.equal(model(x), dense)
    spot_vit.set_keep(model, attention=0.25)
    assert model.spot_config.keep == 1.0 and not torch.equal(model(x), dense)
    for wrong in ({"tokens": [0.9, 0.5]}, {"tokens": 1.5}, {"tokens": {"gmacs": 9.0}}):
        with pytest.raises(ValueError):
            spot_vit.set_keep(model, attention=0.5, **wrong)
        assert model.sparsifiner_config.keep_rate == 0.25 == predictors(model)[0].config.keep_rate
    with pytest.raises(ValueError, match="keep_rate must be in"):
        spot_vit.set_keep(model, tokens=0.5, attention=0)
    assert model.spot_config.keep == 1.0
    with pytest.raises(TypeError, match=r"tokens=\.\.\. or"):
        spot_vit.set_keep(model)
    with pytest.raises(TypeError, match="two names"):
        spot_vit.set_keep(model, 0.5, tokens=0.5)


def test_a_budget_counts_sparse_attention():
    model = spot_vit.sparsify_attention(make(img_size=160), 0.1)
    spot_vit.sparsify(model, at=[1, 2, 3], keep={"gmacs": 0.015})
    assert 0.0145 < spot_vit.count_flops(model, (3, 160, 160)).total / 1e9 <= 0.015
    first = model.spot_config.keep
    spot_vit.set_keep(model, {"gmacs": 0.015}, attention=1.0)
    assert model.spot_config.keep < first


def test_some_blocks():
    model = sparse(blocks=[1, 3])
    assert sorted(predictors(model)) == [1, 3] and model.sparsifiner_config.blocks == (1, 3)
    calls = []
    for predictor in predictors(model).values():
        predictor.register_forward_hook(lambda *_: calls.append(1))
    x = picture(model)
    with torch.no_grad():
        model(x)
        assert len(calls) == 2
        spot_vit.sparsify(model, keep=0.6, at=[1, 2])
        out = model(x, aux=True)
        masked = model.train()(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)
    spot_vit.restore(model)
    with pytest.raises(ValueError, match="block 7, the model has 5"):
        spot_vit.sparsify_attention(model, blocks=[2, 7])


@torch.no_grad()
def test_either_order_of_conversion():
    x = picture(make())
    one = spot_vit.sparsify(sparse(), keep=0.6, at=[1, 2], features=["embed"])
    other = spot_vit.sparsify(make(), keep=0.6, at=[1, 2], features=["embed"])
    spot_vit.sparsify_attention(other, 0.4)
    assert set(other.state_dict()) == set(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
    assert [type(m) for m in other.modules()] == [type(m) for m in one.modules()]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", BIASED)
def test_a_bias_is_refused(variant: str):
    model = make(variant)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        spot_vit.UnsupportedModelError, match=r"beit.Attention.*timm.*bias is added"
    ):
        spot_vit.sparsify_attention(model)
    assert [type(m) for m in model.modules()] == classes
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    with pytest.raises(spot_vit.UnsupportedModelError, match=r"blocks.0.attn.*bias is added"):
        spot_vit.sparsify_attention(model)


def test_others_are_refused_with_class_and_version():
    with pytest.raises(spot_vit.UnsupportedModelError, match=r"SwinTransformer \(timm "):
        spot_vit.sparsify_attention(timm.create_model("swin_tiny_patch4_window7_224"))
    with pytest.raises(spot_vit.UnsupportedModelError, match="attention dropout"):
        spot_vit.sparsify_attention(make(attn_drop_rate=0.1))
    with pytest.raises(spot_vit.UnsupportedModelError, match="patch_drop_rate"):
        spot_vit.sparsify_attention(make(patch_drop_rate=0.1))
    model = sparse()
    with pytest.raises(TypeError, match="sparse already"):
        spot_vit.sparsify_attention(model)
    with pytest.raises(TypeError, match=r"no \['keep'\]"):
        spot_vit.sparsify_attention(make(), keep=0.5)
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.set_keep(model, 0.5)
    with pytest.raises(TypeError, match="attention of this model is not sparse"):
        spot_vit.set_keep(spot_vit.sparsify(make()), attention=0.5)
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.restore(make())
    with pytest.raises(ValueError, match="reduce_n=18 leaves none of 17 tokens"):
        spot_vit.sparsify_attention(make(), reduce_n=18)
    with pytest.raises(ValueError, match="reduce_c=17 leaves none of 16 channels"):
        spot_vit.sparsify_attention(make(), reduce_c=17)
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        model(picture(model), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal is not supported"):
        model(picture(model), is_causal=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep_rate": 0}, "keep_rate must be in"),
        ({"keep_rate": True}, "keep_rate must be in"),
        ({"keep_rate": float("nan")}, "keep_rate must be in"),
        ({"reduce_n": 0}, "reduce_n must be a positive int"),
        ({"reduce_c": 1.5}, "reduce_c must be a positive int"),
        ({"coef_topk": 0}, "coef_topk must be a positive int"),
        ({"coef_threshold": 0.05}, "set coef_topk=None"),
        ({"basis_threshold": -1.0}, "basis_threshold must not be negative"),
        ({"mask_threshold": float("nan")}, "mask_threshold must not be negative"),
        ({"scale": "sqrt"}, "scale must be one of"),
        ({"mask": "best"}, "mask must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"blocks": []}, "non-empty"),
        ({"blocks": [2, 1]}, "ascend"),
        ({"blocks": [1.0]}, "block indices"),
    ],
)
def test_configurations_are_checked(wrong: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        SparsifinerConfig().replace(**wrong)


def test_configurations_go_through_json():
    config = SparsifinerConfig(
        keep_rate=0.1, reduce_n=4, reduce_c=1, share_inout_proj=True, scale="channels",
        coef_topk=None, coef_threshold=0.05, basis_threshold=0.0, mask="threshold",
        mask_threshold=0.5, blocks=[1, 4], backend="dense",
    )  # fmt: skip
    assert config.blocks == (1, 4)
    assert SparsifinerConfig.from_json(config.to_json()) == config
    assert SparsifinerConfig.from_dict(json.loads(config.to_json())) == config
    assert SparsifinerConfig.from_json("{}") == SparsifinerConfig()
    with pytest.raises(TypeError, match=r"SparsifinerConfig has no \['rate'\]"):
        SparsifinerConfig.from_dict({"rate": 1})


# ---- the life of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_object_life(variant: str):
    model = spot_vit.sparsify(sparse(variant), keep=0.6, at=[1, 2, 3])
    x = picture(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert other.sparsifiner_config == model.sparsifiner_config
    ema = ModelEmaV3(model, decay=0.9)
    ema.update(model)
    assert torch.equal(ema.module(x), expected)
    calls = []
    modules = [model.blocks[0].attn, model.blocks[0].attn.connectivity]
    handles = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in modules]
    model(x)
    for handle in handles:
        handle.remove()
    assert calls == modules[::-1]


@pytest.mark.parametrize("spot", [False, True])
def test_checkpointing_changes_no_gradient(spot: bool):
    grads = []
    for checkpointing in (False, True):
        model = sparse()
        if spot:
            spot_vit.sparsify(model, keep=0.6, at=[1, 2], train_decision="topk")
        model.train().set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(picture(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
def test_feature_extractors_and_reset_classifier():
    name, arguments = VARIANTS["EVA-02"]
    extractor = timm.create_model(name, features_only=True, **arguments).eval()
    x = torch.randn(2, 3, 56, 56)
    dense = extractor(x)
    spot_vit.sparsify_attention(extractor.model, 0.3)
    maps = extractor(x)
    assert [m.shape for m in maps] == [m.shape for m in dense]
    assert not torch.equal(maps[-1], dense[-1])
    model = sparse("LV-ViT")
    model.reset_classifier(4)
    assert model(picture(model)).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(dtype: torch.dtype):
    model = sparse(keep_rate=0.5, dtype=torch.float32)
    x = picture(model)
    expected = model(x)
    spread = expected.std()
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert (out.float() - expected).abs().max() < spread
    half = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half.float() - expected).abs().max() < spread


# ---- what training needs -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_dense_attention_switches_sparsity_off(variant: str):
    model = make(variant, torch.float32)
    x = picture(model)
    expected = model(x)
    spot_vit.sparsify_attention(model, 0.3)
    different = model(x)
    with dense_attention(model) as same:
        assert same is model and torch.equal(model(x), expected)
        with dense_attention(model):
            pass
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), different) and not torch.equal(different, expected)
    with pytest.raises(ZeroDivisionError), dense_attention(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), different)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_operands_are_what_timm_attends_with(
    variant: str, convert: bool, monkeypatch: pytest.MonkeyPatch
):
    model = make(variant)  # a teacher needs no conversion
    x = picture(model)
    calls, original = [], nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *args: Any, **arguments: Any) -> Tensor:
        calls.append((q, k, arguments.get("scale") or q.shape[-1] ** -0.5))
        return original(q, k, *args, **arguments)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    expected = model(x)
    monkeypatch.undo()
    if convert:
        spot_vit.sparsify_attention(model, 0.3)
    classes = [type(m) for m in model.modules()]
    with record_operands(model) as operands, dense_attention(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert [type(m) for m in model.modules()] == classes
    assert sorted(operands) == list(range(len(model.blocks)))
    for (q, k, scale), found in zip(calls, operands.values(), strict=False):
        torch.testing.assert_close(found.q.transpose(1, 2), q, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.k.transpose(1, 2), k, rtol=0, atol=1e-10)
        assert found.scale == pytest.approx(scale)
        assert found.num_prefix == model.num_prefix_tokens


def test_operands_carry_gradients_and_follow_a_second_run():
    model = sparse().train()
    model.set_grad_checkpointing(True)
    with record_operands(model) as operands, dense_attention(model):
        out = model(picture(model))
        q, k, _, prefix = operands[2]
        approx = model.blocks[2].attn.connectivity.approx(q.detach()[:, prefix:], k.detach())
        (approx.square().sum() + out.sum()).backward()
    assert approx.shape == (3, 3, 16, 17)
    assert all(p.grad is not None for p in model.blocks[2].attn.connectivity.parameters())
    assert all(p.grad is None for p in model.blocks[1].attn.connectivity.parameters())
    model.zero_grad()
    with record_operands(model) as operands, dense_attention(model):
        model.set_grad_checkpointing(False)
        model(picture(model))
    operands[2].q.sum().backward()
    assert model.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
    with torch.no_grad(), record_operands(model) as operands:
        model(picture(model))
    assert not operands[2].q.requires_grad


def test_predictors_train_at_their_own_rate():
    model = spot_vit.sparsify(sparse(), at=[1, 2])
    groups = {group["name"]: group for group in spot_vit.param_groups(model, lr=1e-3)}
    own = {id(p) for predictor in predictors(model).values() for p in predictor.parameters()}
    backbone = {id(p) for name in groups if "backbone" in name for p in groups[name]["params"]}
    predictor = {id(p) for name in groups if "predictor" in name for p in groups[name]["params"]}
    assert own <= predictor and not own & backbone


# ---- compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "LV-ViT"])
@torch.no_grad()
def test_inference_compiles_in_one_graph(variant: str, backend: str):
    torch._dynamo.reset()
    model = sparse(variant, dtype=torch.float32, backend=backend)
    x = picture(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rate in (0.3, 0.5, 1.0, 0.5, 0.3, 1.0):
        spot_vit.set_keep(model, attention=rate)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3
    spot_vit.sparsify(spot_vit.set_keep(model, attention=0.3), keep=0.6, at=[1, 2])
    torch._dynamo.reset()
    inductor = variant == "class token"  # minutes for all
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["class token", "EVA-02", "LV-ViT"])
def test_training_compiles_in_one_graph(variant: str):
    torch._dynamo.reset()
    model = sparse(variant, dtype=torch.float32)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2]).train()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        out = compiled(picture(model, seed=seed), aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
    assert backend.frame_count == 1
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".connectivity." in name), name


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "LV-ViT"])
def test_export_with_a_dynamic_batch(variant: str, spot: bool):
    model = sparse(variant, dtype=torch.float32)
    if spot:
        spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (picture(model),), dynamic_shapes=({0: batch},))
    x = picture(model, 9, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@torch.no_grad()
def test_other_image_sizes_compile():
    torch._dynamo.reset()
    model = make(dtype=torch.float32, dynamic_img_size=True)
    spot_vit.sparsify_attention(model, 0.3)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for side in (64, 96):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


# ---- names ---------------------------------------------------------------------------------------


def test_named_models():
    with torch.device("meta"):
        one = timm.create_model("sparsifiner_deit_small_patch16_224", keep_rate=0.1, reduce_n=8)
        other = timm.create_model("sparsifiner_lvvit_small", num_classes=10)
        both = timm.create_model("spot_sparsifiner_deit_small_patch16_224", keep=0.5, keep_rate=0.5)
    assert one.sparsifiner_config.keep_rate == 0.1 and not hasattr(one, "spot_config")
    assert one.blocks[11].attn.connectivity.proj_n.shape == (197, 24)
    assert other.sparsifiner_config.keep_rate == 0.25 and other.num_classes == 10
    assert len(predictors(other)) == 16
    assert (both.spot_config.keep, both.sparsifiner_config.keep_rate) == (0.5, 0.5)
    with pytest.raises(
        RuntimeError, match=r"sparsify_attention on timm.create_model\('lvvit_small"
    ):
        timm.create_model("sparsifiner_lvvit_small", pretrained=True)
