"""Writes docs/gpu-status.md from the committed results of tools/gpu/gpu_check.py.

    python tools/gpu/gpu_status.py [--check]

With --check nothing is written; the exit status is 1 when the page is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.gpu.cuda_sources import cuda_ops, source_hash  # noqa: E402

PAGE = "docs/gpu-status.md"
HEAD = """# GPU status

Written by `python tools/gpu/gpu_status.py`; do not edit. A row is filled only by a committed result
of `python tools/gpu/gpu_check.py` (`benchmarks/results/gpu`) whose CUDA tests passed with none
skipped. "Changed since" compares the CUDA source of the op, and the headers it may include, with
what was tested. `pytest tests/ops --emulate-cuda` runs the kernels on a CPU; that fills no row.
"""


def last_passed(op: str, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest result in which all CUDA tests of `op` passed."""
    passed = [r for r in results if r["ops"].get(op, {}).get("test", {}).get("status") == "passed"]
    return max(passed, key=lambda r: r["date"], default=None)


def _changed(recorded: str, now: str) -> str:
    return "no" if recorded == now else "**yes**"


def status_rows(results: list[dict[str, Any]], sources: dict[str, str]) -> list[str]:
    """One table row per op."""
    rows = []
    for op, source in sources.items():
        result = last_passed(op, results)
        if result is None:
            rows.append(f"| {op} | never run | | | | | |")
            continue
        facts, m = result["ops"][op], result["machine"]
        checks = facts.get("memcheck", {})
        rows.append(
            f"| {op} | {result['date'][:10]} | {m['gpu']} | driver {m['driver']}, torch "
            f"{m['torch']}, CUDA {m['cuda']} | {facts['test']['passed']} passed | "
            f"{', '.join(f'{tool} {verdict}' for tool, verdict in checks.items()) or 'not run'} | "
            f"{_changed(facts['source'], source)} |"
        )
    return rows


def register_rows(report: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """One table row per op: what ptxas says on each architecture."""
    rows = []
    for op in filter(report["ops"].__contains__, sources):
        facts = report["ops"][op]
        on = [facts[arch] for arch in report["archs"]]
        cells = [f"{most['registers']} | {most['spilled_bytes']}" for most in on]
        shared = max(most["shared_bytes"] for most in on)
        changed = _changed(facts["source"], sources[op])
        rows.append(f"| {op} | {' | '.join(cells)} | {shared} | {changed} |")
    return rows


def page(
    results: list[dict[str, Any]], registers: dict[str, Any] | None, sources: dict[str, str]
) -> str:
    """The whole page."""
    lines = [
        HEAD,
        "| op | last passed | on | with | tests | memory checks | changed since |",
        "|---|---|---|---|---|---|---|",
        *status_rows(results, sources),
    ]
    if registers is not None:
        archs = " | ".join(f"{arch}: most registers | spilled bytes" for arch in registers["archs"])
        lines += [
            "",
            "## Registers and spills",
            "",
            f"What the compiler of {registers['compiler']} reported on {registers['date']}: the "
            "most that any kernel of an op takes. `python tools/gpu/ptxas_report.py` compiles with "
            "warnings as errors and prints every kernel. This says nothing about whether they are "
            "right or fast.",
            "",
            f"| op | {archs} | most shared bytes | changed since |",
            "|---" * (3 + 2 * len(registers["archs"])) + "|",
            *register_rows(registers, sources),
        ]
    return "\n".join(lines) + "\n"


def generate(root: Path = ROOT) -> str:
    """The page that the committed results of `root` give."""
    folder = root / "benchmarks/results/gpu"
    registers = folder / "registers.json"
    runs = sorted(path for path in folder.glob("*.json") if path != registers)
    results = [json.loads(path.read_text()) for path in runs]
    sources = {op: source_hash(op, root) for op in cuda_ops(root)}
    return page(results, json.loads(registers.read_text()) if registers.exists() else None, sources)


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    new, path = generate(), ROOT / PAGE
    if parser.parse_args(argv).check:
        return 0 if path.exists() and path.read_text() == new else 1
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
