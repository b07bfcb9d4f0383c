"""What counts as equal: bit by bit, by the error rule, within a tolerance."""

from __future__ import annotations

import math
from typing import Any

import torch
from support.arguments import tensors
from support.switches import cuda_kernels
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0  # times the error of plain PyTorch at the same dtype


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
    if not actual.numel():  # of sizes that have no strides in bytes
        return
    if actual.dim() < 2:
        actual, expected = actual.reshape(1, -1), expected.reshape(1, -1)
    differ = (bits(actual) != bits(expected)).nonzero()
    assert not len(differ), f"{what}: {len(differ)} bytes differ, first at {differ[0].tolist()}"


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
    scale64: float = 1.0,
) -> None:
    """The error rule: within the bound of `exact`; NaN and inf exactly where `plain` has them.

    float64 has no wider truth to measure against: there the two agree to 1e-12 of the largest
    value, or of `scale64` where that is more.
    """
    if plain.dtype == torch.float64:
        assert_close(actual, exact, 1e-12, what, scale64)
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
    actual: Any, expected: Any, tolerance: float = 1e-10, what: str = "result", scale: float = 1.0
) -> None:
    """Equal within `tolerance` times the largest value, or `scale` if that is more.

    It allows for another order of sums.
    """
    least = max(1.0, scale)
    for number, (mine, theirs) in enumerate(zip(tensors(actual), tensors(expected), strict=True)):
        label = f"{what}[{number}]"
        assert mine.shape == theirs.shape, f"{label}: shape {mine.shape}, not {theirs.shape}"
        assert mine.dtype == theirs.dtype, f"{label}: dtype {mine.dtype}, not {theirs.dtype}"
        if not mine.dtype.is_floating_point:
            assert torch.equal(mine, theirs), f"{label} differs"
            continue
        finite = theirs.detach()[theirs.isfinite()].abs()
        scale = max(least, finite.max().item()) if finite.numel() else least
        error = (mine - theirs).abs().nan_to_num(nan=0.0, posinf=math.inf)
        same_nan = torch.equal(mine.isnan(), theirs.isnan())
        assert same_nan, f"{label}: NaN in other places"
        worst = error.masked_fill(mine == theirs, 0).max().item() if error.numel() else 0.0
        assert worst <= tolerance * scale, f"{label}: off by {worst:.3e}, scale {scale:.3e}"
