"""Token relevance: how likely each token is worth keeping, from a light predictor.

    z      = GELU(W_r LayerNorm(x) + b_r)                     split into a local and a global half
    shared = sum_t keep_t z_global_t / max(sum_t keep_t, 1)   once per image
    u_t    = [z_local_t, shared, features_t]
    logits = log_softmax(fc3(GELU(fc2(GELU(fc1(u_t))))))      index 0 = keep

The remap with its two halves and the MLP over attention statistics are published (arXiv
2511.10488); widths and GELU follow DynamicViT's predictor, which this is without features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_ext import _check, _definitions, _register


class _Arguments(NamedTuple):
    """Arguments of the op but `eps`, in its order: tensors, or for FLOPs their shapes, or None."""

    tokens: Any
    features: Any
    keep: Any
    norm_weight: Any
    norm_bias: Any
    remap_weight: Any
    remap_bias: Any
    fc1_weight: Any
    fc1_bias: Any
    fc2_weight: Any
    fc2_bias: Any
    fc3_weight: Any
    fc3_bias: Any


COUNT = len(_Arguments._fields)
SAVED = ("logits", "remapped", "shared", "hidden1", "hidden2")  # results of the forward pass

# ---- public function -----------------------------------------------------------------------------


def token_relevance(
    tokens: Tensor | None,
    features: Tensor | None,
    keep: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    remap_weight: Tensor | None,
    remap_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    fc3_weight: Tensor,
    fc3_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Log-probabilities of keeping and of dropping each token.

    The global half enters the first layer once per image, as its product with the columns of
    `fc1_weight` that belong to it, not once per token. Matrix products are torch's own; everything
    between them is fused.

    Without `tokens` the predictor sees features alone: `norm_*` and `remap_*` are None then, and
    `keep` has no influence.

    Args:
        tokens: [B, N, D] patch tokens, float32, float64, float16 or bfloat16; any strides, dense
            in the last dimension is copy-free. Or None.
        features: [B, N, F] evidence, F may be 0; or None.
        keep: [B, N] float weights of the tokens in the mean, usually 0 or 1; or None for all.
        norm_weight: [D], of the layer normalisation.
        norm_bias: [D].
        remap_weight: [R, D], R even: local half, global half.
        remap_bias: [R].
        fc1_weight: [H1, R + F], columns for the local half, the global half and the features.
        fc1_bias: [H1].
        fc2_weight: [H2, H1].
        fc2_bias: [H2].
        fc3_weight: [2, H2].
        fc3_bias: [2].
        eps: of the layer normalisation.

    Returns:
        [B, N, 2] float32 (float64 for float64). Differentiable once in everything but `eps`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, or both `tokens` and `features` None.
        RuntimeError: a second derivative is asked for.
    """
    args = _Arguments(
        tokens, features, keep, norm_weight, norm_bias, remap_weight, remap_bias, fc1_weight,
        fc1_bias, fc2_weight, fc2_bias, fc3_weight, fc3_bias,
    )  # fmt: skip
    if _check.eager():
        _check.number("eps", eps)
        _check_relevance(args)
    result = _definitions.run(
        "token_relevance", token_relevance_reference, fc1_weight, (*args, eps), "eps"
    )
    return result if isinstance(result, Tensor) else result[0]


# ---- reference: the definition -------------------------------------------------------------------


def token_relevance_reference(
    tokens: Tensor | None,
    features: Tensor | None,
    keep: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    remap_weight: Tensor | None,
    remap_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    fc3_weight: Tensor,
    fc3_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Definition of `token_relevance` in plain PyTorch: concatenate, then one MLP."""
    parts = [] if features is None else [features]
    if tokens is not None:
        assert remap_weight is not None
        normed = F.layer_norm(tokens, tokens.shape[2:], norm_weight, norm_bias, eps)
        local, z = F.gelu(F.linear(normed, remap_weight, remap_bias)).chunk(2, dim=-1)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        weight = z.new_ones(z.shape[:2], dtype=wide) if keep is None else keep.to(wide)
        total = (z.to(wide) * weight[..., None]).sum(dim=1)
        mass = weight.sum(dim=1, keepdim=True)
        # Not clamp: its gradient at the bound, where one token is kept, depends on torch's version.
        shared = (total / mass.masked_fill(mass < 1, 1)).to(z.dtype)
        parts = [local, shared[:, None].expand_as(local), *parts]
    hidden = F.gelu(F.linear(torch.cat(parts, dim=-1), fc1_weight, fc1_bias))
    hidden = F.gelu(F.linear(hidden, fc2_weight, fc2_bias))
    logits = F.linear(hidden, fc3_weight, fc3_bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


# ---- checks --------------------------------------------------------------------------------------


def _check_relevance(args: _Arguments) -> None:
    tokens, features, keep = args[:3]
    if tokens is None and features is None:
        raise ValueError("tokens and features must not both be None")
    like_name, like = ("tokens", tokens) if tokens is not None else ("features", features)
    _check.tensor(like_name, like, 3)
    _check.dtype(like_name, like, _check.FLOATING)
    batch, num_tokens = like.shape[:2]
    width: Any = 0
    if features is not None:
        _check_like("features", features, like_name, like, (None, None, None))
        _check.size("features", features, 0, batch, "the batch")
        _check.size("features", features, 1, num_tokens, "the tokens")
        width = features.shape[2]
    if keep is not None:
        _check.tensor("keep", keep, 2)
        _check.dtype("keep", keep, _check.FLOATING)
        _check.device("keep", keep, like_name, like)
        _check.size("keep", keep, 0, batch, "the batch")
        _check.size("keep", keep, 1, num_tokens, "the tokens")
    values = args._asdict()
    for name in ("norm_weight", "norm_bias", "remap_weight", "remap_bias"):
        if (values[name] is None) != (tokens is None):
            wanted = "None without tokens" if tokens is None else "given with tokens"
            raise ValueError(f"{name} must be {wanted}, got {_kind(values[name])}")
    remap = args.remap_weight
    channels: Any = like.shape[2]
    if remap is not None:
        _check_like("norm_weight", args.norm_weight, like_name, like, (channels,))
        _check_like("norm_bias", args.norm_bias, like_name, like, (channels,))
        _check_like("remap_weight", remap, like_name, like, (None, channels))
        rows = remap.shape[0]
        if isinstance(rows, int) and rows % 2:
            raise ValueError(
                f"remap_weight must have an even number of rows, got shape {list(remap.shape)}"
            )
        _check_like("remap_bias", args.remap_bias, like_name, like, (rows,))
        width = rows + width
    for number in (1, 2, 3):
        weight, bias = values[f"fc{number}_weight"], values[f"fc{number}_bias"]
        outputs = 2 if number == 3 else None
        _check_like(f"fc{number}_weight", weight, like_name, like, (outputs, width))
        _check_like(f"fc{number}_bias", bias, like_name, like, (weight.shape[0],))
        width = weight.shape[0]


def _kind(value: object) -> str:
    return "None" if value is None else "a tensor" if isinstance(value, Tensor) else str(value)


def _check_like(
    name: str, value: Tensor | None, like_name: str, like: Tensor, sizes: tuple[Any, ...]
) -> None:
    """`value` has the dtype and device of `like`, and the sizes that are not None."""
    _check.tensor(name, value, len(sizes))
    assert value is not None
    _check.dtype(name, value, _check.FLOATING)
    _check.same_dtype(name, value, like_name, like)
    _check.device(name, value, like_name, like)
    for dim, size in enumerate(sizes):
        if size is not None:
            _check.size(name, value, dim, size, "as the other arguments have")


# ---- fakes ---------------------------------------------------------------------------------------


def _saved_shapes(args: _Arguments) -> tuple[tuple[Any, ...], ...]:
    """Shapes of logits, remapped, shared, hidden1 and hidden2."""
    batch, num_tokens = (args.features if args.tokens is None else args.tokens).shape[:2]
    remapped: tuple[Any, ...] = (0,)
    shared: tuple[Any, ...] = (0,)
    if args.tokens is not None:
        rows = args.remap_weight.shape[0]
        remapped, shared = (batch, num_tokens, rows), (batch, rows // 2)
    hidden = ((batch, num_tokens, w.shape[0]) for w in (args.fc1_weight, args.fc2_weight))
    return (batch, num_tokens, 2), remapped, shared, *hidden


@_register.fake("token_relevance")
def _(*given: Any) -> tuple[Tensor, ...]:
    args = _Arguments(*given[:COUNT])
    _check_relevance(args)
    like, shapes = args.fc1_weight, _saved_shapes(args)
    logits = like.new_empty(shapes[0], dtype=torch.promote_types(like.dtype, torch.float32))
    return logits, *map(like.new_empty, shapes[1:])


@_register.fake("token_relevance_backward")
def _(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    args, saved = _Arguments(*given[:COUNT]), given[COUNT : COUNT + len(SAVED)]
    _check_relevance(args)
    like = args.fc1_weight
    wide = torch.promote_types(like.dtype, torch.float32)
    shapes = _saved_shapes(args)
    _check.saved("grad", grad, shapes[0], wide, "fc1_weight", like)
    for name, value, shape in zip(SAVED, saved, shapes, strict=True):
        if args.tokens is not None or name not in ("remapped", "shared"):
            kind = wide if name == "logits" else like.dtype
            _check.saved(name, value, shape, kind, "fc1_weight", like)
    tokens_grad, features_grad, keep_grad, weights_grad = _wanted(given)
    keep_grad = keep_grad and args.tokens is not None
    wanted = (tokens_grad, features_grad, keep_grad, *[weights_grad] * (COUNT - 3))
    return tuple(
        like.new_empty(
            value.shape if flag and value is not None else (0,),
            dtype=wide if name == "keep" else like.dtype,
        )
        for name, flag, value in zip(args._fields, wanted, args, strict=True)
    )


def _wanted(given: tuple[Any, ...]) -> tuple[bool, ...]:
    """Which gradients the backward op is asked for, behind `grad`; trailing defaults are cut."""
    flags = given[COUNT + len(SAVED) + 1 :]  # eps is between
    return *flags, *[True] * (4 - len(flags))


# ---- autograd ------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *args, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*args, *output)
    ctx.eps = eps


@_register.autograd("token_relevance", _setup)
def _(ctx: Any, grad: Tensor | None, *rest: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (COUNT + 1)
    saved = ctx.saved_tensors
    args = _Arguments(*saved[:COUNT])
    needed = [value is not None and ctx.needs_input_grad[place] for place, value in enumerate(args)]
    needed[2] = needed[2] and args.tokens is not None
    grads = torch.ops.spot.token_relevance_backward(
        grad, *saved, ctx.eps, *needed[:3], any(needed[3:])
    )
    found = [value if flag else None for value, flag in zip(grads, needed, strict=True)]
    if found[2] is not None:
        found[2] = found[2].to(args.keep.dtype)
    return *found, None


_register.once_only("token_relevance")


# ---- autocast ------------------------------------------------------------------------------------


@_register.autocast("token_relevance")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tokens, features, *weights = _register.cast(dtype, (*args[:2], *args[3:COUNT]))
    return (tokens, features, args[2], *weights, *args[COUNT:]), kwargs


@_register.autocast("token_relevance_backward")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs  # as they are; but the products inside must not be cast either


# ---- FLOPs ---------------------------------------------------------------------------------------


def _products(args: _Arguments) -> dict[str, int]:
    """Multiply-accumulates of each product of the forward pass, from its arguments' shapes."""
    batch, count = (args.features if args.tokens is None else args.tokens)[:2]
    rows, hidden1, hidden2 = batch * count, args.fc1_weight[0], args.fc2_weight[0]
    remap, channels = (0, 0) if args.tokens is None else args.remap_weight
    return {
        "remap": rows * channels * remap,
        "local": rows * (remap // 2) * hidden1,
        "shared": batch * (remap // 2) * hidden1,
        "features": 0 if args.features is None else rows * args.features[2] * hidden1,
        "fc2": rows * hidden1 * hidden2,
        "fc3": rows * hidden2 * 2,
    }


@_register.flops("token_relevance")
def _(*given: Any, **kwargs: Any) -> int:
    """The matrix products."""
    return 2 * sum(_products(_Arguments(*given[:COUNT])).values())


@_register.flops("token_relevance_backward")
def _(grad: Any, *given: Any, **kwargs: Any) -> int:
    """Each product twice, less those that only an unwanted gradient needs; `shared` once more."""
    args = _Arguments(*given[:COUNT])
    tokens_grad, features_grad, keep_grad, weights_grad = _wanted(given)
    p = _products(args)
    keep_grad = keep_grad and args.keep is not None
    below = tokens_grad or keep_grad or weights_grad
    total = p["shared"] + p["fc2"] + p["fc3"]
    total += p["features"] if features_grad else 0
    total += p["local"] + p["shared"] if below else 0
    total += p["remap"] if tokens_grad or weights_grad else 0
    total += sum(p.values()) if weights_grad else 0
    return 2 * total
