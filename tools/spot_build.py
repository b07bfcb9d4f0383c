"""Build backend: scikit-build-core, plus the question whether torch is already there.

The build needs torch's headers only. When the interpreter that installs SPOT has torch >= 2.11, its
headers are used and nothing is downloaded; otherwise torch joins the build requirements.
"""

from __future__ import annotations

import os
import subprocess
import sys

from scikit_build_core import build as _base
from scikit_build_core.build import (  # noqa: F401  (hooks passed on unchanged)
    build_sdist,
    get_requires_for_build_sdist,
)

TORCH = "torch>=2.11"

# Runs in the target interpreter; asks for metadata, since importing torch takes seconds.
_PROBE = """
import importlib.metadata as metadata, importlib.util as util
spec = util.find_spec("torch")
where = list(spec.submodule_search_locations or []) if spec else []
version = metadata.version("torch").split("+")[0].split(".")[:2]
if where and tuple(int(part) for part in version) >= (2, 11):
    print(where[0])
"""


def _installed_torch() -> str | None:
    """Folder of the target interpreter's torch, seen past the build isolation."""
    if given := os.environ.get("SPOT_TORCH_DIR"):
        return given
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], env=clean, cwd="/", capture_output=True, text=True
    )
    where = probe.stdout.strip()
    return where if probe.returncode == 0 and where else None


def _with_torch(requires: list[str]) -> list[str]:
    return requires if _installed_torch() else [*requires, TORCH]


def _point_cmake_at_torch() -> None:
    if where := _installed_torch():
        os.environ["SPOT_TORCH_DIR"] = where


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return _with_torch(_base.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return _with_torch(_base.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: D103
    _point_cmake_at_torch()
    return _base.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: D103
    _point_cmake_at_torch()
    return _base.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):  # noqa: D103
    return _base.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):  # noqa: D103
    return _base.prepare_metadata_for_build_editable(metadata_directory, config_settings)
