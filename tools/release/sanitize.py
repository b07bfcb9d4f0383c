"""The CPU op tests under sanitizers, for every instruction set that this processor has.

    python tools/release/sanitize.py address,undefined
    python tools/release/sanitize.py thread

Builds the CPU libraries with the sanitizer (GCC, CMake, Ninja and pybind11 must be there), in a
temporary folder that the installed copy does not see, and runs tests under it, once for each
instruction set. The exit status is not 0 when a test fails or a sanitizer reports.

`address,undefined` runs everything in tests/ops but what measures memory and what compiles or
traces, where the minutes go to a compiler and kernels see nothing else than in eager mode. It sees
every access of kernels and entry points, those beside a tensor's memory included; Python and torch
are not instrumented, but their allocations are watched. Leaks are not looked for: Python has many.

`thread` runs the tests of user threads: every op forward and backward in 8 Python threads at once,
and during a backward pass. torch runs each call in one thread there, since the sanitizer cannot see
the barriers of OpenMP: what it covers is calls beside each other, their scratch and the choice of
kernels, not the threads that share one call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from copies import built, copied

RUNTIMES = {"address": ["libasan.so", "libstdc++.so.6"], "thread": ["libtsan.so"]}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:detect_odr_violation=0:"
    "allocator_may_return_null=1:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:history_size=4",
}
# Memory that grows or is limited, processes that load other libraries; then compilers.
LEFT_OUT = (
    "not memory and not test_growth and not devices_without_kernels_compile and not "
    "test_tracing and not test_in_a_model and not test_definitions"
)
REPORT = re.compile(r"(ERROR: AddressSanitizer|WARNING: ThreadSanitizer|\S*: runtime error:).*")


def build(kind: str, folder: Path) -> Path:
    """A copy of package and tests in `folder`, with instrumented libraries; where it is."""
    copy = copied(folder)
    if kind == "thread":
        conftest = copy / "tests" / "conftest.py"
        text = conftest.read_text()
        assert "\nTHREADS = 2\n" in text, "where the tests say how many threads torch uses"
        conftest.write_text(text.replace("\nTHREADS = 2\n", "\nTHREADS = 1\n"))
    built(folder, copy, f"-DSPOT_SANITIZE={kind}")
    return copy


def environment(kind: str) -> dict[str, str]:
    """In which Python loads the sanitizer before anything else."""
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


def told(output: str) -> str:
    """Every report, each once, and the lines behind the first; else the last ones."""
    lines = output.splitlines()
    found = [number for number, line in enumerate(lines) if REPORT.search(line)]
    if not found:
        return "\n".join(lines[-40:])
    distinct = sorted({lines[number] for number in found})
    return "\n".join([*distinct, "", *lines[found[0] : found[0] + 40]])


def run(isa: str, copy: Path, env: dict[str, str], tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass under `isa` without a report, and what there is to say."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-s",
               "-k", LEFT_OUT, *tests]  # fmt: skip
    done = subprocess.run(
        command, cwd=copy, env={**env, "SPOT_ISA": isa}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    reports = {found.group() for found in REPORT.finditer(done.stdout)}
    fine = done.returncode == 0 and not reports
    last = [line for line in done.stdout.splitlines() if re.search(r"\d (passed|failed)", line)]
    if not fine:
        print(told(done.stdout))
    minutes = (time.monotonic() - start) / 60
    summary = last[-1].strip("= ") if last else f"ended with status {done.returncode}"
    return fine, f"{isa}: {summary}; {len(reports)} reports; {minutes:.1f} min"


def main() -> int:
    """Builds once, then runs the tests for one instruction set after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["address,undefined", "thread"])
    parser.add_argument("--isa", action="append", help="only this one (may be repeated)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes beside each other"
    )
    parser.add_argument("tests", nargs="*", help="paths below the checkout; by default as above")
    chosen = parser.parse_args()
    everything = ["tests/ops"]
    if chosen.kind == "thread":
        everything = [
            "tests/ops/generic/test_threads.py",
            "tests/ops/generic/test_determinism.py::test_eight_python_threads_at_once",
        ]
    with tempfile.TemporaryDirectory(prefix="spot-sanitize-") as name:
        folder = Path(name)
        copy = build(chosen.kind, folder)
        env = environment(chosen.kind)
        usable = instruction_sets(copy, env)
        isas = chosen.isa or usable
        failed = []
        with ThreadPoolExecutor(chosen.jobs) as pool:
            tests = chosen.tests or everything
            results = pool.map(partial(run, copy=copy, env=env, tests=tests), isas)
            for isa, (fine, words) in zip(isas, results, strict=True):
                print(words, flush=True)
                if not fine:
                    failed.append(isa)
    print(f"{chosen.kind}: ran {', '.join(isas)}; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
