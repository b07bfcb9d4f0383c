"""Calls every CUDA kernel over odd shapes and dtypes and compares with the definition on the CPU.

    compute-sanitizer --tool memcheck python tools/gpu/gpu_sample.py compact

The calls are the `gpu` and `unread` ones of tests/ops/cases. Small on purpose: a sanitizer slows
everything down. Bad indices are among the calls: what they must not do is touch foreign memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from ops.cases import SLICES
from ops.cases.base import Op
from ops.cases.results import assert_results
from support.arguments import clone, tensors, to_dtype


def results(op: Op, args: tuple[object, ...]) -> list[Tensor]:
    """Outputs of a call, on the CPU."""
    return [value.cpu() for value in tensors(op.call(*args))]


def sampled(op: Op, device: str, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[str]:
    """What is wrong with the samples of an op, of all its dtypes unless told."""
    for sample in op.gpu:
        for dtype in dtypes or op.dtypes:
            what = f"{op.name}, {sample.name}, {dtype}"
            args = sample.args("cpu", dtype)
            plain = tensors(op.reference(*args))
            exact = tensors(op.reference(*to_dtype(args, torch.float64)))
            sent = clone(args, device)
            one, other = results(op, sent), results(op, sent)
            if not all(torch.equal(*bits(x, y)) for x, y in zip(one, other, strict=True)):
                yield f"{what}: twice is not the same"
            try:
                assert_results(op, dtype, one, plain, exact, cancel=op.public is None)
            except AssertionError as error:
                yield f"{what}: {error}"


def bits(*values: Tensor) -> list[Tensor]:
    """The bytes of contiguous tensors."""
    return [value.flatten().view(torch.uint8) for value in values]


def unread(op: Op, device: str) -> Iterator[str]:
    """What is wrong where values are bad that nobody looks at."""
    for call in op.unread:
        if not call.holds(*results(op, call.args(device))):
            yield f"{op.name}, {call.name}"


def wrong(name: str, device: str = "cuda") -> list[str]:
    """Everything that is wrong with the ops of a slice."""
    found: list[str] = []
    for op in SLICES[name]:
        found += sampled(op, device)
        found += unread(op, device)
    return found


def main(names: list[str]) -> int:
    """Exit status 1 when a call gave something else."""
    found = [what for name in names for what in wrong(name)]
    print(
        "\n".join([f"wrong: {what}" for what in found] or [f"{', '.join(names)}: all as defined"])
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SLICES)))
