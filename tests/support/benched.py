"""Small benchmarks."""

from __future__ import annotations

from typing import Any

from spot_vit.config.bench import BenchSettings

NAME = "deit_tiny_patch16_224"
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
MODEL = [NAME, "--model-kwargs", *(f"{name}={value}" for name, value in SMALL.items())]
"""Words of a command line."""


def settings(**given: Any) -> BenchSettings:
    """Of a tiny model, timed as briefly as can be."""
    usual = {"model": NAME, "model_kwargs": SMALL, "seconds": 0, "patience": 0, "batch_size": (2,)}
    return BenchSettings(**{**usual, **given})
