"""Instruction sets of the CPU kernels: which there are, and choosing one."""

from __future__ import annotations

import pytest
from support.package import python

from spot_ext import _C


def test_spot_isa_forces_an_instruction_set() -> None:
    sets = _C.isas()
    assert sets[0] == "baseline" and set(sets) <= set(_C.build_info()["isas"])
    for name in sets:
        done = python("from spot_ext import _C; print(_C.isa())", env={"SPOT_ISA": name})
        assert done.stdout.split() == [name]


def test_set_isa_refuses_unknown_names() -> None:
    before = _C.isa()
    for name in ("", "AVX2", "avx", "avx512 "):
        with pytest.raises(ValueError, match=rf"isa must be one of .*got '{name}'"):
            _C.set_isa(name)
    assert _C.isa() == before
