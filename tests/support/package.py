"""The package as it is installed, and interpreters that import it anew."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import spot_ext
from spot_ext import _library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(spot_ext.__file__).absolute().parent  # a link stays one, as in FOLDER
FOLDER = _library.loaded[0].parent  # of the compiled libraries
LIBRARIES = sorted(path.name for path in FOLDER.glob("libspot_ops*.so"))

CUDA_SHIMS = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}


def python(
    code: str, *path: Path, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds `spot_ext` in the given folders first."""
    full = {k: v for k, v in os.environ.items() if not k.startswith("SPOT_")}
    full["PYTHONPATH"] = os.pathsep.join(str(p) for p in (*path, SOURCE.parent))
    full["OMP_NUM_THREADS"] = "2"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",  # not the checkout, which would come first
        env=full | (env or {}),
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
