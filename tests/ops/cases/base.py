"""What a case file says about an op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from support.data import FLOATING

NAN = (math.nan,)
ANY = (math.nan, math.inf, -math.inf, -0.0, 1e-42)


@dataclass(frozen=True)
class Sample:
    """One legal call; `args(device, dtype)` builds its positional arguments anew."""

    name: str
    args: Callable[[Any, torch.dtype], tuple[Any, ...]]
    traced: bool = False  # also used by the slow tests: opcheck, compile


@dataclass(frozen=True)
class Bad:
    """One refused call; `words` are in the error of the public function and of the op alike."""

    name: str
    args: Callable[[Any], tuple[Any, ...]]
    raises: type[Exception]
    words: tuple[str, ...]
    op_words: tuple[str, ...] | None = None  # when the op says it otherwise
    op_accepts: bool = False  # Python is stricter than the schema
    values: bool = False  # seen only by looking at values: on the CPU, not when tracing
    layouts: bool = False  # no kernel for the layout: torch's own error, which fakes do not give


@dataclass(frozen=True)
class Unread:
    """A call with bad values, which CUDA does not refuse; `holds(*outputs)` of what it gives."""

    name: str
    args: Callable[[Any], tuple[Any, ...]]
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Op:
    """Everything the generic tests need to know about an op."""

    name: str
    reference: Callable[..., Any]  # plain PyTorch, the op's own positional arguments and outputs
    samples: tuple[Sample, ...]
    errors: tuple[Bad, ...]
    flops: Callable[..., tuple[int, int]]  # least and most, of the positional arguments
    grads: tuple[int, ...] = ()  # argument places with a gradient
    twice: bool = False  # whether second derivatives work
    exact: bool = True  # moves bits; otherwise computes
    public: Callable[..., Any] | None = None  # None: a backward op
    dtypes: tuple[torch.dtype, ...] = FLOATING
    once_only: str = ""  # words of the error when differentiated beyond what it can
    weights: tuple[int, ...] = ()  # argument places without a batch dimension
    roundings: int = 0  # of intermediate results, on the way to one of the outputs
    large: str = ""  # sample that is large as it is; otherwise one is repeated to be
    gpu: tuple[Sample, ...] = ()  # every path of the CUDA kernels, few: sanitizers are slow
    unread: tuple[Unread, ...] = ()  # sanitizers see whether foreign memory is touched
    drawn: Any = None  # Hypothesis strategy of samples: any legal call of a size soon computed
    drawn_dtypes: tuple[torch.dtype, ...] = FLOATING  # of these calls
    # Of the arguments: how large terms are that cancel in the results; of attention, the logits.
    terms: Callable[..., float] | None = field(default=None, compare=False)
    # Of float64 arguments: what the results are compared relative to, if more than the largest.
    scale64: Callable[..., float] | None = field(default=None, compare=False)
    # Numbers whose effect the contract states, by argument place; one is planted in drawn calls.
    odd: Mapping[int, tuple[float, ...]] = field(default_factory=dict, compare=False)

    @property
    def call(self) -> Callable[..., Any]:
        return getattr(torch.ops.spot, self.name)

    def rounding(self, dtype: torch.dtype) -> float:
        """What 16-bit intermediate results may lose, relative to the result."""
        return self.roundings * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0

    def sample(self, name: str) -> Sample:
        return next(sample for sample in self.samples if sample.name == name)


def samples(cases: Iterable[Any], make: str = "args") -> tuple[Sample, ...]:
    """A sample of each case, whose method `make` builds the arguments."""
    return tuple(Sample(case.name, getattr(case, make), case.traced) for case in cases)


def unique(name: str, shape: tuple[int, ...]) -> str:
    """A name for each shape."""
    return f"{name} {shape}"


def positional(function: Callable[..., Any], places: int, *names: str) -> Callable[..., Any]:
    """`function` with the op's positional arguments, of which those behind `places` are `names`."""

    def call(*args: Any) -> Any:
        return function(*args[:places], **dict(zip(names, args[places:], strict=False)))

    return call


def no_flops(*args: Any) -> tuple[int, int]:
    """Of ops that only move and compare."""
    return 0, 0
