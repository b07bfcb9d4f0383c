"""Small models to export, and files of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
from spot_vit.export.formats import available
from support.models import build

KINDS = ("dense", "spot", "dynamicvit", "evit", "sparsifiner", "both", "fuse")
DECIDING = {"spot", "dynamicvit", "evit", "both", "fuse"}


def small(kind: str, **extra: Any) -> Any:
    """Three blocks, two decisions."""
    model = build(depth=3, **extra)
    if kind in ("sparsifiner", "both"):
        spot_vit.sparsify_attention(model, 0.5)
    if kind in DECIDING:
        method = "spot" if kind in ("both", "fuse") else kind
        soft = "fuse" if kind == "fuse" else None
        spot_vit.sparsify(model, method=method, keep=0.6, at=[1, 2], soft=soft)
    return model.eval()


def needs(format: str) -> None:
    """Skips a test whose format cannot be made here."""
    if reason := available()[format]:
        pytest.skip(reason)


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process that finds the operators of `spot_ext`."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def written(folder: Path) -> list[str]:
    """Names of all that is in a folder, hidden files too."""
    return sorted(os.listdir(folder))
