"""How ops run: instruction sets, threads, CUDA kernels emulated."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def isa(name: str):
    """Runs the CPU kernels of one instruction set."""
    control = isa_control()
    before = control.isa()
    control.set_isa(name)
    try:
        yield
    finally:
        control.set_isa(before)


def isa_control() -> Any:
    """`spot_ext._C`, which is built for one CPython only; the ops themselves are not."""
    return pytest.importorskip(
        "spot_ext._C", reason="spot_ext._C was built for another CPython", exc_type=ImportError
    )


@contextmanager
def threads(count: int):
    """Runs torch with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def emulated() -> bool:
    """Whether CUDA kernels stand in for those of the CPU, thousands of times as slow."""
    return "support.emulator" in sys.modules


def cuda_kernels(device: torch.device) -> bool:
    """Whether ops run CUDA kernels there."""
    return device.type == "cuda" or emulated()
