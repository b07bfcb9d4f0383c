"""The recipe of the embedded data, from beginning to end: minutes, as a user would run it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import spot_vit
import torch
from support.runs import command
from torch import Tensor


@pytest.mark.slow
def test_digits_are_learned_and_most_patches_are_not_needed(tmp_path: Path) -> None:
    process = command(
        "train", "digits", "--output", str(tmp_path), "--experiment", "run", OMP_NUM_THREADS="2"
    )
    output = process.communicate(timeout=3000)
    assert process.returncode == 0, output
    found = json.loads((tmp_path / "run/summary.json").read_text())["results"]
    dense, sparse = found["dense"], found["finetune"]
    assert dense["top1"] >= 0.95 and sparse["top1"] >= dense["top1"] - 0.01
    assert sparse["gmacs"] <= 0.6 * dense["gmacs"]

    images = torch.stack([image for image, *_ in spot_vit.ClutteredDigits("test")])
    model = spot_vit.load(tmp_path / "run").eval()

    def says(kind: torch.dtype | None, given: torch.dtype = torch.float32) -> Tensor:
        """Classes by the fast model of a dtype."""
        fast = spot_vit.fast(copy.deepcopy(model), kind)
        return fast(images.to(given)).argmax(dim=1)

    with torch.inference_mode():
        expected = model(images).argmax(dim=1)
        half = copy.deepcopy(model).bfloat16()(images.bfloat16()).argmax(dim=1)
    shares = [
        (found == other).float().mean().item()
        for found, other in (
            (says(None), expected),
            (says(torch.bfloat16), half),
            (says(torch.int8), expected),
        )
    ]
    print(f"agreement of float32, bfloat16, int8 with plain models: {shares}")
    assert shares[0] == 1.0 and shares[1] >= 0.99 and shares[2] >= 0.98
