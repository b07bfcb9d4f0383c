"""Ops between other layers: training, compiled, exported, packaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS
from support.arguments import refilled, tensors
from support.comparison import assert_close
from support.data import generator
from support.slow import most_slow
from torch import Tensor


class Pruner(torch.nn.Module):
    """What a user writes: ops by their `torch.ops` names, between other layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.before = torch.nn.Linear(width, width)
        self.score = torch.nn.Linear(width, 1, bias=False)  # softmax would give it no gradient
        self.after = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        num_tokens = x.shape[1] - 1
        num_keep = num_tokens * 7 // 10
        scores = self.score(x[:, 1:]).squeeze(-1)
        index = torch.ops.spot.select_tokens(scores, num_keep)
        fused = torch.ops.spot.fuse_tokens(x, scores.softmax(-1), index)
        x = torch.ops.spot.compact_tokens(x, index, 1, fused[:, None])
        return self.after(x)


def _images(batch: int, num_tokens: int, device: Any = "cpu") -> Tensor:
    seeded = generator(f"images {batch} {num_tokens}")
    return torch.randn(batch, num_tokens, 16, generator=seeded, dtype=torch.float64).to(device)


def _model(device: Any = "cpu") -> Pruner:
    torch.manual_seed(5)
    return Pruner().double().to(device)


def _losses(model: Any, device: Any, steps: int) -> list[float]:
    """Losses of a few steps on images of growing number and size, then of the first ones again."""
    inner = getattr(model, "_orig_mod", model)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(_images(2 + step, 11 + step, device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in inner.parameters())
        optimizer.step()
        losses.append(loss.item())
    return [*losses, model(_images(2, 11, device)).square().mean().item()]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("dynamic", "backend", "steps"),
    most_slow(
        [
            (None, "aot_eager", 4),
            (True, "aot_eager", 4),
            (False, "aot_eager", 2),
            (True, "inductor", 4),
        ],
        2,
    ),
)
def test_a_model_trains_compiled_as_in_eager(
    dynamic: bool | None, backend: str, steps: int, device: torch.device
) -> None:
    expected = _losses(_model(device), device, steps)
    assert expected[-1] < expected[0]
    compiled = torch.compile(_model(device), fullgraph=True, dynamic=dynamic, backend=backend)
    actual = _losses(compiled, device, steps)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_a_model_exports_with_dynamic_batch_and_tokens(strict: bool, tmp_path: Path) -> None:
    model = _model().eval()
    # From 4 tokens on, since export gives sizes 0 and 1 graphs of their own, whatever the op.
    shapes = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=4)}}
    exported = torch.export.export(model, (_images(2, 11),), dynamic_shapes=shapes, strict=strict)
    used = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    for name in ("select_tokens", "compact_tokens", "fuse_tokens"):
        assert f"spot.{name}.default" in used
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 4), (2, 11), (3, 12), (7, 41), (1, 197)):
        assert_close(loaded(_images(*shape)), model(_images(*shape)))


def test_a_model_exports_for_training() -> None:
    exported = torch.export.export(_model(), (_images(2, 11),)).module()
    torch.testing.assert_close(
        [exported(_images(2, 11)).square().mean().item()],
        [_model()(_images(2, 11)).square().mean().item()],
    )
    exported(_images(2, 11)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in exported.parameters())


class Everything(torch.nn.Module):
    """Every op once, on samples whose tensors are the inputs."""

    def __init__(self, calls: dict[str, tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        outputs = []
        for name, args in self.calls.items():
            outputs += tensors(OPS[name].call(*refilled(args, rest)))
        return tuple(out.clone() for out in outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_aot_inductor_runs_every_op(device: torch.device, tmp_path: Path) -> None:
    names = {"attention_stats": "masked with bias", "select_tokens": "(2, 9, 4)"}
    calls = {
        op.name: op.sample(names.get(op.name, op.samples[1].name)).args(device, torch.float32)
        for op in OPS.values()
    }
    values = tuple(value for args in calls.values() for value in tensors(args))
    model = Everything(calls)
    exported = torch.export.export(model, values)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "everything.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    assert_close(loaded(*values), model(*values), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_aot_inductor_with_dynamic_batch_and_tokens(device: torch.device, tmp_path: Path) -> None:
    model = _model(device).eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64),
                    1: torch.export.Dim("tokens", min=4, max=512)}}  # fmt: skip
    exported = torch.export.export(model, (_images(2, 11, device),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for shape in ((1, 4), (2, 11), (5, 30), (1, 197)):
        assert_close(loaded(_images(*shape, device)), model(_images(*shape, device)))
