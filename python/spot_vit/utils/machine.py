"""The machine that figures are taken on: what it is, and whether it was busy meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import spot_ext


@cache
def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def versions() -> dict[str, str]:
    """Versions of Python, torch, timm (where it is installed) and SPOT."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    with suppress(metadata.PackageNotFoundError):
        found["timm"] = metadata.version("timm")
    return found | {"spot": spot_ext.__version__}


def facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge figures of a device: the machine, its use, and versions.

    Before the libraries are built, instruction set and compiler are missing.
    """
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": device.type,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **versions(),
    }
    with suppress(ImportError):
        from spot_ext import _C

        found |= {"isa": _C.isa(), "compiler": _C.build_info()["compiler"]}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


@cache  # a process of its own, and models ask for the facts when they choose a kernel
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    return text.split("\n")[0].strip() or "unknown"


@dataclass
class Clock:
    """Seconds used by the machine's clock, by this process and by all processes."""

    wall: float
    own: float
    busy: float

    @staticmethod
    def now() -> Clock:
        """The counters now, to take differences of."""
        return Clock(time.perf_counter(), time.process_time(), _busy_seconds())

    def since(self, start: Clock) -> Clock:
        """The seconds that passed since `start`."""
        return Clock(self.wall - start.wall, self.own - start.own, self.busy - start.busy)


def _busy_seconds() -> float:
    """CPU seconds that all processes used, stolen time included; 0 where /proc is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others(clock: Clock, threads: int, cpus: int) -> str | None:
    """The reason why other processes used too much while `clock` passed, or None.

    They may use half of the CPUs that we leave idle, and a tenth of one besides: more would share
    our CPUs, caches and memory.
    """
    used = (clock.busy - clock.own) / clock.wall
    allowed = 0.1 + max(cpus - threads, 0) / 2
    if used > allowed:
        return f"other processes used {used:.2f} CPUs ({allowed:.2f} allowed)"
    return None


def contention(clock: Clock, threads: int, cpus: int) -> str | None:
    """Why timings taken while `clock` passed cannot be trusted, or None."""
    if clock.own < 0.9 * clock.wall:
        return f"this process got only {clock.own / clock.wall:.2f} CPU seconds per second"
    return others(clock, threads, cpus)


def wait_for_quiet(patience: float) -> float:
    """Waits until others leave us our CPUs, `patience` seconds at most; returns what is left."""
    stop = time.perf_counter() + patience
    while (left := stop - time.perf_counter()) > 0:
        start = Clock.now()
        time.sleep(0.25)
        if others(Clock.now().since(start), torch.get_num_threads(), os.cpu_count() or 1) is None:
            break
    return max(left, 0.0)
