"""The table of methods is the one place that knows them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from spot_vit.config.methods import FEATURES, METHODS, Method
from spot_vit.config.spot import SpotConfig

PACKAGE = Path(__file__).resolve().parents[2] / "python/spot_vit"


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_configurations_follow_the_row(row: Method) -> None:
    config = SpotConfig(method=row.name)
    assert METHODS[row.name] is row and row.source
    assert set(row.evidence) <= set(FEATURES)
    assert config.evidence == row.evidence and config.learned == bool(row.evidence)
    assert bool(row.evidence) + row.cuts_inside + row.by_chance == 1, "one thing scores"
    assert config.cuts_inside == row.cuts_inside and config.fuses == row.fuses
    assert config.replace(soft="fuse").fuses and not config.replace(soft="none").fuses


def test_a_new_method_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", Method("mine", "Mine", "a test", ("embed", "cls")))
    config = SpotConfig(method="mine")
    assert config.evidence == ("embed", "cls") and config.learned and config.uses_statistics
    with pytest.raises(ValueError, match="'mine' has its own evidence"):
        SpotConfig(method="mine", features=["embed"])
    with pytest.raises(ValueError, match=r"method must be one of .*'mine'"):
        SpotConfig(method="other")


def test_nobody_else_compares_with_a_name() -> None:
    """Sources of published weights have some of the same names and are no methods."""
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("published.py", "checkpoint_layouts.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                named = {value for value in constants if value in METHODS}
                assert not named, f"{path.name}:{node.lineno} compares with {named}"
