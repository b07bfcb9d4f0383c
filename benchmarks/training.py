"""What a training step costs: timm's train.py, `spot train` dense, SPOT, SPOT with a teacher.

    python benchmarks/training.py --timm-train train.py [--model NAME] [--batch-size N]
                                  [--steps N] [--rounds N] [--threads N] [--workers N]
                                  [--output FILE]

timm does not ship its training script: name a copy of that of the timm that is installed. All sides
read the same folder of random pictures with the same augmentation, optimiser and batch, each in a
process of its own, in turns; the first steps of a process do not count. Without --timm-train its
side is left out. Prints the table, and writes it as JSON with `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

SKIPPED = 5  # steps, in which a process warms up
SIDES: dict[str, list[str]] = {
    "dense": ["--method", "dense"],
    "dense, compiled": ["--method", "dense", "--compile"],
    "SPOT": ["--method", "spot", "--keep", "0.7"],
    "SPOT, compiled": ["--method", "spot", "--keep", "0.7", "--compile"],
    "SPOT, teacher": ["--method", "spot", "--keep", "0.7", "--teacher", "TEACHER"],
}
TIMM = "timm's train.py"


def pictures(folder: Path, count: int, size: int = 256) -> None:
    """Writes JPEGs of noise in two classes."""
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(count if split == "train" else 4):
            path = folder / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def common(options: argparse.Namespace) -> list[str]:
    """Flags that both scripts have."""
    return [
        *("--model", options.model, "--num-classes", "2", "-b", str(options.batch_size)),
        *("-j", str(options.workers), "--opt", "adamw", "--lr", "1e-4", "--weight-decay", "0.05"),
        *(
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--aa",
            "rand-m6-inc1",
        ),  # stronger ones stop timm under Pillow 13
        *("--reprob", "0.25", "--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.1"),
        *("--clip-grad", "1.0", "--device", "cpu", "--log-interval", "1", "--seed", "0"),
    ]


def environment(threads: int) -> dict[str, str]:
    """As commands start, for all sides."""
    from spot_vit.utils.threads import WAIT_POLICY

    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": path}
    return {**os.environ, **WAIT_POLICY, **own}


def ours(name: str, data: Path, options: argparse.Namespace) -> list[float]:
    """Seconds of each step of `spot train`."""
    with tempfile.TemporaryDirectory() as output:
        words = [w if w != "TEACHER" else options.model for w in SIDES[name]]
        if "TEACHER" in SIDES[name]:
            words[words.index("--teacher") + 1] = str(teacher(Path(output), options))
        command = [
            *(sys.executable, "-m", "spot_vit.cli.main", "train", str(data), *common(options)),
            *words,
            *("--output", output, "--experiment", "run"),
        ]
        _run(command, options.threads)
        lines = (Path(output) / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["seconds"] for record in records if record["kind"] == "step"][SKIPPED:]


def teacher(folder: Path, options: argparse.Namespace) -> Path:
    """A file with an untrained dense model."""
    import spot_vit
    import timm

    path = folder / "teacher.safetensors"
    spot_vit.save(path, timm.create_model(options.model, num_classes=2))
    return path


def timms(data: Path, options: argparse.Namespace) -> list[float]:
    """Seconds of each step of timm's script, from the lines that it prints."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *(sys.executable, str(options.timm_train), "--data-dir", str(data), *common(options)),
            *("--val-split", "", "--output", output),
        ]
        text = _run(command, options.threads)
    found = re.findall(r"Time: ([\d.]+)s", text)
    return [float(seconds) for seconds in found][SKIPPED:]


def _run(command: list[str], threads: int) -> str:
    run = subprocess.run(command, env=environment(threads), capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stdout}\n{run.stderr}")
    return run.stdout + run.stderr


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of each side and round, and the ratios to the dense side of the same round."""
    from spot_vit.utils.machine import facts

    names = [*([TIMM] if options.timm_train else []), *options.side]
    medians: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        pictures(data, (options.steps + SKIPPED) * options.batch_size)
        for _ in range(options.rounds):
            for name in names:
                steps = timms(data, options) if name == TIMM else ours(name, data, options)
                medians[name].append(statistics.median(steps))
    ratios = {
        name: [one / other for one, other in zip(medians[name], medians["dense"], strict=True)]
        for name in names
    }
    return {
        "machine": facts(),
        "settings": {n: getattr(options, n) for n in ("model", "batch_size", "threads", "workers")},
        "seconds": medians,
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timm-train", type=Path)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--side", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "dense" not in options.side:
        options.side.insert(0, "dense")
    found = measure(options)
    for name, ratio in found["ratio"].items():
        seconds = statistics.median(found["seconds"][name])
        spread = ", ".join(f"{one:.3f}" for one in found["ratios"][name])
        print(f"{name:<18}{seconds:8.3f} s  x{ratio:.3f}  ({spread})")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
