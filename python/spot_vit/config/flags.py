"""Configurations as flags: the field `foo_bar` is `--foo-bar`.

argparse cuts the command line into flags and words; what the words mean is decided here, by the
types of the fields, so that nothing ends at the first fault: values that cannot be read stay text,
which the configuration refuses by its own words.
"""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from spot_vit.config.fields import (
    Fields,
    Rule,
    alternatives,
    expected,
    is_number,
    of_type,
    problem_lines,
    raise_all,
)

F = TypeVar("F", bound=Fields)


class Formatter(argparse.HelpFormatter):
    """Help with the names of values as they were given, since any number of them is read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar or default_metavar)


def add_flags(
    parser: argparse.ArgumentParser,
    groups: Sequence[type[Fields]],
    short: Mapping[str, Sequence[str]],
) -> None:
    """Adds a flag for each field, in groups, with a line of help each.

    Args:
        parser: takes them; what is not given leaves no trace in what it parses.
        groups: configurations with different fields; the first line of a docstring is a title.
        short: further flags of a field, by its name.
    """
    for group in groups:
        title = (group.__doc__ or "").splitlines()[0].rstrip(".")
        place = parser.add_argument_group(title)
        defaults = group()
        for name, (annotation, rule) in group.rules().items():
            flag = "--" + name.replace("_", "-")
            common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
            text = _help(rule, getattr(defaults, name))
            if annotation is bool:
                flags = (*short.get(name, ()), flag)
                place.add_argument(*flags, action="store_true", help=text, **common)
                place.add_argument(
                    negative(flag), action="store_false", help=argparse.SUPPRESS, **common
                )
                continue
            several = any(_is_list(kind) or _is_mapping(kind) for kind in alternatives(annotation))
            place.add_argument(
                *short.get(name, ()),
                flag,
                nargs="*" if several else "?",
                metavar=_metavar(annotation),
                help=text,
                **common,
            )


def negative(flag: str) -> str:
    """The flag that switches one off: --no-amp, and --aug for --no-aug."""
    return f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"


def read_flags(
    kind: type[Fields], given: Mapping[str, Any], positional: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Values of the flags that were given, and what is wrong with the rest.

    Args:
        kind: the configuration.
        given: words by field, as `add_flags` has argparse collect them.
        positional: field of the word that needs no flag, where it was not given: a list that ends
            in something else than its elements has swallowed it.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, (annotation, rule) in kind.rules().items():
        if name not in given:
            continue
        words = given[name]
        if isinstance(words, bool):
            values[name] = words
            continue
        words = list(words) if isinstance(words, list) else [words]
        if positional is not None and len(words) > 1 and not _belongs(words[-1], annotation):
            values[positional] = words.pop()
            positional = None
        if words in ([], [None]):
            flag = name.replace("_", "-")
            problems.append(f"--{flag} needs a value: {expected(annotation, rule)}")
        elif _is_mapping(annotation):
            values[name] = dict(_pairs(name, words, problems))
        else:
            values[name] = read_value(words, annotation, rule)
    return values, problems


def settings_of(kind: type[F], arguments: argparse.Namespace, name: str) -> F:
    """The settings of a command line with one word that needs no flag.

    Args:
        kind: the configuration.
        arguments: as `add_flags` and `keep_rest` collect them.
        name: field of the word.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    given = dict(vars(arguments))
    words, problems = list(given["words"]), list(given["problems"])
    values, more = read_flags(kind, given, positional=None if words else name)
    if len(words) > 1:
        more.append(f"expected one {name.upper()}, got {', '.join(words)}")
    if words:
        values[name] = words[0]
    return checked(kind.from_dict, values, problems + more)


def checked(
    make: Callable[[Mapping[str, Any]], F], values: Mapping[str, Any], problems: Sequence[str]
) -> F:
    """A configuration of these values, if they and everything before are right.

    Args:
        make: gives the configuration, its `from_dict`.
        values: by field.
        problems: found before, a line each.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    found, all_problems = None, list(problems)
    try:
        found = make(values)
    except ValueError as error:
        all_problems += problem_lines(error)
    raise_all("", all_problems)
    assert found is not None  # else there was a problem
    return found


def read_value(words: Sequence[str], annotation: Any, rule: Rule) -> Any:
    """What words mean as a value of a type; those that mean nothing stay text.

    Elements of a list may stand in one word, with commas between them.
    """
    kinds = alternatives(annotation)
    lists = [kind for kind in kinds if _is_list(kind)]
    if not lists:
        return _scalar(words[0], kinds, rule)
    parts = [part for word in words for part in word.split(",") if part]
    if len(parts) == 1:
        alone = _scalar(parts[0], kinds, rule)
        if any(of_type(alone, kind) for kind in kinds):
            return alone
    return tuple(_scalar(part, typing.get_args(lists[0]), rule) for part in parts)


def keep_rest(parser: argparse.ArgumentParser, elsewhere: Mapping[str, str]) -> None:
    """Has a parser, of a subcommand too, keep what it does not know instead of ending there.

    What it parses then has `words`, those without a flag, and `problems`, a line for each flag that
    it does not know. The word behind such a flag is taken for its value.

    Args:
        parser: that has all its flags.
        elsewhere: what to say of flags that others have, by the flag.
    """
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        found, rest = parse(*args, **kwargs)
        found.words, found.problems = _sorted_out(parser, rest, elsewhere)
        return found, []

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


# ---- pieces --------------------------------------------------------------------------------------


def _sorted_out(
    parser: argparse.ArgumentParser, rest: Sequence[str], elsewhere: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Words without a flag, and what is wrong with the flags that are not known."""
    known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    words: list[str] = []
    problems: list[str] = []
    is_value = False
    for place, word in enumerate(rest):
        if word == "--":
            return [*words, *rest[place + 1 :]], problems
        if not word.startswith("-"):
            if not is_value:
                words.append(word)
            is_value = False
            continue
        flag, _, value = word.partition("=")
        near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
        hint = elsewhere.get(flag) or (f"did you mean {near[0]}?" if near else "")
        problems.append(f"{flag} is no flag" + (f"; {hint}" if hint else ""))
        is_value = not value
    return words, problems


def _scalar(word: str, kinds: Sequence[Any], rule: Rule) -> Any:
    if word in rule.allowed():
        return word
    if type(None) in kinds and word.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                pass
    return word


def _pairs(name: str, words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of name=value; values as yaml reads them."""
    from spot_vit.config.recipe_files import read_text

    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            problems.append(f"{name} takes name=value, got {word!r}")
            continue
        try:
            yield key, read_text(value)
        except ValueError as error:
            problems.append(f"{name}: {key}: {error}")


def _belongs(word: str, annotation: Any) -> bool:
    """Whether a word may end the values of a flag."""
    if _is_mapping(annotation):
        return "=" in word
    elements = [kind for kind in alternatives(annotation) if _is_list(kind)]
    if not elements or str in typing.get_args(elements[0]):
        return True
    parts = [part for part in word.split(",") if part]
    return all(is_number(_scalar(part, (float,), Rule())) for part in parts)


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is Mapping


def _metavar(annotation: Any) -> str:
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    if _is_mapping(kinds[0]):
        return "NAME=VALUE ..."
    for kind in kinds:
        if _is_list(kind):
            held = typing.get_args(kind)
            word = "NAME" if str in held else "N"
            return f"{word} ..." if held[-1] is Ellipsis else " ".join([word] * len(held))
    return "NAME" if kinds == [str] else "N"


def _help(rule: Rule, default: Any) -> str:
    words = [rule.text]
    if rule.allowed():
        words.append(f"[{', '.join(rule.allowed())}]")
    if default is not None and default is not False and default != {}:
        shown = (
            " ".join(f"{v:.4g}" if is_number(v) else str(v) for v in default)
            if isinstance(default, tuple)
            else default
        )
        words.append(f"({shown})")
    return " ".join(words).replace("%", "%%")
