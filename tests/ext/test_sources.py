"""Sources of the libraries: who may include what, and where CUDA's shims are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.package import CUDA_SHIMS, ROOT


def _sources() -> list[Path]:
    found = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(found) > 10
    return found


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_includes(path: Path) -> None:
    """Torch through its stable ABI only; each kind of file what it needs and no more."""
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    kernel = path.parent.name == "cpu" and path.suffix == ".h"
    for include in _includes(path):
        name = include.split("/")[0]
        assert name not in {"ATen", "c10", "caffe2"}, include
        if name == "torch":
            assert include.startswith(allowed), include
            assert path.parent.name in {"common", "cuda"} or path.name == "ops.cpp", (
                f"{path.name} includes {include}: only the seam may"
            )
        if kernel or path.name == "kernels.cpp":
            assert not include.startswith(("torch", "../common")), "kernels know no torch"
        if path.name == "bindings.cpp":
            assert not include.startswith(("torch", "common")), "_C knows no torch"
        if include.startswith("cuda"):
            assert path.parent.name == "cuda", include
        if path.name not in {"bindings.cpp"}:
            assert name not in {"pybind11", "Python.h"}, include


def test_cuda_shims_are_named_in_one_file() -> None:
    for path in _sources():
        named = {shim for shim in CUDA_SHIMS if shim in path.read_text()}
        assert not named or path.name == "device.h", f"{path.name}: {named}"
