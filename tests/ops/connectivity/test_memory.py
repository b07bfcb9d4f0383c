"""Memory of both ops: no matrix of scores, nothing behind the arguments."""

from __future__ import annotations

import json

import pytest
from support.memory import MEASURE_MEMORY, crash_free

_SCRATCH = """
import json
import torch
import spot_ext

torch.set_num_threads(2)
found = []
for call in (spot_ext.connectivity, spot_ext.connectivity_reference):
    for count in (65, 1025):  # the first call warms up
        coefficients, basis = torch.rand(2, 6, count - 1, 32), torch.rand(32, count)
        most, index = rise(lambda: call(coefficients, basis, 50, coef_topk=8))
    found.append(most - 4 * index.numel())
print(json.dumps(found))
"""


def test_no_score_matrix_is_ever_in_memory() -> None:
    """Peak resident size beyond the result, of 12 matrices of 1024 x 1025: 0.05 of their bytes."""
    kernel, reference = json.loads(crash_free(MEASURE_MEMORY + _SCRATCH))
    matrices = 2 * 6 * 1024 * 1025 * 4
    assert reference > matrices, "the measurement does not see matrices where there are some"
    assert kernel <= 0.05 * matrices


_PREDICTION_SCRATCH = """
import json
import torch
import spot_ext

torch.set_num_threads(2)

def stored(q, k, down, up, budget, coef_topk):
    keys = torch.einsum("nr,bnhd->bhdr", down, k)
    return spot_ext.connectivity(q.transpose(1, 2) @ keys, up.mT, budget, coef_topk=coef_topk)

def inside(channels):
    weight, bias = torch.rand(channels, 32) - 0.5, torch.rand(channels)
    both = dict(query_weight=weight, query_bias=bias, key_weight=weight, key_bias=bias)
    return lambda *args, **more: spot_ext.predict_connectivity(*args, **both, **more)

found = []
for call in (spot_ext.predict_connectivity, inside(16), inside(96), stored,
             spot_ext.predict_connectivity_reference):
    for count in (65, 1025):  # the first call warms up
        packed = torch.rand(8, count, 3, 6, 32)
        args = packed[:, 1:, 0], packed[:, :, 1], *torch.rand(2, count, 32), 50
        most, index = rise(lambda: call(*args, coef_topk=8))
    found.append(most - 4 * index.numel())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_coefficients_are_ever_in_memory() -> None:
    """Nor projections, nor queries and keys whose strides are others: half of the bytes of
    coefficients, beside 48 matrices of scores."""
    *inside, stored, reference = json.loads(crash_free(MEASURE_MEMORY + _PREDICTION_SCRATCH))
    coefficients, matrices = 8 * 6 * 1024 * 32 * 4, 8 * 6 * 1024 * 1025 * 4
    assert reference > matrices, "the measurement does not see matrices where there are some"
    assert stored > 0.8 * coefficients, "nor coefficients"
    assert len(inside) == 3 and max(inside) <= 0.5 * coefficients, inside


_EDGES = """
import torch
import spot_ext
from support.memory import guarded

draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for queries, prefix, rank, grid in ((1, 0, 1, 1), (7, 1, 3, 9), (16, 0, 8, 16), (33, 2, 5, 40),
                                        (64, 1, 17, 65), (130, 3, 33, 150)):
        coefficients = guarded(torch.randn(2, 3, queries, rank, generator=draw).to(dtype))
        basis = guarded(torch.randn(rank, grid, generator=draw).to(dtype))
        keep = guarded((torch.rand(2, queries, generator=draw) < 0.6).to(dtype))
        columns = torch.stack([torch.randperm(grid, generator=draw)[: queries + prefix]] * 2)
        for budget in {1, queries, queries + prefix} if queries < 60 else {7}:
            for topk in (None, 2):
                named = spot_ext.connectivity(coefficients, basis, budget, guarded(columns), keep,
                                              coef_topk=topk)
                assert named.max() < queries + prefix
        for dim, channels in ((1, None), (5, None), (16, 3), (5, 2), (3, 17), (16, 16)):
            tokens = queries + prefix
            shapes = (2, queries, 3, dim), (2, tokens, 3, dim), (grid, rank)
            up = guarded(torch.randn(grid, rank, generator=draw).to(dtype))
            fused = columns.clone()
            fused[:, -1] = grid
            if channels is not None:
                shapes += (channels, dim), (channels,), (channels, dim), (channels,)
            drawn = [guarded(torch.randn(s, generator=draw).to(dtype)) for s in shapes]
            drawn += [None] * (7 - len(drawn))
            named = torch.ops.spot.predict_connectivity(
                *drawn, up, tokens, guarded(fused) if tokens < grid else None, keep,
                coef_topk=2, basis_threshold=0.5 if dim == 5 else None)
            assert named.max() < tokens
        for bad in (grid, -1, 2**31, 2**62, -(2**62)):
            columns[1, -1] = bad
            try:
                spot_ext.connectivity(coefficients, basis, 1, guarded(columns), keep)
                raise SystemExit(f"{bad} was not refused")
            except ValueError as error:
                assert "columns" in str(error)
"""


def test_nothing_is_read_behind_the_arguments() -> None:
    """They end where memory begins that ends the process when it is touched."""
    crash_free(_EDGES)
