"""Whole models as ONNX, by the definitions, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.loop import SpotLoop
from support.models import build, images
from support.ranks import LEARNED
from support.slow import most_slow
from torch import Tensor, nn

import spot_ext

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Decisions(nn.Module):
    """Logits, and the tokens that each decision kept."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.model, SpotLoop):
            return (self.model(x),)
        out = self.model(x, aux=True)
        return (out.logits, *out.index)


def small(kind: str) -> Any:
    """Three blocks, two decisions."""
    model = build(depth=3)
    if kind in ("sparsifiner", "both"):
        spot_vit.sparsify_attention(model, 0.5)
    if kind != "sparsifiner":
        method = "spot" if kind == "both" else kind
        spot_vit.sparsify(model, method=method, keep=0.6, at=[1, 2])
    return model


@pytest.mark.parametrize("kind", most_slow(sorted(LEARNED, key="both".__ne__)))
@torch.no_grad()
def test_onnx_runtime_gives_what_the_model_gives(kind: str, tmp_path: Path):
    """For any number of images: the same tokens, and logits to 1e-4."""
    model: Any = Decisions(small(kind)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with spot_ext.definitions():
        program: Any = torch.onnx.export(
            model, (images(model.model),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for number in (1, 5):
        x = images(model.model, number, seed=number)
        given = {session.get_inputs()[0].name: x.numpy()}
        found = [torch.from_numpy(value) for value in session.run(None, given)]
        expected = model(x)
        assert len(found) == len(expected) == (1 if kind == "sparsifiner" else 3)
        assert (found[0] - expected[0]).abs().max() < 1e-4
        assert all(map(torch.equal, found[1:], expected[1:]))
