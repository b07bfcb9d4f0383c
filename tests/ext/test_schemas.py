"""Released schemas do not change in a way that breaks a saved model or a caller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spot_ext  # noqa: F401  (loads the ops)

FROZEN = {
    line.split("(")[0]: line
    for line in (Path(__file__).parent / "schemas.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def _current() -> dict[str, torch._C.FunctionSchema]:
    names = torch._C._dispatch_get_all_op_names()
    return {
        name: torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))
        for name in names
        if name.startswith("spot::")
    }


def test_the_list_is_complete() -> None:
    assert set(_current()) == set(FROZEN), "add new ops to schemas.txt; never remove one"


@pytest.mark.parametrize("name", FROZEN)
def test_schema_is_as_frozen_or_extends_it(name: str) -> None:
    current, frozen = _current()[name], torch._C.parse_schema(FROZEN[name])
    assert current.is_backward_compatible_with(frozen), f"was {frozen}\nis {current}"


@pytest.mark.parametrize("name", FROZEN)
def test_no_keyword_only_tensors_and_no_aliases(name: str) -> None:
    schema = _current()[name]
    assert not any(argument.kwarg_only for argument in schema.arguments)
    assert not any(argument.alias_info for argument in (*schema.arguments, *schema.returns))
    assert not any("int " in str(a.real_type) for a in schema.arguments), "sizes are SymInt"


_OP = "spot::op(Tensor a, SymInt n=1, Tensor? b=None) -> Tensor"


@pytest.mark.parametrize(
    ("changed", "compatible"),
    [
        (_OP, True),
        ("spot::op(Tensor a, SymInt n=1, Tensor? b=None, bool c=False) -> Tensor", True),
        ("spot::op(Tensor a, bool c, SymInt n=1, Tensor? b=None) -> Tensor", False),
        ("spot::op(Tensor a, Tensor? b=None, SymInt n=1) -> Tensor", False),
        ("spot::op(Tensor a, SymInt n=2, Tensor? b=None) -> Tensor", False),
        ("spot::op(Tensor a, SymInt m=1, Tensor? b=None) -> Tensor", False),
        ("spot::op(Tensor a, SymInt n=1) -> Tensor", False),
        ("spot::op(Tensor a, SymInt n, Tensor b) -> Tensor", False),
        ("spot::op(Tensor a, SymInt n=1, Tensor? b=None) -> (Tensor, Tensor)", False),
        ("spot::op(Tensor(a!) a, SymInt n=1, Tensor? b=None) -> Tensor", False),
    ],
)
def test_the_comparison_notices_breaking_changes(changed: str, compatible: bool) -> None:
    frozen, new = torch._C.parse_schema(_OP), torch._C.parse_schema(changed)
    assert new.is_backward_compatible_with(frozen) == compatible
