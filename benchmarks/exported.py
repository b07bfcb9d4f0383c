"""Exported files in their runtimes: the dense model beside SPOT, in turns.

    python benchmarks/exported.py [--model NAME] [--format onnx] [--batch 8 1] [--threads 2]

Weights are random: they do not change what is computed. On a busy machine no ratio is stated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spot_vit
import timm
import torch
from spot_vit.export import Exported, export_model, open_exported
from spot_vit.export.formats import ENDINGS, FORMATS
from spot_vit.utils.machine import Clock, contention, wait_for_quiet
from spot_vit.utils.timing import summary, take_turns


def files(model: str, format: str, keep: float, folder: str) -> dict[str, Path]:
    """The dense file and the sparse one."""
    made = {}
    for name in ("dense", "sparse"):
        torch.manual_seed(0)
        one: Any = timm.create_model(model)
        if name == "sparse":
            spot_vit.sparsify(one, keep=keep)
        path = Path(folder) / f"{name}{ENDINGS[format]}"
        made[name] = export_model(one.eval(), path, format, say=print)
    return made


def side(file: Exported, images: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """What is timed of a file."""
    return lambda _: file(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = files(arguments.model, arguments.format, arguments.keep, folder)
        opened = {name: open_exported(path, arguments.threads) for name, path in made.items()}
    size = opened["dense"].metadata["inputs"]["images"][1:]
    for batch in arguments.batch:
        images = torch.randn(batch, *size)
        sides = {name: side(file, images) for name, file in opened.items()}
        wait_for_quiet(10.0)
        start = Clock.now()
        times = take_turns(sides, "cpu", rounds=10, seconds=arguments.seconds, warmup=3)
        busy = contention(Clock.now().since(start), arguments.threads, os.cpu_count() or 1)
        dense, sparse = (summary(times[name].wall)["median_ms"] for name in ("dense", "sparse"))
        ratio = f"{dense / sparse:.2f} times as fast" if busy is None else f"no ratio: {busy}"
        print(f"batch {batch}: dense {dense:.1f} ms, sparse {sparse:.1f} ms, {ratio}")


if __name__ == "__main__":
    main()
