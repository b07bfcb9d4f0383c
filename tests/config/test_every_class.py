"""Every configuration class, found by introspection: what any field takes, and gives back."""

from __future__ import annotations

import decimal
import fractions
import importlib
import math
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import hypothesis
import numpy as np
import pytest
import spot_vit.config
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from spot_vit import SparsifinerConfig, SpotConfig, sparsify, sparsify_attention
from spot_vit.config.fields import LARGEST, LARGEST_REAL, Fields, Rule, alternatives

NEEDED: dict[str, dict[str, Any]] = {
    "EvaluationSettings": {"checkpoint": "x"},
    "ExportSettings": {"checkpoint": "x"},
    "BenchSettings": {"model": "x"},
    "ReportSettings": {"checkpoint": "x", "images": ("digits",)},
}
"""Fields without a default."""


def every_class() -> list[type[Fields]]:
    """All subclasses, of all modules of the package; those without a field are left out."""
    for module in pkgutil.iter_modules(spot_vit.config.__path__):
        importlib.import_module(f"spot_vit.config.{module.name}")
    found, todo = set(), [Fields]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith("spot_vit.") and kind is not Fields:
            found.add(kind)
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


CLASSES = every_class()
NAMES = [f"{kind.__module__[16:]}.{kind.__name__}" for kind in CLASSES]
FIELDS = [(kind, name) for kind in CLASSES for name in kind.names()]


def test_they_are_all_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"SpotConfig", "SparsifinerConfig", "Recipe", *NEEDED} <= names
    assert len(FIELDS) > 300


class Odd:
    """What nobody expects, and cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


loop: list[Any] = []
loop.append(loop)

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, -1, 2**31 - 1, 2**31, 2**80, -(2**80), 10**400, -(10**400)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, -0.5, 1e308, -1e308, 1e-300, math.inf, math.nan]),
    st.booleans(),
    st.sampled_from([np.float32(0.7), np.float32("inf"), np.float64(2.5), np.float32(-1)]),
    st.builds(np.int64, st.integers(-5, 5)),
    st.sampled_from([np.bool_(True), np.float16("nan"), np.longdouble("0.3"), np.uint8(3)]),
    st.sampled_from([fractions.Fraction(1, 3), decimal.Decimal("0.5"), 1j, np.complex64(1)]),
)
JUNK = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(NUMBERS, max_size=3),
    st.lists(NUMBERS, max_size=3).map(tuple),
    st.lists(st.text(max_size=3), max_size=2),
    st.sampled_from(
        [
            {}, {1: 2}, {"a": 1}, {"a": {1}}, {"a": math.nan}, {"a": object()}, {"a": [1, [2]]},
            {"a": 2**80}, {1, 2}, object(), int, len, loop, range(3),
            range(10**12), memoryview(b"\x01"), bytearray(b"x"), np.array(0.5), np.array([1, 2]),
            np.array([[0.5]]), np.array(["cls"]), np.array([]), torch.tensor(0.5),
            torch.tensor([1, 2]), "x" * 10**6, np.str_("cls"), ("cls", "cls"), [[1]], [None],
        ]
    ),
)  # fmt: skip


def right_type(value: Any, kind: Any) -> bool:
    """What a field's type admits, said again: exact types, and NumPy's scalars for Python's."""
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is str:
        return isinstance(value, str)
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if kind is int:
        return whole
    if kind is float:
        return whole or isinstance(value, float | np.floating)
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, dict)
    assert typing.get_origin(kind) is tuple, kind
    held = typing.get_args(kind)
    if not isinstance(value, list | tuple | range | np.ndarray):
        return False
    if isinstance(value, np.ndarray) and value.ndim != 1:
        return False
    if len(value) > 2**16:
        return False
    if held[-1] is not Ellipsis and len(value) != len(held):
        return False
    return all(right_type(one, held[0]) for one in value)


def in_range(value: Any, rule: Rule) -> bool:
    if isinstance(value, dict):
        return True
    if isinstance(value, list | tuple | range | np.ndarray):
        values = list(value)
        fits = all(in_range(one, rule) for one in values) and (len(values) > 0 or rule.empty)
        if fits and rule.ascending:
            return all(values[k] < values[k + 1] for k in range(len(values) - 1))
        return fits and not (rule.distinct and len(set(values)) < len(values))
    if isinstance(value, str):
        return not rule.allowed() or value in rule.allowed()
    if value is None or isinstance(value, bool | np.bool_):
        return True
    if value != value or value in (math.inf, -math.inf):
        return False
    value = int(value) if isinstance(value, np.integer) else value
    largest = LARGEST_REAL if isinstance(value, float | np.floating) else LARGEST
    high = largest if rule.high is None else rule.high
    low = -largest if rule.low is None else rule.low
    over = rule.above is None or value > float(str(rule.above))
    return low <= value <= high and over and not (rule.even and value % 2)


@pytest.mark.parametrize(
    "kind", CLASSES, ids=lambda kind: f"{kind.__module__[16:]}.{kind.__name__}"
)
@given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_any_field_with_any_value(kind: type[Fields], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(kind.names()))
    value = data.draw(JUNK)
    annotation, rule = kind.rules()[name]
    typed = any(right_type(value, one) for one in alternatives(annotation))
    try:
        made = kind(**{**NEEDED.get(kind.__name__, {}), name: value})
    except (ValueError, TypeError) as error:
        assert name in str(error), error
        assert len(str(error)) < 5000
        return
    assert typed and in_range(value, rule), value
    assert kind.from_dict(made.to_dict()) == made
    assert kind.from_json(made.to_json()) == made
    assert made.replace() == made


@pytest.mark.parametrize(
    "kind", CLASSES, ids=lambda kind: f"{kind.__module__[16:]}.{kind.__name__}"
)
def test_defaults_come_back(kind: type[Fields]) -> None:
    made = kind(**NEEDED.get(kind.__name__, {}))
    assert kind.from_json(made.to_json()) == made
    for text in ("[]", "3", "null", 10**5 * "[" + 10**5 * "]"):
        with pytest.raises(ValueError, match="expected fields by name"):
            kind.from_json(text)
    with pytest.raises((ValueError, TypeError), match="absent"):
        kind.from_dict({**made.to_dict(), "absent": 1})


def fitting(annotation: Any, rule: Rule) -> st.SearchStrategy[Any]:
    """Values that a field's own checks take."""
    kinds = []
    low = rule.low if rule.low is not None else rule.above if rule.above is not None else 0
    high = LARGEST if rule.high is None else rule.high
    for kind in alternatives(annotation):
        if kind is type(None):
            kinds.append(st.none())
        elif kind is bool:
            kinds.append(st.booleans())
        elif kind is str:
            kinds.append(st.sampled_from(rule.allowed()))
        elif kind is int:
            small = st.integers(int(low), int(low) + 6)
            kinds.append(st.one_of(small, st.integers(int(low), int(high))))
            if rule.even:
                kinds[-1] = kinds[-1].map(lambda n: max(int(low), n - n % 2))
        elif kind is float:
            kinds.append(st.floats(low, min(high, 1), exclude_min=rule.above is not None))
        else:
            (held, *_) = typing.get_args(kind)
            several = st.lists(fitting(held, rule), min_size=1, max_size=4, unique=True)
            order = sorted if rule.ascending else lambda x: sorted(x, reverse=True)
            kinds.append(several.map(order).map(tuple))
    return st.one_of(kinds)


@pytest.mark.parametrize(
    ("kind", "convert"), [(SpotConfig, sparsify), (SparsifinerConfig, sparsify_attention)]
)
@given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_what_is_accepted_builds_a_model_or_is_refused_by_name(
    kind: type[Fields], convert: Any, data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.sampled_from(kind.names()), max_size=4))
    values = {name: data.draw(fitting(*kind.rules()[name])) for name in sorted(chosen)}
    try:
        config = kind(**values)
        with torch.device("meta"):  # widths may be large
            model = timm.create_model(
                "deit_small_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3
            )
            convert(model, config=config)
    except ValueError as error:
        assert any(name in str(error) for name in kind.names()), error
        return
    (own,) = (getattr(model, n) for n in ("spot_config", "sparsifiner_config") if hasattr(model, n))
    for name in chosen:
        if values[name] is not None:
            assert getattr(own, name) == getattr(config, name)
    assert kind.from_json(own.to_json()) == own
