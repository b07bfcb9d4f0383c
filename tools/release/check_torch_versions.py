"""Proves that one build serves every torch: builds a wheel once, tests it under each interpreter.

    python tools/release/check_torch_versions.py ~/torch-2.11/bin/python ~/torch-cpu/bin/python

The first interpreter builds. Each one needs torch, pytest, hypothesis and numpy, but not SPOT: the
wheel is unpacked into a folder that is put on its path. Arguments after `--` go to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/ops", "tests/ext/test_schemas.py"]

# What an interpreter finds, as JSON.
_PROBE = """
import json, platform, torch, spot_ext
from spot_ext import _library
try:
    from spot_ext import _C
    control = _C.isa()
except ImportError as cause:
    control = "not for this Python: ISA tests are skipped"
print(json.dumps(dict(
    python=platform.python_version(), torch=str(torch.__version__), file=spot_ext.__file__,
    loaded=[str(path) for path in _library.loaded],
    error=str(_library.error or ""), control=control,
)))
"""


@dataclass
class Result:
    """One row of the table."""

    python: str
    torch: str = "?"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""

    @property
    def good(self) -> bool:
        """Tests ran, and none failed."""
        return self.passed > 0 and self.failed == 0


def _quiet(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload]


def build_wheel(python: str, folder: Path) -> Path:
    """Builds the wheel; without build isolation when `python` has the build tools."""
    tools = "import scikit_build_core, pybind11, cmake, ninja"
    isolated = _quiet([python, "-c", tools]).returncode != 0
    command = [python, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(folder)]
    command += ["--config-settings", f"build-dir={folder / 'build'}"]
    command += [] if isolated else ["--no-build-isolation"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _environment(site: Path) -> dict[str, str]:
    # The safe path keeps the checkout out, whose package would come first.
    return os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}


def check(python: str, site: Path, report: Path, extra: list[str]) -> Result:
    """Runs the op tests under one interpreter against the unpacked wheel."""
    environment = _environment(site)
    probe = _quiet([python, "-c", _PROBE], env=environment, cwd="/")
    if probe.returncode:
        return Result(python, note=f"does not import: {probe.stderr.strip().splitlines()[-1]}")
    found = json.loads(probe.stdout.splitlines()[-1])
    result = Result(python, found["torch"], note=f"Python {found['python']}, {found['control']}")
    outside = [path for path in (found["file"], *found["loaded"]) if site not in Path(path).parents]
    if found["error"] or outside:
        result.note = found["error"].replace("\n", " ") or f"not the wheel: {', '.join(outside)}"
        return result
    subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests",
         f"--junitxml={report}", *TESTS, *extra],
        env=environment, cwd=ROOT,
    )  # fmt: skip
    if not report.exists():
        result.note = "pytest did not run"
        return result
    suite = ElementTree.parse(report).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    result.failed = count["failures"] + count["errors"]
    result.skipped = count["skipped"]
    result.passed = count["tests"] - result.failed - result.skipped
    return result


def table(results: list[Result]) -> str:
    """The results as lines to read."""
    head = ("torch", "passed", "failed", "skipped", "", "interpreter")
    rows = [
        (r.torch, str(r.passed), str(r.failed), str(r.skipped), r.note, r.python) for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in [head, *rows]]  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when the tests ran and passed under every interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("python", nargs="+", help="interpreters; the first builds the wheel")
    parser.add_argument("--wheel", type=Path, help="test this wheel instead of building one")
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    with tempfile.TemporaryDirectory(prefix="spot-versions-") as name:
        folder = Path(name)
        wheel = options.wheel or build_wheel(options.python[0], folder)
        print(f"wheel: {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        site = folder / "site"
        zipfile.ZipFile(wheel).extractall(site)
        results = []
        for number, python in enumerate(options.python):
            print(f"\n== {python}", flush=True)
            report = folder / f"{number}.xml"
            results.append(check(python, site, report, arguments[cut + 1 :]))
    print(f"\n{table(results)}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
