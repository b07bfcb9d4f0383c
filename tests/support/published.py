"""Inference of the published models restated in plain PyTorch, from their state dicts alone.

DeiT, LV-ViT, and DynamicViT or Sparsifiner on either: key names and arithmetic of the public
repositories.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x W^T + b, where there is a bias."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer normalisation of [..., D]."""
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, x: Tensor, heads: int, sparse: Sparse | None) -> Tensor:
    """Softmax attention [B, N, D] and its projection; Sparsifiner's masks all but some keys."""
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if sparse is not None:
        seen = sparsifiner_mask(state, f"{name}.mask_predictor", q, k, sparse)
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


class Sparse(NamedTuple):
    """Sparsifiner: keys a query, coefficients a row, the least entry of the basis."""

    budget: int
    coef_topk: int
    basis_threshold: float = 2e-2


def sparsifiner_mask(state: State, name: str, q: Tensor, k: Tensor, sparse: Sparse) -> Tensor:
    """What each query sees [B, H, N, N], of q and k [B, H, N, d]; the class token sees all."""
    coefficients, basis = sparsifiner_factors(state, name, q, k)
    largest = coefficients.argsort(-1, descending=True)[..., : sparse.coef_topk]
    kept = torch.zeros_like(coefficients).scatter(-1, largest, 1)
    basis = torch.where(basis.abs() > sparse.basis_threshold, basis.abs(), 0)
    best = ((coefficients * kept) @ basis).argsort(-1, descending=True)[..., : sparse.budget]
    seen = torch.ones(*q.shape[:3], q.shape[2], dtype=torch.bool)
    seen[:, :, 1:] = torch.zeros_like(seen[:, :, 1:]).scatter(-1, best, True)
    return seen


def sparsifiner_factors(
    state: State, name: str, q: Tensor, k: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients [B, H, N-1, R] and basis [R, N]; the scale is that of the code, H**-0.5."""
    q, k = linear(state, f"{name}.proj_c_q", q), linear(state, f"{name}.proj_c_k", k)
    low = q @ (k.mT @ state[f"{name}.proj_n"]) * (q.shape[1] ** -0.5 if scale is None else scale)
    return low[:, :, 1:].softmax(-1), state[f"{name}.proj_back_n"].mT


def stem(state: State, image: Tensor) -> Tensor:
    """Patch tokens [B, N, D]: one convolution (DeiT), or four (LV-ViT)."""
    x = image
    if "patch_embed.conv1.weight" in state:
        for k, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, state[f"patch_embed.conv{k}.weight"], stride=stride, padding=padding)
            mean, var, scale, shift = (
                state[f"patch_embed.bn{k}.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    return x.flatten(2).mT


def dynamicvit_scores(state: State, name: str, x: Tensor, keep: Tensor) -> Tensor:
    """DynamicViT's predictor: log-probabilities [B, N, 2] of [B, N, D], keep [B, N] of 0 and 1."""
    x = F.gelu(linear(state, f"{name}.in_conv.1", norm(state, f"{name}.in_conv.0", x, 1e-5)))
    half = x.shape[-1] // 2
    mean = (x[..., half:] * keep[..., None]).sum(1, keepdim=True) / keep.sum(1)[:, None, None]
    x = torch.cat([x[..., :half], mean.expand(-1, x.shape[1], -1)], dim=-1)
    x = F.gelu(linear(state, f"{name}.out_conv.0", x))
    x = F.gelu(linear(state, f"{name}.out_conv.2", x))
    return linear(state, f"{name}.out_conv.4", x).log_softmax(-1)


def inference(
    state: State,
    image: Tensor,
    heads: int,
    *,
    skip_lam: float = 1.0,
    at: Sequence[int] = (),
    keep: Sequence[int] = (),
    sparse: Sparse | None = None,
) -> Tensor:
    """Logits [B, classes].

    Before block at[k] DynamicViT's predictor k leaves keep[k] patches; `sparse` is Sparsifiner's.
    """
    dense = "aux_head.weight" in state
    eps = 1e-5 if dense else 1e-6
    x = stem(state, image)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for i in range(depth):
        if i in at:
            stage = list(at).index(i)
            patches = x[:, 1:]
            alive = torch.ones_like(patches[..., 0])
            scores = dynamicvit_scores(state, f"score_predictor.{stage}", patches, alive)[..., 0]
            best = scores.argsort(dim=1, descending=True)[:, : keep[stage], None]
            x = torch.cat([x[:, :1], patches.take_along_dim(best, dim=1)], dim=1)
        b = f"blocks.{i}"
        y = attention(state, f"{b}.attn", norm(state, f"{b}.norm1", x, eps), heads, sparse)
        x = x + y / skip_lam
        y = F.gelu(linear(state, f"{b}.mlp.fc1", norm(state, f"{b}.norm2", x, eps)))
        x = x + linear(state, f"{b}.mlp.fc2", y) / skip_lam
    x = norm(state, "norm", x, eps)
    logits = linear(state, "head", x[:, 0])
    if dense:
        logits = logits + 0.5 * linear(state, "aux_head", x[:, 1:]).max(dim=1).values
    return logits


def random_state(
    kind: str,
    *,
    dim: int = 48,
    depth: int = 4,
    classes: int = 7,
    patches: int = 16,
    stages: int = 0,
    rank: int = 0,
    shared: bool = False,
) -> State:
    """A file of "deit" or "lvvit" as published.

    With DynamicViT's predictors where stages > 0; with Sparsifiner's, for 3 heads, where rank > 0,
    with one matrix under two names where `shared`.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + patches, dim),
    }

    def layer(name: str, fan_in: int, fan_out: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        if bias:
            shapes[f"{name}.bias"] = (fan_out,)

    def scale(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    if kind == "lvvit":
        for k, (fan_in, size) in enumerate([(3, 7), (64, 3), (64, 3)], start=1):
            shapes[f"patch_embed.conv{k}.weight"] = (64, fan_in, size, size)
            scale(f"patch_embed.bn{k}", 64)
            shapes[f"patch_embed.bn{k}.running_mean"] = (64,)
            shapes[f"patch_embed.bn{k}.running_var"] = (64,)
        shapes["patch_embed.proj.weight"] = (dim, 64, 8, 8)
        layer("aux_head", dim, classes)
    else:
        shapes["patch_embed.proj.weight"] = (dim, 3, 16, 16)
    shapes["patch_embed.proj.bias"] = (dim,)
    hidden = dim * (3 if kind == "lvvit" else 4)
    for i in range(depth):
        scale(f"blocks.{i}.norm1", dim)
        layer(f"blocks.{i}.attn.qkv", dim, 3 * dim, bias=kind == "deit")
        layer(f"blocks.{i}.attn.proj", dim, dim)
        if rank:
            predictor = f"blocks.{i}.attn.mask_predictor"
            layer(f"{predictor}.proj_c_q", dim // 3, dim // 6)
            layer(f"{predictor}.proj_c_k", dim // 3, dim // 6)
            shapes[f"{predictor}.proj_n"] = shapes[f"{predictor}.proj_back_n"] = (1 + patches, rank)
        scale(f"blocks.{i}.norm2", dim)
        layer(f"blocks.{i}.mlp.fc1", dim, hidden)
        layer(f"blocks.{i}.mlp.fc2", hidden, dim)
    scale("norm", dim)
    layer("head", dim, classes)
    for k in range(stages):
        scale(f"score_predictor.{k}.in_conv.0", dim)
        layer(f"score_predictor.{k}.in_conv.1", dim, dim)
        layer(f"score_predictor.{k}.out_conv.0", dim, dim // 2)
        layer(f"score_predictor.{k}.out_conv.2", dim // 2, dim // 4)
        layer(f"score_predictor.{k}.out_conv.4", dim // 4, 2)

    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            return 0.5 + noise.abs()
        return noise * (0.5 if len(shape) == 1 else 0.15)

    state = {name: draw(name, shape) for name, shape in shapes.items()}
    if shared:
        ups = [name for name in state if name.endswith("proj_back_n")]
        state |= {name: state[name.replace("_back", "")] for name in ups}
    return state


def training_checkpoint(state: State) -> dict[str, object]:
    """What a training script saves: weights under "model" beside its arguments and counters."""
    return {"model": state, "epoch": 29, "args": argparse.Namespace(lr=1e-3, model="deit")}
