"""Copies of package and tests with CPU libraries of their own, which leave the checkout alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pyproject.toml", "spot_ext", "python", "tests")


def copied(folder: Path) -> Path:
    """A copy of packages and tests in `folder`, without libraries; where it is."""
    copy = folder / "copy"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, copy / name, ignore=skip)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    return copy


def built(folder: Path, copy: Path, *options: str, torch: Path | None = None) -> None:
    """Puts CPU libraries that are built with further options of CMake into the copy.

    `torch` is the folder of the package whose headers to use, by default that of this Python.
    """
    import pybind11

    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", "-DSPOT_WITH_CUDA=off",
         f"-DSPOT_TORCH_DIR={torch or ''}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
         *options],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(["ninja", "-C", folder / "build"], check=True, stdout=subprocess.DEVNULL)
    for library in (folder / "build").glob("*.so"):
        shutil.copy(library, copy / "spot_ext")
