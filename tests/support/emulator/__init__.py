"""CUDA kernels on the CPU: `pytest tests/ops --emulate-cuda`.

Compiles the sources of csrc/cuda as they are, but for two headers that stand in for the device and
two kinds of lines (CHANGES), and registers what comes out as the CPU kernels of the ops. Threads of
a block are fibers that change places at barriers and exchanges of a warp, in random order; matrix
and copy instructions are written out. That finds wrong indices, missing barriers, lanes that do not
agree and shared memory that is too small. It says nothing about speed, nor about what only a device
does: its memory model within a warp, its rounding of fast functions, its limits of registers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
STAND_INS = ("device.h", "ptx.cuh")
CHANGES = {
    "extern __shared__ __align__(16) unsigned char shared_memory[];": (
        "unsigned char* const shared_memory = emulator::shared_memory;"
    ),
    "STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m)": "STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m)",
}
# As nvcc contracts products and sums.
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-w", "-mfma", "-mf16c", "-ffp-contract=fast")


def available() -> bool:
    """Whether the headers of a CUDA toolkit are here."""
    return _toolkit_headers() is not None


def load() -> None:
    """Replaces the CPU kernels of this process by the CUDA kernels, emulated."""
    with tempfile.TemporaryDirectory(prefix="spot-emulator-") as folder:
        library = build(Path(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are replaced
            torch.ops.load_library(str(library))


def build(folder: Path) -> Path:
    """Compiles csrc/cuda and returns the library."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    for name in STAND_INS:
        shutil.copy(HERE / name, sources / "cuda" / name)
    for path in (sources / "cuda").glob("*.cu*"):
        text = path.read_text()
        for old, new in CHANGES.items():
            text = text.replace(old, new)
        path.write_text(text)
    units = sorted((sources / "cuda").glob("*.cu"))
    objects = [folder / f"{unit.stem}.o" for unit in units]
    includes = _includes()
    jobs = [
        ["g++", *FLAGS, f"-DTORCH_TARGET_VERSION={_torch_target()}", *includes,
         "-x", "c++", "-include", str(sources / "cuda" / "device.h"),
         "-c", str(unit), "-o", str(out)]
        for unit, out in zip(units, objects, strict=True)
    ]  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    library = folder / "libspot_emulated.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    _run(["g++", "-shared", "-fPIC", str(HERE / "switch.cpp"), *map(str, objects),
          "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"])  # fmt: skip
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _torch_target() -> str:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"SPOT_TORCH_TARGET\s+(0x\w+)", text)
    assert found, "CMakeLists.txt names no SPOT_TORCH_TARGET"
    return found[1]


def _includes() -> list[str]:
    toolkit = _toolkit_headers()
    if toolkit is None:
        raise RuntimeError("the emulator needs the headers of a CUDA toolkit; set CUDA_HOME")
    return ["-isystem", str(Path(torch.__file__).parent / "include"), "-isystem", str(toolkit)]


def _toolkit_headers() -> Path | None:
    packages = Path(torch.__file__).parents[1] / "nvidia"  # that torch for CUDA depends on
    toolkits = [cpp_extension.CUDA_HOME or "", "/usr/local/cuda"]
    for headers in (*packages.glob("*/include"), *(Path(home) / "include" for home in toolkits)):
        if all((headers / name).exists() for name in ("cuda_bf16.h", "crt/host_defines.h")):
            return headers
    return None
