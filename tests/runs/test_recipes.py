"""Every shipped recipe trains on random images of its own size, and makes the model it names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from spot_vit.cli.main import main
from spot_vit.config.recipe_files import read, shipped
from support.runs import records
from support.slow import most_slow

GMACS = {
    "digits": 0.0224,
    "dynamicvit-deit-s": 2.965,
    "evit-deit-s": 3.031,
    "finetune-folder": 0.805,
    "sparsifiner-deit-s": 4.408,
    "spot-deit-s": 2.991,
    "spot-deit-t": 0.805,
    "spot-lvvit-s": 4.662,
    "spot-sparsifiner-deit-s": 2.930,
}
"""What a recipe's model costs for an image of the size that it is trained on."""


@pytest.mark.parametrize("name", most_slow(shipped(), 4))
def test_two_steps_of_every_recipe(name: str, tmp_path: Path) -> None:
    words = (
        "--synthetic --steps 2 -b 2 --grad-accum-steps 1 -j 0 --device cpu --log-interval 1"
        " --train-num-samples 4 --val-num-samples 1 --checkpoint-hist 0 --experiment run"
    )
    assert main(["train", "-c", name, "--output", str(tmp_path), *words.split()]) == 0
    found = json.loads((tmp_path / "run/summary.json").read_text())["results"]
    fields = read(name)
    phases = ["dense"] if fields.get("dense_epochs") else []
    phases += ["connectivity"] if "attention_keep" in fields else []
    assert list(found) == [*phases, "finetune"]
    assert found["finetune"]["gmacs"] == pytest.approx(GMACS[name], rel=1e-2)
    steps = records(tmp_path / "run")
    assert len(steps) == 2 * len(found)
    assert all(math.isfinite(r["loss"]) and r["gradient_norm"] > 0 for r in steps)
