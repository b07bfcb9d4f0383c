"""The base of all configurations: checked copies, and a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeVar

F = TypeVar("F", bound="Fields")


def exact(ratio: float) -> Fraction:
    """The decimal that was written: 0.7 is 7/10. Binary floats give 48, not 49, for 100 * 0.7²."""
    return Fraction(str(ratio))


def plain(value: Any) -> Any:
    """What users and files write, as plain data.

    NumPy's scalars become the bool, int or float that they print as; lists, ranges and arrays of
    one dimension become tuples.
    """
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, list | tuple | range) or getattr(value, "ndim", None) == 1:
        return tuple(map(plain, value))
    if getattr(value, "ndim", None) == 0 and value.dtype == bool:
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(str(value)) if isinstance(value, numbers.Real) else value


def is_number(value: object) -> bool:
    """Whether a plain value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a plain value is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


class Fields:
    """Mixin of frozen dataclasses whose fields are plain data and tuples of it."""

    @classmethod
    def names(cls) -> list[str]:
        """Names of the configuration's fields."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def replace(self: F, **changes: Any) -> F:
        """A copy with some fields changed, checked again."""
        if unknown := set(changes) - set(self.names()):
            kind = type(self).__name__
            raise TypeError(f"{kind} has no {sorted(unknown)}; it has {self.names()}")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

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
        return cls.from_dict(json.loads(text))
