"""Drawn calls of every op: legal ones equal the definition, all others end in a Python error.

    python -m pytest tests/ops/generic/test_fuzz.py --hypothesis-profile=nightly

makes 10,000 legal and 2,000 broken calls of each op, and prints the seed.
"""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from ops.cases import OPS, defined_ops
from ops.cases.base import Op
from ops.cases.connectivity_data import clear_of_rounding
from ops.cases.results import assert_results
from ops.generic.broken import Broken, broken_calls
from ops.generic.fuzzed import Call, calls
from support.arguments import tensors, to_dtype
from support.comparison import BACKWARD, assert_accurate, assert_same_bits
from support.data import FLOATING, ROW_DTYPES, random
from support.gradients import gradients
from support.memory import crash_free
from support.night import record
from support.switches import threads
from torch import Tensor
from torch.utils._pytree import tree_map_only

import spot_ext

LEGAL, BROKEN = 1.0, 0.2  # of the examples of a profile
# MemoryError: sizes that fit no address space.
REFUSED = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, MemoryError)

_UNKNOWN_TO_INDEX_PUT = frozenset(ROW_DTYPES) - {
    *FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.complex64, torch.complex128, torch.complex32,
}  # fmt: skip


def examples(part: float) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=max(1, round(part * hypothesis.settings.default.max_examples))
    )


def as_the_schema_reads(op: Op, args: tuple[Any, ...], public: bool = False) -> tuple[Any, ...]:
    """Arguments that were accepted, as the kernel gets them: with defaults, and plain numbers.

    To torch a None is no where a bool is asked for; to public functions, what they would choose.
    """
    kinds = {"int": int, "SymInt": int, "float": float, "bool": bool}
    schema = op.call.default._schema.arguments
    missing = [(x.name, x.default_value) for x in schema[len(args) :]]
    full = [*args, *(None if public and name == "class_token" else x for name, x in missing)]
    for place, (value, argument) in enumerate(zip(full, schema, strict=True)):
        kind = kinds.get(str(argument.type).removeprefix("Optional[").rstrip("]"))
        if kind is not None and value is not None:
            full[place] = kind(value)
        elif kind is bool and not public:
            full[place] = False
    return tuple(full)


def test_every_op_is_drawn() -> None:
    assert {op.name for op in OPS.values() if op.drawn is not None} == defined_ops()


def _expected(
    op: Op, args: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The definition's results, at the dtype of the call and in float64."""
    if not op.exact:
        wide = to_dtype(args, torch.float64)
        return tensors(op.reference(*args)), tensors(op.reference(*wide))
    same = dtype
    if dtype in _UNKNOWN_TO_INDEX_PUT:  # bits are moved, whatever they mean
        same = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        args = tree_map_only(
            Tensor, lambda x: x.resolve_neg().view(same) if x.dtype == dtype else x, args
        )
    plain = tensors(op.reference(*args))
    plain = [x.view(dtype) if x.dtype == same else x for x in plain]
    return plain, plain


def _leave_out_what_is_open(op: Op, *results: list[Tensor]) -> None:
    """A log-sum-exp that is not finite: the contract does not say whether it is NaN or infinite."""
    if op.name == "attention_stats" and len(results[0]) == 3:  # public functions return none
        mine, plain, exact = (of[2].isfinite() for of in results)
        open_ = ~mine & ~(plain & exact)
        for of in results:
            of[2] = of[2].masked_fill(open_, 0)


def _assert_gradients(op: Op, call: Call) -> None:
    with threads(call.threads):
        _, actual = gradients(op.call, call.args, call.kind)
    _, plain = gradients(op.reference, call.args, call.kind)
    _, exact = gradients(op.reference, to_dtype(call.args, torch.float64), call.kind)
    # Terms cancel that are as large as any gradient is.
    size = 1 + max((x.abs().max().item() for x in exact if x is not None and x.numel()), default=0)
    for number, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        if theirs is None or truth is None:
            assert mine is None or not mine.any(), f"gradient {number} should be zero"
            continue
        assert mine is not None, f"gradient {number} is missing"
        if op.exact:
            assert_same_bits(mine, theirs, f"gradient {number}")
        else:
            assert_accurate(mine, theirs, truth, BACKWARD, f"gradient {number}", 4 * size,
                            op.rounding(call.dtype))  # fmt: skip


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_legal_calls_equal_the_definition(op: Op) -> None:
    count = 0

    @examples(LEGAL)
    @given(calls(op.name))
    def check(call: Call) -> None:
        nonlocal count
        count += 1
        with torch.no_grad():
            with threads(call.threads):
                actual = tensors(op.call(*call.args))
                again = tensors(op.public(*call.args)) if op.public else []
            plain, exact = _expected(op, call.args, call.dtype)
        for mine, theirs in zip(again, actual, strict=False):
            assert_same_bits(mine, theirs, "public function")
        _leave_out_what_is_open(op, actual, plain, exact)
        terms = op.terms(*call.args) if op.terms else 0.0
        scale64 = op.scale64(*call.args) if op.scale64 else 1.0
        assert_results(op, call.dtype, actual, plain, exact, True, terms, scale64)
        if call.grads:
            _assert_gradients(op, call)

    check()
    record("legal", op.name, calls=count)


def _can_be_judged(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether the contract says what comes out."""
    names = {x.name for x in op.call.default._schema.arguments}
    if names & {"lse", "hidden1"}:  # results of a forward pass, which no longer fit
        return False
    numbers = [x for x in args if isinstance(x, int | float)]
    if not op.exact and not all(math.isfinite(x) and abs(x) < 2**63 for x in numbers):
        return False
    if "class_token" in names and not args[2].isfinite().all():  # v: hidden rows are not read
        return False
    if op.name == "fuse_tokens_backward" and not args[2].isfinite().all():
        return False
    return op.name != "predict_connectivity" or clear_of_rounding(*args)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.filterwarnings("ignore")
def test_broken_calls_are_refused_or_equal_the_definition(op: Op) -> None:
    count = accepted = 0

    @examples(BROKEN)
    @given(broken_calls(op.name))
    def check(call: Broken) -> None:
        nonlocal count, accepted
        count += 1
        with torch.no_grad():
            try:
                actual = tensors((op.public if call.public else op.call)(*call.args))
            except REFUSED as error:
                assert str(error)
                return
            accepted += 1
            if any(x.device.type == "meta" for x in actual):
                return
            if any(isinstance(x, torch.dtype) for x in call.args):  # torch's number of it is taken
                return
            full = as_the_schema_reads(op, call.args, call.public)
            if not _can_be_judged(op, full):
                return
            dtype = next(x.dtype for x in tensors(call.args) if x.is_floating_point() or op.exact)
            try:
                plain, exact = (x[: len(actual)] for x in _expected(op, full, dtype))
            except IndexError:  # of positions that lead to no token the definition reads too
                assert op.name == "token_evidence" or not any(x.numel() for x in actual)
                return
        _leave_out_what_is_open(op, actual, plain, exact)
        assert_results(op, dtype, actual, plain, exact, cancel=True)

    check()
    assert count > accepted
    record("broken", op.name, calls=count, refused=count - accepted)


@pytest.mark.parametrize("name", ["attention_stats", "sparse_attention"])
def test_the_variances_of_one_patch_without_a_softmax_are_nan(name: str) -> None:
    q, k, v = (random(x, (1, 2, 1, 4), torch.float32) for x in "qkv")
    q[0, 1, 0, 0] = math.nan
    if name == "attention_stats":
        stats = spot_ext.attention_stats(q, k, v)[1]
    else:
        index = torch.tensor([[[[0, 1]]]], dtype=torch.int32)
        stats = spot_ext.sparse_attention(q, k, v, index, need_stats=True)[1]
    assert stats[0, 1, 0, 1:].isnan().all()


_FREED = """
import sys
import torch
from ops.cases import OPS
from support.arguments import tensors

op = OPS[sys.argv[1]]
unread = {("sparse_attention_backward", 8)}  # statistics, without a gradient of them
for place in range(len(op.samples[0].args("cpu", torch.float32))):
    if (op.name, place) in unread:
        continue
    args = op.samples[0].args("cpu", torch.float32)
    for value in tensors(args[place : place + 1]):
        value.untyped_storage().resize_(0)
        try:
            op.call(*args)
        except (TypeError, ValueError, RuntimeError):
            continue
        raise SystemExit(f"argument {place} was not refused")
"""


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, id=name, marks=() if name == "select_tokens" else pytest.mark.nightly)
        for name, op in OPS.items()
    ],
)
def test_freed_storage_is_refused(op: Op) -> None:
    crash_free(_FREED, op.name)
