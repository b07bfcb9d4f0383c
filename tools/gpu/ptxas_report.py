"""Registers, spills and shared memory of the CUDA kernels, as ptxas reports them. Needs no GPU.

    python tools/gpu/ptxas_report.py [--archs 80 90a]

Compiles csrc/cuda/*.cu with warnings as errors and prints what every kernel takes. The most of
each op goes to benchmarks/results/gpu/registers.json, which tools/gpu/gpu_status.py turns into a
table of docs/gpu-status.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.gpu.cuda_sources import cuda_ops, source_hash  # noqa: E402

OUTPUT = ROOT / "benchmarks/results/gpu/registers.json"
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def compile_op(op: str, arch: str) -> str:
    """What ptxas says about csrc/cuda/<op>.cu; raises when nvcc warns."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.submodule_search_locations is None:
        raise SystemExit("torch's headers are needed: install torch first")
    cmake = (ROOT / "CMakeLists.txt").read_text()
    target = re.search(r"SPOT_TORCH_TARGET (0x\w+)", cmake)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [
                "nvcc", "-c", "-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA",
                f"-DTORCH_TARGET_VERSION={target[1]}",
                "-isystem", f"{torch.submodule_search_locations[0]}/include",
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
                f"csrc/cuda/{op}.cu", "-o", f"{folder}/{op}.o",
            ],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{op} does not compile cleanly for sm_{arch}:\n{run.stderr}")
    return run.stderr


def readable(symbol: str) -> str:
    """`select_kernel<float>` for a mangled name."""
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    for noise in ("spot::", "(anonymous namespace)::", "void ", "(bool)"):
        plain = plain.replace(noise, "")
    return plain.rsplit("(", 1)[0].replace(" >", ">")


def parse(text: str) -> list[dict[str, Any]]:
    """One row per kernel of ptxas' output."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            rows.append({"symbol": entry[1], "shared": 0})
        elif frame := _FRAME.search(line):
            names = ("stack", "spill_stores", "spill_loads")
            rows[-1].update(zip(names, map(int, frame.groups()), strict=True))
        elif used := _USED.search(line):
            rows[-1]["registers"] = int(used[1])
            if shared := _SHARED.search(line):
                rows[-1]["shared"] = int(shared[1])
    return rows


def compiler() -> str:
    """`CUDA 13.0`, as nvcc says."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    return f"CUDA {release[1] if release else 'unknown'}"


def most(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """The most that a kernel of an op takes; of spills all together."""
    return {
        "registers": max(row["registers"] for row in kernels),
        "spilled_bytes": sum(row["spill_stores"] + row["spill_loads"] for row in kernels),
        "shared_bytes": max(row["shared"] for row in kernels),
    }


def report(op: str, archs: list[str]) -> dict[str, Any]:
    """Prints every kernel of an op and returns the most of them on each architecture."""
    facts: dict[str, Any] = {"source": source_hash(op)}
    for arch in archs:
        kernels = parse(compile_op(op, arch))
        for row in kernels:
            taken = ", ".join(f"{row[key]} {key}" for key in ("registers", "shared", "stack"))
            print(f"{op} sm_{arch} {readable(row['symbol'])}: {taken}", flush=True)
        facts[f"sm_{arch}"] = most(kernels)
    return facts


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a kernel spills registers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", nargs="+", default=["80", "90a"])
    archs = parser.parse_args(argv).archs
    ops = {op: report(op, archs) for op in cuda_ops()}
    found = {
        "date": datetime.date.today().isoformat(),
        "compiler": compiler(),
        "archs": [f"sm_{arch}" for arch in archs],
        "ops": ops,
    }
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    spills = sum(facts[arch]["spilled_bytes"] for facts in ops.values() for arch in found["archs"])
    print(f"{spills} bytes of spills; wrote {OUTPUT.relative_to(ROOT)}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
