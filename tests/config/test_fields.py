"""Typed checks of configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from spot_vit.config.fields import (
    Fields,
    Rule,
    complaint,
    listed,
    mapping,
    of_type,
    plain,
    problem_lines,
    relation,
    setting,
)


@dataclasses.dataclass(frozen=True)
class Oven(Fields):
    """An oven."""

    heat: float = setting(180.0, above=0, high=300)
    trays: int = setting(1, low=1)
    levels: tuple[int, ...] = setting((1,), low=0, ascending=True)
    modes: tuple[str, ...] = setting((), choices=("grill", "fan"), distinct=True, empty=True)
    pair: tuple[float, float] | None = None
    name: str | None = None
    clean: bool = False
    more: Mapping[str, Any] = mapping()

    @relation("trays", "levels")
    def _trays_fit(self) -> str | None:
        if self.trays <= len(self.levels):
            return None
        return f"{self.trays} trays need as many levels, got {len(self.levels)}"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("heat", 0, "heat must be a number above 0 and at most 300, got 0"),
        ("heat", 301, "got 301"),
        ("heat", float("nan"), "got nan"),
        ("heat", True, "got True"),
        ("heat", "180", "got '180'"),
        ("heat", [180], r"got \(180,\)"),
        ("trays", 1.0, "trays must be a whole number of 1 or more, got 1.0"),
        ("trays", 2**40, "got 1099511627776"),
        ("trays", None, "got None"),
        ("levels", (), "levels must be a non-empty list"),
        ("levels", (2, 1), "ascending, got"),
        ("levels", (1, 1), "ascending, got"),
        ("levels", 3, r"got 3; for one: \[3\]"),
        ("levels", b"\x01", "got b"),
        ("levels", "12", "got '12'"),
        ("levels", {1: 2}, "levels must be"),
        ("modes", ("fan", "fan"), "none twice"),
        ("modes", ("gril",), "did you mean 'grill'"),
        ("modes", "grill", "got 'grill'"),
        ("pair", (1.0,), "a list of 2, each a number, or None"),
        ("pair", (1.0, 2.0, 3.0), "a list of 2"),
        ("pair", (1.0, float("inf")), "a list of 2"),
        ("name", 3, "name must be text, or None, got 3"),
        ("clean", 1, "clean must be true or false, got 1"),
        ("clean", "yes", "clean must be true or false, got 'yes'"),
        ("more", ["a"], "more must be a mapping of names to values"),
        ("more", {1: 2}, "more must be a mapping"),
        ("more", None, "more must be a mapping"),
    ],
)
def test_a_field_says_what_it_may_hold(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Oven(**{field: value})


def test_what_fits_is_kept_as_plain_data() -> None:
    oven = Oven(
        heat=np.float32("0.5"),
        levels=np.array([1, 4]),
        modes=["fan"],
        pair=[1, 2.5],
        more={"a": [1]},
    )
    assert oven.heat == 0.5 and type(oven.heat) is float
    assert oven.levels == (1, 4) and oven.modes == ("fan",) and oven.pair == (1, 2.5)
    assert oven.more == {"a": (1,)} and oven.to_dict()["more"] == {"a": [1]}
    assert Oven.from_json(oven.to_json()) == oven
    assert Oven().more == {} and Oven().more is not Oven().more


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ValueError) as said:
        Oven(heat=-1, clean="no", trays=3)
    assert problem_lines(said.value) == [
        "heat must be a number above 0 and at most 300, got -1",
        "clean must be true or false, got 'no'",
        "3 trays need as many levels, got 1",
    ]
    assert str(said.value).startswith("Oven: 3 problems\n")


def test_relations_are_asked_only_of_fields_that_are_right() -> None:
    with pytest.raises(ValueError) as said:
        Oven(trays=3, levels="x")
    assert problem_lines(said.value) == [str(said.value)]
    assert "levels must be" in str(said.value)


def test_copies_are_checked() -> None:
    with pytest.raises(ValueError, match="at most 300"):
        Oven().replace(heat=1000)
    with pytest.raises(TypeError, match=r"Oven has no \['hot'\]"):
        Oven().replace(hot=1)


def test_types() -> None:
    assert of_type(1, float) and not of_type(1.0, int) and not of_type(True, int)
    assert of_type((1, 2), tuple[float, ...]) and not of_type([1, 2], tuple[float, ...])
    assert of_type((1, "a"), tuple[int, str]) and not of_type((1,), tuple[int, str])
    assert of_type(None, type(None)) and of_type(object(), Any)
    assert complaint("n", "b", str | None, Rule(choices=("a",))) is not None
    assert complaint("n", None, str | None, Rule(choices=("a",))) is None
    assert complaint("n", 3, str | int, Rule(choices=("a",), low=4)) is not None


def test_plain_and_listed_are_each_others_reverse_at_any_depth() -> None:
    deep = {"a": [1, {"b": np.array([0.5, 2.0])}], "c": range(2)}
    assert plain(deep) == {"a": (1, {"b": (0.5, 2.0)}), "c": (0, 1)}
    assert listed(plain(deep)) == {"a": [1, {"b": [0.5, 2.0]}], "c": [0, 1]}
