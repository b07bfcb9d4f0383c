"""torch.jit.trace, by the kernels and by the definitions."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import images
from support.ranks import LEARNED, converted
from torch import Tensor, nn

import spot_ext

CHOICES: dict[str, Any] = {
    "kernels": contextlib.nullcontext, "definitions": spot_ext.definitions,
}  # fmt: skip


def traced(model: nn.Module, choice: str, *inputs: Any) -> Any:
    with CHOICES[choice](), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # timm's, of image sizes
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, inputs)


def ops_of(program: Any) -> set[str]:
    text = str(program.inlined_graph)
    return {word.split("(")[0] for word in text.split() if word.startswith("spot::")}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_traced_models_decide_anew(kind: str, choice: str, tmp_path: Path):
    """On other images, more of them, and after a file."""
    model = converted(kind).eval()
    program = traced(model, choice, images(model, 2))
    assert bool(ops_of(program)) == (choice == "kernels")
    x = images(model, 5, seed=7)
    assert (program(x) - model(x)).abs().max() < 1e-12
    torch.jit.save(program, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), program(x))


class Decisions(nn.Module):
    """Logits and the tokens that the last decision kept."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(x, aux=True)
        return out.logits, out.index[-1]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", [kind for kind in LEARNED if kind != "sparsifiner"])
@torch.no_grad()
def test_decisions_are_outputs(kind: str, choice: str):
    model = Decisions(converted(kind)).eval()
    program = traced(model, choice, images(model.model))
    x = images(model.model, 4, seed=9)
    logits, index = program(x)
    assert torch.equal(index, model(x)[1])
    assert (logits - model(x)[0]).abs().max() < 1e-12


class Given(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *kept: Tensor) -> Tensor:
        return self.model(x, kept=list(kept))


@torch.no_grad()
def test_decisions_are_inputs():
    model = Given(converted("spot")).eval()
    x = images(model.model)
    program = traced(model, "kernels", x, *model.model(x, aux=True).index)
    y = images(model.model, 3, seed=4)
    kept = model.model(y, aux=True).index
    assert (program(y, *kept) - model.model(y)).abs().max() < 1e-12
