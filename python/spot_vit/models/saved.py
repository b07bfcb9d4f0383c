"""Models that travel: one file holds the weights and everything that builds the model again."""

from __future__ import annotations

import functools
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from spot_ext import __version__
from spot_vit.config.conversion import CONVERSIONS, Conversion, conversion_of
from spot_vit.models.checkpoint_files import (
    CONVERSION,
    State,
    listed,
    read_metadata,
    read_safetensors,
    refuse_non_finite,
    short_name,
    write_safetensors,
)
from spot_vit.models.checkpoint_fit import misfits
from spot_vit.models.convert import convert_as, set_keep
from spot_vit.models.named import ANY, NAMED
from spot_vit.utils.errors import UserError
from spot_vit.utils.modes import unwrap

CONFIG = "config"
"""In the metadata of our files: what their writer gave to keep, as JSON."""

_FOLDER_FILES = ("best.safetensors", "last.safetensors", "model.safetensors")
_OF_PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

_NONE = type(None)
_CARD: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "arguments": (dict,),
    CONVERSION: (dict,),
    "classes": (list, _NONE),
    "data_config": (dict,),
    CONFIG: (dict,),
}
"""What a file says, in the order of `Card`."""

_ELSEWHERE = ("pretrained", "checkpoint_path")
_LARGEST = 2**20  # width, side or number of classes; depths are bounded by the tensors there are


@dataclass(frozen=True)
class Card:
    """What a file of `save` says besides the weights; plain data.

    Attributes:
        architecture: timm's name of the dense model.
        arguments: of `timm.create_model` besides the name.
        conversion: fields of each conversion, see `spot_vit.config.conversion`; empty: dense.
        classes: their names in the order of the logits, where they are known.
        data_config: preprocessing, as `timm.data.create_transform` takes it.
        config: what the writer gave to keep.
    """

    architecture: str
    arguments: dict[str, Any]
    conversion: Conversion
    classes: list[str] | None
    data_config: dict[str, Any]
    config: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    classes: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    **arguments: Any,
) -> None:
    """Writes a model as one file of safetensors from which `load` builds it again, atomically.

    The file is also one for `timm.create_model(name, checkpoint_path=...)` and for
    `load_checkpoint`.

    Args:
        path: of the file; folders are made.
        model: made by `timm.create_model`, dense or converted; wrapped or not (DDP, torch.compile,
            an EMA of timm or torch, whose average is written).
        classes: their names in the order of the logits; by default those the model came with.
        data_config: what differs from the preprocessing that the model came with: "input_size"
            (channels, height, width), "mean", "std", "interpolation", "crop_pct", "crop_mode".
        config: more to keep, as JSON takes it.
        state: tensors to write in place of the model's, such as those gathered from FSDP; names may
            have the prefixes of wrappers.
        **arguments: what `timm.create_model` was given besides the name; timm keeps it since
            1.0.31, so that nothing need be said here.

    Raises:
        UserError: timm cannot build the model again by name, or the file cannot be written.
        ValueError: `classes` names another number of classes than the model has, `data_config`
            does not fit it, or `state` is sharded.
    """
    inner = unwrap(model)
    state = inner.state_dict() if state is None else state
    if sharded := [name for name, tensor in state.items() if hasattr(tensor, "full_tensor")]:
        raise ValueError(
            f"state: {listed(sharded)} are sharded over processes; give state= the tensors that "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict gathers"
        )
    architecture, arguments = _architecture(inner, arguments)
    conversion = conversion_of(inner)
    text = json.dumps(arguments, sort_keys=True)
    expected = _shapes(architecture, text, json.dumps(conversion, sort_keys=True))
    tensors = _by_own_names(state, expected)
    if problems := _changes(tensors, expected):
        raise UserError(
            f"timm cannot build this {type(inner).__name__} again as {architecture!r} with {text}: "
            f"{problems}. save_checkpoint writes its weights alone"
        )
    count = arguments.get("num_classes", getattr(inner, "num_classes", None))
    names = class_names(inner, classes, count)
    metadata = {
        "format": "pt",  # which transformers and accelerate ask for
        "architecture": json.dumps(architecture),
        "arguments": text,
        CONVERSION: json.dumps(conversion),
        "classes": json.dumps(names),
        "data_config": json.dumps(preprocessing(inner, data_config or {})),
        CONFIG: json.dumps(dict(config or {})),
    }
    write_safetensors(path, tensors, metadata)


def load(
    path: str | os.PathLike[str],
    *,
    keep: Any = None,
    attention_keep: float | None = None,
) -> Any:
    """Builds the model that a file of `save` holds: on the CPU, in eval mode, float32.

    The names of its classes and its preprocessing are in `model.pretrained_cfg` ("label_names",
    "mean", …), where timm looks for them: `timm.data.resolve_model_data_config(model)`.

    Args:
        path: of the file; or a folder: of the Hub, or of a run, whose best model is taken.
        keep: another budget, as `set_keep` takes it; None for the model's own.
        attention_keep: another share of keys that each query sees; None for the model's own.

    Raises:
        UserError: there is no such file, it is damaged or not of `save`, its architecture is not
            known here, its tensors are not those of the model that it names, or its numbers are
            not finite.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            with _explained(path):
                model = timm.create_model(f"local-dir:{path}", pretrained=True)
            return _with_keep(model, keep, attention_keep).eval()
        path = _in_folder(path)
    card = read_card(path)
    state = read_safetensors(path)
    refuse_non_finite(state, str(path))
    _refuse_unlikely(card, len(state), path)
    # Without memory first: a file may name a model much larger than itself.
    empty = _empty(card.architecture, card.arguments, card.conversion, path)
    state = _by_own_names(state, empty.state_dict())
    if problems := misfits(empty, state):
        raise UserError(f"{path} does not fit {card.architecture!r} here: {'; '.join(problems)}")
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and not used
        model = _build(card.architecture, card.arguments, card.conversion, path)
    model.load_state_dict(state)
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in card.data_config.items()
    }
    model.pretrained_cfg = {**model.pretrained_cfg, **config, "label_names": card.classes}
    return _with_keep(model, keep, attention_keep).eval()


def read_card(path: str | os.PathLike[str]) -> Card:
    """What a file of `save` says, without its weights.

    Raises:
        UserError: there is no such file, it is damaged, or was not written by `save`.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; expected one that spot_vit.save wrote")
    found = read_metadata(path)
    if "architecture" not in found:
        raise UserError(
            f"{path} does not say which model it is of, as files of spot_vit.save do: build the "
            "model, then load_checkpoint (files of save_checkpoint), convert_checkpoint "
            "(published ones) or timm's checkpoint_path= (state dicts) reads it"
        )
    values = [found.get(name) for name in _CARD]
    for (name, kinds), value in zip(_CARD.items(), values, strict=True):
        if not isinstance(value, kinds):
            words = " or ".join("none" if kind is _NONE else kind.__name__ for kind in kinds)
            raise UserError(
                f"{path} is damaged: {name} must be {words}, got {type(value).__name__} "
                f"{reprlib.repr(value)}"
            )
    return Card(*values)  # type: ignore[arg-type]


def _refuse_unlikely(card: Card, tensors: int, where: object) -> None:
    """Raises UserError where a file asks for what no file of `save` does.

    That is weights from elsewhere, or numbers that would take all time or memory.
    """
    for name, value in card.arguments.items():
        limit = max(tensors, 1) if "depth" in name or "layers" in name else _LARGEST
        numbers = value if isinstance(value, list) else [value]
        if name in _ELSEWHERE and value:
            reason = "weights from elsewhere"
        elif any(isinstance(n, int | float) and not abs(n) <= limit for n in numbers):
            reason = f"more than {limit}"
        else:
            continue
        raise UserError(f"{where} was not read: it asks for {name}={reprlib.repr(value)}, {reason}")


def _in_folder(folder: Path) -> Path:
    there = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder} holds none of {', '.join(_FOLDER_FILES)}; name a file")
    return there[0]


def _with_keep(model: Any, keep: Any, attention_keep: float | None) -> Any:
    if keep is None and attention_keep is None:
        return model
    return set_keep(model, tokens=keep, attention=attention_keep)


def _architecture(model: Any, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds the dense model; raises where it cannot."""
    kind = type(model).__name__
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise UserError(
            f"spot_vit.save writes models of timm.create_model, whose name builds them again; this "
            f"{kind} is not one. save_checkpoint writes its weights, and load_checkpoint reads "
            "them into a model that was built in the same way"
        )
    if recorded := getattr(timm.models, "get_model_args", None):
        arguments = recorded(model, arguments)
    for field in (*CONVERSIONS, *(n for kind in CONVERSIONS.values() for n in kind.config.names())):
        arguments.pop(field, None)  # of our names; the model says what became of them
    if name == ANY:
        name = arguments.pop("dense")
    name = NAMED.get(name, name)
    heads = getattr(model, "get_classifier", lambda: None)()
    head = heads[0] if isinstance(heads, tuple | nn.ModuleList) else heads
    if isinstance(head, nn.Linear):  # which may have been replaced
        arguments["num_classes"] = head.out_features
    for argument, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(
                f"this {kind} was made with {argument}={value!r}, which a file cannot hold; "
                f"spot_vit.save(..., {argument}=...) may say it as plain data"
            ) from error
    return name, arguments


def class_names(model: Any, given: Sequence[str] | None, count: int | None) -> list[str] | None:
    """Names of a model's classes: those given, else those it came with; None where nobody knows.

    Raises:
        ValueError: other than `count` names are given.
    """
    if given is None:
        known = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        return list(known) if known is not None and len(known) == count else None
    if len(given) != count:
        raise ValueError(f"classes: expected {count} names, as many as logits, got {len(given)}")
    return list(given)


def preprocessing(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a model at its present size, with what is given.

    Raises:
        ValueError: something is given that is no part of it.
    """
    if unknown := sorted(set(given) - set(_OF_PREPROCESSING)):
        raise ValueError(f"data_config: expected some of {_OF_PREPROCESSING}, got {unknown}")
    resolve = getattr(timm.data, "resolve_input_data_config", None)  # since timm 1.0.31
    found = (resolve or timm.data.resolve_model_data_config)(model, dict(given))
    return {name: found[name] for name in _OF_PREPROCESSING}


def _build(name: str, arguments: Mapping[str, Any], conversion: Conversion, where: object) -> Any:
    """A new model; raises where timm or this version of SPOT cannot build it."""
    if name == ANY or not timm.is_model(name):
        raise UserError(
            f"{where} is of the model {name!r}, which timm {timm.__version__} does not know: "
            "import the package that registers it, or update timm"
        )
    with _explained(where):
        return convert_as(timm.create_model(name, **arguments), conversion)


@contextmanager
def _explained(where: object) -> Iterator[None]:
    """A context in which building a model raises UserError that names the file and versions."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:  # timm's models assert, look up and divide by what they are given
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{where} cannot be built by timm {timm.__version__} and spot_vit {__version__}, which "
            f"may not be the versions that it was made with: {reason}"
        ) from error


@functools.lru_cache(maxsize=8)  # a training saves the same model again and again
def _shapes(name: str, arguments: str, conversion: str) -> dict[str, torch.Size]:
    """Shapes of the tensors of a model that is built anew, by name; nothing is allocated."""
    model = _empty(name, json.loads(arguments), json.loads(conversion), "this model")
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _empty(name: str, arguments: Mapping[str, Any], conversion: Conversion, where: object) -> Any:
    """A new model whose tensors have no memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return _build(name, arguments, conversion, where)


def _by_own_names(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> State:
    """The tensors by the names that a model has for them, without the prefixes of wrappers."""
    named = {}
    for name, tensor in state.items():
        short = short_name(name)[0]
        named[short if name not in own and short in own else name] = tensor
    return named


def _changes(tensors: State, expected: Mapping[str, torch.Size]) -> str:
    """What tells a model from the one that is built anew, as text; empty if nothing."""
    texts = {
        "missing": set(expected) - set(tensors),
        "unexpected": set(tensors) - set(expected),
        "of another shape": {
            name for name in set(tensors) & set(expected) if tensors[name].shape != expected[name]
        },
    }
    return "; ".join(f"{what}: {listed(names)}" for what, names in texts.items() if names)
