"""Fields as flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from spot_vit.config.fields import Fields, Rule, mapping, setting
from spot_vit.config.flags import Formatter, add_flags, keep_rest, negative, read_flags, read_value


@dataclasses.dataclass(frozen=True)
class Shop(Fields):
    """Shop."""

    town: str = setting("Ulm", text="where it is, 100%")
    rate: float = setting(0.5, low=0)
    count: int | None = None
    kind: str | None = setting(None, choices=("none", "big"), text="its size")
    keep: float | tuple[float, ...] = 0.7
    pair: tuple[float, float] | None = None
    tags: tuple[str, ...] = setting((), choices=("a", "b"), empty=True)
    more: Mapping[str, Any] = mapping()
    open_late: bool = False
    no_cash: bool = False


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=Formatter)
    add_flags(parser, (Shop,), {"count": ("-n",)})
    keep_rest(parser, {"--city": "say --town"})
    return parser.parse_args(words)


def read(*words: str) -> dict[str, Any]:
    values, problems = read_flags(Shop, vars(parsed(*words)))
    assert not problems
    return values


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--rate", "1e-3"], {"rate": 1e-3}),
        (["--rate=3"], {"rate": 3.0}),
        (["-n", "3"], {"count": 3}),
        (["-n3"], {"count": 3}),
        (["--count", "none"], {"count": None}),
        (["--count", "-3"], {"count": -3}),
        (["--count", "3.5"], {"count": "3.5"}),
        (["--kind", "none"], {"kind": "none"}),
        (["--kind", "null"], {"kind": None}),
        (["--town", "3"], {"town": "3"}),
        (["--keep", "0.5"], {"keep": 0.5}),
        (["--keep", "0.5", "0.4"], {"keep": (0.5, 0.4)}),
        (["--keep", "0.5,0.4"], {"keep": (0.5, 0.4)}),
        (["--pair", "0.5", "1"], {"pair": (0.5, 1.0)}),
        (["--pair", "none"], {"pair": None}),
        (["--pair", "1"], {"pair": (1.0,)}),
        (["--tags", "a"], {"tags": ("a",)}),
        (["--tags", "a,b"], {"tags": ("a", "b")}),
        (["--more", "a=1", "b=[1, x]", "c=1e-3", "d=none", "e=", "f=g=h"],
         {"more": {"a": 1, "b": [1, "x"], "c": 1e-3, "d": "none", "e": None, "f": "g=h"}}),
        (["--open-late"], {"open_late": True}),
        (["--no-open-late"], {"open_late": False}),
        (["--no-cash"], {"no_cash": True}),
        (["--cash"], {"no_cash": False}),
        ([], {}),
    ],
)  # fmt: skip
def test_words_become_values(words: list[str], values: dict[str, Any]) -> None:
    assert read(*words) == values


def test_types_of_what_is_read() -> None:
    assert type(read("--rate", "3")["rate"]) is float
    assert type(read("--count", "3")["count"]) is int
    assert read_value(["x"], float, Rule()) == "x"


@pytest.mark.parametrize(
    ("words", "rest", "problems"),
    [
        (["here"], ["here"], []),
        (["--rate", "1", "here", "--open-late"], ["here"], []),
        (["--city", "Bonn", "here"], ["here"], ["--city is no flag; say --town"]),
        (["--city=Bonn", "here"], ["here"], ["--city is no flag; say --town"]),
        (["--rat", "1"], [], ["--rat is no flag; did you mean --rate?"]),
        (["--open_late", "--xyzzy"], [], ["--open_late is no flag; did you mean --open-late?",
                                          "--xyzzy is no flag"]),
        (["a", "b"], ["a", "b"], []),
        (["--keep", "0.5", "--", "-odd", "b"], ["-odd", "b"], []),
    ],
)  # fmt: skip
def test_what_is_not_known_is_kept(words: list[str], rest: list[str], problems: list[str]) -> None:
    found = parsed(*words)
    assert found.words == rest and found.problems == problems


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rate"], "--rate needs a value: a number of 0 or more"),
        (["--keep"], "--keep needs a value: a number, or a non-empty list"),
        (["--more", "a"], "more takes name=value, got 'a'"),
        (["--more", "=1"], "more takes name=value, got '=1'"),
        (["--more", "a=[1"], "more: a: no yaml"),
    ],
)
def test_flags_that_cannot_be_read(words: list[str], problem: str) -> None:
    _, problems = read_flags(Shop, vars(parsed(*words)))
    assert len(problems) == 1 and problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--keep", "0.7", "here"], {"keep": 0.7, "town": "here"}),
        (["--keep", "0.7,0.5", "here"], {"keep": (0.7, 0.5), "town": "here"}),
        (["--more", "a=1", "here"], {"more": {"a": 1}, "town": "here"}),
        (["--tags", "a", "here"], {"tags": ("a", "here")}),
        (["--keep", "here"], {"keep": "here"}),
    ],
)
def test_a_list_gives_back_the_word_behind_it(words: list[str], values: dict[str, Any]) -> None:
    found, problems = read_flags(Shop, vars(parsed(*words)), positional="town")
    assert not problems
    assert found == values or found == {"keep": ("here",)}
    kept, _ = read_flags(Shop, vars(parsed(*words)))
    assert "town" not in kept


def test_help_has_a_line_for_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "Shop:" in text and "where it is, 100% (Ulm)" in text
    assert "-n N, --count N" in text and "its size [none, big]" in text
    assert "--pair N N" in text and "--more NAME=VALUE ..." in text and "--keep N ..." in text
    assert "--no-open-late" not in text and "\n  --cash" not in text
    for field in dataclasses.fields(Shop):
        assert f"--{field.name.replace('_', '-')}" in text


def test_what_switches_off() -> None:
    assert negative("--amp") == "--no-amp" and negative("--no-aug") == "--aug"
