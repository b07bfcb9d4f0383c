"""What tracing makes of sizes."""

from __future__ import annotations

import pytest
import torch
from spot_vit.utils.tracing import known, refuse_symbols
from torch import Tensor


def test_sizes_are_plain_while_tracing(recwarn):
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append((type(x.shape[1]), known(x.shape[1])))
        return x * known(x.shape[1])

    traced = torch.jit.trace(function, torch.ones(2, 5))
    assert seen[0] == (Tensor, 5) and type(seen[0][1]) is int
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    assert torch.equal(traced(torch.ones(3, 5)), torch.full((3, 5), 5.0))


def test_other_sizes_stay_what_they_are():
    assert known(7) == 7
    program = torch.export.export(
        _Twice(), (torch.ones(4, 3),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    assert program.module()(torch.ones(6, 3)).shape == (6, 3)


class _Twice(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(known(x.shape[0]), 1)


def test_symbols_of_fx_are_refused():
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace .* cannot follow"):
        torch.fx.symbolic_trace(_Twice())
    refuse_symbols(None, 3, torch.ones(2))
