"""Assertions, data and switches of the op tests. The ops themselves are in `op_table.py`."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ROW_NAMES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32
    float64 complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2
    float8_e5m2fnuz float8_e8m0fnu"""
ROW_DTYPES = tuple(getattr(torch, name) for name in _ROW_NAMES.split() if hasattr(torch, name))
FORWARD, BACKWARD = 2.0, 3.0  # times the error of plain PyTorch at the same dtype

# ---- comparison ----------------------------------------------------------------------------------


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor [B, T, ...] as [B, T, bytes], NaN payloads and signs of zero too."""
    dense = value.detach().resolve_conj().resolve_neg()
    dense = dense.clone(memory_format=torch.contiguous_format)
    rows = math.prod(dense.shape[2:]) * dense.element_size()
    if dense.numel() == 0:
        return torch.empty((*dense.shape[:2], rows), dtype=torch.uint8, device=value.device)
    return dense.reshape(-1).view(torch.uint8).reshape(*dense.shape[:2], rows)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal in shape, dtype, device and every bit."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.device == expected.device, f"{what}: on {actual.device}, not {expected.device}"
    if actual.dim() < 2:
        actual, expected = actual.reshape(1, -1), expected.reshape(1, -1)
    differ = (bits(actual) != bits(expected)).nonzero()
    assert not len(differ), f"{what}: {len(differ)} bytes differ, first at {differ[0].tolist()}"


def emulated() -> bool:
    """Whether CUDA kernels stand in for the CPU's, thousands of times as slow (tests/emulator)."""
    return "emulator" in sys.modules


def cuda_kernels(device: torch.device) -> bool:
    """Whether ops run CUDA kernels there."""
    return device.type == "cuda" or emulated()


def error_bound(
    plain: Tensor, exact: Tensor, factor: float, scale: float = 0.0, rounding: float = 0.0
) -> float:
    """Largest allowed error: `factor` times that of `plain`, plus a floor.

    `exact` is the float64 result, `plain` that of plain PyTorch at the same dtype. The floor is one
    unit in the last place of the largest value for 16 bits, where the final rounding dominates, and
    twelve for 32 bits (PyTorch's own tolerance): few terms in another order differ by that much.
    `scale` is given where larger terms cancel: the floor is that of the terms then. `rounding` is
    what intermediate results of 16 bits lose, relative to the result: by luck `plain` loses less.
    """
    finite = exact.isfinite()
    scale = max(scale, exact[finite].abs().max().item() if finite.any() else 0.0)
    error = (plain.to(exact.dtype) - exact)[finite].abs()
    error = error[error.isfinite()]
    info = torch.finfo(plain.dtype)
    worst = error.max().item() if error.numel() else 0.0
    units = 1 if plain.dtype.itemsize == 2 else 12
    return factor * worst + max(units * info.eps, rounding) * scale + info.tiny


def assert_accurate(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float = FORWARD,
    what: str = "result",
    scale: float = 0.0,
    rounding: float = 0.0,
) -> None:
    """The error rule: within the bound of `exact`; NaN and inf exactly where `plain` has them.

    float64 has no wider truth to measure against: there the two agree to 1e-12.
    """
    if plain.dtype == torch.float64:
        assert_close(actual, exact, 1e-12, what)
        return
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, not {plain.dtype}"
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, not {exact.shape}"
    if actual.numel() == 0:
        return
    wide = actual.detach().to(exact.dtype)
    exact = exact.detach()
    # Values beyond the range of the dtype are infinite in `plain` too.
    finite = plain.isfinite() & exact.isfinite()
    odd = ~finite & (wide.isfinite() | (wide.isnan() != plain.isnan()))
    assert not odd.any(), f"{what}: {int(odd.sum())} values should not be finite"
    lost = finite & ~wide.isfinite()
    assert not lost.any(), f"{what}: {int(lost.sum())} values are not finite"
    error = (wide - exact).abs().masked_fill(~finite, 0)
    bound = error_bound(plain.detach(), exact, factor, scale, rounding)
    worst = int(error.argmax())
    assert error.max().item() <= bound, (
        f"{what}: error {error.max().item():.3e} above {bound:.3e} at "
        f"{[int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]}: "
        f"got {wide.flatten()[worst].item()}, exact {exact.flatten()[worst].item()}"
    )


def assert_gradient(
    actual: Tensor | None,
    plain: Tensor | None,
    exact: Tensor | None,
    what: str = "gradient",
    scale: float = 0.0,
    rounding: float = 0.0,
) -> None:
    """A gradient is there, accurate by element, direction and norm, and not zeroed anywhere."""
    if exact is None:
        assert actual is None, f"{what}: a gradient where there should be none"
        return
    assert actual is not None, f"{what}: no gradient"
    assert plain is not None
    assert_accurate(actual, plain, exact, BACKWARD, what, scale, rounding)
    wide, truth = actual.to(torch.float64).flatten(), exact.to(torch.float64).flatten()
    eps = torch.finfo(actual.dtype).eps
    floor = (1e-12 if actual.dtype == torch.float64 else 4 * eps) * scale * truth.numel() ** 0.5
    norm = truth.norm().item()
    if math.isfinite(norm) and norm > floor:
        plain_error = (plain.to(torch.float64).flatten() - truth).norm().item() / norm
        error = (wide - truth).norm().item() / norm
        least = 1e-12 if actual.dtype == torch.float64 else max(4 * eps, rounding)
        allowed = BACKWARD * plain_error + least + floor / norm
        assert error <= allowed, f"{what}: relative L2 error {error:.3e} above {allowed:.3e}"
        cosine = (wide @ truth / (wide.norm() * truth.norm()).clamp(min=1e-300)).item()
        assert cosine >= 1 - 4 * allowed - 1e-12, f"{what}: cosine {cosine}"
    plainly = plain.to(torch.float64).flatten().abs()
    least = 4 * torch.finfo(actual.dtype).tiny
    if cuda_kernels(actual.device) and actual.dtype.itemsize == 2:
        # Tensor cores take 16 bits: two terms may cancel where the exact ones leave less than a
        # unit of the largest.
        least = max(least, eps * scale)
    there = (plainly > least) & (truth.abs() > plainly / 2)
    zeroed = int((there & (wide == 0)).sum())
    assert zeroed == 0, f"{what}: {zeroed} entries are zero that should not be"
    noise = error_bound(plain, exact, 0.0, scale) if scale else 0.0
    leaked = int(((truth == 0) & (plainly == 0) & (wide.abs() > noise)).sum())
    assert leaked == 0, f"{what}: {leaked} entries should be exactly zero"


def assert_close(
    actual: Any, expected: Any, tolerance: float = 1e-10, what: str = "result"
) -> None:
    """Equal within `tolerance` times the largest value, which allows for another order of sums."""
    for number, (mine, theirs) in enumerate(zip(tensors(actual), tensors(expected), strict=True)):
        label = f"{what}[{number}]"
        assert mine.shape == theirs.shape, f"{label}: shape {mine.shape}, not {theirs.shape}"
        assert mine.dtype == theirs.dtype, f"{label}: dtype {mine.dtype}, not {theirs.dtype}"
        if not mine.dtype.is_floating_point:
            assert torch.equal(mine, theirs), f"{label} differs"
            continue
        finite = theirs.detach()[theirs.isfinite()].abs()
        scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
        error = (mine - theirs).abs().nan_to_num(nan=0.0, posinf=math.inf)
        same_nan = torch.equal(mine.isnan(), theirs.isnan())
        assert same_nan, f"{label}: NaN in other places"
        worst = error.masked_fill(mine == theirs, 0).max().item() if error.numel() else 0.0
        assert worst <= tolerance * scale, f"{label}: off by {worst:.3e}, scale {scale:.3e}"


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result or an argument list, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)]


def to_dtype(args: Any, dtype: torch.dtype) -> Any:
    """Floating tensors cast to `dtype`, detached; gradients are asked for where they were."""

    def cast(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.detach()
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return tree_map_only(Tensor, cast, args)


def clone(args: Any) -> Any:
    """A deep copy with the same strides, also of overlapping ones; fresh leaves."""

    def copy(value: Tensor) -> Tensor:
        if value.numel() == 0 or any(stride < 0 for stride in value.stride()):
            return value.detach().clone().requires_grad_(value.requires_grad)
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        flat = value.detach().as_strided((extent,), (1,)).clone()
        return flat.as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)

    return tree_map_only(Tensor, copy, args)


def with_grad(args: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """Leaf copies of the arguments; the floating ones at `places` ask for a gradient."""
    fresh = list(clone(args))
    for place in places:
        if place < len(fresh) and isinstance(fresh[place], Tensor):
            fresh[place].requires_grad_(fresh[place].is_floating_point())
    return tuple(fresh)


@functools.lru_cache(maxsize=256)
def _cotangent(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str, number: int
) -> Tensor:
    seeded = generator(f"cotangent {number} {kind}")
    value = torch.randn(shape, generator=seeded, dtype=torch.float64).to(device, dtype)
    if kind == "expanded" and value.numel():  # what `sum` sends: every stride 0
        return value.flatten()[0].expand(shape)
    if kind == "transposed" and len(shape) > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "partial" and value.numel() and len(shape) > 1:  # what `mean(dim=1)` sends
        return value[:, :1].expand(shape)
    return value


def cotangents(outputs: Any, kind: str = "random", draw: int = 0) -> list[Tensor]:
    """Incoming gradients of the floating outputs, with the strides that autograd may produce."""
    return [
        _cotangent(tuple(out.shape), out.dtype, out.device, kind, number + 1000 * draw)
        for number, out in enumerate(tensors(outputs))
    ]


def gradients(
    call: Callable[..., Any], args: tuple[Any, ...], kind: str = "random", draw: int = 0
) -> tuple[Any, list[Tensor | None]]:
    """Outputs of `call` and the gradients of the arguments that ask for one."""
    outputs = call(*args)
    wanted = [value for value in tensors(args) if value.requires_grad]
    used = [out for out in tensors(outputs) if out.requires_grad]
    if not used or not wanted:
        return outputs, [None for _ in wanted]
    grads = torch.autograd.grad(used, wanted, cotangents(used, kind, draw), allow_unused=True)
    return outputs, list(grads)


# ---- data ----------------------------------------------------------------------------------------


def generator(name: str) -> torch.Generator:
    """A generator whose seed is the name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """Random values: normal for floating and complex dtypes, any bits for integers."""
    seeded = generator(name)
    if dtype.is_complex:
        parts = torch.randn((*shape, 2), generator=seeded, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype).to(device)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.randn(shape, generator=seeded, dtype=torch.float64).to(device, dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=seeded).to(device, dtype)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=seeded)
    return raw.to(torch.uint8).view(dtype).reshape(shape).to(device)


def random_bits(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu"
) -> Tensor:
    """Any bit pattern of the dtype: NaN with payloads, infinities, denormals, both zeros."""
    if dtype == torch.bool:
        return random(name, shape, dtype, device)
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator(name)).to(torch.uint8)
    return raw.view(dtype).reshape(shape).to(device)


def random_index(
    name: str,
    batch: int,
    num_tokens: int,
    num_keep: int,
    order: str = "ascending",
    device: Any = "cpu",
) -> Tensor:
    """[batch, num_keep] distinct positions, `ascending` or `shuffled`."""
    seeded = generator(name)
    rows = [torch.randperm(num_tokens, generator=seeded)[:num_keep] for _ in range(batch)]
    index = torch.stack(rows) if rows else torch.empty((0, num_keep), dtype=torch.int64)
    return (index.sort(dim=1).values if order == "ascending" else index).to(device)


LAYOUTS = ("contiguous", "swapped", "reversed", "stepped", "offset", "padded", "expanded", "flat")


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same values with other strides; `expanded` and `flat` repeat the first image or row."""
    if value.dim() < 2 or value.numel() == 0:
        return value
    if layout == "swapped":  # batch and tokens
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":  # last dimension slowest
        order = tuple(reversed(range(value.dim())))
        return value.permute(order).contiguous().permute(order)
    if layout == "stepped":  # every second element of the last dimension
        gaps = random_bits("gaps", tuple(value.shape), value.dtype, value.device)
        return torch.stack([value, gaps], dim=-1)[..., 0]
    if layout == "offset":  # starts one element into its memory, so it is not aligned
        flat = torch.cat([value.flatten()[:1], value.flatten()])
        return flat[1:].view(value.shape)
    if layout == "padded":  # rows with a gap after them, images too
        wide = torch.cat([value, value[:, :1]], dim=1)
        double = torch.cat([wide, wide], dim=-1)
        return double.narrow(1, 0, value.shape[1]).narrow(-1, 0, value.shape[-1])
    if layout == "expanded":  # one image for all
        return value[:1].expand(value.shape)
    if layout == "flat":  # one row for all
        return value[:, :1].expand(value.shape)
    assert layout == "contiguous", layout
    return value.contiguous()


def lay_out_index(index: Tensor, layout: str) -> Tensor:
    """As `lay_out`, but positions stay distinct: `flat` is not possible."""
    return lay_out(index, "contiguous" if layout == "flat" else layout)


@contextmanager
def isa(name: str):
    """Runs the CPU kernels of one instruction set."""
    control = isa_control()
    before = control.isa()
    control.set_isa(name)
    try:
        yield
    finally:
        control.set_isa(before)


def isa_control() -> Any:
    """`spot_ext._C`, which is built for one CPython only; the ops themselves are not."""
    return pytest.importorskip(
        "spot_ext._C", reason="spot_ext._C was built for another CPython", exc_type=ImportError
    )


@contextmanager
def threads(count: int):
    """Runs torch with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- memory --------------------------------------------------------------------------------------

_GUARDED: list[mmap.mmap] = []


def guarded(value: Tensor) -> Tensor:
    """A contiguous copy that ends where a page begins that nobody may touch.

    To read or write behind it ends the process: for subprocesses (see `crash_free`).
    """
    size, page = value.numel() * value.element_size(), mmap.PAGESIZE
    whole = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert (
        ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + whole), page, 0) == 0
    )
    _GUARDED.append(memory)
    if size == 0:
        return value.contiguous()
    copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=whole - size)
    return copy.view(value.shape).copy_(value.detach())


def crash_free(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own, which must end well."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed leaves the resident size
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# Code that defines `rise(function)`: by how much the resident size rose at most, and the result.
MEASURE_MEMORY = """
import ctypes
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which hold more than was asked for
_ballast = []

def _resident(field):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith(field))

def rise(function):
    _ballast.append(b"x" * max(_resident("VmHWM:") - _resident("VmRSS:"), 0))
    before = _resident("VmHWM:")
    result = function()
    return _resident("VmHWM:") - before, result
"""
