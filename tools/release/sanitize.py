"""The CPU op tests under sanitizers, for every instruction set that this processor has.

    python tools/release/sanitize.py address,undefined
    python tools/release/sanitize.py thread

Builds the CPU libraries with the sanitizer (GCC, CMake, Ninja and pybind11 must be there), in a
temporary folder that the installed copy does not see, and runs tests under it, once for each
instruction set. The exit status is not 0 when a test fails or a sanitizer reports.

`address,undefined` runs everything in tests/ops but what measures memory. It sees every access of
kernels and entry points, those beside a tensor's memory included; Python and torch are not
instrumented, but their allocations are watched. Leaks are not looked for: Python has many.

`thread` runs the tests of user threads: each op forward and backward in 8 Python threads at once,
also during a backward pass. torch's own threads are told apart by OpenMP, whose barriers the
sanitizer cannot see; reports with OpenMP's threads are dropped, so one op's own threads are not
what it covers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pyproject.toml", "spot_ext", "python", "tests")
RUNTIMES = {"address": ["libasan.so", "libstdc++.so.6"], "thread": ["libtsan.so"]}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:detect_odr_violation=0:"
    "allocator_may_return_null=1:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# The interpreter and torch are not instrumented: what they do to each other's memory behind locks
# that the sanitizer cannot see is theirs.
SUPPRESSED = """
called_from_lib:libgomp
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
race:libgomp
race:gomp_
race:python3
race:libtorch_cpu.so
race:libtorch_python.so
race:libc10.so
race:numpy
deadlock:libtorch
"""
# Memory that grows or is limited, and processes that load other libraries.
LEFT_OUT = "not memory and not many_calls_do_not_grow and not devices_without_kernels_compile"
REPORT = re.compile(r"(ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:).*")


def build(kind: str, folder: Path) -> Path:
    """A copy of package and tests in `folder`, with instrumented libraries; where it is."""
    import pybind11
    import torch

    copy = folder / "copy"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, copy / name, ignore=skip)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", "-DSPOT_WITH_CUDA=off",
         f"-DSPOT_SANITIZE={kind}", f"-DSPOT_TORCH_DIR={Path(torch.__file__).parent}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(["ninja", "-C", folder / "build"], check=True, stdout=subprocess.DEVNULL)
    for library in (folder / "build").glob("*.so"):
        shutil.copy(library, copy / "spot_ext")
    return copy


def environment(kind: str, folder: Path) -> dict[str, str]:
    """In which Python loads the sanitizer before anything else."""
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSED)
    compiler = os.environ.get("CXX", "g++")
    names = next(names for first, names in RUNTIMES.items() if kind.startswith(first))
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]
    return {
        **os.environ, **OPTIONS,
        "TSAN_OPTIONS": f"suppressions={suppressions}:ignore_noninstrumented_modules=1:"
        "exitcode=66:history_size=4",
        "LD_PRELOAD": ":".join(found), "OMP_NUM_THREADS": "1", "PYTHONMALLOC": "malloc",
    }  # fmt: skip


def instruction_sets(copy: Path, env: dict[str, str]) -> list[str]:
    """Those that this processor can run, of those that were built."""
    code = (
        "import json, torch, spot_ext; from spot_ext import _C\n"
        "print(json.dumps([spot_ext.library_path(), _C.isas()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=env, check=True, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    path, usable = json.loads(done.stdout.splitlines()[-1])
    if Path(path).parent != (copy / "spot_ext").resolve():
        raise SystemExit(f"expected the instrumented library in {copy}, found {path}")
    return list(usable)


def run(kind: str, isa: str, copy: Path, env: dict[str, str], tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass under `isa` without a report, and what there is to say."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-s",
               "-k", LEFT_OUT, *tests]  # fmt: skip
    done = subprocess.run(
        command, cwd=copy, env={**env, "SPOT_ISA": isa}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    reports = REPORT.findall(done.stdout)
    fine = done.returncode == 0 and not reports
    last = [line for line in done.stdout.splitlines() if re.search(r"\d (passed|failed)", line)]
    if not fine:
        print(done.stdout[-8000:])
    minutes = (time.monotonic() - start) / 60
    summary = last[-1].strip("= ") if last else f"ended with status {done.returncode}"
    return fine, f"{isa}: {summary}; {len(reports)} reports; {minutes:.1f} min"


def main() -> int:
    """Builds once, then runs the tests for one instruction set after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["address,undefined", "thread"])
    parser.add_argument("--isa", action="append", help="only this one (may be repeated)")
    parser.add_argument("tests", nargs="*", help="paths below the checkout; by default as above")
    chosen = parser.parse_args()
    everything = ["tests/ops"]
    if chosen.kind == "thread":
        everything = ["tests/ops/generic/test_threads.py", "tests/ops/generic/test_determinism.py"]
    with tempfile.TemporaryDirectory(prefix="spot-sanitize-") as name:
        folder = Path(name)
        copy = build(chosen.kind, folder)
        env = environment(chosen.kind, folder)
        usable = instruction_sets(copy, env)
        failed = []
        for isa in chosen.isa or usable:
            fine, words = run(chosen.kind, isa, copy, env, chosen.tests or everything)
            print(words, flush=True)
            if not fine:
                failed.append(isa)
    print(f"{chosen.kind}: ran {', '.join(chosen.isa or usable)}; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
