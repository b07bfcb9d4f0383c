"""connectivity and predict_connectivity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ops.cases.base import NAN, Bad, Op, Unread, positional, samples
from ops.cases.connectivity_data import (
    PREDICTION_NAMES,
    Connectivity,
    Prediction,
    Sharp,
    drawn_connectivity,
    drawn_prediction,
)
from ops.cases.errors import ints, keep_errors, t, tensor_errors
from ops.cases.strategies import drawn
from support.data import generator
from support.layouts import LAYOUTS
from torch import Tensor

import spot_ext

_CHOICE_NAMES = ("coef_topk", "threshold")

_CONNECTIVITY = (
    Connectivity("plain", traced=True),
    Connectivity("everything", columns=16, keep="random", coef_topk=3, threshold=0.3, budget=6,
                  traced=True),
    Connectivity("columns", columns=23, traced=True),
    Connectivity("columns of all", columns=10),
    Connectivity("masked", keep="random", traced=True),
    Connectivity("masked columns", keep="random", columns=15),
    Connectivity("keep all", keep="all"),
    Connectivity("keep none", keep="none", traced=True),
    Connectivity("keep none, no prefix", keep="none", num_prefix=0),
    Connectivity("threshold", threshold=0.5, budget=8, traced=True),
    Connectivity("threshold of 0", threshold=0.0, part=0.3, budget=8),
    Connectivity("negative threshold", threshold=-0.5, budget=8),
    Connectivity("threshold beyond all", threshold=1e3),
    Connectivity("topk of 1", coef_topk=1, traced=True),
    Connectivity("topk of 3", coef_topk=3, rank=8),
    Connectivity("topk of all", coef_topk=5),
    Connectivity("topk beyond all", coef_topk=50),
    Connectivity("budget of 1", budget=1),
    Connectivity("budget of all", budget=10, traced=True),
    Connectivity("budget of all, masked", budget=10, keep="random"),
    Connectivity("one coefficient", rank=1, traced=True),
    Connectivity("no coefficients", rank=0, budget=3),
    Connectivity("no prefix", num_prefix=0, traced=True),
    Connectivity("five prefix tokens", num_prefix=5, keep="random", traced=True),
    Connectivity("one head", heads=1),
    Connectivity("one column", queries=0, num_prefix=1, budget=1),
    Connectivity("one query", queries=1, num_prefix=0, budget=1),
    Connectivity("no queries", queries=0, num_prefix=3, budget=2),
    Connectivity("no heads", heads=0),
    Connectivity("empty batch", batch=0, keep="random", columns=12, traced=True),
    Connectivity("all ties", part=0.0, keep="random"),
    Connectivity("sparse basis", part=0.1, budget=7, queries=30, rank=9, coef_topk=4),
    Connectivity("odd sizes", batch=3, heads=3, queries=67, num_prefix=2, rank=13, budget=19,
                  coef_topk=8, keep="random"),
    Connectivity("ViT", queries=196, rank=32, budget=50, coef_topk=8, batch=1),
    Connectivity("twelve ViT images", batch=12, queries=98, rank=16, budget=25, coef_topk=8,
                  columns=197, keep="random"),
    *(Connectivity(f"{layout} coefficients", coefficients_layout=layout, keep="random",
                    traced=layout == "swapped") for layout in LAYOUTS[1:]),
    *(Connectivity(f"{layout} basis", basis_layout=layout, columns=14) for layout in LAYOUTS[1:]),
    *(Connectivity(f"{layout} columns", columns_layout=layout, columns=19)
      for layout in LAYOUTS[1:-1]),
)  # fmt: skip

# At the default sizes keys are projected to 2 channels before they are added up, to 8 after.
_PREDICTION = (
    Prediction("plain", traced=True),
    Prediction("everything", columns=16, keep="random", coef_topk=3, threshold=0.1, budget=6,
                channels=2, scale=0.7, basis_threshold=0.5, fused=True, traced=True),
    Prediction("basis threshold", basis_threshold=0.5, traced=True),
    Prediction("basis threshold of 0", basis_threshold=0.0, coef_topk=3),
    Prediction("negative basis threshold", basis_threshold=-1.0),
    Prediction("basis threshold beyond all", basis_threshold=1e3),
    Prediction("fused token", columns=13, fused=True, traced=True),
    Prediction("fused token, projected first", columns=13, fused=True, channels=2, keep="random"),
    Prediction("fused token, no projections", columns=13, fused=True, channels=None),
    Prediction("projected first", channels=2, traced=True),
    Prediction("projected first, columns", channels=2, columns=23, coef_topk=3),
    Prediction("projected first, masked", channels=2, keep="random", traced=True),
    Prediction("no projections", channels=None, traced=True),
    Prediction("no projections, columns", channels=None, columns=23, coef_topk=3),
    Prediction("no projections, masked columns", channels=None, columns=15, keep="random"),
    Prediction("columns", columns=23, traced=True),
    Prediction("masked", keep="random", traced=True),
    Prediction("masked columns", keep="random", columns=15),
    Prediction("keep all", keep="all"),
    Prediction("keep none", keep="none"),
    Prediction("keep none, no prefix", keep="none", num_prefix=0),
    Prediction("scaled", scale=2.0),
    Prediction("scale 0", scale=0.0, coef_topk=3),
    Prediction("negative scale, no projections", scale=-1.5, channels=None),
    Prediction("threshold", threshold=0.2, budget=8, traced=True),
    Prediction("threshold of 0", threshold=0.0, part=0.3, budget=8),
    Prediction("threshold beyond all", threshold=1e3),
    Prediction("topk of 1", coef_topk=1, traced=True),
    Prediction("topk of 8", coef_topk=8, rank=12),
    Prediction("topk of all", coef_topk=5),
    Prediction("topk beyond all", coef_topk=50),
    Prediction("budget of 1", budget=1),
    Prediction("budget of all", budget=10),
    Prediction("budget of all, masked", budget=10, keep="random"),
    Prediction("one coefficient", rank=1, traced=True),
    Prediction("no coefficients", rank=0, budget=3),
    Prediction("one channel", channels=1),
    Prediction("no channels", channels=0, coef_topk=3),
    Prediction("head dim 1", dim=1),
    Prediction("head dim 1, no projections", dim=1, channels=None),
    Prediction("head dim 0", dim=0),
    Prediction("head dim 0, no projections", dim=0, channels=None, coef_topk=3),
    Prediction("33 channels", dim=33, channels=33, rank=17, coef_topk=8),
    Prediction("17 of 65 channels", dim=65, channels=17, rank=33, coef_topk=8, queries=20),
    Prediction("no prefix", num_prefix=0, traced=True),
    Prediction("five prefix tokens", num_prefix=5, keep="random"),
    Prediction("one head", heads=1),
    Prediction("one column", queries=0, num_prefix=1, budget=1),
    Prediction("one query", queries=1, num_prefix=0, budget=1),
    Prediction("no queries", queries=0, num_prefix=3, budget=2),
    Prediction("no heads", heads=0),
    Prediction("empty batch", batch=0, keep="random", columns=12, traced=True,
                rows_layout="contiguous"),  # opcheck cannot clone others
    Prediction("all ties", part=0.0, keep="random"),
    Prediction("sparse basis", part=0.1, budget=7, queries=30, rank=9, coef_topk=4),
    Prediction("odd sizes", batch=3, heads=3, queries=67, num_prefix=2, rank=13, budget=19,
                coef_topk=8, keep="random", dim=7),
    Prediction("odd sizes, projected first", batch=3, heads=3, queries=67, num_prefix=2, rank=13,
                budget=19, coef_topk=8, columns=90, dim=7, channels=3),
    *(Prediction(f"ViT, {channels} channels", batch=1, heads=1, queries=196, rank=32, budget=50,
                  coef_topk=8, dim=16, channels=channels) for channels in (None, 8, 32)),
    Prediction("twelve images", batch=12, heads=1, queries=60, rank=16, budget=15, coef_topk=8,
                columns=100, keep="random", dim=8),
    *(Prediction(f"{layout} q and k", rows_layout=layout, keep="random", columns=14,
                  channels=(None, 2, 8)[number % 3], traced=layout == "swapped")
      for number, layout in enumerate(LAYOUTS)),
    *(Prediction(f"{layout} down", down_layout=layout, columns=14) for layout in LAYOUTS[1:]),
    *(Prediction(f"{layout} weights of {channels}", weights_layout=layout, coef_topk=3,
                  channels=channels, traced=layout == "stepped" and channels == 2)
      for layout in LAYOUTS[1:] for channels in (2, 8)),
    *(Prediction(f"{layout} up", basis_layout=layout, columns=14, fused=layout == "padded",
                 basis_threshold=(None, 0.5)[number % 2])
      for number, layout in enumerate(LAYOUTS[1:-2])),
)  # fmt: skip


# columns in play, patch queries, rank, budget, coefficients kept, mask, gathered, threshold
_GPU_SIZES = (
    (1, 1, 1, 1, None, "", False, None),
    (2, 2, 0, 1, None, "", False, None),  # no basis: all tie
    (17, 17, 5, 17, 3, "random", False, None),
    (33, 31, 40, 4, 8, "random", True, None),
    (197, 196, 32, 50, 8, "", False, None),
    (197, 196, 32, 50, 8, "random", True, None),
    (197, 196, 32, 100, None, "", False, 0.01),
    (256, 9, 7, 255, 2, "random", True, 0.0),
    (300, 20, 64, 30, 8, "random", False, None),
    (700, 12, 33, 70, 8, "random", True, None),  # more columns than a warp holds
    (30000, 2, 3, 999, 2, "", False, None),
    (70000, 1, 2, 50, None, "random", True, None),  # more than shared memory holds
)


def _gpu_case(kind: type[Any], number: int, label: str, **more: Any) -> Any:
    in_play, queries, rank, budget, coef_topk, keep, gathered, threshold = _GPU_SIZES[number]
    return kind(
        f"[{queries}, {rank}] x {in_play} {number}, {label}", heads=3, queries=queries,
        num_prefix=in_play - queries, rank=rank, budget=budget, coef_topk=coef_topk, keep=keep,
        columns=in_play + 5 if gathered else None, threshold=threshold, **more,
    )  # fmt: skip


_GPU_CONNECTIVITY = tuple(
    _gpu_case(Connectivity, number, layout, coefficients_layout=layout, odd=True)
    for number in range(len(_GPU_SIZES))
    for layout in ("contiguous", "reversed")
)
_GPU_PREDICTION = tuple(
    _gpu_case(Sharp, number, f"head dim {dim}, channels {channels}", dim=dim, channels=channels,
              basis_threshold=None if dim == 32 else 0.25,
              rows_layout="contiguous" if dim == 77 else "reversed")
    for number, (in_play, *_) in enumerate(_GPU_SIZES)
    for dim, channels in (((32, None), (77, None), (77, 3), (33, 40), (64, 200))
                          if in_play < 1000 else ((5, None), (5, 2)))
)  # fmt: skip


def _first_three(index: Tensor) -> bool:
    return bool((index == torch.arange(3, dtype=torch.int32)).all())


def _unread(build: Callable[[Any, Tensor], tuple[Any, ...]]) -> tuple[Unread, ...]:
    """Columns that the grid does not have are never named: of six the first three are."""

    def args(device: Any) -> tuple[Any, ...]:
        return build(device, ints(device, [0, 1, 2, 9, -1, 1 << 40]))

    return (Unread("columns out of range", args, _first_three),)


def _positive(name: str, *shape: int, device: Any) -> Tensor:
    return torch.rand(shape, generator=generator(f"unread {name}")).to(device)


_UNREAD_CONNECTIVITY = _unread(
    lambda d, columns: (
        _positive("coefficients", 1, 1, 4, 3, device=d), _positive("basis", 3, 9, device=d), 3,
        columns,
    )
)  # fmt: skip
_UNREAD_PREDICTION = _unread(
    lambda d, columns: (
        _positive("q", 1, 4, 2, 8, device=d), _positive("k", 1, 6, 2, 8, device=d),
        _positive("down", 9, 3, device=d), None, None, None, None,
        _positive("up", 9, 3, device=d), 3, columns,
    )
)  # fmt: skip


def _connectivity_errors() -> tuple[Bad, ...]:
    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"coefficients": t(2, 3, 5, 4, device=device)}
        values["basis"] = t(4, 6, device=device)
        return tuple((values | _choice() | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    return (
        *tensor_errors("coefficients", lambda d, x: build(d, coefficients=x), (2, 3, 5, 4),
                        "4 dim"),
        resized("coefficients", 3, 5, 4, words=("4 dim",)),
        bad("more queries than columns", lambda d: {"coefficients": t(2, 3, 7, 4, device=d)},
            ValueError, ("basis", "7", "6")),
        bad("coefficients integer",
            lambda d: {"coefficients": t(2, 3, 5, 4, dtype=torch.int32, device=d)}, TypeError,
            ("coefficients", "float32", "int32")),
        bad("coefficients complex",
            lambda d: {"coefficients": t(2, 3, 5, 4, dtype=torch.complex64, device=d)}, TypeError,
            ("coefficients", "complex64")),
        *tensor_errors("basis", lambda d, x: build(d, basis=x), (4, 6), "2 dim"),
        resized("basis", 4, 6, 1, words=("2 dim",)),
        resized("basis", 3, 6, words=("size 4",)),
        bad("basis of another dtype", lambda d: {"basis": t(4, 6, device=d).double()}, TypeError,
            ("basis", "float32", "float64")),
        bad("basis on another device", lambda d: {"basis": t(4, 6, device="meta")}, ValueError,
            ("basis", "device")),
        bad("basis of too many columns", lambda d: {
            "basis": t(4, 1, device=d).expand(4, 2**31 - 1),
            "columns": ints(d, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])}, ValueError,
            ("basis", "2^31", "columns", f"{2**31 - 1}")),
        *_choice_errors(build, 6),
    )  # fmt: skip


def _prediction_errors() -> tuple[Bad, ...]:
    shapes = {
        "q": (2, 5, 3, 2), "k": (2, 6, 3, 2), "down": (6, 4), "query_weight": (7, 2),
        "query_bias": (7,), "key_weight": (7, 2), "key_bias": (7,), "up": (6, 4),
    }  # fmt: skip
    projections = tuple(shapes)[3:7]

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {n: t(*shape, device=device) for n, shape in shapes.items()}
        values |= {"scale": None, "basis_threshold": None} | _choice() | changes
        return tuple(values[name] for name in PREDICTION_NAMES)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    return (
        *tensor_errors("q", lambda d, x: build(d, q=x), shapes["q"], "4 dim"),
        *tensor_errors("k", lambda d, x: build(d, k=x), shapes["k"], "4 dim"),
        *tensor_errors("down", lambda d, x: build(d, down=x), shapes["down"], "2 dim"),
        *tensor_errors("up", lambda d, x: build(d, up=x), shapes["up"], "2 dim"),
        resized("q", 2, 5, 6, words=("4 dim",)),
        resized("k", 2, 6, 6, words=("4 dim",)),
        resized("k", 1, 6, 3, 2, words=("size 2", "batch")),
        resized("k", 2, 6, 1, 2, words=("size 3", "heads")),
        resized("k", 2, 6, 3, 1, words=("size 2", "head dim")),
        resized("k", 2, 5, 3, 2, words=("size 6", "as up has tokens")),
        resized("down", 6, 4, 1, words=("2 dim",)),
        bad("down of other tokens", lambda d: {"down": t(5, 4, device=d)}, ValueError,
            ("up", "size 5", "as down has", "[6, 4]")),
        resized("up", 24, words=("2 dim",)),
        resized("up", 5, 4, words=("size 6", "as down has")),
        bad("up of too many tokens", lambda d: {
            **{name: t(1, 4, device=d).expand(2**31 - 1, 4) for name in ("down", "up")},
            "columns": ints(d, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])}, ValueError,
            ("up", "2^31", "rows", f"{2**31 - 1}")),
        resized("up", 6, 3, words=("size 4", "as down has")),
        bad("k of all tokens beside columns",
            lambda d: {"columns": ints(d, [0, 1, 2, 3, 4], [5, 4, 3, 2, 1])}, ValueError,
            ("k", "size 5", "as columns has", "[2, 6, 3, 2]")),
        resized("query_weight", 7, words=("2 dim",)),
        resized("query_weight", 7, 3, words=("size 2", "head dim")),
        bad("query_weight of other channels", lambda d: {"query_weight": t(6, 2, device=d)},
            ValueError, ("query_bias", "size 6", "channels of query_weight", "[7]")),
        resized("query_bias", 7, 1, words=("1 dim",)),
        resized("query_bias", 6, words=("size 7", "channels of query_weight")),
        resized("key_weight", 14, words=("2 dim",)),
        resized("key_weight", 6, 2, words=("size 7", "channels of query_weight")),
        resized("key_weight", 7, 1, words=("size 2", "head dim")),
        resized("key_bias", 1, 7, words=("1 dim",)),
        resized("key_bias", 1, words=("size 7", "channels of query_weight")),
        *(bad(f"{name} missing", lambda d, n=name: {n: None}, ValueError,
              (f"{name} must be given", "as well as"))
          for name in projections),
        *(bad(f"{name} alone", lambda d, n=name: {other: None for other in projections if
              other != n}, ValueError, ("must be given", f"as well as {name}"))
          for name in projections),
        *(bad(f"{name} is a list", lambda d, n=name: {n: [1.0]}, TypeError, (name, "list"),
              op_words=(name,))
          for name in projections),
        bad("more queries than columns", lambda d: {"q": t(2, 7, 3, 2, device=d)}, ValueError,
            ("up", "7", "6")),
        bad("q integer", lambda d: {"q": t(2, 5, 3, 2, dtype=torch.int32, device=d)}, TypeError,
            ("q", "float32", "int32")),
        bad("q complex", lambda d: {"q": t(2, 5, 3, 2, dtype=torch.complex64, device=d)},
            TypeError, ("q", "complex64")),
        *(bad(f"{name} of another dtype",
              lambda d, n=name: {n: t(*shapes[n], device=d).double()}, TypeError,
              (name, "float32", "float64"))
          for name in ("k", "down", "up", *projections)),
        *(bad(f"{name} on another device", lambda d, n=name: {n: t(*shapes[n], device="meta")},
              ValueError, (name, "device"))
          for name in ("k", "down", "up", *projections)),
        *(bad(f"{name} is a string", lambda d, n=name: {n: "1"}, TypeError, (name, "str"),
              op_words=(name,))
          for name in ("scale", "basis_threshold")),
        *(bad(f"{name} is a tensor", lambda d, n=name: {n: torch.tensor(1.0)}, TypeError,
              (name, "Tensor"), op_accepts=True)
          for name in ("scale", "basis_threshold")),
        *(bad(f"{name} is a bool", lambda d, n=name: {n: True}, TypeError, (name, "bool"),
              op_accepts=True)
          for name in ("scale", "basis_threshold")),
        *_choice_errors(build, 7),
    )  # fmt: skip


def _choice() -> dict[str, Any]:
    """Legal arguments of either op of connectivity from the budget on."""
    return {
        "budget": 3, "columns": None, "keep": None, "coef_topk": None, "threshold": None,
    }  # fmt: skip


def _choice_errors(build: Callable[..., tuple[Any, ...]], end: int) -> list[Bad]:
    """Wrong arguments that both have; `build(device, **changes)` starts from `_choice`, for 5
    queries of 2 images, 4 coefficients and 6 columns; those in play are to be below `end`."""

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    def named(device: Any, *row: int) -> dict[str, Any]:
        return {"columns": ints(device, [0, 1, 2, 3, 4, 5], list(row))}

    def numbers(name: str, *values: int) -> list[Bad]:
        return [
            *(bad(f"{name} {value}", lambda d, v=value: {name: v}, ValueError, (name, f"{value}"))
              for value in (0, -1, -(2**62), *values)),
            bad(f"{name} huge", lambda d: {name: 2**70}, ValueError, (name,), op_words=(name,)),
            bad(f"{name} float", lambda d: {name: 2.0}, TypeError, (name, "float"),
                op_words=(name,)),
            bad(f"{name} bool", lambda d: {name: True}, TypeError, (name, "bool"),
                op_accepts=True),
            bad(f"{name} is a string", lambda d: {name: "2"}, TypeError, (name, "str"),
                op_words=(name,)),
        ]  # fmt: skip

    return [
        *numbers("budget", 7, 2**40),
        bad("budget None", lambda d: {"budget": None}, TypeError, ("budget", "NoneType"),
            op_words=("budget",)),
        bad("budget of other columns", lambda d: {
            "columns": ints(d, [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]), "budget": 6}, ValueError,
            ("budget", "between 1 and 5", "6")),
        *numbers("coef_topk"),
        bad("columns is a list", lambda d: {"columns": [1]}, TypeError, ("columns", "list"),
            op_words=("columns",)),
        bad("columns int32", lambda d: {"columns": named(d, 0, 1, 2, 3, 4, 5)["columns"].int()},
            TypeError, ("columns", "int64", "int32")),
        bad("columns of rank 1", lambda d: {"columns": torch.arange(6, device=d)}, ValueError,
            ("columns", "2 dim", "[6]")),
        bad("columns of another batch", lambda d: {"columns": torch.arange(6, device=d)[None]},
            ValueError, ("columns", "size 2", "[1, 6]")),
        bad("columns too few", lambda d: {"columns": ints(d, [0, 1, 2, 3], [5, 4, 3, 2])},
            ValueError, ("columns", "5", "4")),
        bad("columns on another device",
            lambda d: {"columns": torch.zeros(2, 6, dtype=torch.int64, device="meta")}, ValueError,
            ("columns", "device")),
        bad("too many columns",
            lambda d: {"columns": ints(d, [0], [1]).expand(2, 2**31 - 1)}, ValueError,
            ("columns", "2^31", f"{2**31 - 1}")),
        bad("columns too large", lambda d: named(d, 0, 1, 2, 3, 4, end), ValueError,
            ("columns[1, 5]", f"in [0, {end})", f"got {end}"), values=True),
        bad("columns negative", lambda d: named(d, 0, -1, 2, 3, 4, 5), ValueError,
            ("columns[1, 1]", f"in [0, {end})", "got -1"), values=True),
        bad("columns huge", lambda d: named(d, 2**62, 1, 2, 3, 4, 5), ValueError,
            ("columns[1, 0]", f"in [0, {end})", f"got {2**62}"), values=True),
        *keep_errors(lambda d, keep: build(d, keep=keep)),
        bad("threshold is a string", lambda d: {"threshold": "1"}, TypeError,
            ("threshold", "str"), op_words=("threshold",)),
        bad("threshold is a tensor", lambda d: {"threshold": torch.tensor(1.0)}, TypeError,
            ("threshold", "Tensor"), op_accepts=True),
        bad("threshold is a bool", lambda d: {"threshold": True}, TypeError,
            ("threshold", "bool"), op_accepts=True),
    ]  # fmt: skip


def _connectivity_flops(
    coefficients: Tensor, basis: Tensor, budget: int, columns: Tensor | None, keep: Any,
    coef_topk: int | None, *args: Any,
) -> tuple[int, int]:  # fmt: skip
    """The product with the coefficients that count, as if the basis were dense."""
    in_play = basis.shape[1] if columns is None else columns.shape[1]
    rows, rank = coefficients.shape[:3].numel(), coefficients.shape[3]
    used = rank if coef_topk is None else min(rank, coef_topk)
    return 2 * rows * used * in_play, 2 * rows * used * in_play


def _prediction_flops(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Any,
    key_weight: Any, key_bias: Any, up: Tensor, budget: int, columns: Tensor | None, keep: Any,
    scale: Any, coef_topk: int | None, *args: Any,
) -> tuple[int, int]:  # fmt: skip
    """That, and the products of a head, in the order that costs less; softmax may add a few
    operations per entry."""
    (batch, queries, heads, dim), tokens, rank = q.shape, k.shape[1], down.shape[1]
    added_up, met = (rank, tokens, dim), (queries, dim, rank)
    orders = [[added_up, met]]
    if query_weight is not None:
        channels = query_weight.shape[0]
        there, back = (rank, dim, channels), (rank, channels, dim + 1)  # 1: a bias
        projected = [(queries, dim, channels), (tokens, dim, channels)]
        narrow = [(rank, tokens, channels), (queries, channels, rank)]
        orders = [[added_up, there, back, met], [*projected, *narrow]]
    products = 2 * batch * heads * min(sum(map(math.prod, order)) for order in orders)
    entries = batch * heads * queries * rank
    shape = torch.empty(batch, heads, queries, rank, device="meta")
    least, most = _connectivity_flops(shape, up.mT, budget, columns, keep, coef_topk)
    return products + least, products + most + 8 * entries


OPS = (
    Op("connectivity",
       positional(spot_ext.connectivity_reference, 5, *_CHOICE_NAMES),
       samples(_CONNECTIVITY), _connectivity_errors(),
       _connectivity_flops, public=positional(spot_ext.connectivity, 5, *_CHOICE_NAMES),
       weights=(1,), large="twelve ViT images",
       gpu=samples(_GPU_CONNECTIVITY), unread=_UNREAD_CONNECTIVITY,
       drawn=drawn(drawn_connectivity()), odd={0: NAN}),
    Op("predict_connectivity",
       positional(spot_ext.predict_connectivity_reference, 0, *PREDICTION_NAMES),
       samples(_PREDICTION), _prediction_errors(),
       _prediction_flops,
       public=positional(spot_ext.predict_connectivity, 0, *PREDICTION_NAMES),
       weights=tuple(range(2, 8)), large="twelve images",
       gpu=samples(_GPU_PREDICTION), unread=_UNREAD_PREDICTION,
       drawn=drawn(drawn_prediction(), "args_soon_found")),
)  # fmt: skip
