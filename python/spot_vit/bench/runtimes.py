"""What runs a model in a benchmark: one row of `RUNTIMES` each, and why some are not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spot_vit.bench.variants import Variant
from spot_vit.config.bench import FILES, RUNTIMES, BenchSettings
from spot_vit.export import available, export_model, open_exported
from spot_vit.export.formats import ENDINGS
from spot_vit.models.fast import fast

Open = Callable[[], Any]
"""Gives what maps images [B, 3, H, W] to logits; called anew for each batch size."""


@dataclass(frozen=True)
class Runtime:
    """What runs a model.

    Attributes:
        make: prepares a variant, in a folder of its own, and gives what opens it.
        keeps_memory: whether it holds on to memory between calls, so that only a first call shows
            how much it takes.
        compiles: kinds of devices on which torch compiles graphs in its calls.
    """

    make: Callable[[Variant, BenchSettings, Path], Open]
    keeps_memory: bool = False
    compiles: tuple[str, ...] = ()


def _eager(variant: Variant, settings: BenchSettings, folder: Path) -> Open:
    return lambda: variant.model


def _compiled(variant: Variant, settings: BenchSettings, folder: Path) -> Open:
    model = variant.copied()
    model.compile()
    return lambda: model


def _fast(variant: Variant, settings: BenchSettings, folder: Path) -> Open:
    model = fast(variant.copied(), getattr(torch, settings.dtype))
    return lambda: model


def _file(format: str) -> Callable[[Variant, BenchSettings, Path], Open]:
    def make(variant: Variant, settings: BenchSettings, folder: Path) -> Open:
        path = export_model(
            variant.model,
            folder / f"model{ENDINGS[format]}",
            format,
            image_size=settings.img_size,
            batch_size=max(settings.batch_size),
            verify=False,
        )
        return lambda: open_exported(path)

    return make


TABLE: dict[str, Runtime] = {
    "eager": Runtime(_eager),
    "compiled": Runtime(_compiled, compiles=("cpu", "cuda")),
    "fast": Runtime(_fast, compiles=("cuda",)),
    "aoti": Runtime(_file("aoti")),
    "onnx": Runtime(_file("onnx"), keeps_memory=True),
    "openvino": Runtime(_file("openvino"), keeps_memory=True),
}
assert tuple(TABLE) == RUNTIMES


def absent(settings: BenchSettings) -> dict[str, str]:
    """The runtimes that cannot be used here, and why, in words."""
    formats = available()
    reasons = {}
    for name in FILES:
        if settings.device != "cpu":
            reasons[name] = "files are run on the CPU"
        elif settings.dtype != "float32":
            reasons[name] = f"files compute in float32, not in {settings.dtype}"
        elif (reason := formats[name]) is not None:
            reasons[name] = reason
    if (reason := formats["aoti"]) is not None:
        reasons["compiled"] = reason
    return reasons


def forward(model: Any, images: Tensor, _: int = 0) -> Any:
    """Logits of images, without gradients."""
    with torch.inference_mode():
        return model(images)
