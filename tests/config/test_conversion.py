"""Conversions as data: what two of them differ in, and whether that matters."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from spot_vit.config.conversion import CONVERSIONS, compare, conversion_of
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig

SPOT = SpotConfig(at=(1, 2, 3))
SPARSE = SparsifinerConfig(blocks=(0, 1))

FREE = [
    ("keep", 0.5),
    ("keep", [0.9, 0.5, 0.1]),
    ("detach_stats", True),
    ("train_decision", "topk"),
    ("tau", 0.5),
    ("noise", 0.1),
    ("keep_rate", 0.1),
    ("mask_threshold", 0.1),
    ("backend", "dense"),
]
WHAT_MATTERS = [
    ("method", "dynamicvit"),
    ("at", [1, 2]),
    ("features", ["embed", "cls"]),
    ("history", "since_last"),
    ("heads", "mean"),
    ("d_remap", 16),
    ("scaling", "n"),
    ("soft", "fuse"),
    ("reduce_n", 2),
    ("reduce_c", 1),
    ("project", True),
    ("share_inout_proj", True),
    ("scale", "channels"),
    ("coef_topk", 3),
    ("coef_threshold", 0.1),
    ("basis_threshold", 0.1),
    ("mask", "threshold"),
    ("removed_as_zeros", True),
    ("blocks", [1]),
]


def changed(field: str, value: Any) -> dict[str, Any]:
    """Both configurations as a file has them, with one field changed."""
    configs = {"spot": SPOT, "sparsifiner": SPARSE}
    name = "spot" if field in SpotConfig.names() else "sparsifiner"
    more = {"coef_topk": None} if field == "coef_threshold" else {}
    configs[name] = configs[name].replace(**{field: value}, **more)
    return json.loads(json.dumps({name: config.to_dict() for name, config in configs.items()}))


MODEL = SimpleNamespace(spot_config=SPOT, sparsifiner_config=SPARSE)


def test_every_field_is_one_or_the_other() -> None:
    named = {field for field, _ in FREE + WHAT_MATTERS}
    assert named == {*SpotConfig.names(), *SparsifinerConfig.names()}
    free = {field for kind in CONVERSIONS.values() for field in kind.free}
    assert free == {field for field, _ in FREE}


@pytest.mark.parametrize(("field", "value"), FREE)
def test_what_is_free_is_told(field: str, value: Any) -> None:
    problems, free = compare(changed(field, value), conversion_of(MODEL))
    wanted = tuple(value) if isinstance(value, list) else value
    own = SPOT if field in SpotConfig.names() else SPARSE
    assert not problems
    assert free == [f"{field} was {wanted!r} and is {getattr(own, field)!r} in the model"]


@pytest.mark.parametrize(("field", "value"), WHAT_MATTERS)
def test_what_matters_is_a_problem(field: str, value: Any) -> None:
    problems, free = compare(changed(field, value), conversion_of(MODEL))
    assert not free and any(text.startswith(f"{field} was ") for text in problems)


def test_equal_conversions_and_models_without() -> None:
    same = changed("keep", SPOT.keep)
    assert compare(same, conversion_of(MODEL)) == ([], [])
    assert conversion_of(object()) == {} and compare({}, {}) == ([], [])
    problems, _ = compare(changed("keep", 0.5), {})
    assert problems == [
        "convert the model first: sparsify(model, keep=0.5, at=(1, 2, 3))",
        "convert the model first: sparsify_attention(model, blocks=(0, 1))",
    ]
    problems, _ = compare({}, conversion_of(MODEL))
    assert [text.split(":")[0] for text in problems] == [
        "the weights are of a model without sparsify",
        "the weights are of a model without sparsify_attention",
    ]


def test_fields_of_other_versions() -> None:
    older = changed("keep", 0.7)
    del older["spot"]["noise"]
    assert compare(older, conversion_of(MODEL)) == ([], [])
    with pytest.raises(ValueError, match=r"another version: SpotConfig has no \['colour'\]"):
        compare({"spot": {"colour": "red"}}, conversion_of(MODEL))
    with pytest.raises(ValueError, match=r"not known here: \['pruning'\]"):
        compare({"pruning": {}}, conversion_of(MODEL))
