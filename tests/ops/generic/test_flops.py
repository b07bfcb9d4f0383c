"""FLOPs that are counted for every op."""

from __future__ import annotations

import pytest
import torch
from ops.cases import each_sample
from ops.cases.base import Op, Sample
from ops.generic.calls import DIFFERENTIABLE
from support.arguments import with_grad
from support.gradients import gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_flops(op: Op, sample: Sample) -> None:
    args = sample.args("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        op.call(*args)
    least, most = op.flops(*args)
    assert least <= counter.get_total_flops() <= most
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        op.call(*tree_map_only(Tensor, mode.from_tensor, args))
    assert least <= counter.get_total_flops() <= most


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_flops_of_a_training_step(op: Op) -> None:
    args = with_grad(op.samples[0].args("cpu", torch.float32), op.grads)
    with FlopCounterMode(display=False) as counter:
        gradients(op.call, args)
    least, most = op.flops(*args)
    if op.exact:
        assert counter.get_total_flops() == 0
    else:
        assert 3 * least <= counter.get_total_flops() <= 4 * most
