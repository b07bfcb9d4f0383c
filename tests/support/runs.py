"""Small recipes, folders of pictures, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from spot_vit.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8}
"""Arguments that make timm's DeiT so small that a step takes milliseconds."""


def small_recipe(output: Path, **changes: Any) -> Recipe:
    """A recipe of a few steps on synthetic data."""
    given: dict[str, Any] = {
        "synthetic": True,
        "train_num_samples": 48,
        "val_num_samples": 22,
        "num_classes": 5,
        "model": "deit_tiny_patch16_224",
        "model_kwargs": SMALL,
        "epochs": 2,
        "warmup_epochs": 0.5,
        "batch_size": 8,
        "workers": 0,
        "log_interval": 1,
        "device": "cpu",
        "output": str(output),
        "experiment": "run",
    }
    return Recipe(**given | changes)


def folder_of_pictures(root: Path, per_class: int = 12, classes: int = 3, side: int = 40) -> Path:
    """An ImageFolder whose classes differ in colour: train and validation."""
    draw = np.random.default_rng(0)
    for split, count in (("train", per_class), ("validation", max(per_class // 3, 2))):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 90, (side, side + 6, 3))
                pixels[..., label % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of a run of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def trace(folder: Path) -> list[tuple[str, int, float, float]]:
    """What a run computed, step by step, to the last bit."""
    return [(r["phase"], r["step"], r["loss"], r["gradient_norm"]) for r in records(folder)]


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `spot` with such words in a process of its own, from the checkout."""
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "spot_vit.cli.main", *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
