"""compact_tokens, scatter_tokens and their gradients move bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import OPS
from ops.compact.drawn import index_of, moved, row_cases, rows_of
from support.arguments import tensors
from support.comparison import assert_same_bits, bits
from support.data import ROW_DTYPES, generator, random, random_bits, random_index
from support.layouts import lay_out
from support.switches import isa, isa_control

import spot_ext
from spot_ext import (
    compact_tokens,
    compact_tokens_reference,
    fuse_tokens,
    scatter_tokens,
    scatter_tokens_reference,
    select_tokens,
)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_compact_moves_bits(device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    prefix = case["num_prefix"]
    tokens = rows_of(case, "tokens", prefix + case["num_tokens"], dtype, random_bits)
    extra = rows_of(case, "second", case["num_extra"], dtype, random_bits)
    extra = extra if case["num_extra"] else None
    index = index_of(case)
    expected = compact_tokens_reference(
        bits(tokens), index, prefix, None if extra is None else bits(extra)
    )
    actual = compact_tokens(*moved(device, tokens, index, prefix, extra)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_scatter_moves_bits(device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    prefix, num_tokens = case["num_prefix"], case["num_tokens"]
    tokens = rows_of(case, "tokens", prefix + case["num_keep"], dtype, random_bits)
    background = None
    if case["num_extra"]:
        background = rows_of(case, "second", prefix + num_tokens, dtype, random_bits)
    index = index_of(case)
    expected = scatter_tokens_reference(
        bits(tokens), index, num_tokens, prefix, None if background is None else bits(background)
    )
    actual = scatter_tokens(*moved(device, tokens, index, num_tokens, prefix, background)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_compact_backward_moves_bits(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype
) -> None:
    prefix, extra, num_tokens = case["num_prefix"], case["num_extra"], case["num_tokens"]
    grad = rows_of(case, "tokens", prefix + extra + case["num_keep"], dtype, random_bits)
    index = index_of(case)
    op = OPS["compact_tokens_backward"]
    expected = op.reference(bits(grad), index, num_tokens, prefix, extra)
    actual = op.call(*moved(device, grad, index, num_tokens, prefix, extra)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_scatter_and_compact_undo_each_other(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype
) -> None:
    prefix = case["num_prefix"]
    tokens = rows_of(case, "tokens", prefix + case["num_tokens"], dtype, random_bits).to(device)
    index = index_of(case).to(device)
    compacted = compact_tokens(tokens, index, prefix)
    grid = scatter_tokens(compacted, index, case["num_tokens"], prefix, background=tokens)
    assert_same_bits(bits(grid), bits(tokens))
    assert_same_bits(bits(compact_tokens(grid, index, prefix)), bits(compacted))


def test_every_dtype_of_torch_is_moved_or_refused() -> None:
    kinds = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    index = torch.tensor([[2, 0]])
    moved = set()
    for dtype in sorted(kinds, key=str):
        try:
            tokens = torch.empty((1, 4, 3), dtype=dtype)
        except (RuntimeError, NotImplementedError):
            continue
        try:
            out = compact_tokens(tokens, index)
        except TypeError as error:
            assert "tokens" in str(error)
            continue
        assert out.dtype == dtype
        moved.add(dtype)
    assert moved == set(ROW_DTYPES)


@pytest.mark.parametrize("view", ["conj", "imag of conj", "real", "diagonal"])
def test_lazy_views_are_resolved(view: str, device: torch.device) -> None:
    base = random("complex", (2, 6, 3), torch.complex64, device)
    tokens = {
        "conj": base.conj(),
        "imag of conj": base.conj().imag,
        "real": base.real,
        "diagonal": torch.diag_embed(base.real).diagonal(dim1=-2, dim2=-1),
    }[view]
    index = random_index("index", 2, 5, 3, "shuffled", device)
    plain = tokens.resolve_conj().resolve_neg().contiguous()
    assert_same_bits(compact_tokens(tokens, index), compact_tokens_reference(plain, index))
    grid = scatter_tokens(tokens[:, :4], index, 9)
    assert_same_bits(grid, scatter_tokens_reference(plain[:, :4], index, 9))


def _instruction_sets() -> list[str]:
    return isa_control().isas()


# Larger than the caches, one image split between threads, rows of a multiple of 64 bytes and not:
# where copies are blocked, prefetched or streamed.
_BIG = [
    (3, 1500, 700, 1, 0, 1024),
    (2, 2100, 1100, 5, 3, 1024),
    (1, 9000, 2100, 0, 1, 1024),
    (2, 1100, 1030, 1, 1, 1000),
    (64, 196, 137, 1, 0, 256),
    (2, 800, 400, 3, 2, 1023),
]


@pytest.mark.parametrize("shape", _BIG, ids=str)
def test_large_outputs_on_every_instruction_set(shape: tuple[int, ...]) -> None:
    batch, num_tokens, num_keep, prefix, num_extra, width = shape
    tokens = torch.randn(batch, prefix + num_tokens, width, generator=generator("large"))
    extra = torch.randn(batch, num_extra, width, generator=generator("extra"))
    background = torch.randn(tokens.shape, generator=generator("background"))
    # Shifted by one element: rows are not aligned, and the copies must not assume it.
    shifted = lay_out(tokens, "offset")
    index = random_index("large", batch, num_tokens, num_keep, "shuffled")
    kept = compact_tokens_reference(tokens, index, prefix, extra)
    grid = scatter_tokens_reference(kept[:, num_extra:], index, num_tokens, prefix)
    filled = scatter_tokens_reference(kept[:, num_extra:], index, num_tokens, prefix, background)
    back = OPS["compact_tokens_backward"].reference(kept, index, num_tokens, prefix, num_extra)
    for name in _instruction_sets():
        with isa(name):
            for source in (tokens, shifted):
                assert_same_bits(compact_tokens(source, index, prefix, extra), kept, name)
            args = (kept[:, num_extra:], index, num_tokens, prefix)
            assert_same_bits(scatter_tokens(*args), grid, name)
            assert_same_bits(scatter_tokens(*args, background), filled, name)
            actual = OPS["compact_tokens_backward"].call(kept, index, num_tokens, prefix, num_extra)
            assert_same_bits(actual, back, name)


def test_offsets_beyond_two_to_the_31() -> None:
    """Strides and positions whose product does not fit 32 bits; the memory is never touched."""
    numpy = pytest.importorskip("numpy")
    space = torch.from_numpy(numpy.zeros(2**32 + 4096, dtype=numpy.uint8))  # zeros: not resident
    positions = [3, 2**31 + 5, 2**32 + 7]
    for number, at in enumerate(positions):
        space[at + 1 : at + 5] = torch.tensor([number + 1, number + 2, number + 3, number + 4])
    tokens = space.as_strided((1, 2**32 + 16, 4), (0, 1, 1))  # overlapping rows, one per byte
    index = torch.tensor([positions])
    expected = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]], dtype=torch.uint8)
    assert torch.equal(compact_tokens(tokens, index)[0, 1:], expected)

    far = 2**31 + 64
    halves = space.view(torch.bfloat16)[: far + 64].as_strided((2, 5, 8), (far - 32, 8, 1))
    halves.copy_(random("far", (2, 5, 8), torch.bfloat16))
    near = halves.clone()
    index = torch.tensor([[3, 0], [1, 2]])
    assert_same_bits(compact_tokens(halves, index), compact_tokens(near, index))
    assert_same_bits(scatter_tokens(halves[:, :3], index, 7), scatter_tokens(near[:, :3], index, 7))
    weights = random("weights", (2, 4), torch.float32).abs().bfloat16()
    assert_same_bits(fuse_tokens(halves, weights, index), fuse_tokens(near, weights, index))
    scores = halves[:, 0]
    assert_same_bits(select_tokens(scores, 3), select_tokens(near[:, 0].contiguous(), 3))


def test_meta_tensors_give_shapes() -> None:
    tokens = torch.empty(2, 9, 5, device="meta")
    index = spot_ext.select_tokens(torch.empty(2, 8, device="meta"), 3)
    assert index.shape == (2, 3) and index.dtype == torch.int64 and index.device.type == "meta"
    assert compact_tokens(tokens, index).shape == (2, 4, 5)
    assert scatter_tokens(tokens[:, :4], index, 8).shape == (2, 9, 5)
    assert fuse_tokens(tokens, torch.empty(2, 8, device="meta"), index).shape == (2, 5)
    assert tensors(compact_tokens(tokens, index))[0].device.type == "meta"


def test_rows_in_front_of_the_indexed_ones_are_named() -> None:
    """As EViT's fused token: left out, or counted in the prefix."""
    tokens = random("tokens", (2, 5, 3), torch.float32)
    index = random_index("index", 2, 8, 3, "shuffled")
    cure = "size 4 .*leave fused tokens in front of the indexed out, or count them in num_prefix"
    with pytest.raises(ValueError, match=cure):
        scatter_tokens(tokens, index, 8)
    with pytest.raises(ValueError, match=cure):
        torch.ops.spot.scatter_tokens(tokens.to("meta"), index.to("meta"), 8)
    without = scatter_tokens(torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1), index, 8)
    counted = scatter_tokens(tokens, index, 8, num_prefix=2)
    assert_same_bits(without[:, 1:], counted[:, 2:])
    with pytest.raises(ValueError, match="size 4 ") as caught:  # too few: no fused tokens
        scatter_tokens(tokens[:, :3], index, 8)
    assert "fused" not in str(caught.value)
