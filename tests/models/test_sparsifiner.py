"""Sparsifiner attention in converted models, alone and together with SPOT."""

from __future__ import annotations

import pytest
import spot_vit
import timm
import torch
from spot_vit.models.recording import record_operands
from spot_vit.models.sparsifiner import dense_attention, predictors
from spot_vit.nn.attention import AttentionRequest, attend_to_named
from support.sparsifiner import (
    EVERY,
    FAMILIES,
    Named,
    make,
    masking,
    picture,
    sparse,
    with_backend,
)


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
        request = AttentionRequest(
            num_prefix, class_token, None, leaves[3] if masked else None, want
        )
        out, stats = attend_to_named(*leaves[:3], request, 0.4, Named(index, backend), want)
        sent = pulls if want else pulls[:1]
        given = [out, stats] if want else [out]
        grads = torch.autograd.grad(given, leaves, sent)
        results.append([out, stats, *grads])
        assert not out[0, num_prefix + 3, 0].any() and not out[1, num_prefix + 7].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


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
        # Added to all scores, or to all logits of a query, it changes no top k and no softmax.
        unseen = name.endswith("k_proj.bias") or (decision == "topk" and name.endswith("fc3.bias"))
        if not unseen:
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
    for wrong in ({"tokens": [0.9, 0.5]}, {"tokens": 1.5}, {"tokens": {"gmacs": 1e-9}}):
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
