"""pack_linear and packed_linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.base import ANY, NAN, Bad, Op, no_flops, samples
from ops.cases.errors import t, tensor_errors
from ops.cases.strategies import counts, drawn, names, widths
from support.data import random
from support.layouts import LAYOUTS, lay_out

import spot_ext

_NAMES = ("input", "packed", "out_features", "bias", "residual", "activation")


@dataclass(frozen=True)
class Weight:
    name: str
    shape: tuple[int, int] = (40, 12)
    layout: str = "contiguous"
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return (lay_out(random(self.name, self.shape, dtype, device), self.layout),)


@dataclass(frozen=True)
class Linear:
    name: str
    rows: tuple[int, ...] = (2, 9)
    inputs: int = 20
    outputs: int = 40
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    layout: str = "contiguous"  # of the input
    residual_layout: str = "contiguous"
    packed_layout: str = "contiguous"
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        def normal(what: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
            value = scale * random(f"{self.name} {what}", shape, torch.float64)
            return value.to(device, dtype)

        weight = normal("weight", self.outputs, self.inputs, scale=max(self.inputs, 1) ** -0.5)
        packed = spot_ext.pack_linear_reference(weight)
        residual = normal("residual", *self.rows, self.outputs) if self.residual else None
        return (
            lay_out(normal("input", *self.rows, self.inputs), self.layout),
            lay_out(packed, self.packed_layout),
            self.outputs,
            normal("bias", self.outputs) if self.bias else None,
            None if residual is None else lay_out(residual, self.residual_layout),
            self.activation,
        )


_WEIGHTS = (
    Weight("plain", traced=True),
    Weight("whole panels", (64, 5), traced=True),
    Weight("one panel", (32, 7), traced=True),
    Weight("one output", (1, 7), traced=True),
    Weight("one input", (33, 1), traced=True),
    Weight("one number", (1, 1), traced=True),
    Weight("no outputs", (0, 5)),
    Weight("no inputs", (40, 0)),
    Weight("nothing", (0, 0)),
    Weight("many panels", (31 * 32 + 8, 9), traced=True),
    Weight("ViT", (384, 384)),
    *(
        Weight(f"{layout} weight", layout=layout, traced=layout in ("swapped", "stepped"))
        for layout in LAYOUTS[1:]
    ),
)

_LINEARS = (
    Linear("plain", traced=True),
    Linear("everything", residual=True, activation="gelu", traced=True),
    Linear("no bias", bias=False, traced=True),
    Linear("residual", residual=True, traced=True),
    Linear("residual, no bias", bias=False, residual=True),
    Linear("gelu", activation="gelu", traced=True),
    Linear("gelu_tanh", activation="gelu_tanh", traced=True),
    Linear("gelu_tanh and all", residual=True, activation="gelu_tanh"),
    Linear("one row", (1,), traced=True),
    Linear("a vector", (), residual=True),
    Linear("four dimensions", (2, 3, 4), residual=True, traced=True),
    Linear("no rows", (0, 5), residual=True),
    Linear("no outputs", outputs=0),
    Linear("no inputs", inputs=0, activation="gelu"),
    Linear("one input", inputs=1),
    Linear("one output", outputs=1, residual=True),
    Linear("whole panels", outputs=64, traced=True),
    Linear("two blocks of the depth", (1, 17), inputs=385, outputs=33, residual=True),
    Linear("three blocks of the depth", (3,), inputs=1000, activation="gelu"),
    Linear("rows that share sets of the cache", (1, 31), inputs=1024),
    Linear("rows that share them in every dtype", (29,), inputs=4096, residual=True),
    Linear("several blocks of rows", (2, 70), inputs=500, outputs=70, residual=True),
    Linear("one tile", (13,), outputs=96, activation="gelu_tanh"),
    Linear("ViT", (1, 197), 384, 384, residual=True),
    Linear("twelve images", (12, 41), 192, 200, residual=True, activation="gelu"),
    *(
        Linear(f"{layout} input", residual=True, layout=layout, traced=layout == "padded")
        for layout in LAYOUTS[1:]
    ),
    *(
        Linear(f"{layout} residual", residual=True, residual_layout=layout)
        for layout in LAYOUTS[1:]
    ),
    *(Linear(f"{layout} panels", packed_layout=layout) for layout in LAYOUTS[1:-2]),
)


_sizes = st.one_of(counts, st.sampled_from([95, 96, 97, 129, 385]))
_layouts = st.sampled_from(LAYOUTS)

_drawn_weights = st.builds(Weight, names, st.tuples(_sizes, _sizes), _layouts)
_drawn_linears = st.builds(
    Linear, names,
    st.one_of(st.tuples(counts), st.tuples(st.integers(0, 3), widths),
              st.sampled_from([(), (2, 3, 4), (1, 1, 1)])),
    _sizes, _sizes, st.booleans(), st.booleans(), st.sampled_from(["none", "gelu", "gelu_tanh"]),
    _layouts, _layouts, st.sampled_from(LAYOUTS[:-2]),
)  # fmt: skip


def _weight_errors() -> tuple[Bad, ...]:
    def bad(label: str, shape: tuple[int, ...], dtype: torch.dtype, *words: str) -> Bad:
        raises = ValueError if dtype.is_floating_point else TypeError
        return Bad(f"weight {label}", lambda d: (t(*shape, dtype=dtype, device=d),), raises,
                   ("weight", *words))  # fmt: skip

    kinds = (
        torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
    )  # fmt: skip
    return (
        *tensor_errors("weight", lambda d, x: (x,), (40, 6), "2 dim"),
        bad("of rank 1", (40,), torch.float32, "2 dim", "[40]"),
        bad("of rank 3", (2, 3, 4), torch.float32, "2 dim", "[2, 3, 4]"),
        *(bad(str(kind), (40, 6), kind, "float32", str(kind).partition(".")[2]) for kind in kinds),
    )


def _linear_errors() -> tuple[Bad, ...]:
    shapes = {"input": (2, 9, 6), "packed": (2, 6, 32), "bias": (40,), "residual": (2, 9, 40)}

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {n: t(*shape, device=device) for n, shape in shapes.items()}
        values |= {"out_features": 40, "activation": "gelu"} | changes
        return tuple(values[name] for name in _NAMES)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    def number(value: Any, raises: Any, words: Any, **more: Any) -> Bad:
        return bad(f"out_features {value!r}", lambda d: {"out_features": value}, raises,
                   ("out_features", *words), **more)  # fmt: skip

    return (
        *tensor_errors("input", lambda d, x: build(d, input=x), shapes["input"], "at least 1 dim"),
        *tensor_errors("packed", lambda d, x: build(d, packed=x), shapes["packed"], "3 dim"),
        bad("input integer", lambda d: {"input": t(2, 9, 6, dtype=torch.int32, device=d)},
            TypeError, ("input", "float32", "int32")),
        bad("input complex", lambda d: {"input": t(2, 9, 6, dtype=torch.complex64, device=d)},
            TypeError, ("input", "complex64")),
        bad("input of other features", lambda d: {"input": t(2, 9, 7, device=d)}, ValueError,
            ("packed", "size 7", "features of input", "[2, 6, 32]")),
        resized("packed", 40, 6, words=("3 dim",)),
        resized("packed", 2, 7, 32, words=("size 6", "features of input")),
        resized("packed", 2, 6, 16, words=("size 32", "outputs of a panel")),
        *(number(value, ValueError, ("between 33 and 64", f"got {value}"))
          for value in (32, 65, 0, -1, 2**40)),
        number(2**70, ValueError, (), op_words=("out_features",)),
        number(40.0, TypeError, ("float",), op_words=("out_features",)),
        number("40", TypeError, ("str",), op_words=("out_features",)),
        number(None, TypeError, ("NoneType",), op_words=("out_features",)),
        number(True, TypeError, ("bool",), op_accepts=True),
        *(bad(f"{name} is a list", lambda d, n=name: {n: [1.0]}, TypeError, (name, "list"),
              op_words=(name,))
          for name in ("bias", "residual")),
        resized("bias", 1, 40, words=("1 dim",)),
        resized("bias", 64, words=("size 40", "out_features")),
        resized("residual", 9, 40, words=("3 dim",)),
        resized("residual", 1, 9, 40, words=("size 2", "as input has")),
        resized("residual", 2, 1, 40, words=("size 9", "as input has")),
        resized("residual", 2, 9, 64, words=("size 40", "out_features")),
        *(bad(f"{name} of another dtype", lambda d, n=name: {n: t(*shapes[n], device=d).double()},
              TypeError, (name, "float32", "float64"))
          for name in ("packed", "bias", "residual")),
        *(bad(f"{name} on another device", lambda d, n=name: {n: t(*shapes[n], device="meta")},
              ValueError, (name, "device"))
          for name in ("packed", "bias", "residual")),
        bad("an unknown activation", lambda d: {"activation": "relu"}, ValueError,
            ("activation", "'gelu_tanh'", "'relu'")),
        bad("activation None", lambda d: {"activation": None}, TypeError,
            ("activation", "NoneType"), op_words=("activation",)),
    )  # fmt: skip


def _linear_flops(input: torch.Tensor, packed: Any, outputs: int, *args: Any) -> tuple[int, int]:
    """Products of weights; activations may add a few operations per output."""
    rows = input.shape[:-1].numel()
    products = 2 * rows * input.shape[-1] * outputs
    return products, products + 20 * rows * outputs


_REFUSED = "for inference and has no gradient"

OPS = (
    Op("pack_linear", spot_ext.pack_linear_reference, samples(_WEIGHTS), _weight_errors(), no_flops,
       public=spot_ext.pack_linear, once_only=_REFUSED, large="ViT",
       drawn=drawn(_drawn_weights), odd={0: ANY}),
    Op("packed_linear", spot_ext.packed_linear_reference, samples(_LINEARS), _linear_errors(),
       _linear_flops, exact=False, public=spot_ext.packed_linear, once_only=_REFUSED,
       weights=(1, 3), large="twelve images", drawn=drawn(_drawn_linears), odd={0: NAN, 4: ANY}),
)  # fmt: skip
