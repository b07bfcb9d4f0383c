"""Whether a file gives what its model gives, found in a process that does not know this package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spot_vit.export import standalone
from spot_vit.export.program import Outputs, as_tuple
from spot_vit.utils.errors import UserError

BATCHES = (1, 2, 8)
TOLERANCE = 1e-4  # of logits
NUDGE = 1e-5  # of pixels, relative: some ten times what runtimes differ by
_TRIES = 16  # batches of images


def verify(model: nn.Module, path: Path, size: Sequence[int], seed: int = 0) -> float:
    """Compares a file with its model on random images, in batches of 1, 2 and 8.

    Decisions must be the same to the last patch, and logits within 1e-4. Images are such that
    rounding has no say: those whose decisions change when pixels do by one in 100,000 are drawn
    anew.

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
    images = firm_images(outputs, sum(BATCHES), size, seed)
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
                    f"of {ours.numel()} places; the largest difference of a logit is {difference:.1e}"
                )
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"the file is wrong: {where} the largest difference of a logit is {difference:.1e}, "
                f"more than {TOLERANCE:g}"
            )
        largest = max(largest, difference)
    return largest


@torch.no_grad()
def firm_images(outputs: nn.Module, number: int, size: Sequence[int], seed: int) -> Tensor:
    """Random images [number, *size] whose decisions do not hang on rounding.

    Raises:
        UserError: nearly all hang on it: scores of the patches are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    firm: list[Tensor] = []
    for _ in range(_TRIES):
        images = torch.randn(max(BATCHES), *size, generator=generator)
        nudged = images * (1 + NUDGE * torch.randn(images.shape, generator=generator))
        same = torch.ones(len(images), dtype=torch.bool)
        _, *kept = as_tuple(outputs(images))
        _, *others = as_tuple(outputs(nudged)) if kept else (images,)
        for index, other in zip(kept, others, strict=True):
            same &= (index == other).all(dim=1)
        firm.extend(images[same])
        if len(firm) >= number:
            return torch.stack(firm[:number])
    raise UserError(
        f"the decisions of this model cannot be verified: on {_TRIES * max(BATCHES) - len(firm)} of "
        f"{_TRIES * max(BATCHES)} random images they change with rounding; are its predictors "
        "trained?"
    )


def _results(path: Path, batches: dict[str, Tensor]) -> dict[str, list[np.ndarray]]:
    """What the file gives for each batch, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="spot-verify-") as folder:
        images, results = Path(folder) / "images.npz", Path(folder) / "results.npz"
        np.savez(images, **{name: batch.numpy() for name, batch in batches.items()})
        command = [sys.executable, standalone.__file__, str(path), str(images), str(results)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise UserError(f"the file does not run: {said[-1]}")
        with np.load(results) as found:
            return {
                name: [found[key] for key in sorted(found) if key.startswith(f"{name}.")]
                for name in batches
            }
