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


@pytest.mark.parametrize("name", ["quantum", "AVX2", "avx512 "])
def test_an_absent_instruction_set_is_refused(name: str) -> None:
    """By every op, in one sentence; nothing else is used; another may be chosen."""
    done = python(
        """
        import torch, spot_ext
        from spot_ext import _C
        print(_C.isa())
        for call in (
            lambda: spot_ext.select_tokens(torch.rand(2, 5), 2),
            lambda: torch.ops.spot.attention_stats(*[torch.rand(2, 6, 2, 4)] * 3),
            lambda: torch.ops.spot.token_relevance(
                None, torch.rand(2, 5, 3), *[None] * 5,
                *map(torch.rand, [(4, 3), 4, (3, 4), 3, (2, 3), 2])),
        ):
            try:
                call()
                print("ran")
            except RuntimeError as error:
                print(str(error).splitlines()[0])
        _C.set_isa("baseline")
        print(spot_ext.select_tokens(torch.rand(2, 5), 2).shape)
        """,
        env={"SPOT_ISA": name},
    )
    first, *refused, last = done.stdout.splitlines()
    assert first == "none" and last == "torch.Size([2, 2])"
    assert len(refused) == 3
    for line in refused:
        assert f"SPOT_ISA is '{name}', but must be one of baseline" in line
