"""Builds a wheel with each interpreter, and tries it there: size, contents, installation, each op.

    python tools/release/wheels.py PYTHON... [--output dist] [--cuda]

Each interpreter needs torch and pip; an installed SPOT is not used. `--cuda` builds CUDA kernels
too, for `CUDAARCHS`. For wheels that run on older systems than this one, see `[tool.cibuildwheel]`
in pyproject.toml.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "tools/release/smoke.py"
MOST_MB = {False: 10, True: 40}  # by whether CUDA kernels are in it
MOST_SECONDS = 20  # of an installation beside torch
OUTSIDE = ("libtorch", "libc10", "libstdc++", "libgcc_s", "libc.", "libm.", "libpthread", "ld-")


@dataclass
class Built:
    """One row of the table."""

    python: str
    wheel: str = ""
    mb: float = 0.0
    build_s: float = 0.0
    install_s: float = 0.0
    note: str = ""
    good: bool = False


def _run(*command: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def build(python: str, output: Path, cuda: bool) -> Path:
    """The wheel that an interpreter builds, in a build folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SPOT_WITH_CUDA": "on" if cuda else "off"}
        run = _run(
            python, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", folder,
            "--config-settings", f"build-dir={folder}/build", env=environment,
        )  # fmt: skip
        if run.returncode:
            raise RuntimeError(run.stderr.strip().splitlines()[-1])
        (wheel,) = Path(folder).glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(wheel.replace(output / wheel.name))


def faults(wheel: Path, cuda: bool) -> list[str]:
    """What is wrong with a wheel as a file."""
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith(".so")]
        expected = 2 + cuda  # ops, _C, ops for CUDA
        if len(libraries) != expected:
            found.append(f"{expected} libraries expected, {len(libraries)} found")
        if "spot_vit/report/template/page.js" not in names:
            found.append("the page's template is missing")
        if strange := {name.split("/")[0] for name in names} - {"spot_ext", "spot_vit"}:
            found += [f"{name} is in it" for name in strange if not name.endswith(".dist-info")]
        for name in libraries:
            read = _run("readelf", "-d", archive.extract(name, folder)).stdout
            lines = [line for line in read.splitlines() if "NEEDED" in line]
            needed = [line.split("[")[1].rstrip("]") for line in lines]
            allowed = (*OUTSIDE, "libspot_ops")
            found += [f"{name} needs {one}" for one in needed if not one.startswith(allowed)]
    if wheel.stat().st_size > MOST_MB[cuda] * 1e6:
        found.append(f"larger than {MOST_MB[cuda]} MB")
    return found


def tried(python: str, output: Path, cuda: bool) -> Built:
    """A wheel that is built, looked at, installed and used."""
    row = Built(python)
    begin = time.perf_counter()
    try:
        wheel = build(python, output, cuda)
    except RuntimeError as error:
        row.note = f"does not build: {error}"
        return row
    row.build_s = time.perf_counter() - begin
    row.wheel, row.mb = wheel.name, wheel.stat().st_size / 1e6
    with tempfile.TemporaryDirectory() as site:
        begin = time.perf_counter()
        install = _run(
            python, "-m", "pip", "install", "-q", "--no-deps", "--target", site, str(wheel)
        )
        row.install_s = time.perf_counter() - begin
        found = faults(wheel, cuda)
        if install.returncode:
            found.append(f"does not install: {install.stderr.strip().splitlines()[-1]}")
        elif row.install_s > MOST_SECONDS:
            found.append(f"takes more than {MOST_SECONDS} s to install")
        environment = os.environ | {"PYTHONPATH": site, "PYTHONSAFEPATH": "1"}
        use = _run(python, str(SMOKE), cwd="/", env=environment)
        if use.returncode:
            found.append(f"fails: {use.stderr.strip().splitlines()[-1]}")
    row.good = not found
    row.note = "; ".join(found) or " | ".join(use.stdout.strip().splitlines())
    return row


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where every wheel is good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("python", nargs="+", help="interpreters with torch and pip")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--cuda", action="store_true")
    arguments = parser.parse_args(argv)
    good = True
    for python in arguments.python:
        row = tried(python, arguments.output, arguments.cuda)
        good &= row.good
        print(
            f"{'good' if row.good else 'BAD '} {row.wheel or python}: {row.mb:.1f} MB, built in "
            f"{row.build_s:.0f} s, installed in {row.install_s:.1f} s\n     {row.note}",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
