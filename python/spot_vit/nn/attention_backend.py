"""Where sparse attention beats dense attention with a mask: measured once per machine, and kept.

Both sides attend to the keys that the same index names: `spot_ext.sparse_attention` reads those
alone; `scaled_dot_product_attention` computes the whole map and hides the rest with a boolean mask,
whose making counts. Which is faster depends on the machine, so it is measured: a column of keep
rates for a number of tokens, a dtype and a device, when someone first asks for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

import spot_ext
from spot_ext.sparse_attention import named_keys
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import Clock, contention, facts
from spot_vit.utils.timing import Side, take_turns

SIZES = (50, 100, 197, 401, 577, 1025, 2049, 4097)  # tokens, one of them a class token
RATES = (0.1, 0.25, 0.5, 0.75)
HEADS, HEAD_DIM = 6, 64
SECONDS = 0.15  # for one entry, more where three rounds take longer
ROUNDS = 3
KEY = ("tokens", "dtype", "device")  # what a column is for
FIGURES = ("keep_rate", "sparse", "masked")  # of an entry, on which the choice depends
DEPENDS_ON = {
    "cpu": ("device", "processor", "isa", "threads", "torch", "spot"),
    "cuda": ("device", "gpu", "torch", "spot"),
}  # of the facts about a machine

Entry = dict[str, float]
"""Median milliseconds of "sparse", "masked" and "plain" dense attention, and "keep_rate"."""

Timer = Callable[[int, float, torch.dtype, torch.device], Entry]

# ---- the choice ----------------------------------------------------------------------------------

_answers: dict[tuple[Any, ...], str] = {}
_tables: dict[Path, dict[str, Any]] = {}


def choose(num_tokens: int, keep_rate: float, dtype: torch.dtype, device: torch.device) -> str:
    """The faster way to attend to a share of the keys, "sparse" or "dense" (masked).

    Reads the table of this machine, or the file that the environment variable SPOT_CROSSOVER names.
    A column that the table lacks is measured, in about a second, unless the table is that file, or
    something traces or watches the computation (torch.compile, export, a FLOP counter, a CUDA
    graph): then the answer is "sparse". Columns measured on a busy machine are not written down.

    Args:
        num_tokens: N; the column of the nearest size in `SIZES` counts.
        keep_rate: keys per query as a share of N.
        dtype: of queries, keys and values.
        device: where they are. Others than CPU and CUDA are not measured.
    """
    device = torch.device(device)
    question = (num_tokens, keep_rate, dtype, device, _threads(device), _file())
    if question not in _answers:
        column = _column(nearest(num_tokens), dtype, device)
        if column is None:
            return "sparse"
        _answers[question] = "sparse" if keep_rate <= crossover_rate(column) else "dense"
    return _answers[question]


def crossover_rate(column: Sequence[Entry]) -> float:
    """The keep rate up to which sparse attention is at least as fast, linear between entries.

    0.0 where it never is, and 1.0 where it is at every rate of the column.
    """
    before = None
    for entry in sorted(column, key=lambda entry: entry["keep_rate"]):
        excess = entry["sparse"] / entry["masked"] - 1
        if excess > 0:
            if before is None:
                return 0.0
            rate, gain = before
            return rate + (entry["keep_rate"] - rate) * gain / (gain + excess)
        before = entry["keep_rate"], -excess
    return 1.0


def nearest(num_tokens: int) -> int:
    """The size in `SIZES` whose logarithm is nearest."""
    return min(SIZES, key=lambda size: abs(math.log(size / max(num_tokens, 1))))


def _column(size: int, dtype: torch.dtype, device: torch.device) -> list[Entry] | None:
    """Entries of the table, measured if need be; None where they cannot be."""
    path = _file()
    given = path is not None
    if path is None:
        path = cache_path(machine(device))
    if path not in _tables and given:
        _tables[path] = read(path)
    elif path not in _tables:
        _tables[path] = {"machine": machine(device), "columns": _kept(path)}
    table = _tables[path]
    for column in table["columns"]:
        if [column[key] for key in KEY] == [size, _name(dtype), device.type]:
            return column["entries"]
    if given or device.type not in ("cpu", "cuda") or _watched(device):
        return None
    column = measure_column(size, dtype, device)
    table["columns"].append(column)
    if column["contended"] is None:
        _keep(path, column, table["machine"])
    return column["entries"]


def _watched(device: torch.device) -> bool:
    """Whether something traces, counts or captures what would be timed."""
    tracing = torch._guards.TracingContext.try_get() is not None
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    modes = _get_current_dispatch_mode() is not None
    return tracing or capturing or modes or torch.compiler.is_compiling()


# ---- the file ------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures of a device depend on."""
    what = DEPENDS_ON["cuda" if device.type == "cuda" else "cpu"]
    return {name: value for name, value in facts(device).items() if name in what}


def cache_path(facts: dict[str, Any]) -> Path:
    """The file of a machine, under XDG_CACHE_HOME."""
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # a user without a home, as in some containers
        home = tempfile.gettempdir()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path(home) / ".cache") / "spot"
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / f"crossover-{digest[:16]}.json"


def read(path: Path) -> dict[str, Any]:
    """A table from its file.

    Raises:
        UserError: it is not one.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text())
        for column in table["columns"]:
            _ = [column[key] for key in KEY]
            figures = [entry[key] for entry in column["entries"] for key in FIGURES]
            if not figures or not all(0 < figure < math.inf for figure in figures):
                raise ValueError(f"expected figures above 0, got {figures}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no crossover table ({type(error).__name__}: {error}); "
            "`spot bench crossover` writes one"
        ) from error
    return table


def _kept(path: Path) -> list[dict[str, Any]]:
    """The columns of a cache; none where it is not there, and with a warning where it is damaged.

    A column that is missing is measured again, and the file is then written anew.
    """
    if not os.path.exists(path):
        return []
    try:
        columns: list[dict[str, Any]] = read(path)["columns"]
        return columns
    except UserError as error:
        warnings.warn(f"{error}; it is measured again", RuntimeWarning, stacklevel=2)
        return []


def _keep(path: Path, column: dict[str, Any], facts: dict[str, Any]) -> None:
    """Adds a column to the file, beside what other processes may have added meanwhile."""
    others = [c for c in _kept(path) if any(c[key] != column[key] for key in KEY)]
    with suppress(OSError, UserError):  # a cache that cannot be written only costs time
        save_json(path, {"machine": facts, "columns": [*others, column]})


def _file() -> Path | None:
    named = os.environ.get("SPOT_CROSSOVER")
    return Path(named) if named else None


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the measurement -----------------------------------------------------------------------------


def measure_column(
    size: int, dtype: torch.dtype, device: torch.device, timer: Timer | None = None
) -> dict[str, Any]:
    """A column: all keep rates for one number of tokens, and whether the machine was busy."""
    timer = timer or time_entry
    start = Clock.now()
    entries = [timer(size, rate, dtype, device) for rate in RATES]
    reason = None
    if device.type == "cpu":
        clock = Clock.now().since(start)
        reason = contention(clock, torch.get_num_threads(), os.cpu_count() or 1)
    return {
        "tokens": size,
        "dtype": _name(dtype),
        "device": device.type,
        "entries": entries,
        "contended": reason,
    }


def measure_table(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    sizes: Sequence[int] = SIZES,
) -> dict[str, Any]:
    """A table of all dtypes and sizes; columns that no other process disturbed are kept on disk."""
    about = machine(device)
    table: dict[str, Any] = {"machine": about, "columns": []}
    for dtype in dtypes:
        for size in sizes:
            column = measure_column(size, dtype, device)
            table["columns"].append(column)
            if column["contended"] is None:
                _keep(cache_path(about), column, about)
    _answers.clear()
    _tables.clear()
    return table


@torch.no_grad()
def time_entry(size: int, rate: float, dtype: torch.dtype, device: torch.device) -> Entry:
    """Medians of the three kinds of attention, which take turns."""
    generator = torch.Generator().manual_seed(size)
    shape = (1, size, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    index = _some_keys(size, math.ceil(rate * size), generator).to(device)
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def dense(mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)

    sides: dict[str, Side] = {
        "sparse": lambda _: spot_ext.sparse_attention(q, k, v, index),
        "masked": lambda _: dense(named_keys(index, size)),
        "plain": lambda _: dense(),
    }
    with torch.autocast(device.type, enabled=False):
        times = take_turns(sides, device, rounds=ROUNDS, seconds=SECONDS)
    return {"keep_rate": rate, **{name: one.median_ms for name, one in times.items()}}


def _some_keys(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Random ascending columns, int32 [1, HEADS, size - 1, count]; rows repeat after 64."""
    drawn = torch.rand(HEADS, 64, size, generator=generator).argsort(dim=-1)[..., :count]
    rows = torch.arange(size - 1) % 64
    return drawn.sort(dim=-1).values[:, rows].to(torch.int32)[None]
