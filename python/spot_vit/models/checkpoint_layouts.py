"""Layouts of published files: which names they have, and what these are in our models.

Names are those of the public code: facebookresearch/deit, zihangJiang/TokenLabeling (LV-ViT),
raoyongming/DynamicViT, youweiliang/evit, lim142857/Sparsifiner.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from spot_vit.config.spot import SpotConfig
from spot_vit.models.checkpoint_files import State, listed

SOURCES = ("deit", "lvvit", "dynamicvit", "evit", "sparsifiner")

CONNECTIVITY = ".attn.connectivity."
"""Ours for Sparsifiner's attn.mask_predictor."""

RELEVANCE = ".relevance."
"""Ours for DynamicViT's score_predictor.k, which moves into the block that it decides before."""

SCORES = "score_predictor."

_PREDICTOR = {  # its layers
    "in_conv.0": "norm",
    "in_conv.1": "remap",
    "out_conv.0": "fc1",
    "out_conv.2": "fc2",
    "out_conv.4": "fc3",
}


def gaps(state: State, source: str) -> str:
    """Keys that are missing from or unexpected in a file of `source`, as text; empty if none."""
    required, optional = _layout(state, source)
    missing = required - set(state)
    unexpected = set(state) - required - optional
    texts = [(missing, "missing"), (unexpected, "unexpected")]
    return "; ".join(f"{what} {listed(names)}" for names, what in texts if names)


def _layout(state: State, source: str) -> tuple[set[str], set[str]]:
    """Required and optional keys of a file of `source` with as many blocks as `state` has."""
    either = source in ("dynamicvit", "sparsifiner")
    lvvit = source == "lvvit" or (either and "patch_embed.conv1.weight" in state)
    linear = ["patch_embed.proj", "head"] + (["aux_head"] if lvvit else [])
    norms = ["norm"]
    required, optional = {"cls_token", "pos_embed"}, set()
    if not lvvit:  # distilled DeiT
        optional = {"dist_token", *_pair("head_dist")}
    reduces = any(key.endswith(".mask_predictor.proj_c_q.weight") for key in state)  # reduce_c > 1
    for b in range(_count(state, "blocks")):
        layers = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        linear += [f"blocks.{b}.{layer}" for layer in layers]
        required.add(f"blocks.{b}.attn.qkv.weight")
        if not lvvit:
            required.add(f"blocks.{b}.attn.qkv.bias")
            for k in (1, 2):  # DeiT-III, as published and as timm names it
                optional |= {f"blocks.{b}.gamma_{k}", f"blocks.{b}.ls{k}.gamma"}
        if source == "sparsifiner":
            predictor = f"blocks.{b}.attn.mask_predictor"
            linear += [f"{predictor}.proj_c_{side}" for side in "qk" if reduces]
            required |= {f"{predictor}.proj_n", f"{predictor}.proj_back_n"}
    if lvvit:
        required |= {f"patch_embed.conv{k}.weight" for k in (1, 2, 3)}
        for norm in (f"patch_embed.bn{k}" for k in (1, 2, 3)):
            norms.append(norm)
            required |= {f"{norm}.running_mean", f"{norm}.running_var"}
            optional.add(f"{norm}.num_batches_tracked")
    if source == "dynamicvit":
        predictors = range(_count(state, "score_predictor"))
        linear += [f"{SCORES}{k}.{layer}" for k in predictors for layer in _PREDICTOR]
    for name in linear + norms:
        required |= _pair(name)
    return required, optional


def _count(state: State, prefix: str) -> int:
    """Blocks, or predictors, that the names speak of; never more than there are names."""
    indices = [int(m[1]) for key in state if (m := re.match(rf"{prefix}\.(\d{{1,9}})\.", key))]
    return min(1 + max(indices, default=0), len(state))


def _pair(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


def renamed(state: State, at: Sequence[int] | None) -> State:
    """Our names: predictors move into their blocks, DeiT-III's LayerScale gets timm's name.

    Args:
        state: a published file.
        at: blocks of DynamicViT's predictors, None for the published ones.

    Raises:
        ValueError: `at` does not name as many blocks as there are predictors.
    """
    blocks: Sequence[int] = ()
    if any(key.startswith(SCORES) for key in state):
        blocks = SpotConfig().decision_blocks(_count(state, "blocks")) if at is None else at
        if len(blocks) != _count(state, "score_predictor"):
            raise ValueError(
                f"the checkpoint has {_count(state, 'score_predictor')} predictors, but at names "
                f"blocks {list(blocks)}"
            )
    ours = {}
    for key, value in state.items():
        if match := re.match(r"score_predictor\.(\d+)\.(\w+\.\d+)\.(\w+)$", key):
            block = blocks[int(match[1])]
            key = f"blocks.{block}{RELEVANCE}{_PREDICTOR[match[2]]}.{match[3]}"
        else:
            key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
            key = key.replace(".attn.mask_predictor.", CONNECTIVITY)
        ours[key] = value
    return ours


def once(state: State, shared: bool) -> State:
    """One matrix for both projections of tokens, where `shared` and the file's two are one."""
    ups = [key for key in state if key.endswith(f"{CONNECTIVITY}proj_back_n")]
    one = all(torch.equal(state[up], state[up.replace("_back", "")]) for up in ups)
    return {k: v for k, v in state.items() if not (shared and one and k in ups)}
