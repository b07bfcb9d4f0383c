"""`python -m spot_ext.info`: what was built, what was loaded and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from ops.cases import OPS
from support.package import FOLDER, SOURCE, python

import spot_ext
from spot_ext import _library


def _info(*flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    return subprocess.run(
        [sys.executable, "-m", "spot_ext.info", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )


def test_info_as_text() -> None:
    done = _info()
    assert done.returncode == 0, done.stderr
    torch_line = f"torch        {torch.__version__}"
    for words in (
        f"SPOT {spot_ext.__version__}",
        torch_line,
        "torchvision",
        "timm",
        "built",
        "CPU kernels",
        "CUDA kernels",
        str(FOLDER / _library.OPS),
        "select_tokens",
        "attention_stats",
    ):
        assert words in done.stdout


def test_info_as_json() -> None:
    done = _info("--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["spot"] == spot_ext.__version__ and facts["torch"] == torch.__version__
    assert facts["error"] is None and set(facts["ops"]) == set(OPS)
    assert all(devices for devices in facts["ops"].values())
    assert facts["build"]["torch_target"] == "2.11" and facts["isa"] in facts["isas_usable"]
    assert Path(facts["loaded"][0]).name == _library.OPS


def test_info_diagnoses_torchvision_and_an_unknown_isa(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    meta = tmp_path / "torchvision-0.1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\nRequires-Dist: torch==1.0\n"
    )
    done = python(
        "from spot_ext import info; print(info.report(info.collect()))",
        tmp_path,
        env={"SPOT_ISA": "quantum"},
    )
    assert "SPOT_ISA=quantum is unknown or unusable here: every op" in done.stdout
    assert "0.1 does NOT work with torch" in done.stdout and "torch==1.0" in done.stdout
    assert "torchvision::nms does not exist" in done.stdout
