"""Build backend: scikit-build-core, plus the question where torch's headers come from.

The build needs nothing of torch but its headers. When the interpreter that installs SPOT has
torch >= 2.11, those are used and nothing is downloaded. Otherwise they are taken out of torch's
wheel, which pip downloads, and keeps in its cache for the installation that follows, but need not
unpack: a whole torch in the build environment would be gigabytes and minutes. Without pip, torch
joins the build requirements.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

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


def _in_target(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the target interpreter, seen past the isolation of the build environment."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [sys.executable, *arguments], env=clean, cwd="/", capture_output=True, text=True
    )


def _installed_torch() -> str | None:
    """Folder of the target interpreter's torch >= 2.11, or None."""
    if given := os.environ.get("SPOT_TORCH_DIR"):
        return given
    probe = _in_target("-c", _PROBE)
    return (probe.stdout.strip() or None) if probe.returncode == 0 else None


def _headers_from_wheel() -> str | None:
    """Unpacks the headers of the torch that pip would install; None where pip cannot get it."""
    folder = tempfile.mkdtemp(prefix="spot-torch-headers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    download = _in_target("-m", "pip", "download", *options, "--dest", folder, TORCH)
    wheels = list(Path(folder).glob("torch-*.whl"))
    if download.returncode != 0 or not wheels:
        print(download.stderr, file=sys.stderr)
        return None
    with zipfile.ZipFile(wheels[0]) as wheel:
        wanted = ("torch/include/torch/", "torch/version.py")
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(wanted)])
    wheels[0].unlink()
    return str(Path(folder, "torch"))


def _extra_requirements() -> list[str]:
    if _installed_torch() or _in_target("-m", "pip", "--version").returncode == 0:
        return []
    return [TORCH]


def _point_cmake_at_torch() -> None:
    if where := _installed_torch() or _headers_from_wheel():
        os.environ["SPOT_TORCH_DIR"] = where


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return [*_base.get_requires_for_build_wheel(config_settings), *_extra_requirements()]


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return [*_base.get_requires_for_build_editable(config_settings), *_extra_requirements()]


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
