"""`fast`: the same values and decisions by other operators, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.models import fast as fast_module
from spot_vit.models.fast_blocks import FastBlock, FastSpotBlock
from spot_vit.nn import packed as packed_module
from spot_vit.nn.packed import PackedLinear, candidates, fastest, pack_linear
from spot_vit.nn.relevance import TokenRelevance
from support.models import VARIANTS, build, images
from torch import Tensor, nn

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda model: model,
    "spot": lambda model: spot_vit.sparsify(model, keep=0.6, at=[1, 3]),
    "evit": lambda model: spot_vit.sparsify(model, method="evit", keep=0.6, at=[1, 3]),
    "soft": lambda model: spot_vit.sparsify(model, keep=0.6, at=[1, 4], soft="fuse"),
    "sparsifiner": lambda model: spot_vit.sparsify_attention(model, keep_rate=0.4),
    "both": lambda model: spot_vit.sparsify(
        spot_vit.sparsify_attention(model, keep_rate=0.4), keep=0.6, at=[1, 3]
    ),
}
VIT = "class token"


@pytest.fixture(autouse=True)
def who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is fastest here, which a busy machine may decide otherwise."""
    monkeypatch.setattr(fast_module, "fastest", lambda *_: ("own", 1.5))


def converted(variant: str = VIT, conversion: str = "spot") -> Any:
    """A small model in eval mode, or a skip where the two do not go together."""
    torch.manual_seed(0)
    model = build(variant).eval()
    try:
        model = CONVERSIONS[conversion](model)
    except (ValueError, TypeError) as error:
        pytest.skip(str(error))
    for module in model.modules():
        if isinstance(module, TokenRelevance):  # untrained scores are as near as roundings
            module.fc3.weight.data.mul_(100)
    return model.eval()


def small() -> tuple[Any, Tensor]:
    model = converted()
    return model, images(model)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_decisions_and_everything_else_stay(variant: str, conversion: str) -> None:
    model = converted(variant, conversion)
    pictures = images(model)
    with torch.no_grad():
        before = model(pictures)
        decided = model(pictures, aux=True).index if hasattr(model, "spot_config") else []
    state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]

    assert spot_vit.fast(model) is model
    assert model._fast.packed == sum(type(layer) is PackedLinear for layer in model.modules()) > 0
    with torch.inference_mode():
        after = model(pictures)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model(pictures), after, rtol=0, atol=0)
    if decided:
        again = model(pictures, aux=True)
        assert all(torch.equal(a, b) for a, b in zip(again.index, decided, strict=True))
        torch.testing.assert_close(again.logits, before, rtol=1e-5, atol=1e-4)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(pictures), model(pictures)) and other._fast.packed
    spot_vit.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    with torch.no_grad():
        assert torch.equal(model(pictures), before)
    assert "_fast" not in model.__dict__


@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_blocks_are_fused_and_the_last_one_computes_the_prefix_alone(conversion: str) -> None:
    model = converted(conversion=conversion)
    size = tuple(images(model).shape[1:])
    before = spot_vit.count_flops(model, size)
    spot_vit.fast(model)
    kind = FastBlock if conversion == "dense" else FastSpotBlock
    assert all(type(block) is kind for block in model.blocks)
    after = spot_vit.count_flops(model, size)
    assert [a.total for a in after.layers[:-2]] == [b.total for b in before.layers[:-2]]
    tokens, dim = before.layers[-2].tokens, model.embed_dim
    # Of the last block's products all tokens make keys and values, the class token the rest.
    assert after.layers[-2].mlp == before.layers[-2].mlp // tokens
    kept = 2 * tokens * dim * dim + 2 * dim * dim + 2 * tokens * dim
    assert after.layers[-2].attention == kept
    assert spot_vit.restore(model) and spot_vit.count_flops(model, size).total == before.total


@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_features_are_those_of_the_model(conversion: str) -> None:
    model = converted(conversion=conversion)
    pictures = images(model)
    with torch.no_grad():
        tokens = model.forward_features(pictures)
        maps = model.forward_intermediates(pictures, indices=2, intermediates_only=True)
        spot_vit.fast(model)
        torch.testing.assert_close(model.forward_features(pictures), tokens, rtol=1e-5, atol=1e-4)
        again = model.forward_intermediates(pictures, indices=2, intermediates_only=True)
    for found, expected in zip(again, maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", [VIT, "registers, LayerScale", "qk norm", "EVA-02"])
def test_hooks_see_what_they_saw(variant: str) -> None:
    model = converted(variant, "spot")
    pictures = images(model)
    names = [name for name, _ in model.named_modules() if name]

    def seen(hooked: str) -> list[Tensor]:
        found: list[Tensor] = []
        module = model.get_submodule(hooked)
        handle = module.register_forward_hook(lambda m, i, out: found.append(out))
        with torch.no_grad():
            model(pictures)
        handle.remove()
        return [out for out in found if isinstance(out, Tensor)]

    before = {name: seen(name) for name in names}
    spot_vit.fast(model)
    for name in names:
        after = seen(name)
        assert len(after) == len(before[name]), name
        for a, b in zip(after, before[name], strict=True):
            if name.endswith(("q_norm", "k_norm")) and a.shape != b.shape:
                a = a.transpose(1, 2)  # heads and tokens may come in either order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, msg=name)


def test_hooks_may_ask_for_gradients_of_their_own() -> None:
    model, pictures = small()
    spot_vit.fast(model)
    found: list[Tensor] = []

    def probe(module: nn.Module, args: Any, out: Tensor) -> None:
        with torch.enable_grad():
            x = out.clone().requires_grad_(True)
            found.append(torch.autograd.grad(x.square().sum(), x)[0] - 2 * x.detach())

    names = ("blocks.0.norm1", "blocks.2.attn", "patch_embed.proj", "blocks.1.relevance")
    for name in names:
        model.get_submodule(name).register_forward_hook(probe)
    with torch.no_grad():
        model(pictures)
    assert len(found) == len(names) and not any(gradient.any() for gradient in found)


def test_a_hook_on_a_norm_costs_no_more_than_its_call() -> None:
    model, pictures = small()
    spot_vit.fast(model)
    expected = model(pictures)
    block, seen = model.blocks[0], []
    for moved in (block.norm1, block.norm2):
        handle = moved.register_forward_hook(lambda module, args, out: seen.append(module))
        assert torch.equal(model(pictures), expected)
        assert block._plan.serves(pictures) and seen == [moved]
        handle.remove()
        seen.clear()
    handle = block.mlp.act.register_forward_hook(lambda module, args, out: seen.append(module))
    model(pictures)
    assert not block._plan.serves(pictures) and seen == [block.mlp.act]
    handle.remove()
    assert torch.equal(model(pictures), expected) and block._plan.serves(pictures)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_maps_and_operands_are_those_of_the_model(conversion: str) -> None:
    model = converted(conversion=conversion)
    pictures = images(model)
    expected = spot_vit.attention_maps(model, pictures)
    before = spot_vit.fast(model)(pictures)
    classes = [type(module) for module in model.modules()]
    found = spot_vit.attention_maps(model, pictures)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.position, theirs.position)
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), spot_vit.record_operands(model) as operands:
        model(pictures)
    assert len(operands) == len(model.blocks)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(pictures), before)


def test_what_replaces_a_layer_is_called() -> None:
    model, pictures = small()
    spot_vit.fast(model)
    plain = model(pictures)

    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    for path in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"):
        changed, expected = copy.deepcopy(model), spot_vit.restore(copy.deepcopy(model))
        for other in (changed, expected):
            block, (part, name) = other.blocks[2], path.split(".")
            layer = getattr(getattr(block, part), name)
            setattr(getattr(block, part), name, Doubled(layer))
        assert not torch.allclose(changed(pictures), plain)
        torch.testing.assert_close(changed(pictures), expected(pictures), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "path", ["mlp.act", "mlp.drop1", "mlp.drop2", "attn.proj_drop", "ls1", "ls2", "drop_path1"]
)
def test_what_replaces_a_part_without_weights_is_called(path: str) -> None:
    model, pictures = small()
    spot_vit.fast(model)
    plain = model(pictures)
    slow = spot_vit.restore(copy.deepcopy(model))
    for other in (model, slow):
        parent, _, name = path.rpartition(".")
        setattr(other.blocks[2].get_submodule(parent), name, nn.Tanh())
    assert not torch.allclose(model(pictures), plain)
    torch.testing.assert_close(model(pictures), slow(pictures), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["blocks.2.norm1.weight", "blocks.0.mlp.fc2.bias", "patch_embed.proj.bias"]
)
def test_a_parameter_may_ask_for_its_gradient_later(name: str) -> None:
    model, pictures = small()
    slow = copy.deepcopy(model)
    spot_vit.fast(model)
    with torch.no_grad():
        model(pictures)
    found = []
    for other in (model, slow):
        parameter = other.get_parameter(name).requires_grad_(True)
        found.append(torch.autograd.grad(other(pictures).square().sum(), parameter)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_new_weights_are_packed_anew() -> None:
    model, pictures = small()
    other = converted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        expected = other(pictures)
    spot_vit.fast(model)
    before = model(pictures)
    assert not torch.allclose(before, expected, atol=1e-3)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(pictures), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.data = torch.zeros_like(model.blocks[0].mlp.fc1.weight)
    assert not torch.allclose(model(pictures), expected, atol=1e-3)


def test_training_is_refused_and_gradients_by_images_are_right() -> None:
    model, pictures = small()
    pictures.requires_grad_(True)
    (expected,) = torch.autograd.grad(model(pictures).square().sum(), pictures)
    spot_vit.fast(model.train())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    (found,) = torch.autograd.grad(model(pictures).square().sum(), pictures)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"a fast model does not train: spot_vit.restore"):
        model.train()(pictures)


def test_set_keep_changes_the_budget() -> None:
    model, pictures = small()
    spot_vit.fast(model)
    for keep in (0.3, 1.0, 0.6):
        spot_vit.set_keep(model, keep)
        slow = spot_vit.restore(copy.deepcopy(model))
        torch.testing.assert_close(model(pictures), slow(pictures), rtol=1e-5, atol=1e-4)


def test_it_saves_and_loads_as_the_model(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=3).eval()
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pictures)
        for dtype in (None, torch.bfloat16, torch.int8):
            spot_vit.fast(model, dtype)
            spot_vit.save(tmp_path / "fast.safetensors", model)
            spot_vit.restore(model)
            assert torch.equal(spot_vit.load(tmp_path / "fast.safetensors")(pictures), expected)


@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_bfloat16_computes_as_the_cast_model_and_keeps_the_weights(conversion: str) -> None:
    model = converted(conversion=conversion)
    pictures = images(model, 16)
    cast = copy.deepcopy(model).bfloat16()
    state = copy.deepcopy(model.state_dict())
    spot_vit.fast(model, torch.bfloat16)
    with torch.no_grad():
        expected, found = cast(pictures.bfloat16()), model(pictures)
    assert found.dtype is torch.bfloat16
    difference = (found - expected).float().norm() / expected.float().norm()
    assert difference < 0.1
    for name, value in model.state_dict().items():
        assert value.dtype is state[name].dtype and torch.equal(value, state[name])
    changed = {name: value + 0.1 for name, value in state.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    again = copy.deepcopy(model)(pictures)
    spot_vit.restore(model)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(again, spot_vit.fast(model, torch.bfloat16)(pictures))


def test_another_dtype_is_taken_by_every_way_into_the_model() -> None:
    model, pictures = small()
    with torch.no_grad():
        features = model.forward_features(pictures)
        spot_vit.fast(model, torch.bfloat16)
        expected = model(pictures)
        assert torch.equal(model(x=pictures), expected)
        assert torch.equal(model(pictures.bfloat16()), expected)
        found = model.forward_features(pictures)
    assert found.dtype is torch.bfloat16 and found.shape == features.shape
    spot_vit.restore(model)
    assert not model.patch_embed._forward_pre_hooks
    assert not model.patch_embed._forward_pre_hooks_with_kwargs
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        full = half(pictures.bfloat16())
        assert spot_vit.fast(half, torch.float32)(pictures).dtype is torch.float32
        assert half.state_dict()["head.weight"].dtype is torch.bfloat16
        assert torch.equal(spot_vit.restore(half)(pictures.bfloat16()), full)


@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_int8_is_close_and_leaves_predictors_in_float(conversion: str) -> None:
    model = converted(conversion=conversion)
    pictures = images(model, 16)
    with torch.no_grad():
        expected = model(pictures)
        kept = model(pictures, aux=True).index if conversion != "dense" else None
        given = {} if kept is None else {"kept": kept}
        spot_vit.fast(model, torch.int8)
        found = model(pictures, **given)
    assert (found - expected).norm() / expected.norm() < 0.1
    assert not torch.equal(found, expected)
    for name, module in model.named_modules():
        if "relevance" in name or "connectivity" in name:
            assert not isinstance(module, PackedLinear), name


@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_repeats_and_threads_give_the_same_bits(conversion: str) -> None:
    model = spot_vit.fast(converted(conversion=conversion))
    pictures = images(model)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            found.append(model(pictures))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_it_compiles_exports_and_traces() -> None:
    model, pictures = small()
    spot_vit.fast(model)
    expected = model(pictures)
    with torch.no_grad():
        exported = torch.export.export(model, (pictures,)).module()
        torch.testing.assert_close(exported(pictures), expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pictures), expected, rtol=1e-4, atol=1e-4)
        with spot_vit_definitions():
            traced = torch.jit.trace(model, pictures, check_trace=False)
        torch.testing.assert_close(traced(pictures), expected, rtol=1e-4, atol=1e-4)


def spot_vit_definitions() -> Any:
    import spot_ext

    return spot_ext.definitions()


def test_autocast_and_other_dtypes_run_torchs_layers() -> None:
    model, pictures = small()
    slow = copy.deepcopy(model)
    spot_vit.fast(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(pictures), slow(pictures), rtol=0.1, atol=0.1)
    model, slow = model.double(), slow.double()
    with torch.no_grad():
        torch.testing.assert_close(model(pictures.double()), slow(pictures.double()))


def test_no_images_give_no_logits() -> None:
    model = spot_vit.fast(converted(conversion="dense"))
    assert model(torch.randn(0, 3, 64, 64)).shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: spot_vit.fast(m), TypeError, "fast already; restore undoes it"),
        (lambda m: spot_vit.fast(torch.compile(m)), TypeError, "wraps the model"),
        (lambda m: spot_vit.sparsify_attention(m), TypeError, "the model is fast: restore it"),
        (lambda m: spot_vit.fast(spot_vit.restore(m), torch.float16), ValueError, "is for GPUs"),
        (lambda m: spot_vit.fast(spot_vit.restore(m), "int8"), ValueError, "dtype: expected None"),
        (
            lambda m: spot_vit.fast(spot_vit.restore(m).bfloat16(), torch.int8),
            ValueError,
            "made of a model in float32",
        ),
    ],
)
def test_what_it_refuses(change: Any, error: type[Exception], message: str) -> None:
    model, pictures = small()
    spot_vit.fast(model)
    expected = model(pictures)
    with pytest.raises(error, match=message):
        change(model)
    if fast_module.is_fast(model):
        assert torch.equal(model(pictures), expected)


def test_a_dense_fast_model_is_not_converted() -> None:
    model = spot_vit.fast(converted(conversion="dense"))
    with pytest.raises(TypeError, match="the model is fast: restore it, call sparsify"):
        spot_vit.sparsify(model)


def test_where_packing_is_slower_torchs_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = small()
    expected = model(pictures)
    monkeypatch.setattr(fast_module, "fastest", lambda *_: ("plain", 1.0))
    calls: list[Any] = []
    monkeypatch.setattr(packed_module.PackedLinear, "_pack", lambda *a: calls.append(a))
    spot_vit.fast(model)
    assert model._fast.packed == 0
    torch.testing.assert_close(model(pictures), expected, rtol=1e-5, atol=1e-4)
    assert not calls


def test_the_fastest_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest.cache_clear()
    kind, speedup = fastest()
    assert kind in ("plain", *candidates(torch.float32)) and speedup >= 1.0
    assert fastest() == (kind, speedup)
    monkeypatch.setattr(packed_module, "candidates", lambda dtype: [])
    fastest.cache_clear()
    assert fastest() == ("plain", 1.0)
    fastest.cache_clear()


@pytest.mark.parametrize("kind", candidates(torch.float32))
@pytest.mark.parametrize("conversion", ["dense", "spot", "both"])
def test_whoever_multiplies(conversion: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_module, "fastest", lambda *_: (kind, 1.5))
    model = converted("registers, LayerScale", conversion)
    pictures = images(model)
    with torch.no_grad():
        expected = model(pictures)
    spot_vit.fast(model)
    assert model.blocks[0].mlp.fc1.kind == kind
    torch.testing.assert_close(model(pictures), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [*candidates(torch.float32), "int8", "plain"])
def test_a_packed_layer_is_the_layer_and_what_follows(kind: str, bias: bool) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(48, 40, bias=bias).eval().requires_grad_(False)
    x, residual, scale = torch.randn(2, 5, 48), torch.randn(2, 5, 40), torch.randn(40)
    y = layer(x)
    pack_linear(layer, kind)
    near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    if kind == "int8":
        near = {"rtol": 0.05, "atol": 0.05}
    assert isinstance(layer, PackedLinear)
    torch.testing.assert_close(layer(x), y, **near)
    for form in ("none", "tanh"):
        expected = nn.functional.gelu(y, approximate=form)
        torch.testing.assert_close(layer.fused(x, gelu=form), expected, **near)
    for rows in (None, (8, 24)):
        part = slice(None) if rows is None else slice(*rows)
        other = pack_linear(copy.deepcopy(layer), kind)
        found = other.fused(x, residual=residual[..., part], rows=rows)
        torch.testing.assert_close(found, y[..., part] + residual[..., part], **near)
    found = layer.fused(x, scale=scale, residual=residual)
    torch.testing.assert_close(found, y * scale + residual, **near)
