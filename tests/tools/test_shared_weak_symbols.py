"""tools/build/shared_weak_symbols.py, and what it says about the CPU kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.package import ROOT
from support.slow import most_slow


def _object(folder: Path, name: str, text: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "a C++ compiler built this package"
    (folder / f"{name}.cpp").write_text(text)
    path = folder / f"{name}.o"
    subprocess.run(
        [compiler, "-O0", "-c", str(folder / f"{name}.cpp"), "-o", str(path)], check=True
    )
    return path


def _shared(*paths: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tools" / "build" / "shared_weak_symbols.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, paths)], capture_output=True, text=True
    )


def test_shared_weak_symbols_are_found(tmp_path: Path) -> None:
    inline = "inline int shared_helper(int x) { return x + 1; }\n"
    one = _object(tmp_path, "one", inline + "int one(int x) { return shared_helper(x); }")
    two = _object(tmp_path, "two", inline + "int two(int x) { return shared_helper(x); }")
    done = _shared(one, two)
    assert done.returncode == 1
    assert "shared_helper" in done.stderr and "one.o" in done.stderr and "two.o" in done.stderr


def test_distinct_weak_symbols_pass(tmp_path: Path) -> None:
    inline = "inline int helper(int x) {{ return x + 1; }}\nint {0}(int x) {{ return helper(x); }}"
    one = _object(tmp_path, "one", f"namespace a {{ {inline.format('one')} }}")
    two = _object(tmp_path, "two", f"namespace b {{ {inline.format('two')} }}")
    assert _shared(one, two).returncode == 0
    assert _shared(one, one).returncode == 0  # one object, given twice
    assert _shared().returncode == 0


@pytest.mark.parametrize("which", most_slow(["ends", "all"]))
def test_per_isa_kernels_share_no_weak_symbols(tmp_path: Path, which: str) -> None:
    """Unoptimised, as in debug builds: there inline functions become weak symbols."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler
    flags = {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mbmi2"],
        "avx512": [
            *("-mavx2", "-mfma", "-mbmi2"),
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        ],
    }
    flags["avx512_bf16"] = [*flags["avx512"], "-mavx512bf16"]
    from spot_ext import _C

    objects = []
    isas = _C.build_info()["isas"]
    for isa in isas if which == "all" else [isas[0], isas[-1]]:
        path = tmp_path / f"{isa}.o"
        subprocess.run(
            [
                compiler,
                "-std=c++17",
                "-O0",
                "-fno-exceptions",
                "-fno-rtti",
                f"-DSPOT_ISA={isa}",
                *flags[isa],
                "-c",
                str(ROOT / "csrc" / "cpu" / "kernels.cpp"),
                "-o",
                str(path),
            ],
            check=True,
        )
        objects.append(path)
    done = _shared(*objects)
    assert done.returncode == 0, done.stderr
