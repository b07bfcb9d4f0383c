"""Everything that the operators are put through at night, op by op, and the figures of it.

    python tools/release/nightly.py                     # about an hour and a half on two cores
    python tools/release/nightly.py --share 0.01        # the same checks, a hundredth of the calls
    python tools/release/nightly.py --only select_tokens --only fuse_tokens

Each op and each file of tests runs in a process of its own, so that one that a signal ends is
counted and the others go on. Calls are drawn anew each night: the seed is printed, and `--seed`
draws the same again. Needs pytest and hypothesis, and 16 GB of memory for `huge`.

| check | of each op |
|---|---|
| fuzz | 10,000 legal calls equal the definition, 2,000 broken ones end in a Python error |
| determinism | 1,000 repeats, and 1,000 calls by each of 8 Python threads, give the same bits |
| growth | 20,000 calls of changing sizes leave nothing; the peak of a call of 4,096 tokens |
| processes | the same bits in forked and spawned processes and in workers of a DataLoader |
| huge | strides beyond 2^31 elements; once for all ops: tensors of more elements |
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]

CHECKS = {  # the tests of tests/ops/generic/test_<check>.py that these markers choose
    "fuzz": "not slow",
    "determinism": "nightly",
    "growth": "nightly or not nightly",
    "processes": "nightly",
    "huge": "nightly",
}
ALL_OPS = "all"
_SHARED = re.compile("legal|broken|1000|20000|every_op_after")  # tests whose calls --share changes


def run(check: str, op: str, share: float, seed: int, markers: str) -> dict[str, Any]:
    """One file of tests of one op (`all`: what is no op's), and what is known afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        lines, report = Path(folder) / "figures.jsonl", Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"tests/ops/generic/test_{check}.py", "-m", markers, "--tb=short",
            "--hypothesis-profile=nightly", f"--hypothesis-seed={seed}", f"--junitxml={report}",
        ]  # fmt: skip
        command += ["-k", "real or expanded"] if op == ALL_OPS else ["--op", op]
        environment = os.environ | {
            "SPOT_NIGHTLY_SHARE": str(share), "SPOT_NIGHTLY_FIGURES": str(lines),
        }  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - start
        figures = [json.loads(x) for x in lines.read_text().splitlines()] if lines.exists() else []
        suites, cases = [], []
        if report.exists():
            root = ElementTree.parse(report).getroot()
            suites, cases = root.findall("testsuite"), list(root.iter("testcase"))
    found = {
        "check": check,
        "op": op,
        "tests": sum(int(suite.get("tests", 0)) for suite in suites),
        "failures": sum(int(suite.get(x, 0)) for suite in suites for x in ("failures", "errors")),
        "signal": signal.Signals(-done.returncode).name if done.returncode < 0 else "",
        "exit_status": done.returncode,
        "seconds": round(seconds, 1),
        "shared_seconds": sum(
            float(case.get("time", 0)) for case in cases if _SHARED.search(case.get("name", ""))
        ),
        "figures": figures,
    }
    if done.returncode not in (0, 5):  # 5: this op has no test there
        found["output"] = (done.stdout + done.stderr)[-6000:]
    return found


def beside(peak: dict[str, Any]) -> str:
    """How much more scratch a call took than its page says; less than 64 KB is some pages."""
    scratch = peak["documented_scratch"]
    beyond = peak["peak_bytes"] - peak["result_bytes"] - scratch
    return f"{beyond / scratch:+.1%}" if scratch >= 1 << 16 else f"{beyond} bytes"


def rows_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table with a line for each op and check."""
    head = ("op", "check", "tests", "failures", "signal", "calls", "seconds", "grew by", "peak MB",
            "beside its page")  # fmt: skip
    rows = [list(head)]
    for result in results:
        figures = result["figures"]
        calls = sum(x.get("calls", 0) for x in figures)
        grown = [x["heap_bytes"] for x in figures if "heap_bytes" in x]
        peaks = [x["peak_bytes"] for x in figures if "peak_bytes" in x]
        rows.append([
            result["op"], result["check"], str(result["tests"]), str(result["failures"]),
            result["signal"] or "none", f"{calls:,}", f"{result['seconds']:.0f}",
            f"{max(grown)} bytes" if grown else "", f"{max(peaks) / 1e6:.1f}" if peaks else "",
            ", ".join(beside(x) for x in figures if "peak_bytes" in x),
        ])  # fmt: skip
    return rows


def whole_seconds(results: list[dict[str, Any]], share: float) -> float:
    """What a whole night takes at most: parts of tests that are no calls count as calls."""
    return sum(x["seconds"] + x["shared_seconds"] * (1 / share - 1) for x in results)


def failed(result: dict[str, Any]) -> bool:
    """Whether a process ended in anything but passed tests, or none of this op."""
    return result["exit_status"] not in (0, 5)


def main() -> int:
    """Prints the table and writes the JSON; exit status 1 when anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", metavar="OP", help="an op; may be repeated")
    parser.add_argument("--check", action="append", choices=CHECKS, help="may be repeated")
    parser.add_argument("--share", type=float, default=1.0, help="of all calls (default: 1)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--output", type=Path, default=Path("nightly.json"))
    arguments = parser.parse_args()
    if not 0 < arguments.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, got {arguments.share}")

    import torch
    from spot_vit.utils.machine import facts
    from spot_vit.utils.tables import format_table

    names = {x.split("::")[1].split(".")[0] for x in torch._C._dispatch_get_all_op_names()
             if x.startswith("spot::")}  # fmt: skip
    unknown = set(arguments.only or ()) - names - {ALL_OPS}
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {sorted(names)}")
    jobs = [(check, op) for op in sorted(names) for check in CHECKS] + [("huge", ALL_OPS)]
    jobs = [
        (check, op)
        for check, op in jobs
        if op in (arguments.only or [*names, ALL_OPS]) and check in (arguments.check or CHECKS)
    ]
    print(f"seed {arguments.seed}, {len(jobs)} processes", flush=True)
    results = []
    for check, op in jobs:
        markers = CHECKS["growth"] if op == ALL_OPS else CHECKS[check]
        results.append(run(check, op, arguments.share, arguments.seed, markers))
        wrong = "FAILED " if failed(results[-1]) else ""
        print(f"{wrong}{op} {check}: {results[-1]['seconds']:.0f} s", flush=True)
    print(format_table(rows_of(results)))
    whole = whole_seconds(results, arguments.share)
    if arguments.share < 1:
        print(f"all calls would take {whole / 60:.0f} minutes at most")
    for result in filter(failed, results):
        print(f"\n{result['op']} {result['check']}, exit status {result['exit_status']}:")
        print(result["output"])
    summary = {
        "seed": arguments.seed, "share": arguments.share, "machine": facts(),
        "date": time.strftime("%Y-%m-%d"), "seconds": sum(x["seconds"] for x in results),
        "failures": sum(x["failures"] for x in results),
        "signals": sum(bool(x["signal"]) for x in results), "results": results,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{arguments.output} has all figures")
    return int(any(map(failed, results)))


if __name__ == "__main__":
    sys.exit(main())
