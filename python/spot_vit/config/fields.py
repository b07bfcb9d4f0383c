"""The base of all configurations: typed checks, checked copies, and a round trip through JSON.

A configuration is a frozen dataclass on `Fields`. Types come from the annotations, ranges and
choices from `setting`, and what fields ask of each other from methods marked with `relation`.
Everything that is wrong is found before anything is said, and said in one `ValueError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cache
from typing import Any, TypeVar

F = TypeVar("F", bound="Fields")
M = TypeVar("M", bound=Callable[..., Any])

LARGEST = 2**31 - 1
"""Of whole numbers, unless a field says otherwise: what counts, sizes and indices fit in."""

LARGEST_REAL = 1e30
"""Of other numbers, unless a field says otherwise: it and some more fit in float32."""

_DEEPEST, _LONGEST = 16, 2**16  # lists and mappings that are taken for plain data


# ---- plain data ----------------------------------------------------------------------------------


def exact(ratio: float) -> Fraction:
    """The decimal that was written: 0.7 is 7/10. Binary floats give 48, not 49, for 100 * 0.7²."""
    return Fraction(str(ratio))


def plain(value: Any, depth: int = 0) -> Any:
    """What users and files write, as plain data; anything else stays as it is.

    NumPy's scalars become the bool, int or float that they print as; lists, ranges and arrays of
    one dimension become tuples, mappings become dicts.

    Args:
        value: given by anybody.
        depth: of lists and mappings around it.
    """
    if type(value) in (bool, int, float, str):
        return value
    array = getattr(value, "dtype", None) is not None
    several = isinstance(value, list | tuple | range | Mapping)
    if several or (array and getattr(value, "ndim", None) == 1):
        if depth >= _DEEPEST or len(value) > _LONGEST:
            return value
        if isinstance(value, Mapping):
            return {key: plain(held, depth + 1) for key, held in value.items()}
        return tuple(plain(held, depth + 1) for held in value)
    if array and getattr(value, "ndim", None) == 0 and value.dtype == bool:
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        with suppress(ValueError):  # which fractions do not print as
            return float(str(value))
    return value


def is_plain(value: Any) -> bool:
    """Whether a value is what JSON keeps as it is: nothing, finite numbers, text, and these held.

    Args:
        value: that `plain` gave.
    """
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(held) for key, held in value.items())
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    if is_whole(value):
        return abs(value) < 2**63
    return value is None or isinstance(value, bool | str)


def shown(value: object) -> str:
    """A value in a message: what Python prints, and of that what fits into a line."""
    try:
        text = repr(value)
    except Exception:  # more digits than Python prints, or an object of whatever kind
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}…"


def listed(value: Any) -> Any:
    """Plain data as JSON and yaml have it: tuples are lists, at any depth."""
    if isinstance(value, dict):
        return {key: listed(held) for key, held in value.items()}
    return [listed(held) for held in value] if isinstance(value, tuple | list) else value


def is_number(value: object) -> bool:
    """Whether a plain value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a plain value is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def nearest(word: object, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" where a known name is like `word`, else nothing."""
    found = difflib.get_close_matches(str(word).replace("-", "_"), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def near_names(name: str, known: Sequence[str]) -> str:
    """The words "; near: x, y" of known names that begin nearly so, else nothing."""
    beginnings = {one[: len(name) + 1]: one for one in reversed(known)}
    near = [beginnings[found] for found in difflib.get_close_matches(name, beginnings, 3, 0.8)]
    return f"; near: {', '.join(near)}" if near else ""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {shown(value)}")


# ---- what a field may hold -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold besides its type; for a tuple, each of its elements.

    Attributes:
        low: smallest number.
        above: numbers must exceed it.
        high: largest number.
        even: whether numbers are even.
        choices: the values that are allowed, or a function that gives them.
        distinct: no element twice.
        ascending: elements ascend.
        empty: whether a tuple may be empty.
        expected: words for all of this, where those made from it would not do.
        text: what the field is, in a line.
    """

    low: float | None = None
    above: float | None = None
    high: float | None = None
    even: bool = False
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    distinct: bool = False
    ascending: bool = False
    empty: bool = False
    expected: str = ""
    text: str = ""

    def allowed(self) -> tuple[str, ...]:
        """The choices, or none where anything of the type will do."""
        return self.choices() if callable(self.choices) else self.choices

    def admits(self, value: Any) -> bool:
        """Whether one value of the right type, or an element, is in range and among the choices."""
        if isinstance(value, str):
            return not self.allowed() or value in self.allowed()
        if not is_number(value):
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.high is None and abs(value) > (LARGEST if is_whole(value) else LARGEST_REAL):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and not (self.even and value % 2)
        )

    def admits_all(self, values: tuple[Any, ...]) -> bool:
        """Whether the elements of a tuple are, and stand as they should."""
        if not (values or self.empty) or not all(map(self.admits, values)):
            return False
        if self.ascending and any(b <= a for a, b in itertools.pairwise(values)):
            return False
        return not self.distinct or len(set(values)) == len(values)


def setting(default: Any, **rule: Any) -> Any:
    """A field of a configuration: its default, and what a `Rule` holds, by name."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**rule)})


def mapping(text: str = "") -> Any:
    """A field of names and values, none by default."""
    return dataclasses.field(default_factory=dict, metadata={"rule": Rule(text=text)})


def relation(*fields: str) -> Callable[[M], M]:
    """Marks a method that says what is wrong between fields, or gives None.

    Args:
        fields: those it reads; it is asked only where each of them is right by itself.
    """

    def mark(method: M) -> M:
        method.relates = fields  # type: ignore[attr-defined]
        return method

    return mark


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation names; several for `int | None` and other unions."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def of_type(value: Any, kind: Any) -> bool:
    """Whether a plain value has the type; an int is a float too, and a bool is neither."""
    if kind is Any:
        return True
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return is_number(value)
    if kind is int:
        return is_whole(value)
    if typing.get_origin(kind) is tuple:
        held = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        if held[-1] is Ellipsis:
            return all(of_type(element, held[0]) for element in value)
        return len(value) == len(held) and all(map(of_type, value, held))
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, dict) and is_plain(value)
    return isinstance(value, kind)


def _named(kind: Any, rule: Rule) -> str:
    """A type with its range, in words."""
    if kind in (None, type(None)):
        return "None"
    if kind is bool:
        return "true or false"
    if kind is str:
        return f"one of {list(rule.allowed())}" if rule.allowed() else "text"
    if typing.get_origin(kind) is Mapping:
        return "a mapping of names to values"
    if typing.get_origin(kind) is tuple:
        held = typing.get_args(kind)
        inner = _named(held[0], rule)
        if held[-1] is not Ellipsis:
            return f"a list of {len(held)}, each {inner}"
        order = ", ascending" if rule.ascending else ", none twice" if rule.distinct else ""
        return f"a {'' if rule.empty else 'non-empty '}list, each {inner}{order}"
    noun = "a whole number" if kind is int else "a number"
    least = f"above {rule.above:g}" if rule.above is not None else ""
    if rule.low is not None:
        least = f"of {rule.low:g} or more"
    if rule.high is None:
        return f"{noun} {least}".rstrip()
    if not least:
        return f"{noun} of at most {rule.high:g}"
    if rule.low is not None:
        return f"{noun} from {rule.low:g} to {rule.high:g}"
    return f"{noun} {least} and at most {rule.high:g}"


def expected(annotation: Any, rule: Rule) -> str:
    """What a field may hold, in words."""
    return rule.expected or ", or ".join(_named(kind, rule) for kind in alternatives(annotation))


def complaint(name: str, value: Any, annotation: Any, rule: Rule) -> str | None:
    """What is wrong with a plain value of a field: expected, found, the nearest choice; or None."""
    for kind in alternatives(annotation):
        if of_type(value, kind):
            fits = rule.admits_all(value) if isinstance(value, tuple) else rule.admits(value)
            if fits:
                return None
    text = f"{name} must be {expected(annotation, rule)}, got {shown(value)}"
    if any(of_type((value,), kind) and rule.admits(value) for kind in alternatives(annotation)):
        return f"{text}; for one: [{shown(value)}]"
    words = value if isinstance(value, tuple) else (value,)
    odd = [word for word in words if isinstance(word, str) and word not in rule.allowed()]
    return text + nearest(odd[0], rule.allowed()) if odd else text


# ---- configurations ------------------------------------------------------------------------------


class _Checks(typing.NamedTuple):
    """Annotation and rule of each field, and the methods that relate fields."""

    fields: dict[str, tuple[Any, Rule]]
    relations: list[Callable[[Any], str | None]]


def _read_checks(kind: Any) -> _Checks:
    hints = typing.get_type_hints(kind)
    rules = {f.name: f.metadata.get("rule", Rule()) for f in dataclasses.fields(kind)}
    methods = [method for base in reversed(kind.__mro__) for method in vars(base).values()]
    return _Checks(
        {name: (hints[name], rule) for name, rule in rules.items()},
        [method for method in methods if hasattr(method, "relates")],
    )


_checks: Callable[[Any], _Checks] = cache(_read_checks)


class Fields:
    """Mixin of frozen dataclasses whose fields are plain data and tuples of it."""

    def __post_init__(self) -> None:
        checks = _checks(type(self))
        wrong: dict[str, str] = {}
        for name, (annotation, rule) in checks.fields.items():
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if found := complaint(name, value, annotation, rule):
                wrong[name] = found
        between = [
            method(self)
            for method in checks.relations
            if not wrong.keys() & set(method.relates)  # type: ignore[attr-defined]
        ]
        raise_all(type(self).__name__, [*wrong.values(), *filter(None, between)])

    @classmethod
    def names(cls) -> list[str]:
        """Names of the configuration's fields."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def rules(cls) -> dict[str, tuple[Any, Rule]]:
        """The annotation of each field, and what it may hold besides that type."""
        return dict(_checks(cls).fields)

    def replace(self: F, **changes: Any) -> F:
        """A copy with some fields changed, checked again."""
        if unknown := set(changes) - set(self.names()):
            kind = type(self).__name__
            raise TypeError(f"{kind} has no {sorted(unknown)}; it has {self.names()}")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {name: listed(getattr(self, name)) for name in self.names()}

    @classmethod
    def from_dict(cls: type[F], data: Mapping[str, Any]) -> F:
        """A configuration from what `to_dict` gave; fields that are absent have their defaults."""
        return cls().replace(**data)

    def to_json(self) -> str:
        """The configuration as JSON text that `from_json` reads."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[F], text: str) -> F:
        """A configuration from what `to_json` gave."""
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError("expected fields by name, got JSON that is nested too deep") from error
        if not isinstance(data, dict):
            raise ValueError(f"expected fields by name, got {shown(data)}")
        return cls.from_dict(data)


def checked_value(name: str, value: Any, annotation: Any, **rule: Any) -> Any:
    """A single setting as plain data, checked as the field of a configuration is.

    Args:
        name: of the setting, for the message.
        value: given by anybody.
        annotation: its type.
        rule: what a `Rule` holds, by name.

    Raises:
        ValueError: another type, or out of range; the setting is named.
    """
    value = plain(value)
    if found := complaint(name, value, annotation, Rule(**rule)):
        raise ValueError(found)
    return value


def raise_all(what: str, problems: list[str]) -> None:
    """Raises one `ValueError` with all the problems, a line each; nothing where there are none.

    Args:
        what: has them, for the first line where there are several; may be empty.
        problems: a line each.
    """
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(
            "\n  ".join([f"{what and what + ': '}{len(problems)} problems", *problems])
        )


def problem_lines(error: ValueError) -> list[str]:
    """The problems that `raise_all` put into an error."""
    lines = str(error).split("\n  ")
    return lines[1:] or lines
