"""The compact slice against its definitions, on the inputs that break such code."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ops.cases import OPS
from support.arguments import tensors, to_dtype
from support.comparison import (
    assert_accurate,
    assert_close,
    assert_gradient,
    assert_same_bits,
    bits,
)
from support.data import FLOATING, ROW_DTYPES, generator, random, random_bits, random_index
from support.gradients import gradients
from support.layouts import LAYOUTS, lay_out, lay_out_index
from support.switches import cuda_kernels, isa, isa_control, threads
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import spot_ext
from spot_ext import (
    compact_tokens,
    compact_tokens_reference,
    fuse_tokens,
    fuse_tokens_reference,
    scatter_tokens,
    scatter_tokens_reference,
    select_tokens,
    select_tokens_reference,
)

# ---- select --------------------------------------------------------------------------------------

_ODD_SCORES = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1.0000001, 5e-324, -5e-324, 1e-45, 6e-8,
    -6e-8, 65504.0, 3.4e38, -3.4e38, 1e308, 2.0**-14, 0.1,
]  # fmt: skip


def best_positions(scores: list[float], num_keep: int) -> list[int]:
    """The definition once more, in plain Python: NaN last, ties to the lower position."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i]),
    )
    return sorted(order[:num_keep])


@st.composite
def score_rows(draw: Any) -> tuple[Tensor, int]:
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    number = st.one_of(
        st.sampled_from(_ODD_SCORES),
        st.integers(-3, 3).map(float),
        st.floats(allow_nan=True, allow_infinity=True),
    )
    rows = draw(
        st.lists(
            st.lists(number, min_size=num_tokens, max_size=num_tokens),
            min_size=batch,
            max_size=batch,
        )
    )
    dtype = draw(st.sampled_from(FLOATING))
    scores = torch.tensor(rows, dtype=torch.float64).reshape(batch, num_tokens).to(dtype)
    scores = lay_out(scores, draw(st.sampled_from(LAYOUTS)))
    return scores, draw(st.integers(0, num_tokens))


@given(score_rows())
def test_select_is_a_stable_sort(device: torch.device, case: tuple[Tensor, int]) -> None:
    scores, num_keep = case
    expected = [best_positions(row.tolist(), num_keep) for row in scores.double()]
    expected = torch.tensor(expected, dtype=torch.int64).reshape(len(scores), num_keep)
    scores = scores.to(device)
    assert_same_bits(select_tokens_reference(scores, num_keep).cpu(), expected, "reference")
    assert_same_bits(select_tokens(scores, num_keep).cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [0.0, -1.5, math.nan, math.inf, -math.inf])
def test_select_among_equals_takes_the_first(
    dtype: torch.dtype, value: float, device: torch.device
) -> None:
    for num_tokens in (1, 2, 63, 64, 65, 200):
        scores = torch.full((2, num_tokens), value, dtype=dtype, device=device)
        for num_keep in {0, 1, num_tokens // 2, num_tokens}:
            expected = torch.arange(num_keep, device=device).expand(2, num_keep)
            assert_same_bits(select_tokens(scores, num_keep), expected.contiguous())


@pytest.mark.parametrize("dtype", FLOATING)
def test_select_orders_every_bit_pattern(dtype: torch.dtype, device: torch.device) -> None:
    """All 65,536 half-precision values, or as many random bit patterns of the wider dtypes."""
    if dtype.itemsize == 2:
        patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        scores = patterns[torch.randperm(65536, generator=generator("patterns"))].view(dtype)
    else:
        scores = random_bits("patterns", (65536,), dtype)
    scores = scores[None].to(device)
    for num_keep in (1, 2047, 32768, 63489, 65535):
        expected = select_tokens_reference(scores, num_keep)
        assert_same_bits(select_tokens(scores, num_keep), expected, f"{num_keep} of {dtype}")


def test_select_from_more_tokens_than_it_can_count_is_refused(device: torch.device) -> None:
    scores = torch.rand(1, 1, device=device).expand(1, 2**31)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 tokens, got 2147483648"):
        select_tokens(scores, 1)


def test_select_has_no_gradient(device: torch.device) -> None:
    scores = random("scores", (2, 9), torch.float32, device).requires_grad_()
    index = select_tokens(scores, 4)
    assert index.dtype == torch.int64 and not index.requires_grad


# ---- compact, scatter and their gradients move bits ----------------------------------------------


@st.composite
def row_cases(draw: Any) -> dict[str, Any]:
    num_tokens = draw(st.integers(0, 12))
    return {
        "batch": draw(st.integers(0, 4)),
        "num_tokens": num_tokens,
        "num_keep": draw(st.integers(0, num_tokens)),
        "num_prefix": draw(st.sampled_from([0, 1, 2, 5])),
        "num_extra": draw(st.sampled_from([0, 0, 1, 3])),
        "row": draw(st.sampled_from([(), (1,), (3,), (8,), (0,), (2, 3), (33,), (2, 1, 2)])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "second_layout": draw(st.sampled_from(LAYOUTS)),
        "index_layout": draw(st.sampled_from(LAYOUTS)),
        "order": draw(st.sampled_from(["ascending", "shuffled"])),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def _rows(case: dict[str, Any], what: str, count: int, dtype: torch.dtype, make: Any) -> Tensor:
    shape = (case["batch"], count, *case["row"])
    layout = case["second_layout" if what == "second" else "layout"]
    return lay_out(make(f"{what} {case['seed']}", shape, dtype), layout)


def _index(case: dict[str, Any]) -> Tensor:
    index = random_index(
        str(case["seed"]), case["batch"], case["num_tokens"], case["num_keep"], case["order"]
    )
    return lay_out_index(index, case["index_layout"])


def _to(device: torch.device, *values: Any) -> list[Any]:
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_compact_moves_bits(device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    prefix = case["num_prefix"]
    tokens = _rows(case, "tokens", prefix + case["num_tokens"], dtype, random_bits)
    extra = _rows(case, "second", case["num_extra"], dtype, random_bits)
    extra = extra if case["num_extra"] else None
    index = _index(case)
    expected = compact_tokens_reference(
        bits(tokens), index, prefix, None if extra is None else bits(extra)
    )
    actual = compact_tokens(*_to(device, tokens, index, prefix, extra)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_scatter_moves_bits(device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    prefix, num_tokens = case["num_prefix"], case["num_tokens"]
    tokens = _rows(case, "tokens", prefix + case["num_keep"], dtype, random_bits)
    background = None
    if case["num_extra"]:
        background = _rows(case, "second", prefix + num_tokens, dtype, random_bits)
    index = _index(case)
    expected = scatter_tokens_reference(
        bits(tokens), index, num_tokens, prefix, None if background is None else bits(background)
    )
    actual = scatter_tokens(*_to(device, tokens, index, num_tokens, prefix, background)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_compact_backward_moves_bits(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype
) -> None:
    prefix, extra, num_tokens = case["num_prefix"], case["num_extra"], case["num_tokens"]
    grad = _rows(case, "tokens", prefix + extra + case["num_keep"], dtype, random_bits)
    index = _index(case)
    op = OPS["compact_tokens_backward"]
    expected = op.reference(bits(grad), index, num_tokens, prefix, extra)
    actual = op.call(*_to(device, grad, index, num_tokens, prefix, extra)).cpu()
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_same_bits(bits(actual), expected)


@given(case=row_cases(), dtype=st.sampled_from(ROW_DTYPES))
def test_scatter_and_compact_undo_each_other(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype
) -> None:
    prefix = case["num_prefix"]
    tokens = _rows(case, "tokens", prefix + case["num_tokens"], dtype, random_bits).to(device)
    index = _index(case).to(device)
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


# ---- a bad index is named, wherever it is --------------------------------------------------------


def _heavy(num_keep: int) -> tuple[Tensor, Tensor]:
    """Rows so large that each is a task of its own."""
    tokens = torch.randn(2, 1 + 2 * num_keep, 12000, generator=generator("heavy"))
    return tokens, random_index("heavy", 2, 2 * num_keep, num_keep)


@pytest.mark.parametrize("place", range(0, 16, 3))
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize(("value", "words"), [(-1, "is -1, out of range"), (32, "is 32, out of"),
                                              (None, "repeats position")])  # fmt: skip
def test_one_bad_entry_among_many_tasks(
    image: int, place: int, value: int | None, words: str
) -> None:
    tokens, index = _heavy(16)
    index[image, place] = index[image, (place + 5) % 16] if value is None else value
    later = max(place, (place + 5) % 16) if value is None else place
    where = re.escape(f"index[{image}, {later}]")
    kept = torch.randn(2, 17, 12000, generator=generator("kept"))
    weights = torch.rand(2, 32, generator=generator("weights"))
    for count in (1, 2, 4):
        with threads(count):
            for call in (
                lambda: compact_tokens(tokens, index),
                lambda: scatter_tokens(kept, index, 32),
                lambda: fuse_tokens(tokens, weights, index),
                lambda: torch.ops.spot.compact_tokens_backward(kept, index, 32),
                lambda: torch.ops.spot.fuse_tokens_backward(tokens[:, 0], tokens, weights, index),
            ):
                with pytest.raises((ValueError, RuntimeError), match=where + f".*{words}"):
                    call()


@pytest.mark.parametrize("num_tokens", [0, 5, 2**40, 2**61, 2**62])
def test_rows_without_bytes_cost_nothing(num_tokens: int, device: torch.device) -> None:
    tokens = torch.empty((2, 3, 0), device=device)
    index = torch.empty((2, 0), dtype=torch.int64, device=device)
    if cuda_kernels(device) and num_tokens > 5:
        return  # the map of positions is allocated there
    assert scatter_tokens(tokens, index, num_tokens, 3).shape == (2, 3 + num_tokens, 0)


def test_a_bad_index_into_empty_rows_is_named() -> None:
    empty, weights = torch.empty((2, 6, 0)), torch.rand(2, 5)
    for entries, words in (([[0, 3], [5, 1]], "is 5, out of"), ([[0, 3], [3, 3]], "repeats")):
        index = torch.tensor(entries)
        for call in (
            lambda i=index: compact_tokens(empty, i),
            lambda i=index: scatter_tokens(empty[:, :3], i, 5),
            lambda i=index: fuse_tokens(empty, weights, i),
            lambda i=index: torch.ops.spot.compact_tokens_backward(empty[:, :3], i, 5),
            lambda i=index: torch.ops.spot.fuse_tokens_backward(empty[:, 0], empty, weights, i),
        ):
            with pytest.raises((ValueError, RuntimeError), match=words):
                call()


@pytest.mark.parametrize("place", range(15))
def test_neighbours_that_repeat_across_tasks(place: int) -> None:
    tokens, index = _heavy(16)
    index[1, place + 1] = index[1, place]
    with threads(4), pytest.raises(ValueError, match=rf"index\[1, {place + 1}\] repeats"):
        compact_tokens(tokens, index)


@given(
    st.lists(st.integers(-2, 6), min_size=0, max_size=5),
    st.integers(0, 2),
    st.sampled_from(["compact", "scatter", "fuse"]),
)
@example([3, 3], 1, "compact")
@example([3, 1, 3], 0, "compact")
@example([4, 5], 0, "compact")
def test_any_index_is_right_or_refused(entries: list[int], prefix: int, which: str) -> None:
    index = torch.tensor([entries], dtype=torch.int64).reshape(1, len(entries))
    tokens = torch.randn(1, prefix + 5, 3, generator=generator("any"))
    weights = torch.rand(1, 5, generator=generator("weights"))
    kept = torch.randn(1, prefix + len(entries), 3, generator=generator("kept"))
    legal = all(0 <= e < 5 for e in entries) and len(set(entries)) == len(entries)
    call, reference, args = {
        "compact": (compact_tokens, compact_tokens_reference, (tokens, index, prefix)),
        "scatter": (scatter_tokens, scatter_tokens_reference, (kept, index, 5, prefix)),
        "fuse": (fuse_tokens, fuse_tokens_reference, (tokens, weights, index, prefix)),
    }[which]
    if legal:
        assert_close(call(*args), reference(*args), 1e-6)
    else:
        with pytest.raises(ValueError, match="index"):
            call(*args)


@st.composite
def any_shape(draw: Any, most: int = 4) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 3), min_size=0, max_size=most)))


@given(
    shapes=st.tuples(any_shape(), any_shape(3), any_shape(3)),
    dtypes=st.tuples(*(st.sampled_from([torch.float32, torch.int64, torch.float16]),) * 3),
    numbers=st.tuples(st.integers(-2, 5), st.integers(-2, 5)),
    which=st.sampled_from(["select", "compact", "scatter", "fuse"]),
)
def test_any_arguments_are_right_or_refused(
    shapes: Any, dtypes: Any, numbers: tuple[int, int], which: str
) -> None:
    """Whatever the shapes: the reference's answer, or TypeError/ValueError. Never a crash."""
    first = random("first", shapes[0], dtypes[0])
    second = random("second", shapes[1], dtypes[1])
    index = torch.arange(math.prod(shapes[2])).reshape(shapes[2]).to(dtypes[2])
    if index.dim() == 2:
        index = torch.arange(shapes[2][1]).expand(shapes[2]).to(dtypes[2])
    one, other = numbers
    call, reference, args = {
        "select": (select_tokens, select_tokens_reference, (first, one)),
        "compact": (compact_tokens, compact_tokens_reference, (first, index, one, second)),
        "scatter": (scatter_tokens, scatter_tokens_reference, (first, index, one, other, second)),
        "fuse": (fuse_tokens, fuse_tokens_reference, (first, second, index, one, True)),
    }[which]
    try:
        actual = call(*args)
    except (TypeError, ValueError) as error:
        assert str(error)
        return
    expected = reference(*args)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if which == "fuse":
        assert_close(actual, expected, 1e-3)
    else:
        assert torch.equal(actual, expected)


# ---- fuse ----------------------------------------------------------------------------------------


@given(
    case=row_cases(),
    dtype=st.sampled_from(FLOATING),
    normalize=st.booleans(),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_fuse_is_as_accurate_as_torch(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype, normalize: bool, sign: float
) -> None:
    case = case | {"row": (math.prod(case["row"]),)}
    tokens = _rows(case, "tokens", case["num_prefix"] + case["num_tokens"], dtype, random)
    weights = random(f"weights {case['seed']}", (case["batch"], case["num_tokens"]), torch.float64)
    weights = lay_out((sign * (weights.abs() + 0.05)).to(dtype), case["second_layout"])
    args = _to(device, tokens, weights, _index(case), case["num_prefix"], normalize)
    for value in args[:2]:
        value.requires_grad_()
    out, grads = gradients(fuse_tokens, tuple(args))
    plain, plain_grads = gradients(fuse_tokens_reference, tuple(args))
    exact_args = to_dtype(tuple(args), torch.float64)
    exact, exact_grads = gradients(fuse_tokens_reference, exact_args)
    assert_accurate(out, plain, exact)
    assert_gradient(grads[0], plain_grads[0], exact_grads[0], "tokens")
    # The gradient of a weight is the difference of two terms of this size; one token: zero.
    size = exact.abs().sum(-1).max().item() if exact.numel() else 0.0
    size = max(size, exact_args[0].detach().abs().sum(-1).max().item() if exact.numel() else 0.0)
    mass = exact_args[1].detach().abs()
    least = mass[mass > 0].min().item() if normalize and mass.numel() else 1.0
    assert_gradient(grads[1], plain_grads[1], exact_grads[1], "weights", 4 * size / least)


@pytest.mark.parametrize("dtype", FLOATING)
def test_fuse_of_nothing_is_zero(dtype: torch.dtype, device: torch.device) -> None:
    tokens = random("tokens", (3, 7, 5), dtype, device)
    index = random_index("index", 3, 6, 2, device=device)
    everything = random_index("all", 3, 6, 6, "shuffled", device)
    weights = random("weights", (3, 6), dtype, device)
    none = torch.zeros_like(weights)
    opposite = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5, -0.5]], device=device, dtype=dtype)
    some = torch.tensor([[1, 4]], device=device)
    for w, i in ((weights, everything), (none, index), (opposite[:1].expand(3, 6), everything)):
        w = w.clone().requires_grad_()
        x = tokens.clone().requires_grad_()
        out = fuse_tokens(x, w, i)
        assert_same_bits(out, torch.zeros_like(out))
        out.sum().backward()
        assert not x.grad.any() and not w.grad.any()
    assert_same_bits(fuse_tokens(tokens, weights, everything, normalize=False),
                     torch.zeros(3, 5, dtype=dtype, device=device))  # fmt: skip
    assert fuse_tokens(tokens[:1], opposite, some).isfinite().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_fuse_never_reads_prefix_or_kept_tokens(
    odd: float, normalize: bool, device: torch.device
) -> None:
    tokens = random("tokens", (2, 9, 5), torch.float32, device)
    weights = random("weights", (2, 7), torch.float32, device).abs()
    index = random_index("index", 2, 7, 3, "shuffled", device)
    clean, _ = gradients(lambda *a: fuse_tokens(*a, 2, normalize), (tokens, weights, index))
    tokens[:, :2] = odd
    for image in range(2):
        tokens[image, 2 + index[image]] = odd
        weights[image, index[image]] = odd
    tokens.requires_grad_()
    weights.requires_grad_()
    out, grads = gradients(lambda *a: fuse_tokens(*a, 2, normalize), (tokens, weights, index))
    assert_same_bits(out, clean)
    for grad in grads:
        assert grad.isfinite().all()
    assert not grads[0][:, :2].any()
    for image in range(2):
        assert not grads[0][image, 2 + index[image]].any()
        assert not grads[1][image, index[image]].any()


@pytest.mark.parametrize("weight", [1e-45, 1e-40, 1e-38, 3e37])
def test_fuse_with_weights_at_the_ends_of_the_range(weight: float, device: torch.device) -> None:
    tokens = random("tokens", (2, 9, 5), torch.float32, device)
    index = random_index("index", 2, 8, 4, device=device)
    weights = torch.full((2, 8), weight, device=device)
    expected = fuse_tokens_reference(tokens, weights, index)
    assert expected.isfinite().all()
    torch.testing.assert_close(fuse_tokens(tokens, weights, index), expected, rtol=0.3, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_fuse_hands_odd_values_on(odd: float, dtype: torch.dtype, device: torch.device) -> None:
    tokens = random("tokens", (1, 6, 4), dtype, device)
    weights = torch.rand(1, 5, generator=generator("weights")).to(device, dtype)
    index = torch.tensor([[0, 2]], device=device)
    tokens[0, 4, 1] = odd
    out = fuse_tokens(tokens, weights, index)
    assert out[0, 1].isnan() if math.isnan(odd) else out[0, 1] == odd
    assert out[0, [0, 2, 3]].isfinite().all()
    weights[0, 3] = odd
    actual = fuse_tokens(tokens, weights, index)
    expected = fuse_tokens_reference(tokens, weights, index)
    assert_same_bits(actual.isfinite(), expected.isfinite())
    assert_same_bits(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_value_is_read_and_rounded_as_torch_does(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Sums of two values are exact in float32, so that the result is one rounding."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    others = patterns[torch.randperm(65536, generator=generator("others"))]
    tokens = torch.stack([patterns, others]).view(dtype)[None].to(device)
    empty = torch.empty((1, 0), dtype=torch.int64, device=device)
    for weight in (1.0, 2.0**-10):  # the second gives subnormal results
        weights = torch.full((1, 2), weight, dtype=dtype, device=device)
        actual = fuse_tokens(tokens, weights, empty, num_prefix=0, normalize=False)
        expected = (tokens[:, 0].float() * weight + tokens[:, 1].float() * weight).to(dtype)
        assert_same_bits(actual.isnan(), expected.isnan())
        same = (actual == expected) | expected.isnan()
        assert same.all(), f"{int((~same).sum())} values differ"


def test_fuse_of_a_softmax_stays_inside_the_tokens(device: torch.device) -> None:
    tokens = random("tokens", (4, 30, 8), torch.float32, device)
    weights = random("weights", (4, 29), torch.float32, device).softmax(-1)
    index = random_index("index", 4, 29, 11, device=device)
    out = fuse_tokens(tokens, weights, index)
    assert (out <= tokens[:, 1:].amax(1)).all() and (out >= tokens[:, 1:].amin(1)).all()


# ---- gradients -----------------------------------------------------------------------------------


@given(case=row_cases(), kind=st.sampled_from(["random", "expanded", "transposed", "partial"]))
def test_gradients_equal_those_of_the_definitions(
    device: torch.device, case: dict[str, Any], kind: str
) -> None:
    prefix, num_tokens = case["num_prefix"], case["num_tokens"]
    index = _index(case).to(device)
    full = _rows(case, "tokens", prefix + num_tokens, torch.float64, random).to(device)
    kept = _rows(case, "second", prefix + case["num_keep"], torch.float64, random).to(device)
    extra = _rows(case, "second", case["num_extra"], torch.float64, random).to(device)
    for call, reference, args in (
        (compact_tokens, compact_tokens_reference, (full, index, prefix, extra)),
        (scatter_tokens, scatter_tokens_reference, (kept, index, num_tokens, prefix, full)),
        (scatter_tokens, scatter_tokens_reference, (kept, index, num_tokens, prefix)),
    ):
        leaves = tuple(
            a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a is not index else a
            for a in args
        )
        _, actual = gradients(call, leaves, kind)
        _, expected = gradients(reference, leaves, kind)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same_bits(mine, theirs)


def _small(op: str) -> list[Any]:
    names = [s.name for s in OPS[op].samples if "ViT" not in s.name and "odd sizes" not in s.name]
    assert len(names) >= 20
    return [pytest.param(op, name, id=f"{op}-{name}".replace(" ", "_")) for name in names]


def _leaves(op: str, name: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    """A function of the differentiable arguments, and those, without overlapping memory."""
    args = OPS[op].sample(name).args(device, torch.float64)
    places = [i for i in OPS[op].grads if i < len(args) and isinstance(args[i], Tensor)]
    leaves = [args[i].detach().clone(memory_format=torch.contiguous_format) for i in places]

    def function(*values: Tensor) -> Any:
        filled = list(args)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return OPS[op].call(*filled)

    return function, [leaf.requires_grad_() for leaf in leaves]


_TWICE = ["compact_tokens", "compact_tokens_backward", "scatter_tokens"]


@pytest.mark.parametrize(("op", "name"), [p for op in (*_TWICE, "fuse_tokens") for p in _small(op)])
def test_gradcheck(op: str, name: str, device: torch.device) -> None:
    function, leaves = _leaves(op, name, device)
    assert gradcheck(function, leaves, check_undefined_grad=False)


@pytest.mark.parametrize(("op", "name"), [p for op in _TWICE for p in _small(op)])
def test_gradgradcheck(op: str, name: str, device: torch.device) -> None:
    function, leaves = _leaves(op, name, device)
    assert gradgradcheck(function, leaves, check_undefined_grad=False)


def test_complex_gradients(device: torch.device) -> None:
    tokens = random("tokens", (2, 6, 2), torch.complex128, device).requires_grad_()
    index = random_index("index", 2, 5, 3, "shuffled", device)
    assert gradcheck(lambda x: compact_tokens(x, index), (tokens,))
    assert gradgradcheck(lambda x: compact_tokens(x, index), (tokens,))
    assert gradcheck(lambda x: scatter_tokens(x[:, :4], index, 7), (tokens,))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_meet_under_autocast(ambient: torch.dtype, device: torch.device) -> None:
    """A float32 residual stream beside what linear layers and softmax return under autocast."""
    wide = random("wide", (2, 6, 4), torch.float32, device)
    index = random_index("index", 2, 5, 3, "shuffled", device)
    weights = random("weights", (2, 5), torch.float32, device).softmax(-1)
    with torch.amp.autocast(device.type, dtype=ambient):
        for tokens in (wide, wide.to(ambient)):
            for w in (weights, weights.to(ambient)):
                out = fuse_tokens(tokens, w, index)
                assert out.dtype == ambient
                assert_same_bits(out, fuse_tokens(wide.to(ambient), weights.to(ambient), index))
            assert compact_tokens(tokens, index).dtype == tokens.dtype
            for extra in (wide[:, :2], wide[:, :2].to(ambient)):
                common = torch.promote_types(tokens.dtype, extra.dtype)
                out = compact_tokens(tokens, index, 1, extra)
                expected = compact_tokens_reference(tokens.to(common), index, 1, extra.to(common))
                assert_same_bits(out, expected)
            for background in (wide, wide.to(ambient)):
                common = torch.promote_types(tokens.dtype, background.dtype)
                out = scatter_tokens(tokens[:, :4], index, 5, 1, background)
                expected = scatter_tokens_reference(
                    tokens[:, :4].to(common), index, 5, 1, background.to(common)
                )
                assert_same_bits(out, expected)
            whole = torch.ones(2, 6, 4, dtype=torch.int64, device=device)
            assert compact_tokens(whole, index).dtype == torch.int64
    with pytest.raises(TypeError, match="weights"):
        fuse_tokens(wide.to(ambient), weights, index)


# ---- devices without kernels ---------------------------------------------------------------------


def test_meta_tensors_give_shapes() -> None:
    tokens = torch.empty(2, 9, 5, device="meta")
    index = spot_ext.select_tokens(torch.empty(2, 8, device="meta"), 3)
    assert index.shape == (2, 3) and index.dtype == torch.int64 and index.device.type == "meta"
    assert compact_tokens(tokens, index).shape == (2, 4, 5)
    assert scatter_tokens(tokens[:, :4], index, 8).shape == (2, 9, 5)
    assert fuse_tokens(tokens, torch.empty(2, 8, device="meta"), index).shape == (2, 5)
    assert tensors(compact_tokens(tokens, index))[0].device.type == "meta"
