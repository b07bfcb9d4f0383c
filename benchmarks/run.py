"""Runs the benchmarks of ops and models, on green tests only.

    python benchmarks/run.py [name...] [--device cpu|cuda] [--threads N] [--output results.json]

Exit status: 0 all stated and every bar held, 1 a bar missed or tests red, 3 a ratio with a bar was
not stated because the machine was contended.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from spot_vit.utils import machine  # noqa: E402
from spot_vit.utils.timing import keep_memory, measure  # noqa: E402


def names() -> list[str]:
    """The files of this folder that have `cases`."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in files if "\ndef cases(" in path.read_text())


def tests_of(name: str) -> tuple[list[str], list[str]]:
    """Where the tests of a benchmark are, and the marks that select them.

    Those of an op are all tests of its slice; others are called so in any folder of the tests.
    """
    if (ROOT / "tests/ops" / name).is_dir():
        return ["tests/ops", "--ignore=tests/ops/generic"], [name]
    found = sorted((ROOT / "tests").rglob(f"test_{name}.py"))
    return [path.relative_to(ROOT).as_posix() for path in found], []


def tests_pass(name: str, device: str) -> bool:
    """Whether the tests of <name> are green: all of them on the CPU, its CUDA tests on a GPU."""
    where, marks = tests_of(name)
    if device == "cuda":
        marks.append("cuda")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *where]
    if marks:
        command += ["-m", " and ".join(marks)]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def _git(*command: str) -> str | None:
    try:
        run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures: the machine, and the code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **machine.facts(device),
        "revision": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("--no-optional-locks", "status", "--porcelain")),
    }


def table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "times in ms: median [10th, 90th percentile]; ratio = other / ours",
        "",
        "| case | ours | other | its time | ratio | bar | held |",
        "|---" * 7 + "|",
    ]
    for entry in (entry for op in results["ops"].values() for entry in op["cases"]):
        for row in entry["rows"]:
            ours, other = entry["times"]["spot"], entry["times"][row["other"]]
            lines.append(
                f"| {entry['case']} | {_time(ours)} | {row['other']} | {_time(other)} "
                f"| {'contended' if row['ratio'] is None else format(row['ratio'], '.2f')} "
                f"| {'' if row['at_least'] is None else '≥ ' + format(row['at_least'], '.3g')} "
                f"| {_held(row)} |"
            )
    return "\n".join(lines)


def _time(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.3g} [{times['p10_ms']:.3g}, {times['p90_ms']:.3g}]"


def _held(row: dict[str, Any]) -> str:
    if row["at_least"] is None:
        return ""
    return "not stated" if row["held"] is None else "yes" if row["held"] else "NO"


def status(results: dict[str, Any]) -> int:
    """The exit status of a finished run."""
    rows = [r for op in results["ops"].values() for entry in op["cases"] for r in entry["rows"]]
    barred = [row for row in rows if row["at_least"] is not None]
    if any(row["held"] is False for row in barred):
        return 1
    return 3 if any(row["held"] is None for row in barred) else 0


def main(argv: list[str] | None = None) -> int:
    """Tests, times, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = names()
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for quiet")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--show", type=Path, help="only print the table of an earlier result")
    parser.add_argument("--skip-tests", action="store_true", help="time untested; this is recorded")
    args = parser.parse_args(argv)
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return 0
    for name in args.names:
        if name not in known:
            parser.error(f"no benchmark named '{name}'; there are {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()

    results: dict[str, Any] = {"machine": facts(args.device), "ops": {}}
    for name in args.names or known:
        if not args.skip_tests and not tests_pass(name, args.device):
            print(f"{name}: tests are red, so nothing was timed", file=sys.stderr)
            return 1
        module = importlib.import_module(f"benchmarks.{name}")
        measured = [
            measure(case, args.device, args.seconds, args.patience)
            for case in module.cases(args.device)
        ]
        results["ops"][name] = {"tested": not args.skip_tests, "cases": measured}
    print(table(results))
    for op in results["ops"].values():
        for entry in op["cases"]:
            if entry["contended"]:
                print(f"contended: {entry['case']}: {entry['contended']}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return status(results)


if __name__ == "__main__":
    sys.exit(main())
