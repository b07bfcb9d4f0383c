"""What holds for every converted model of another package than timm: checks, by its own output."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spot_vit
import torch
from spot_vit.models.loop import SpotLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Read = Callable[[Any], Tensor]
"""The tensor to compare in what the model returns."""

AT = [1, 2, 3]


def filled(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The model with weights large enough that every part matters, in eval."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model.to(dtype).eval()


@torch.no_grad()
def check_bit_exact(model: Any, x: Tensor, read: Read) -> None:
    """At keep = 1 it is the model it was, and after `restore`; statistics change nothing."""
    classes = [type(module) for module in model.modules()]
    expected, keys, kind = read(model(x)), list(model.state_dict()), type(model(x))
    assert spot_vit.sparsify(model, keep=1.0, at=AT) is model
    assert isinstance(model, SpotLoop) and isinstance(model, classes[0])
    assert torch.equal(read(model(x)), expected) and type(model(x)) is kind
    assert [key for key in model.state_dict() if ".relevance." not in key] == keys
    out = model(x, aux=True)
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    assert [mask.mean().item() for mask in out.masks] == [1, 1, 1]
    spot_vit.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(read(model(x)), expected) and list(model.state_dict()) == keys


@torch.no_grad()
def check_masked_equals_compacted(model: Any, x: Tensor, read: Read) -> None:
    """A float64 model: training's masks give what inference's cuts give."""
    spot_vit.sparsify(model, keep=0.6, at=AT)
    out = model(x, aux=True)
    assert [index.shape[1] for index in out.index] == [9, 5, 3]
    assert torch.equal(read(model(x)), out.logits)
    assert not torch.allclose(out.logits, read(_dense(model)(x)))
    torch.testing.assert_close(read(model(x, kept=out.index)), out.logits, rtol=0, atol=1e-10)
    model.train()
    masked = model(x, kept=out.index, aux=True)
    torch.testing.assert_close(masked.logits, out.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(read(model(x, kept=out.index)), out.logits, rtol=0, atol=1e-10)
    for mask, other in zip(masked.masks, out.masks, strict=True):
        assert torch.equal(mask, other)


def _dense(model: Any) -> Any:
    return spot_vit.restore(copy.deepcopy(model))


def check_gradients(model: Any, x: Tensor, unused: tuple[str, ...] = ()) -> None:
    """Training reaches every parameter, but for `unused` ones."""
    spot_vit.sparsify(model, keep=0.6, at=AT).train()
    out = model(x, aux=True)
    (out.logits.square().mean() + sum((mask.mean() - 0.3) ** 2 for mask in out.masks)).backward()
    for name, parameter in model.named_parameters():
        if name in unused:
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith(("k_proj.bias", "key.bias")):  # the same for all keys: no influence
            assert parameter.grad.abs().sum() > 0, name
    assert [len(out.masks), len(out.logp), len(out.index)] == [3, 3, 0]


@torch.no_grad()
def check_object_life(model: Any, x: Tensor, read: Read, folder: Path) -> None:
    """Copies, pickles, files, and a fresh process that has imported nothing yet."""
    original = type(model).__name__
    spot_vit.sparsify(model, keep=0.6, at=AT)
    expected = read(model(x))
    torch.save(model, folder / "model.pt")
    loaded = torch.load(folder / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(read(other(x)), expected)
        assert other.spot_config == model.spot_config
        assert type(spot_vit.restore(other)).__name__ == original
    torch.save((x, expected), folder / "expected.pt")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch, spot_vit
model = torch.load({str(folder / "model.pt")!r}, weights_only=False)
x, expected = torch.load({str(folder / "expected.pt")!r})
with torch.no_grad():
    out = model(x, aux=True)
assert torch.equal(out.logits, expected)
print(type(spot_vit.restore(model)).__name__)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == original, done.stderr


@torch.no_grad()
def check_sparse_attention(model: Any, x: Tensor, read: Read) -> None:
    """Sparse attention alone, and with token removal; maps of both."""
    expected = read(model(x))
    spot_vit.sparsify_attention(model, keep_rate=1.0)
    assert torch.equal(read(model(x)), expected)
    spot_vit.set_keep(model, attention=0.3)
    sparse = read(model(x))
    assert not torch.allclose(sparse, expected)
    spot_vit.sparsify(model, keep=0.6, at=AT)
    assert not torch.allclose(read(model(x)), sparse)
    maps = spot_vit.attention_maps(model, x)
    assert len(maps) == 5
    spot_vit.restore(model)
    assert torch.equal(read(model(x)), expected)


def check_distillation(model: Any, x: Tensor) -> None:
    """`fit` with a teacher: the model itself, converted to be dense."""
    teacher = spot_vit.sparsify(copy.deepcopy(model), keep=1.0)
    spot_vit.sparsify(model, keep=0.6, at=AT)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(spot_vit.param_groups(model, freeze_epochs=0))
    loader = DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=len(x))
    losses = spot_vit.fit(model, loader, optimizer, spot_vit.SpotObjective(teacher=teacher))
    assert losses
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(".relevance." in name for name in moved)
    assert len(moved) > len(before) // 2


@torch.no_grad()
def check_compiled(model: Any, x: Tensor, read: Read) -> None:
    """Compiled, it gives what it gives eagerly, at every budget."""
    spot_vit.sparsify(model, keep=0.6, at=AT)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for keep in (0.6, 0.8):
        spot_vit.set_keep(model, keep)
        torch.testing.assert_close(read(compiled(x)), read(model(x)))
    torch._dynamo.reset()


def check_budgets(model: Any) -> None:
    """What it costs, dense and sparse, layer by layer; a budget in multiply-accumulates."""
    dense = spot_vit.count_flops(model, (3, 64, 64))
    spot_vit.sparsify(model, keep=1.0, at=AT)
    assert spot_vit.count_flops(model, (3, 64, 64)).total == dense.total
    spot_vit.set_keep(model, 0.6)
    sparse = spot_vit.count_flops(model, (3, 64, 64))
    prefix = model.num_prefix_tokens
    for count, tokens in ((dense, [16] * 5), (sparse, [16, 9, 5, 3, 3])):
        blocks = count.layers[1:-1]
        assert [layer.tokens - prefix for layer in blocks] == tokens
        for layer in blocks:
            rows, dim, hidden = layer.tokens, 48, 96
            assert layer.attention == 4 * rows * dim * dim + 2 * rows * rows * dim
            assert layer.mlp == 2 * rows * dim * hidden
    assert sparse.predictor > 0 and sparse.statistics > 0
    spot_vit.set_keep(model, {"gmacs": sparse.total / 1e9})
    assert spot_vit.count_flops(model, (3, 64, 64)).total <= sparse.total
    assert 0.5 < model.spot_config.keep < 0.7
