"""How much the nightly tests do, and the figures that they leave for tools/release/nightly.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SHARE = float(os.environ.get("SPOT_NIGHTLY_SHARE", "1"))
"""Of all counts, to try the nightly run in less time."""

_FIGURES = os.environ.get("SPOT_NIGHTLY_FIGURES")


def nightly(count: int) -> int:
    """That many at night, or the share of them that is asked for."""
    return max(1, round(count * SHARE))


def record(check: str, op: str, **figures: Any) -> None:
    """Adds a line of figures to the file that SPOT_NIGHTLY_FIGURES names; without it, nothing."""
    if _FIGURES:
        with Path(_FIGURES).open("a") as file:
            file.write(json.dumps({"check": check, "op": op, **figures}) + "\n")
