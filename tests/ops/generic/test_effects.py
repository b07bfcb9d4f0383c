"""What a call of an op leaves behind: nothing but its results."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from support.arguments import clone, tensors, with_grad
from support.comparison import assert_same_bits
from support.gradients import gradients


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_inputs_stay_as_they_are(op: Op, sample: Sample, device: torch.device) -> None:
    args = sample.args(device, torch.float32)
    before = clone(args)
    versions = [value._version for value in tensors(args)]
    outputs = tensors(op.call(*args))
    assert [value._version for value in tensors(args)] == versions
    for now, then in zip(tensors(args), tensors(before), strict=True):
        assert_same_bits(now, then, "argument")
    memory = {value.untyped_storage().data_ptr() for value in tensors(args) if value.numel()}
    for number, out in enumerate(outputs):
        assert not out.numel() or out.untyped_storage().data_ptr() not in memory, (
            "alias of an input"
        )
        for other in outputs[:number]:
            assert not out.numel() or (
                out.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
            ), "two outputs share memory"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_results_are_leaves_of_nothing_under_no_grad(op: Op, device: torch.device) -> None:
    args = op.samples[0].args(device, torch.float32)
    expected = tensors(op.call(*args))
    tracked = with_grad(args, op.grads)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = tensors(op.call(*tracked))
        assert not any(out.requires_grad for out in outputs)
        for mine, theirs in zip(outputs, expected, strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_many_calls_do_not_grow_the_process(op: Op) -> None:
    good = with_grad(op.samples[0].args("cpu", torch.float32), op.grads)
    values = (b for b in op.errors if b.values or b.name.startswith("num_keep too"))
    bad = next(values, op.errors[0])
    wrong = bad.args("cpu")

    def calls(count: int) -> None:
        for _ in range(count):
            gradients(op.call, good)
            with pytest.raises((ValueError, RuntimeError)):
                op.call(*wrong)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    calls(50)
    gc.collect()
    before = resident()
    calls(300)
    gc.collect()
    assert resident() - before < 4 << 20
