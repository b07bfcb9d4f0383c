"""Published weights, brought to the state dict of our models.

Key names are those of the public code: facebookresearch/deit, zihangJiang/TokenLabeling (LV-ViT),
raoyongming/DynamicViT, youweiliang/evit, lim142857/Sparsifiner.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spot_vit.config.spot import SpotConfig
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.nn.relevance import TokenRelevance

SOURCES = ("deit", "lvvit", "dynamicvit", "evit", "sparsifiner")

State = dict[str, Tensor]

_WRAPPERS = ("model", "state_dict")  # under which training scripts put the weights
_CONNECTIVITY = ".attn.connectivity."  # Sparsifiner's attn.mask_predictor
_RELEVANCE = ".relevance."  # DynamicViT's score_predictor.k
_PREDICTOR = {  # its layers
    "in_conv.0": "norm",
    "in_conv.1": "remap",
    "out_conv.0": "fc1",
    "out_conv.2": "fc2",
    "out_conv.4": "fc3",
}


def convert_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    source: str,
    model: nn.Module | None = None,
    *,
    at: Sequence[int] | None = None,
) -> State:
    """Turns published weights into a state dict of our model, and loads it if one is given.

    Dense weights (deit, lvvit, evit) fit both the timm model and the SPOT model made from it, whose
    predictors then keep the values they have. DynamicViT's also fill the predictors of a model
    converted with `method="dynamicvit"`, or with `features=["embed"]`; Sparsifiner's fill those of
    `sparsify_attention`.

    Args:
        checkpoint: a file of `torch.save`, read with `weights_only=True`, or of safetensors; or
            what was read from one. The weights may lie under "model" or "state_dict", and names may
            start with "module.".
        source: "deit" (DeiT, distilled DeiT, DeiT-III), "lvvit", "evit", "dynamicvit" or
            "sparsifiner" (both on DeiT or LV-ViT).
        model: loaded in place and strictly, when given.
        at: blocks of DynamicViT's predictors; those of `model`, else the published L//4, L//2,
            3L//4.

    Returns:
        Names and tensors as `model.load_state_dict` takes them.

    Raises:
        ValueError: the file is not plain tensors, or does not have the layout of `source`, or does
            not fit `model`; missing and unexpected keys and differing shapes are listed.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {list(SOURCES)}, got {source!r}")
    state = _weights(checkpoint)
    if gaps := _gaps(state, source):
        others = [other for other in SOURCES if not _gaps(state, other)]
        hint = f"; it has the layout of source={others[0]!r}" if others else ""
        raise ValueError(f"this is not a checkpoint of source={source!r}: {gaps}{hint}")
    if source == "dynamicvit" and at is None and model is not None:
        at = getattr(getattr(model, "spot_config", None), "at", None)
    converted = _renamed(state, at)
    if source == "sparsifiner":
        config = getattr(model, "sparsifiner_config", None)
        converted = _once(converted, config is None or config.share_inout_proj)
    if model is not None:
        _load(model, converted, source)
    return converted


# ---- reading -------------------------------------------------------------------------------------


def _weights(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> State:
    content = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    state = {str(k).removeprefix("module."): v for k, v in content.items() if torch.is_tensor(v)}
    if not state:
        raise ValueError(f"the checkpoint holds no tensors, only {sorted(map(str, content))}")
    return state


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        # torch's own text advises to read the file anyway.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged, or no checkpoint"
        raise ValueError(
            f"{path} was not read, and nothing in it was executed: only tensors and plain data are "
            f"accepted, and {reason}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _harmless() -> list[Any]:
    """What training scripts put beside the weights: arguments, paths, and scalars of NumPy.

    Each is plain data; files of NumPy 1 name its module otherwise.
    """
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    paths = [
        (path, f"{module}.{path.__name__}")
        for path in (PosixPath, PurePosixPath)
        for module in ("pathlib", "pathlib._local")
    ]
    return [argparse.Namespace, np.dtype, *dtypes, *named, *paths]


# ---- layouts -------------------------------------------------------------------------------------


def _gaps(state: State, source: str) -> str:
    """Keys that are missing from or unexpected in a file of `source`, as text; empty if none."""
    required, optional = _layout(state, source)
    missing = required - set(state)
    unexpected = set(state) - required - optional
    return "; ".join(_listed(missing, "missing") + _listed(unexpected, "unexpected"))


def _layout(state: State, source: str) -> tuple[set[str], set[str]]:
    """Required and optional keys of a file of `source` with as many blocks as `state` has."""
    either = source in ("dynamicvit", "sparsifiner")
    lvvit = source == "lvvit" or (either and "patch_embed.conv1.weight" in state)
    linear = ["patch_embed.proj", "head"] + (["aux_head"] if lvvit else [])
    norms = ["norm"]
    required, optional = {"cls_token", "pos_embed"}, set()
    if not lvvit:  # distilled DeiT
        optional = {"dist_token", *_pair("head_dist")}
    for b in range(_count(state, "blocks")):
        layers = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        linear += [f"blocks.{b}.{layer}" for layer in layers]
        required.add(f"blocks.{b}.attn.qkv.weight")
        if not lvvit:
            required.add(f"blocks.{b}.attn.qkv.bias")
            optional |= {f"blocks.{b}.gamma_{k}" for k in (1, 2)}  # DeiT-III
        if source == "sparsifiner":
            predictor = f"blocks.{b}.attn.mask_predictor"
            linear += [f"{predictor}.proj_c_q", f"{predictor}.proj_c_k"]
            required |= {f"{predictor}.proj_n", f"{predictor}.proj_back_n"}
    if lvvit:
        required |= {f"patch_embed.conv{k}.weight" for k in (1, 2, 3)}
        for norm in (f"patch_embed.bn{k}" for k in (1, 2, 3)):
            norms.append(norm)
            required |= {f"{norm}.running_mean", f"{norm}.running_var"}
            optional.add(f"{norm}.num_batches_tracked")
    if source == "dynamicvit":
        predictors = range(_count(state, "score_predictor"))
        linear += [f"score_predictor.{k}.{layer}" for k in predictors for layer in _PREDICTOR]
    for name in linear + norms:
        required |= _pair(name)
    return required, optional


def _count(state: State, prefix: str) -> int:
    indices = [int(m[1]) for key in state if (m := re.match(rf"{prefix}\.(\d+)\.", key))]
    return 1 + max(indices, default=0)


def _pair(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


def _renamed(state: State, at: Sequence[int] | None) -> State:
    """Our names: predictors move into their blocks, DeiT-III's LayerScale gets timm's name."""
    blocks: Sequence[int] = ()
    if any(key.startswith("score_predictor.") for key in state):
        blocks = SpotConfig().decision_blocks(_count(state, "blocks")) if at is None else at
        if len(blocks) != _count(state, "score_predictor"):
            raise ValueError(
                f"the checkpoint has {_count(state, 'score_predictor')} predictors, but at names "
                f"blocks {list(blocks)}"
            )
    renamed = {}
    for key, value in state.items():
        if match := re.match(r"score_predictor\.(\d+)\.(\w+\.\d+)\.(\w+)$", key):
            block = blocks[int(match[1])]
            key = f"blocks.{block}{_RELEVANCE}{_PREDICTOR[match[2]]}.{match[3]}"
        else:
            key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
            key = key.replace(".attn.mask_predictor.", _CONNECTIVITY)
        renamed[key] = value
    return renamed


def _once(state: State, shared: bool) -> State:
    """One matrix for both projections of tokens, where `shared` and the file's two are one."""
    ups = [key for key in state if key.endswith(f"{_CONNECTIVITY}proj_back_n")]
    one = all(torch.equal(state[up], state[up.replace("_back", "")]) for up in ups)
    return {k: v for k, v in state.items() if not (shared and one and k in ups)}


# ---- loading -------------------------------------------------------------------------------------


def _load(model: nn.Module, state: State, source: str) -> None:
    own = model.state_dict()
    optional = {key for key in own if key.endswith(".num_batches_tracked")}
    if source != "dynamicvit":
        optional |= set(predictor_parameters(model, TokenRelevance))
    if source != "sparsifiner":
        optional |= set(predictor_parameters(model, ConnectivityPredictor))
    missing, unexpected = set(own) - set(state) - optional, set(state) - set(own)
    problems = _listed(missing, "missing") + _listed(unexpected, "unexpected")
    problems += [
        _shape_problem(model, key, value.shape, own[key].shape)
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if any(_RELEVANCE in key for key in unexpected) and not hasattr(model, "spot_config"):
        problems.append("convert the model first: sparsify(model, method='dynamicvit')")
    if any(_CONNECTIVITY in key for key in unexpected) and not hasattr(model, "sparsifiner_config"):
        problems.append("convert the model first: sparsify_attention(model)")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit this {type(model).__name__}: " + "; ".join(problems)
        )
    model.load_state_dict(state, strict=False)


def _shape_problem(model: Any, key: str, found: torch.Size, expected: torch.Size) -> str:
    text = f"{key} is {tuple(found)}, the model has {tuple(expected)}"
    if key == "pos_embed" and found[2:] == expected[2:]:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        theirs, ours = (_grid(shape[1] - prefix) for shape in (found, expected))
        return (
            f"{text}: positions of {theirs} patches instead of {ours}; build the model for the "
            "image size of the checkpoint, load it, then call model.set_input_size"
        )
    if key.startswith(("head", "aux_head")):
        return f"{text}; load with the checkpoint's num_classes, then call model.reset_classifier"
    return text


def _grid(count: int) -> str:
    side = math.isqrt(max(count, 0))
    return f"{side} x {side}" if side * side == count else str(count)


def _listed(keys: set[str], what: str) -> list[str]:
    if not keys:
        return []
    names = sorted(keys)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [f"{what} {', '.join(names[:8])}{more}"]
