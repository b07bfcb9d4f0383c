"""The libraries as they were built: what they need, and what they show."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from support.package import CUDA_SHIMS, FOLDER, LIBRARIES

from spot_ext import _library

TORCH = Path(torch.__file__).parent


def _nm(path: Path, *flags: str) -> list[list[str]]:
    done = subprocess.run(
        ["nm", "-D", *flags, str(path)], check=True, capture_output=True, text=True
    )
    return [line.split() for line in done.stdout.splitlines()]


def _undefined(path: Path) -> set[str]:
    """Undefined symbols that are neither weak nor versioned (libc, libstdc++, libgcc)."""
    rows = _nm(path, "--undefined-only")
    return {row[-1] for row in rows if row[-2] == "U" and "@" not in row[-1]}


@pytest.fixture(scope="module")
def torch_exports() -> set[str]:
    rows = _nm(TORCH / "lib" / "libtorch_cpu.so", "--defined-only")
    return {row[-1].split("@")[0] for row in rows}


def test_the_ops_library_needs_only_a_cpu_torch(torch_exports: set[str]) -> None:
    undefined = _undefined(FOLDER / _library.OPS)
    assert "torch_call_dispatcher" in undefined
    assert undefined <= torch_exports, undefined - torch_exports
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert not undefined & CUDA_SHIMS


def test_the_cuda_library_needs_three_symbols_more(torch_exports: set[str]) -> None:
    from spot_ext import _C

    path = FOLDER / _library.CUDA_OPS
    assert path.exists() == bool(_C.build_info()["cuda"])
    if not path.exists():
        return
    undefined = _undefined(path)
    assert undefined - torch_exports == CUDA_SHIMS
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    if torch.version.cuda is not None:
        exported = {
            row[-1].split("@")[0]
            for row in _nm(TORCH / "lib" / "libtorch_cuda.so", "--defined-only")
        }
        assert exported >= CUDA_SHIMS


def _dynamic(path: Path, tag: str) -> list[str]:
    done = subprocess.run(["readelf", "-dW", str(path)], check=True, capture_output=True, text=True)
    return re.findall(rf"\({tag}\).*\[(.*)\]", done.stdout)


SYSTEM = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}


def test_needed_libraries_and_no_path_to_torch() -> None:
    wanted = {
        _library.OPS: {"libtorch_cpu.so"},
        _library.CUDA_OPS: {"libtorch_cpu.so", "libtorch.so"},
    }
    for name in LIBRARIES:
        assert set(_dynamic(FOLDER / name, "NEEDED")) - SYSTEM == wanted[name], name
        for tag in ("RPATH", "RUNPATH"):
            assert not _dynamic(FOLDER / name, tag), name
    (module,) = FOLDER.glob("_C.*.so")
    assert set(_dynamic(module, "NEEDED")) - SYSTEM == {_library.OPS}
    assert _dynamic(module, "RUNPATH") + _dynamic(module, "RPATH") == ["$ORIGIN"]


def test_only_intended_symbols_are_visible() -> None:
    control = {"spot_isa", "spot_set_isa", "spot_isas_built", "spot_isas_usable"}
    for name in LIBRARIES:
        rows = _nm(FOLDER / name, "--defined-only", "--demangle")
        strong = {row[-1] for row in rows if row[1] in "TDBR"}
        assert strong == (control if name == _library.OPS else set()), name
        for row in rows:  # inline functions of the standard library are beyond our reach
            symbol = " ".join(row[2:])
            if symbol not in control:
                assert re.search(r"\bstd::", symbol) and "spot" not in symbol, symbol
    (module,) = FOLDER.glob("_C.*.so")
    functions = {row[-1] for row in _nm(module, "--defined-only") if row[1] == "T"}
    assert functions == {"PyInit__C"}
