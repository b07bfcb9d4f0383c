"""A bad index is named, wherever it is, and other wrong arguments are refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.comparison import assert_close
from support.data import generator, random, random_index
from support.switches import cuda_kernels, threads
from torch import Tensor

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
