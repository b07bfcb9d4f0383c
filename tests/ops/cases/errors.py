"""Error inputs that several ops have, and tensors to make them of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ops.cases.base import Bad, unique
from support.data import random
from torch import Tensor


def t(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Values, the same for every tensor of a shape."""
    return random(unique("error", shape), shape, dtype, device)


def ints(device: Any, *rows: list[int]) -> Tensor:
    """Positions [B, number], an image a row."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def prefix_errors(build: Callable[[Any, Any], tuple[Any, ...]], high: int) -> list[Bad]:
    """Wrong numbers of prefix tokens, of which there may be `high`."""

    def bad(value: Any, raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(f"num_prefix {value!r}", lambda d: build(d, value), raises, words, **more)

    return [
        bad(-1, ValueError, ("num_prefix", "-1")),
        bad(high + 1, ValueError, ("num_prefix", f"{high}", f"{high + 1}")),
        bad(2**62, ValueError, ("num_prefix", f"{2**62}")),
        bad(2**70, ValueError, ("num_prefix",), op_words=("num_prefix",)),
        bad(1.0, TypeError, ("num_prefix", "float"), op_words=("num_prefix",)),
        bad("1", TypeError, ("num_prefix", "str"), op_words=("num_prefix",)),
        bad(True, TypeError, ("num_prefix", "bool"), op_accepts=True),
        bad(None, TypeError, ("num_prefix", "NoneType"), op_words=("num_prefix",)),
    ]


def tensor_errors(
    name: str, build: Callable[[Any, Any], tuple[Any, ...]], good: tuple[int, ...], ranks: str
) -> list[Bad]:
    """A `name` that is no tensor, or a tensor of the wrong kind."""

    def bad(label: str, value: Callable[[Any], Any], words: Any, **more: Any) -> Bad:
        return Bad(f"{name} {label}", lambda d: build(d, value(d)), TypeError, words, **more)

    return [
        bad("is None", lambda d: None, (name, "NoneType"), op_words=()),
        bad("is a list", lambda d: [1.0], (name, "list"), op_words=()),
        bad("is sparse", lambda d: t(*good, device=d).to_sparse(), (name, "sparse"), layouts=True),
        Bad(f"{name} is a number", lambda d: build(d, torch.tensor(1.0, device=d)), ValueError,
            (name, ranks, "[]")),
    ]  # fmt: skip


def keep_errors(build: Callable[[Any, Any], tuple[Any, ...]]) -> list[Bad]:
    """Wrong masks beside 2 images of 5 patch tokens."""

    def bad(label: str, keep: Callable[[Any], Any], words: Any, raises: Any = ValueError,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(f"keep {label}", lambda d: build(d, keep(d)), raises, words, **more)

    return [
        bad("is a list", lambda d: [1.0], ("keep", "list"), TypeError, op_words=("keep",)),
        bad("of rank 1", lambda d: t(5, device=d), ("keep", "2 dim")),
        bad("bool", lambda d: t(2, 5, dtype=torch.bool, device=d), ("keep", "bool"), TypeError),
        bad("of another batch", lambda d: t(1, 5, device=d), ("keep", "size 2", "[1, 5]")),
        bad("with the prefix", lambda d: t(2, 6, device=d), ("keep", "size 5", "[2, 6]")),
        bad("on another device", lambda d: t(2, 5, device="meta"), ("keep", "device")),
        *(bad(label, lambda d, v=value: torch.full((2, 5), v, device=d), ("keep", "0 or 1"),
              values=True)
          for label, value in (("between 0 and 1", 0.5), ("of 2", 2.0), ("NaN", math.nan))),
    ]  # fmt: skip
