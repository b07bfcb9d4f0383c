"""Converted timm Vision Transformers."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import spot_vit
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spot_vit.models.adapters.find import BLOCKS
from spot_vit.utils.places import PLACES
from support.models import FAMILIES, VARIANTS, build, images
from timm.utils import ModelEmaV3
from torch import Tensor, nn


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_keep_1_is_bit_exact_and_the_loop_with_statistics_is_close(variant: str):
    model = build(variant)
    x = images(model)
    expected, features = model(x), model.forward_features(x)
    keys = list(model.state_dict())
    spot_vit.sparsify(model, keep=1.0, at=[1, 2, 3])
    assert torch.equal(model(x), expected)
    assert torch.equal(model.forward_features(x), features)
    assert [key for key in model.state_dict() if ".relevance." not in key] == keys
    out = model(x, aux=True)  # every decision runs, with statistics; nothing is cut
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    assert [mask.mean().item() for mask in out.masks] == [1, 1, 1]
    spot_vit.restore(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_training_equals_compacted_inference(variant: str):
    model = spot_vit.sparsify(build(variant, torch.float64), keep=0.6, at=[1, 2, 3])
    x = images(model)
    out = model(x, aux=True)
    assert torch.equal(model(x), out.logits)
    given = model(x, kept=out.index)
    torch.testing.assert_close(given, out.logits, rtol=0, atol=1e-10)
    model.train()
    masked = model(x, kept=out.index, aux=True)
    if variant == "no pooling":  # all tokens come back: compare the survivors
        prefix = model.num_prefix_tokens
        rows = torch.cat([torch.arange(prefix).expand(len(x), -1), out.index[-1] + prefix], dim=1)
        masked.logits = masked.logits.gather(1, rows[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(masked.logits, out.logits, rtol=0, atol=1e-10)
    for mask, other in zip(masked.masks, out.masks, strict=True):
        assert torch.equal(mask, other)


@settings(max_examples=15)
@given(
    keep=st.sampled_from([0.4, 0.5, 0.7, 0.95, (0.9, 0.9, 0.2)]),
    features=st.sets(st.sampled_from(["embed", "cls", "rowcol", "moments"]), min_size=1),
    history=st.sampled_from(["all", "since_last", 2]),
    heads=st.sampled_from(["concat", "mean"]),
    seed=st.integers(0, 99),
)
def test_any_configuration_is_consistent(keep, features, history, heads, seed):
    model = build(dtype=torch.float64)
    names = sorted(features)
    spot_vit.sparsify(model, at=[1, 3, 4], keep=keep, features=names, history=history, heads=heads)
    x = images(model, seed=seed)
    with torch.no_grad():
        out = model(x, aux=True)
        # Without aux a stage that cuts nothing is skipped, and with it some statistics.
        torch.testing.assert_close(model(x), out.logits, rtol=0, atol=1e-10)
    counts = [16 * r.numerator // r.denominator for r in model.spot_config.ratios(3)]
    assert [index.shape[1] for index in out.index] == counts
    alive = torch.ones(len(x), 16)
    for index, mask, logp in zip(out.index, out.masks, out.logp, strict=True):
        assert (index[:, 1:] > index[:, :-1]).all()
        assert torch.equal(mask, torch.zeros_like(mask).scatter(1, index, 1))
        assert (mask <= alive).all()
        assert logp.shape == (len(x), int(alive[0].sum()), 2)
        alive = mask
    model.train()
    with torch.no_grad():
        masked = model(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


def test_decisions_pick_the_highest_scores():
    model = spot_vit.sparsify(build(), keep=0.5, at=[1, 2])
    with torch.no_grad():
        out = model(images(model), aux=True)
    chosen = out.logp[0][..., 0].topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(out.index[0], chosen)
    second = out.logp[1][..., 0].topk(4, dim=1).indices.sort(dim=1).values
    assert torch.equal(out.index[1], out.index[0].gather(1, second))


@pytest.mark.parametrize("decision", ["gumbel", "topk"])
@pytest.mark.parametrize("variant", ["class token", "avg", "map pooling (SigLIP)", *FAMILIES])
def test_training_reaches_every_parameter(variant: str, decision: str):
    model = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3], train_decision=decision)
    model.train()
    out = model(images(model, 8), aux=True)
    loss = out.logits.square().mean() + sum((m.mean() - 0.3) ** 2 for m in out.masks)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().sum() > 0, name
    assert [len(out.masks), len(out.logp), len(out.index)] == [3, 3, 0]
    assert out.tokens.shape == (8, model.num_prefix_tokens + 16, 48)
    for sooner, later in zip(out.masks, out.masks[1:], strict=False):
        assert (later <= sooner).all()
    if decision == "topk":
        assert [int(mask[0].sum()) for mask in out.masks] == [9, 5, 3]


def test_a_training_step_lowers_the_loss():
    model = spot_vit.sparsify(build(), keep=0.7, at=[1, 2]).train()
    groups = spot_vit.param_groups(model, lr=3e-3, backbone_lr_scale=1.0, freeze_epochs=0)
    optimizer = torch.optim.AdamW(groups)
    x, target = images(model, 16), torch.arange(16) % 7
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_param_groups_follow_the_recipe():
    model = spot_vit.sparsify(build(), at=[1, 2, 3])
    groups = {
        group["name"]: group for group in spot_vit.param_groups(model, lr=1e-3, head="pretrained")
    }
    assert set(groups) == {"predictor", "predictor_no_decay", "backbone", "backbone_no_decay"}
    assert groups["backbone"]["lr"] == pytest.approx(1e-5)
    assert groups["backbone"]["freeze_epochs"] == 5
    assert groups["predictor"]["lr"] == 1e-3 and groups["predictor"]["freeze_epochs"] == 0
    assert groups["predictor_no_decay"]["weight_decay"] == 0
    in_groups = {id(p) for group in groups.values() for p in group["params"]}
    out = {name for name, p in model.named_parameters() if id(p) not in in_groups}
    assert out == {"cls_token", "pos_embed"}


@torch.no_grad()
def test_set_keep_and_set_back():
    model = spot_vit.sparsify(build(), keep=1.0, at=[1, 2, 3])
    x = images(model)
    dense = model(x)
    spot_vit.set_keep(model, 0.5)
    assert model.forward_features(x).shape[1] == 1 + 2
    spot_vit.set_keep(model, [0.9, 0.6, 0.5])
    assert model.forward_features(x).shape[1] == 1 + 8
    spot_vit.set_keep(model, 1.0)
    assert torch.equal(model(x), dense)
    with pytest.raises(ValueError, match="2 stages"):
        spot_vit.set_keep(model, [0.9, 0.6])


@pytest.mark.parametrize("variant", ["class token", *FAMILIES])
@torch.no_grad()
def test_object_life(variant: str):
    model = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3])
    x = images(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert other.spot_config == model.spot_config
    ema = ModelEmaV3(model, decay=0.9)
    ema.update(model)
    assert torch.equal(ema.module(x), expected)
    fresh = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    calls = []
    handle = model.blocks[2].attn.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    handle.remove()
    assert calls == [1]


@torch.no_grad()
def test_intermediates_are_dense_and_keep_last_values():
    dense = build()
    x = images(dense)
    expected_final, expected = dense.forward_intermediates(x, norm=False)
    model = spot_vit.sparsify(build(), keep=1.0, at=[1, 3])
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, expected_final)
    for found, other in zip(maps, expected, strict=True):
        assert torch.equal(found, other)

    spot_vit.set_keep(model, 0.5)
    out = model(x, aux=True)
    final, maps = model.forward_intermediates(x, output_fmt="NLC", norm=False)
    assert final.shape[1] == 1 + 4 and torch.equal(final, out.tokens)
    assert [tuple(m.shape) for m in maps] == [(3, 16, 48)] * 5
    gone = out.masks[0] == 0
    torch.testing.assert_close(
        maps[0], expected[0].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )
    for later in maps[1:]:
        torch.testing.assert_close(later[gone], maps[0][gone])
        assert not torch.equal(later[~gone], maps[0][~gone])
    gone_later = (out.masks[1] == 0) & ~gone
    torch.testing.assert_close(maps[4][gone_later], maps[2][gone_later])
    torch.testing.assert_close(
        model.norm(maps[4]).gather(1, out.index[-1][..., None].expand(-1, -1, 48)),
        final[:, 1:],
    )


@torch.no_grad()
@pytest.mark.parametrize("arguments", [
    {}, {"indices": 2}, {"indices": [0, 3], "return_prefix_tokens": True},
    {"output_fmt": "NLC", "stop_early": True, "indices": [1]},
    {"output_dict": True, "return_prefix_tokens": True, "norm": True},
    {"intermediates_only": True, "indices": 1},
])  # fmt: skip
def test_intermediates_take_timm_arguments(arguments: dict[str, Any]):
    dense = build("registers, LayerScale")
    x = images(dense)
    expected = dense.forward_intermediates(x, **arguments)
    model = spot_vit.sparsify(dense, keep=1.0, at=[1, 2])
    found = model.forward_intermediates(x, **arguments)
    flat, tree = torch.utils._pytree.tree_flatten(expected)
    other, other_tree = torch.utils._pytree.tree_flatten(found)
    assert tree == other_tree
    assert all(torch.equal(a, b) for a, b in zip(flat, other, strict=True))


@pytest.mark.parametrize("variant", ["class token", *FAMILIES])
def test_timm_interfaces_keep_working(variant: str):
    model = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3])
    assert set(spot_vit.restore(copy.deepcopy(model)).no_weight_decay()) == set(
        model.no_weight_decay()
    )
    model.reset_classifier(4)
    assert model(images(model)).shape == (3, 4)
    side = 4
    if hasattr(model, "set_input_size"):
        side = 6
        model.set_input_size(img_size=side * model.patch_embed.patch_size[0])
        assert model(images(model)).shape == (3, 4)
    with torch.no_grad():
        out = model(images(model), aux=True)
    ratios = model.spot_config.ratios(3)
    counts = [side**2 * ratio.numerator // ratio.denominator for ratio in ratios]
    assert [index.shape[1] for index in out.index] == counts
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    features, maps = model.forward_intermediates(images(model), indices=[1])
    assert maps[0].shape == (3, 48, side, side)
    assert features.shape[1] == model.num_prefix_tokens + counts[0]


def test_feature_extractors_stay_dense():
    name, arguments = VARIANTS["EVA-02"]
    extractor = timm.create_model(name, features_only=True, **arguments)
    spot_vit.sparsify(extractor.model, keep=0.5, at=[1, 2])
    extractor.eval()
    with torch.no_grad():
        maps = extractor(torch.randn(2, 3, 56, 56))
    assert [tuple(m.shape) for m in maps] == [(2, 48, 4, 4)] * len(maps)


@pytest.mark.parametrize("variant", ["class token", "DINOv3, registers"])
def test_dynamic_image_size(variant: str):
    model = spot_vit.sparsify(build(variant, dynamic_img_size=True), keep=0.5, at=[1, 2])
    with torch.no_grad():
        for size, counts in ((64, [8, 4]), (96, [18, 9])):
            out = model(torch.randn(2, 3, size, size), aux=True)
            assert [index.shape[1] for index in out.index] == counts


@pytest.mark.parametrize("variant", ["class token", *FAMILIES])
def test_gradient_checkpointing_changes_no_gradient(variant: str):
    model = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3]).train()
    x = images(model)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(x, aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", ["class token", *FAMILIES])
def test_autocast_trains(variant: str):
    model = spot_vit.sparsify(build(variant), keep=0.6, at=[1, 2, 3]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images(model), aux=True)
    assert out.masks[0].dtype == torch.float32
    assert all(((mask == 0) | (mask == 1)).all() for mask in out.masks)
    (out.logits.float().square().mean() + sum(mask.mean() for mask in out.masks)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bfloat16_model_runs():
    model = spot_vit.sparsify(build(), keep=0.6, at=[1, 2, 3]).to(torch.bfloat16)
    with torch.no_grad():
        out = model(images(model), aux=True)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    model.train()
    model(images(model)).float().sum().backward()


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = spot_vit.sparsify(build(), keep=0.6, at=[1, 2, 3]).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second step fails if a parameter was unused in the first
            out = parallel(images(model), aux=True)
            (out.logits.sum() + sum(mask.mean() for mask in out.masks)).backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("swin_tiny_patch4_window7_224", {}, "cannot convert model.*SwinTransformer"),
        ("eva02_enormous_patch14_clip_224", {"depth": 2}, "cannot convert blocks.0.*PostNorm"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "cannot convert blocks.0.attn.*two softmaxes"),
        ("qwen3_vit_88m_enc", {}, "cannot convert model.*Qwen3.*merges"),
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, "attention dropout"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", {"global_pool": "prr"}, "no masked form"),
        ("vit_small_patch16_18x2_224", {}, "cannot convert blocks.0.*ParallelThingsBlock"),
        ("vit_relpos_small_patch16_224", {}, "cannot convert model"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(name, arguments, words):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **arguments)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(spot_vit.UnsupportedModelError, match=words):
        spot_vit.sparsify(model)
    assert [type(module) for module in model.modules()] == classes  # nothing half-converted


def test_a_changed_timm_class_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def forward(self, x, attn_mask=None, is_causal=False, new_option=None):
        return x

    model = build()
    monkeypatch.setattr(type(model.blocks[0]), "forward", forward)
    with pytest.raises(spot_vit.UnsupportedModelError, match="new_option"):
        spot_vit.sparsify(model)


def test_adapters_state_the_signatures_of_this_timm():
    for entry in BLOCKS.values():
        for method, names in entry.signatures.items():
            found = tuple(inspect.signature(getattr(entry.target, method)).parameters)[1:]
            assert found == names


def test_wrong_use_says_what_is_wrong():
    model = build()
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.set_keep(model, 0.5)
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.restore(model)
    with pytest.raises(ValueError, match="block 9, the model has 5"):
        spot_vit.sparsify(model, at=[1, 9])
    with pytest.raises(ValueError, match="2 stages"):
        spot_vit.sparsify(model, keep=[0.5, 0.4])
    with pytest.raises(TypeError, match="keepp"):
        spot_vit.sparsify(model, keepp=0.5)
    spot_vit.sparsify(model, keep=0.5, at=[1, 2])
    with pytest.raises(TypeError, match="already"):
        spot_vit.sparsify(model)
    x = images(model)
    with pytest.raises(ValueError, match="attn_mask"):
        model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        model.forward_features(x, is_causal=True)
    with pytest.raises(ValueError, match="2 index tensors"):
        model(x, kept=[torch.zeros(3, 1, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"kept\[0\]"):
        model(x, kept=[torch.zeros(3, 1), torch.zeros(3, 1)])
    index = torch.tensor([[0, 1]] * 3)
    with pytest.raises(ValueError, match="out of range"):  # 5 is not among the survivors
        model(x, kept=[index, torch.full((3, 1), 5)])
    with pytest.raises(ValueError, match="out of range"):
        model(x, kept=[index + 15, index[:, :1]])


def test_given_decisions_must_nest_in_training_too():
    model = spot_vit.sparsify(build(), keep=0.5, at=[1, 2]).train()
    index = torch.tensor([[0, 1]] * 3)
    with pytest.raises(ValueError, match="not kept by the stage before"):
        model(images(model), kept=[index, torch.full((3, 1), 5)])
    with pytest.raises(ValueError, match="out of range for 16 patch tokens"):
        model(images(model), kept=[index + 15, index])


@torch.no_grad()
def test_a_head_that_pools_nothing_is_refused():
    for variant in ("avg", "map pooling (SigLIP)", "BEiT"):
        with pytest.raises(ValueError, match=r"keep=0.1 leaves none of 16 patch tokens at stage 1"):
            spot_vit.sparsify(build(variant), keep=0.1, at=[1, 2, 3])
    small = torch.randn(2, 3, 32, 32)  # 4 patches, where the model was built for 16
    model = spot_vit.sparsify(build("avg", dynamic_img_size=True), keep=0.4, at=[1, 2, 3])
    with pytest.raises(ValueError, match=r"keep=0.4 leaves none of 4 patch tokens"):
        model(small)
    assert model.train()(small).isfinite().all()
    model = spot_vit.sparsify(build("class token", dynamic_img_size=True), keep=0.4, at=[1, 2, 3])
    assert model(small).isfinite().all()


def _macs(model: nn.Module, counts: list[int], at: list[int]) -> tuple[int, int]:
    """Multiply-accumulates from the sizes alone: total and predictors."""
    dim, heads = 192, 3
    n, total, predictor = 196, 196 * 768 * dim + dim * 1000, 0
    for b in range(12):
        if b in at:
            d_in = dim + 18 * heads
            h1, h2 = d_in // 2, d_in // 4
            shared = dim // 2 * h1  # the global half enters once per image
            predictor += n * (dim * dim + (d_in - dim // 2) * h1 + h1 * h2 + 2 * h2) + shared
            n = counts[at.index(b)]
        t = n + 1
        total += 12 * t * dim * dim + 2 * t * t * dim
        if b < at[-1]:
            total += 4 * heads * n * n
    return total + predictor, predictor


@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_count_flops_matches_the_formula(keep: float):
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    dense = spot_vit.count_flops(model, (3, 224, 224)).total
    assert round(dense / 1e9, 3) == 1.254
    spot_vit.sparsify(model, keep=keep)
    counts = [196 * r.numerator // r.denominator for r in model.spot_config.ratios(3)]
    found = spot_vit.count_flops(model, (3, 224, 224))
    assert (found.total, found.predictor) == _macs(model, counts, [3, 6, 9])


def test_deit_small_costs_what_the_papers_say():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224", pretrained=False)
    assert round(spot_vit.count_flops(model, (3, 224, 224)).total / 1e9, 3) == 4.599
    spot_vit.sparsify(model, keep=0.7)
    assert model.training
    total = spot_vit.count_flops(model, (3, 224, 224)).total / 1e9
    assert 2.88 < total < 3.05
    assert model.training


def test_supported_names_the_classes():
    names = set(spot_vit.supported())
    timms = ["beit.Beit", "deit.VisionTransformerDistilled", "eva.Eva", "naflexvit.NaFlexVit"]
    timms.append("vision_transformer.VisionTransformer")
    own = {"spot_vit.models.lvvit.LVViT", *(f"timm.models.{name}" for name in timms)}
    assert names == own | set(PLACES)
