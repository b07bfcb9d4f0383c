"""Every public function as ONNX, by its definition, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from support.arguments import refilled, tensors
from support.comparison import assert_close
from support.slow import most_slow
from torch import Tensor

import spot_ext

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class _Call(torch.nn.Module):
    """A public function of its tensor arguments; results without elements are left out."""

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.args = op, args

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        assert self.op.public is not None
        outputs = tensors(self.op.public(*refilled(self.args, values)))
        return tuple(out for out in outputs if out.numel())


def _few() -> list[Any]:
    """The first three samples of each function that have results, two of them with `-m slow`."""
    found = [p for p in each_sample(traced=True) if p.values[0].public]
    chosen = []
    for op in OPS.values():
        mine = [p for p in found if p.values[0] is op]
        some = [p for p in mine if all(out.numel() for out in _outputs(*p.values))][:3]
        chosen += most_slow(some)
    return chosen


def _outputs(op: Op, sample: Sample) -> list[Tensor]:
    return tensors(op.public(*sample.args("cpu", torch.float32)))[:1]  # type: ignore[misc]


@pytest.mark.parametrize(("op", "sample"), _few())
def test_onnx_runtime_gives_what_the_kernel_gives(op: Op, sample: Sample, tmp_path: Path) -> None:
    args = sample.args("cpu", torch.float32)
    model, values = _Call(op, args).eval(), tuple(value.contiguous() for value in tensors(args))
    with spot_ext.definitions():
        program = torch.onnx.export(model, values, dynamo=True, verbose=False)
    path = tmp_path / "model.onnx"
    program.save(path)  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (value.numpy() for value in values), strict=True))
    found = [torch.from_numpy(out) for out in session.run(None, given)]
    assert_close(found, list(model(*values)), 1e-5)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_ties_and_odd_numbers_keep_their_order(count: int, tmp_path: Path) -> None:
    """Runtimes may sort as they like: ties go to the lower position, NaN ranks below -inf."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[1.0, nan, 2.0, 2.0, -inf, 1.0, nan, 2.0], [nan, -inf] * 4, [inf] * 8])
    sample = Sample("odd", lambda *_: (scores, count))
    test_onnx_runtime_gives_what_the_kernel_gives(OPS["select_tokens"], sample, tmp_path)
