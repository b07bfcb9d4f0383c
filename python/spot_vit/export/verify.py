"""Whether a file gives what its model gives, found in a process that does not know this package."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spot_vit.export import standalone
from spot_vit.export.program import Outputs, as_tuple
from spot_vit.models.loop import SpotLoop
from spot_vit.utils.errors import UserError

BATCHES = (1, 2, 8)
TOLERANCE = 1e-4  # of logits
JITTER = 1e-6  # of weights, relative: several times what runtimes differ by
_TRIES = 32  # batches of images


def verify(model: nn.Module, path: Path, size: Sequence[int], seed: int = 0) -> float:
    """Compares a file with its model on random images, in batches of 1, 2 and 8.

    Decisions must be the same to the last patch, and logits within 1e-4. Images are those of which
    rounding alone changes nothing, see `firm_images`.

    Args:
        model: that the file was made of.
        path: of the file.
        size: channels, height and width of an image.
        seed: of the images.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: the file gives something else, or does not run.
    """
    outputs = Outputs(model)
    images = firm_images(model, sum(BATCHES), size, seed)
    batches = dict(zip(map(str, BATCHES), images.split(list(BATCHES)), strict=True))
    found = _results(path, batches)
    largest = 0.0
    for name, batch in batches.items():
        with torch.no_grad():
            logits, *kept = as_tuple(outputs(batch))
        theirs = [torch.from_numpy(value) for value in found[name]]
        where = f"on {name} random image{'s' if len(batch) > 1 else ''}"
        if [value.shape for value in theirs] != [logits.shape, *(index.shape for index in kept)]:
            shapes = [list(value.shape) for value in theirs]
            raise UserError(f"the file is wrong: {where} its outputs have shapes {shapes}")
        difference = (theirs[0] - logits).abs().max().item()
        for k, (ours, other) in enumerate(zip(kept, theirs[1:], strict=True)):
            if changed := int((ours != other).sum()):
                raise UserError(
                    f"the file is wrong: {where}, decision {k + 1} has other patches in {changed} "
                    f"of {ours.numel()} places; the largest difference of a logit is "
                    f"{difference:.1e}"
                )
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"the file is wrong: {where} the largest difference of a logit is "
                f"{difference:.1e}, more than {TOLERANCE:g}"
            )
        largest = max(largest, difference)
    return largest


@torch.no_grad()
def firm_images(model: nn.Module, number: int, size: Sequence[int], seed: int) -> Tensor:
    """Random images [number, *size] of which a model says the same however it is rounded.

    That is: computed in float64, and with weights that differ by one in a million, decisions are
    the same and logits nearly; and scores on both sides of a cut are four roundings apart.

    Raises:
        UserError: there are hardly any: scores of the patches are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    others = [copy.deepcopy(model).double(), *(_jittered(model, generator) for _ in range(2))]
    firm: list[Tensor] = []
    for _ in range(_TRIES):
        images = torch.randn(max(BATCHES), *size, generator=generator)
        found, logp = _decided(model, images)
        same = torch.ones(len(images), dtype=torch.bool)
        for index, scores in zip(found[1:], logp, strict=False):
            same &= _apart(scores[..., 0], index.shape[1])
        for other in others:
            if not same.any():
                break
            dtype = next(other.parameters()).dtype
            values, _ = _decided(other, images.to(dtype))
            same &= (values[0] - found[0]).abs().amax(dim=1) < TOLERANCE / 4
            for index, value in zip(found[1:], values[1:], strict=True):
                same &= (index == value).all(dim=1)
        firm.extend(images[same])
        if len(firm) >= number:
            return torch.stack(firm[:number])
    tried = _TRIES * max(BATCHES)
    raise UserError(
        f"this model cannot be verified: what it says of {tried - len(firm)} of {tried} random "
        "images hangs on rounding; are its predictors trained?"
    )


def _decided(model: nn.Module, images: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs of a file, and the log-probabilities of the decisions that predictors took."""
    if not isinstance(model, SpotLoop):
        return (model(images),), []
    found = model(images, aux=True)
    return (found.logits, *found.index), found.logp


def _jittered(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with other roundings: its weights differ a little."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + JITTER * noise)
    return other


def _apart(scores: Tensor, count: int) -> Tensor:
    """[B] whether the `count` best of scores [B, N] are some roundings above the others."""
    if not 0 < count < scores.shape[1]:
        return torch.ones(len(scores), dtype=torch.bool)
    best = scores.sort(dim=1, descending=True).values
    last, next_one = best[:, count - 1], best[:, count]
    return last - next_one > 4 * torch.finfo(scores.dtype).eps * last.abs()


def _results(path: Path, batches: dict[str, Tensor]) -> dict[str, list[np.ndarray]]:
    """What the file gives for each batch, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="spot-verify-") as folder:
        images, results = Path(folder) / "images.npz", Path(folder) / "results.npz"
        arrays: Any = {name: batch.numpy() for name, batch in batches.items()}
        np.savez(images, **arrays)
        command = [sys.executable, standalone.__file__, str(path), str(images), str(results)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise UserError(f"the file does not run: {said[-1]}")
        with np.load(results) as found:
            return {
                name: [found[key] for key in found if key.startswith(f"{name}.")]
                for name in batches
            }
