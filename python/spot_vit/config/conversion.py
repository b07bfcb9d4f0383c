"""How a model was converted, as plain data that travels with its weights and is compared."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from spot_vit.config.fields import Fields
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig

Conversion = dict[str, dict[str, Any]]
"""Fields of the configuration of each conversion, by its name in `CONVERSIONS`."""


class Kind(NamedTuple):
    """A conversion: the call, its configuration, where the model keeps it, and what is free in it.

    Free fields say how much is kept, how it is computed, or how training decides: weights mean the
    same under any value. Every other field changes what the weights mean or compute.
    """

    call: str
    config: type[Fields]
    attribute: str
    free: tuple[str, ...]


CONVERSIONS = {
    "spot": Kind(
        "sparsify",
        SpotConfig,
        "spot_config",
        ("keep", "detach_stats", "train_decision", "tau", "noise"),
    ),
    "sparsifiner": Kind(
        "sparsify_attention",
        SparsifinerConfig,
        "sparsifiner_config",
        ("keep_rate", "mask_threshold", "backend"),
    ),
}


def conversion_of(model: Any) -> Conversion:
    """The configurations of a model, not wrapped; empty for a dense one."""
    return {
        name: getattr(model, kind.attribute).to_dict()
        for name, kind in CONVERSIONS.items()
        if hasattr(model, kind.attribute)
    }


class Comparison(NamedTuple):
    """What differs between weights and a model, one text each: what matters, and what is free."""

    problems: list[str]
    free: list[str]


def compare(found: Mapping[str, Mapping[str, Any]], own: Conversion) -> Comparison:
    """Compares the conversion that weights were saved with and that of a model.

    Args:
        found: with the weights.
        own: `conversion_of` the model that is to take them.

    Raises:
        ValueError: `found` names a conversion or a field that this version does not know, or is
            no mapping of names to fields.
    """
    if not isinstance(found, Mapping) or not all(isinstance(f, Mapping) for f in found.values()):
        raise ValueError(f"the weights do not say how they were converted: {reprlib.repr(found)}")
    problems: list[str] = []
    free: list[str] = []
    if unknown := sorted(set(found) - set(CONVERSIONS)):
        raise ValueError(f"the weights are of a conversion that is not known here: {unknown}")
    for name, kind in CONVERSIONS.items():
        if name not in found and name not in own:
            continue
        if name not in found:
            problems.append(
                f"the weights are of a model without {kind.call}: load them first, then convert"
            )
            continue
        theirs = _read(kind, found[name])
        if name not in own:
            problems.append(f"convert the model first: {_call(kind, theirs)}")
            continue
        ours = _read(kind, own[name])
        for field in kind.config.names():
            there, here = getattr(theirs, field), getattr(ours, field)
            if there != here:
                text = f"{field} was {there!r} and is {here!r} in the model"
                (free if field in kind.free else problems).append(text)
    return Comparison(problems, free)


def _read(kind: Kind, data: Mapping[str, Any]) -> Fields:
    try:
        return kind.config.from_dict(data)
    except TypeError as error:
        raise ValueError(f"the weights were saved by another version: {error}") from error


def _call(kind: Kind, config: Fields) -> str:
    """The call that converts as `config` says, with the fields that are not the default."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(kind.config)  # type: ignore[arg-type]
        if getattr(config, field.name) != field.default
    }
    return f"{kind.call}({', '.join(['model', *(f'{k}={v!r}' for k, v in values.items())])})"
