"""Builds, tests, times and memory-checks the CUDA kernels on a machine with an NVIDIA GPU.

    python tools/gpu/gpu_check.py --output FOLDER [build test bench memcheck] [--ops compact ...]

Needs nvcc, torch >= 2.11 with CUDA, scikit-build-core, pybind11, pytest and hypothesis; no network.
The package is built into a temporary folder, so nothing installed is changed. Every part has a time
limit and so has the whole; what ran out of time is recorded as such. FOLDER gets results.json,
summary.md and the logs. Keep a result as benchmarks/results/gpu/<device>-<date>.json, then run
`python tools/gpu/gpu_status.py`.

Exit status: 0 nothing failed, 1 something failed or ran out of time, 2 bad arguments, 4 no GPU or
no nvcc. Without compute-sanitizer the memory checks are recorded as not run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from tools.gpu.cuda_sources import cuda_ops, source_hash  # noqa: E402

PARTS = ("build", "test", "bench", "memcheck")
LIMITS = {"build": 180.0, "test": 270.0, "bench": 90.0, "memcheck": 150.0}  # seconds
TOTAL = 530.0
TOOLS = ("memcheck", "racecheck")
LOG_BYTES = 1 << 20

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "out of time", "not run"


class Budget:
    """Seconds left of a part and of the whole."""

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + total
        self._part_end = self._end

    def start(self, limit: float) -> None:
        """A part begins."""
        self._part_end = min(self._end, self._clock() + limit)

    def left(self) -> float:
        """Seconds the running part may still take."""
        return max(self._part_end - self._clock(), 0.0)


def run(command: list[str], log: Path, seconds: float, env: dict[str, str]) -> str:
    """Runs a command with its output added to `log`; it and its children end with its time."""
    if seconds <= 0:
        return TIMED_OUT
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return PASSED if child.wait(timeout=seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            out.write(f"\nkilled after {seconds:.0f} s\n".encode())
            return TIMED_OUT
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def missing() -> str | None:
    """Why nothing can be checked here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None:
        return "nvcc is not on PATH (put it there, or set CUDACXX)"
    return None


def machine() -> dict[str, Any]:
    """The GPU, its driver, the machine around it, and versions."""
    from spot_vit.utils.machine import facts

    return facts("cuda")


def build(target: Path, scratch: Path, log: Path, budget: Budget, env: dict[str, str]) -> str:
    """Installs the package into `target`, CUDA kernels for this GPU included."""
    command = [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--target", str(target), f"-Cbuild-dir={scratch}", str(ROOT),
    ]  # fmt: skip
    wanted = {"CUDAARCHS": "native", **env, "SPOT_WITH_CUDA": "on"}
    return run(command, log, budget.left(), wanted)


def count_tests(log: str) -> dict[str, int]:
    """Passed, failed and skipped tests in the output of `pytest -v`, finished or not."""
    line = r"(?m)^(?:tests/.*? |\[gw\d+\] \[ *\d+%\] )(PASSED|FAILED|ERROR|SKIPPED)\b"  # xdist: gw
    words = re.findall(line, log)
    return {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }


def test(op: str, log: Path, budget: Budget, env: dict[str, str]) -> dict[str, Any]:
    """Runs the CUDA tests of an op, the generic ones too; skipped or none is not passed."""
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    start = log.stat().st_size if log.exists() else 0
    command = [
        sys.executable, "-m", "pytest", "-v", "-m", f"cuda and {op}", *workers,
        "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=short", "tests/ops",
    ]  # fmt: skip
    status = run(command, log, budget.left(), env)
    counts = count_tests(log.read_bytes()[start:].decode(errors="replace")) if log.exists() else {}
    if status == PASSED and (counts["skipped"] or not counts["passed"]):
        status = FAILED
    return {"status": status, **counts}


def bench(op: str, output: Path, log: Path, budget: Budget, env: dict[str, str]) -> dict[str, Any]:
    """Times an op. Its tests came before, where they were asked for."""
    if not (ROOT / f"benchmarks/{op}.py").exists():
        return {"status": NOT_RUN, "why": "no benchmark"}
    command = [
        sys.executable, "benchmarks/run.py", op, "--device", "cuda", "--skip-tests",
        "--seconds", "0.5", "--output", str(output),
    ]  # fmt: skip
    status = run(command, log, budget.left(), env)
    result: dict[str, Any] = {"status": status}
    if output.exists():
        result["cases"] = json.loads(output.read_text())["ops"][op]["cases"]
    return result


def memcheck(op: str, log: Path, budget: Budget, env: dict[str, str]) -> dict[str, str]:
    """Verdict of each tool of compute-sanitizer on the sample of an op."""
    verdicts = {}
    for tool in TOOLS:
        command = [
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
            sys.executable, "tools/gpu/gpu_sample.py", op,
        ]  # fmt: skip
        if shutil.which(command[0]) is None:
            verdicts[tool] = f"{NOT_RUN}: no compute-sanitizer"
        else:
            # Without the caching allocator each tensor ends where its memory ends.
            uncached = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            verdicts[tool] = run(command, log, budget.left(), uncached)
    return verdicts


def check(parts: list[str], ops: list[str], folder: Path, total: float) -> dict[str, Any]:
    """Runs the parts in order and returns the results; nothing else goes on without a build."""
    budget = Budget(total)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "parts": {},
        "ops": {op: {"source": source_hash(op)} for op in ops},
    }
    logs = {part: folder / f"{part}.log" for part in PARTS}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        target = scratch / "site"
        paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        built = True
        for part in PARTS:
            if part not in parts:
                continue
            started = time.monotonic()
            budget.start(LIMITS[part])
            if part == "build":
                status = build(target, scratch / "build", logs[part], budget, env)
                built = status == PASSED
                results["parts"][part] = {"status": status}
            elif not built:
                results["parts"][part] = {"status": NOT_RUN}
                continue
            else:
                for op, facts in results["ops"].items():
                    if part == "test":
                        facts[part] = test(op, logs[part], budget, env)
                    elif part == "bench" and facts.get("test", {}).get("status") == FAILED:
                        facts[part] = {"status": NOT_RUN, "why": "tests failed"}
                    elif part == "bench":
                        facts[part] = bench(op, scratch / f"{op}.json", logs[part], budget, env)
                    else:
                        facts[part] = memcheck(op, logs[part], budget, env)
                results["parts"][part] = {"status": part_status(part, results["ops"])}
            results["parts"][part]["seconds"] = round(time.monotonic() - started, 1)
    return results


def part_status(part: str, ops: dict[str, Any]) -> str:
    """The worst status of a part over the ops."""
    seen = []
    for facts in ops.values():
        seen += facts[part].values() if part == "memcheck" else [facts[part]["status"]]
    for worst in (FAILED, TIMED_OUT, NOT_RUN):
        if any(status.startswith(worst) for status in seen):
            return worst
    return PASSED


def summary(results: dict[str, Any]) -> str:
    """The results to read."""
    m = results["machine"]
    lines = [
        f"# GPU check, {results['date']}",
        "",
        f"{m['gpu']} (capability {m['capability']}), driver {m['driver']}, torch {m['torch']}, "
        f"CUDA {m['cuda']}",
        "",
        "| part | status | seconds |",
        "|---|---|---|",
    ]
    for part, facts in results["parts"].items():
        lines.append(f"| {part} | {facts['status']} | {facts.get('seconds', '')} |")
    for op, facts in results["ops"].items():
        lines += ["", f"## {op} (source {facts['source']})", ""]
        if tested := facts.get("test"):
            counts = ", ".join(
                f"{tested[kind]} {kind}"
                for kind in ("passed", "failed", "skipped")
                if kind in tested
            )
            lines.append(f"- tests: {tested['status']}{counts and f' ({counts})'}")
        for tool, verdict in facts.get("memcheck", {}).items():
            lines.append(f"- {tool}: {verdict}")
        cases = facts.get("bench", {}).get("cases", [])
        if cases:
            lines += ["", "| case | ours ms | other | its ms | ratio |", "|---|---|---|---|---|"]
        for case in cases:
            for row in case["rows"]:
                ours, other = (case["times"][k]["median_ms"] for k in ("spot", row["other"]))
                ratio = "contended" if row["ratio"] is None else f"{row['ratio']:.2f}"
                lines.append(
                    f"| {case['case']} | {ours:.4g} | {row['other']} | {other:.4g} | {ratio} |"
                )
    return "\n".join(lines) + "\n"


def trim(log: Path) -> None:
    """Keeps the end of a long log."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(b"[start cut off]\n" + log.read_bytes()[-LOG_BYTES:])


def main(argv: list[str] | None = None) -> int:
    """Checks, then writes results.json and summary.md whatever happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--ops", nargs="+", default=cuda_ops(), help="default: all with kernels")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything together")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part named '{part}'; there are {', '.join(PARTS)}")
    for op in args.ops:
        if op not in cuda_ops():
            parser.error(f"no CUDA kernels named '{op}'; there are {', '.join(cuda_ops())}")
    if (reason := missing()) is not None:
        print(f"nothing was checked: {reason}", file=sys.stderr)
        return 4
    args.output.mkdir(parents=True, exist_ok=True)
    results = check(args.parts or list(PARTS), args.ops, args.output, args.seconds)
    (args.output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    (args.output / "summary.md").write_text(summary(results))
    for part in PARTS:
        trim(args.output / f"{part}.log")
    print(summary(results))
    bad = {part["status"] for part in results["parts"].values()} & {FAILED, TIMED_OUT}
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
