"""Which lines the tests run: of Python, and of the C++ around the kernels.

    python tools/release/covered.py python        # the default tests, half an hour on two cores
    python tools/release/covered.py host          # the tests of operators and of the package

`python` runs the default tests with coverage.py, commands and processes that they start included.
`host` builds the CPU library with GCC's counters in everything but the kernels (schemas, checks,
allocation, dispatch, bindings), in a temporary folder, and runs tests/ops and tests/ext. Arguments
after the first go to pytest. Needs `coverage` and `gcovr` from PyPI, and what a build needs. Ends
with 1 where tests fail, or under 95 % of Python's lines or 90 % of C++'s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from copies import ROOT, built, copied

ENOUGH = {"python": 95, "host": 90}
HOST = r"csrc/(ops\.cpp|bindings\.cpp|common/|cpu/host/|cpu/[a-z_]+\.cpp)"
KERNELS = r"csrc/cpu/kernels\.cpp"
COUNTED = """
[run]
parallel = true
patch = subprocess, _exit
concurrency = multiprocessing, thread
sigterm = true
data_file = {folder}/data
source =
  {root}/python/spot_vit
  {root}/spot_ext
"""


def python(folder: Path, tests: list[str]) -> bool:
    """Runs the tests and prints every file that is not covered whole."""
    settings = folder / "coveragerc"
    settings.write_text(COUNTED.format(folder=folder, root=ROOT))
    tool = [sys.executable, "-m", "coverage"]
    where = ["--rcfile", settings]
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    tests = tests or ["-n", "2"]
    passed = subprocess.run(
        [*tool, "run", *where, "-m", "pytest", "-p", "no:cacheprovider", *tests], cwd=ROOT, env=env
    )
    subprocess.run([*tool, "combine", "--quiet", *where], cwd=ROOT, check=True)
    told = subprocess.run(
        [*tool, "report", *where, "--skip-covered", "--sort=cover",
         f"--fail-under={ENOUGH['python']}"], cwd=ROOT,
    )  # fmt: skip
    return not passed.returncode and not told.returncode


def host(folder: Path, tests: list[str]) -> bool:
    """Builds with counters, runs the tests on this machine's kernels, prints every file."""
    copy = copied(folder)
    flags = "--coverage -fprofile-update=atomic -fprofile-exclude-files=.*/csrc/cpu/[a-z_]*.h"
    built(folder, copy, f"-DCMAKE_CXX_FLAGS={flags}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    passed = subprocess.run([*command, *(tests or ["-n", "2", "tests/ops", "tests/ext"])], cwd=copy)
    told = subprocess.run(
        [sys.executable, "-m", "gcovr", "--root", ROOT, "--filter", HOST,
         "--exclude", KERNELS,
         "--gcov-ignore-parse-errors", "--gcov-ignore-errors=no_working_dir_found",
         f"--fail-under-line={ENOUGH['host']}", folder / "build"], cwd=ROOT,
    )  # fmt: skip
    return not passed.returncode and not told.returncode


def main() -> int:
    """Exit status 0 where the tests pass and run enough lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("of", choices=ENOUGH)
    given, tests = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="spot-covered-") as name:
        measured = {"python": python, "host": host}[given.of](Path(name), tests)
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
