"""Memory that is watched: guarded ends and peak sizes, in processes of their own."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

_GUARDED: list[mmap.mmap] = []


def guarded(value: Tensor) -> Tensor:
    """A contiguous copy that ends where a page begins that nobody may touch.

    To read or write behind it ends the process: for subprocesses (see `crash_free`).
    """
    size, page = value.numel() * value.element_size(), mmap.PAGESIZE
    whole = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert (
        ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + whole), page, 0) == 0
    )
    _GUARDED.append(memory)
    if size == 0:
        return value.contiguous()
    copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=whole - size)
    return copy.view(value.shape).copy_(value.detach())


def crash_free(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own, which must end well."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed leaves the resident size
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# Code that defines `rise(function)`: by how much the resident size rose at most, and the result.
MEASURE_MEMORY = """
import ctypes
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which hold more than was asked for
_ballast = []

def _resident(field):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith(field))

def rise(function):
    _ballast.append(b"x" * max(_resident("VmHWM:") - _resident("VmRSS:"), 0))
    before = _resident("VmHWM:")
    result = function()
    return _resident("VmHWM:") - before, result
"""
