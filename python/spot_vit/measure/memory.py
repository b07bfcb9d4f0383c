"""Peak memory of a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """How far memory rises during a call above what was held before it, at most.

    On CUDA it is what torch allocates. On a CPU it is the resident memory of the whole process, of
    whatever library; freed memory is given back to the system first, so that using it again counts.
    What a library keeps for itself between calls does not.

    Args:
        call: what is watched; its result is dropped.
        device: where it computes.

    Returns:
        Bytes; None where the system does not tell (resident peaks are Linux's).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak is now what is resident
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        call()
        return None


def _resident(field: str) -> int:
    """Bytes of a field of the process's status."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"the system does not tell {field}")
