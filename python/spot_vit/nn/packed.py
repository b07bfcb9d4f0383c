"""Linear layers whose weights are laid out once for the processor, with what follows fused in.

On a CPU, torch's own linear layers arrange the weight anew in every call. `spot_ext.packed_linear`
and oneDNN multiply by a weight that is packed beforehand, and apply GELU, or add the residual,
while the product is still in cache. Which is fastest is measured once a process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from spot_ext import _library
from spot_vit.nn.watch import tensor_state
from spot_vit.utils.timing import Side, take_turns

PACKED = (torch.float32, torch.bfloat16)
_SHAPE = (384, 1536)  # channels in and out: what `fastest` multiplies, and by how many tokens
_TOKENS = (197, 68)
_LEAD = 0.95  # our own operator is called in less time, which counts where tokens are few
Product = Callable[..., Tensor]
_SPOT_GELU = {None: "none", "none": "gelu", "tanh": "gelu_tanh"}


class PackedLinear(nn.Linear):
    """An `nn.Linear` in inference: the same weights, and a packed copy that is made when needed.

    The copy follows the weight: after `load_state_dict`, a move or a change in place it is made
    anew. It is in no state_dict, and no copy or pickle has it. Where a packed product cannot serve
    (a gradient is asked for, something traces or compiles, autocast, another device), the layer is
    torch's.

    Attributes:
        kind: who multiplies: "own" (`spot_ext.packed_linear`), "onednn", "int8" (weights by
            channel, activations by call), or "plain": torch's own layer.
    """

    kind: str

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.fused(input)

    def fused(
        self,
        x: Tensor,
        *,
        gelu: str | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The product, and what follows it.

        Args:
            x: [..., in].
            gelu: "none" or "tanh": GELU of that approximation follows.
            scale: [out] factor of the output (LayerScale), before the residual.
            residual: [..., out] added to the output.
            rows: first and last + 1 of the outputs that are wanted, all by default.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        if self.training:
            raise RuntimeError(
                "a fast model does not train: spot_vit.restore(model) undoes fast, and eval() "
                "leaves the training mode"
            )
        weight = self._parameters["weight"]
        assert weight is not None
        here = self.kind != "plain" and weight.is_cpu
        if not (here and serves(x, weight.dtype, asks_gradient(self))):
            return self._plain(x, gelu, scale, residual, rows)
        with untracked():
            return self.product(gelu, scale, rows)(x, residual)

    def product(
        self,
        gelu: str | None = None,
        scale: Tensor | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Product:
        """`fused` with these arguments, for as long as the parameters are what they are.

        It asks nothing of the tensors that it is given; see `serves`.
        """
        assert self.kind != "plain"
        packed = self._packed(self.weight, scale, rows)
        return _PRODUCTS[self.kind](packed, gelu)

    def _plain(
        self,
        x: Tensor,
        gelu: str | None,
        scale: Tensor | None,
        residual: Tensor | None,
        rows: tuple[int, int] | None,
    ) -> Tensor:
        y = F.linear(x, _rows(self.weight, rows), _rows(self.bias, rows))
        return _follow(y, gelu, scale, residual)

    def _packed(self, weight: Tensor, scale: Tensor | None, rows: tuple[int, int] | None) -> Any:
        """The packed weight, made again where the parameters are no longer those it was made of."""
        state = (tensor_state(weight), tensor_state(self._parameters["bias"]), tensor_state(scale))
        packs = self.__dict__.setdefault("_packs", {})
        found = packs.get(rows)
        if found is None or found[0] != state:
            with torch.no_grad():
                found = packs[rows] = state, self._pack(scale, rows)
        return found[1]

    def _pack(self, scale: Tensor | None, rows: tuple[int, int] | None) -> Any:
        weight, bias = _rows(self.weight.detach(), rows), _rows(self.bias, rows)
        if scale is not None:
            weight = weight * scale[:, None]
            bias = None if bias is None else bias * scale
        return _pack(self.kind, weight, bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packs"}


def pack_linear(layer: nn.Linear, kind: str) -> PackedLinear:
    """Turns a plain linear layer into a packed one, in place."""
    packed: Any = layer
    packed.__class__ = PackedLinear
    packed.kind = kind
    return packed


def unpack_linear(layer: PackedLinear) -> nn.Linear:
    """Undoes `pack_linear`."""
    layer.__dict__.pop("_packs", None)
    del layer.kind
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    return layer


def asks_gradient(layer: Any) -> bool:
    """Whether weight or bias of a layer asks for a gradient."""
    bias = layer._parameters["bias"]
    return layer._parameters["weight"].requires_grad or (bias is not None and bias.requires_grad)


def untracked() -> AbstractContextManager[Any]:
    """Context of operators without a gradient, where none is wanted: calls are quicker in it."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def serves(x: Tensor, dtype: torch.dtype, differentiated: bool) -> bool:
    """Whether products by packed weights can take x, and nobody asks for more than their values.

    `differentiated` says whether a gradient by the weights may be asked for.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype is not dtype:
        return False
    if not x.is_cpu or dtype not in PACKED or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or differentiated):
        return False
    traced = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return not (
        traced
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# ---- products by packed weights: (x, residual) -> y ----------------------------------------------


def _own(packed: Any, gelu: str | None) -> Product:
    op, activation = torch.ops.spot.packed_linear, _SPOT_GELU[gelu]
    panels, outputs, bias = packed
    return lambda x, residual=None: op(x, panels, outputs, bias, residual, activation)


def _onednn(packed: Any, gelu: str | None) -> Product:
    ops = torch.ops.mkldnn
    activation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return ops._linear_pointwise(x, *packed, activation, [], algorithm)
        assert gelu is None
        return ops._linear_pointwise.binary(x, residual, *packed, "add")

    return product


def _int8(packed: Any, gelu: str | None) -> Product:
    op = torch.ops.quantized.linear_dynamic
    return lambda x, residual=None: _follow(op(x, packed), gelu, None, residual)


_PRODUCTS = {"own": _own, "onednn": _onednn, "int8": _int8}


def product_of(kind: str, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Product:
    """The product by a weight [out, in] as it is now, packed for one that is not "plain"."""
    return _PRODUCTS[kind](_pack(kind, weight, bias), gelu)


def _pack(kind: str, weight: Tensor, bias: Tensor | None) -> Any:
    if kind == "int8":
        return _quantised(weight, bias)
    if kind == "own":
        return torch.ops.spot.pack_linear(weight), weight.shape[0], bias
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias


def _rows(tensor: Any, rows: tuple[int, int] | None) -> Any:
    """The part of a weight or bias that makes these outputs; a bias may be None."""
    return tensor if tensor is None or rows is None else tensor[slice(*rows)]


def _follow(y: Tensor, gelu: str | None, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """What a fused product does behind the product, one by one."""
    y = y if gelu is None else F.gelu(y, approximate=gelu)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


def _quantised(weight: Tensor, bias: Tensor | None) -> Any:
    """A weight [out, in] in int8, by output channel, packed for products with activations."""
    scale = weight.abs().amax(dim=1).double().clamp(min=1e-12) / 127
    zero = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():  # such tensors are deprecated; this one lives for two lines
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
    engines = torch.backends.quantized.supported_engines
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn" if "onednn" in engines else before
    try:
        return torch.ops.quantized.linear_prepack(quantised, None if bias is None else bias.float())
    finally:
        torch.backends.quantized.engine = before


# ---- who multiplies fastest ----------------------------------------------------------------------


def candidates(dtype: torch.dtype) -> list[str]:
    """Who can multiply by a packed weight of a dtype here, besides torch's own layers."""
    found = []
    if dtype in PACKED and _library.error is None:
        found.append("own")
    ops = ("_linear_pointwise", "_reorder_linear_weight")
    onednn = torch.backends.mkldnn.is_available()
    if dtype in PACKED and onednn and all(hasattr(torch.ops.mkldnn, op) for op in ops):
        found.append("onednn")
    return found


def missing_int8() -> str | None:
    """Why this torch has no int8 products, or None."""
    has = hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch, "quantize_per_channel")
    return None if has else f"torch {torch.__version__} has no quantized::linear_dynamic"


@functools.cache
def fastest(dtype: torch.dtype = torch.float32, threads: int | None = None) -> tuple[str, float]:
    """Who multiplies fastest on this machine; measured once, in a tenth of a second.

    Args:
        dtype: of weights and activations.
        threads: for which it is asked; with another number it is measured again.

    Returns:
        "own", "onednn" or "plain", and how many times as fast as torch's own layer that is, for a
        layer of ViT-S with GELU, 197 tokens and 68.
    """
    narrow, wide = _SHAPE
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, rows, narrow, generator=generator).to(dtype) for rows in _TOKENS]
    sides: dict[str, Side] = {}
    for kind in ("plain", *candidates(dtype)):
        layer = nn.Linear(narrow, wide).to(dtype).eval().requires_grad_(False)
        sides[kind] = partial(_with_gelu, pack_linear(layer, kind), inputs)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        found = take_turns(sides, "cpu", rounds=15, warmup=2)
    times = {kind: one.median_ms for kind, one in found.items()}
    best = min(times, key=lambda kind: times[kind] * (_LEAD if kind == "own" else 1))
    return best, times["plain"] / times[best]


def _with_gelu(layer: PackedLinear, inputs: list[Tensor], _: int) -> None:
    for x in inputs:
        layer.fused(x, gelu="none")


def packing_report() -> dict[str, tuple[str, float]]:
    """For each dtype who multiplies fastest here, and how many times as fast as torch's layer."""
    threads = torch.get_num_threads()
    return {str(dtype).removeprefix("torch."): fastest(dtype, threads) for dtype in PACKED}
