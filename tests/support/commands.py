"""The command `spot` as users type it: small runs in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from spot_vit.cli.main import main
from support.runs import ROOT, SMALL

MODEL = ["--model", "deit_tiny_patch16_224", "--model-kwargs"]
MODEL += [f"{name}={value}" for name, value in SMALL.items()]
MACHINE = ["--device", "cpu", "-j", "0", "-b", "8", "--epochs", "2", "--log-interval", "1"]
TINY = [*MODEL, *MACHINE]
"""Flags of a run of a few seconds."""

SYNTHETIC = [*TINY, "--synthetic", "--num-classes", "5"]
SYNTHETIC += ["--train-num-samples", "48", "--val-num-samples", "23"]
"""The same without data: 6 steps an epoch, and a number of images that two do not divide."""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `spot` says of what it does not do; it must be one line, and status 2."""
    capsys.readouterr()
    assert main([*words]) == 2
    said = capsys.readouterr()
    assert not said.out
    lines = said.err.splitlines()
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0]


def environment() -> dict[str, str]:
    """Of a process that imports the checkout."""
    path = os.pathsep.join(map(str, (ROOT / "python", ROOT, ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(*words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python with such arguments in a process of its own, for some seconds at most."""
    return subprocess.run(
        [sys.executable, *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def begun(*words: str) -> subprocess.Popen[str]:
    """Starts Python with such arguments; what it says comes out of one pipe."""
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Returns when something has happened; fails where the process ends before."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SPOT = ["-m", "spot_vit.cli.main"]


def files(folder: Path) -> list[str]:
    """Names of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
