"""Tables and pictures of a benchmark, of figures that are made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from spot_vit.bench.picture import save_picture
from spot_vit.bench.report import describe


def row(name: str, ms: float, tokens: float | None, **other: Any) -> dict[str, Any]:
    return {
        "name": name, "runtime": name.partition(",")[0], "peer": None, "keep": None,
        "attention_keep": None, "gmacs": 4.6, "tokens": tokens, "median_ms": ms,
        "p10_ms": ms * 0.9, "p90_ms": ms * 1.2, "rounds": 20, "images_per_s": 1e3 / ms,
        "speedup": 100 / ms, "gmacs_per_s": 46.0, "share_of_peak": 0.46,
        "memory_bytes": 52_000_000, "graphs": None, "recompilations": None, **other,
    }  # fmt: skip


RESULT: dict[str, Any] = {
    "settings": {"dtype": "float32"},
    "machine": {"processor": "A processor", "threads": 2, "torch": "2.14"},
    "model": {"name": "deit_small_patch16_224", "image": [3, 224, 224], "parameters": 22_000_000},
    "peak": {"gmacs_per_s": 100.0, "by": "torch", "size": 2048},
    "absent": {"openvino": "not installed"},
    "batches": [
        {
            "batch": 8,
            "contended": None,
            "attempts": 1,
            "rows": [
                row("eager, dense", 100.0, 197.0),
                row("compiled, keep 0.7", 40.0, 130.0, graphs=2, recompilations=1),
                row("ToMe r=13", 80.0, 120.0, runtime="eager", peer="ToMe r=13"),
            ],
        }
    ],
    "layers": [
        {
            "batch": 8,
            "contended": None,
            "attempts": 1,
            "model": "keep 0.7",
            "runtimes": {
                name: [
                    {"layer": layer, "part": part, "ms": ms, "share": ms / 20, "gmacs": 0.1,
                     "gmacs_per_s": 0.8e3 / ms}
                    for layer, part, ms in (
                        ("stem", "", 2.0), ("blocks.0", "attention", 8.0), ("blocks.0", "mlp", 9.0),
                        ("head", "", 1.0),
                    )
                ]
                for name in ("eager", "fast")
            },
        }
    ],
}  # fmt: skip


def test_the_tables_say_everything() -> None:
    lines = describe(RESULT).splitlines()
    assert lines[0] == "deit_small_patch16_224, 3x224x224, 22.0 M parameters, float32"
    assert "peak 100 GMAC/s (product of 2048 x 2048 matrices, torch)" in lines[1]
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["eager, dense"][2:] == [
        "4.6", "197", "100", "90", "120", "10.0", "1.00", "46.0", "46%", "52",
    ]  # fmt: skip
    assert cells["compiled, keep 0.7"][-4:] == ["46.0", "46%", "52", "2+1"]
    assert cells["blocks.0 attention"][2:] == [
        "0.100", "8.00", "40.0%", "100.0", "8.00", "40.0%", "100.0",
    ]  # fmt: skip
    assert cells["all MLP"][2:5] == ["0.100", "9.00", "45.0%"] and "all decisions" not in cells
    assert cells["whole model"][2:5] == ["0.400", "20.00", "100.0%"]
    assert "  openvino: not installed" in lines


def test_a_busy_machine_leaves_ratios_out() -> None:
    busy = copy.deepcopy(RESULT)
    batch = busy["batches"][0]
    batch["contended"] = "other processes used 1.50 CPUs (0.10 allowed)"
    for one in batch["rows"]:
        one["speedup"] = one["share_of_peak"] = one["memory_bytes"] = one["tokens"] = None
        one["graphs"] = one["recompilations"] = None
    layers = busy["layers"][0]
    layers["contended"] = "busy there too"
    for part in layers["runtimes"]["fast"]:
        part["share"] = None
    text = describe(busy)
    assert "no ratios: the machine was busy: busy there too" in text
    (whole,) = (line.split() for line in text.splitlines() if line.startswith("whole model"))
    assert whole[2:] == ["0.400", "20.00", "100.0%", "160.0", "20.00", "160.0"]
    assert "no ratios: the machine was busy: other processes used 1.50 CPUs" in text
    (line,) = (line for line in text.splitlines() if line.startswith("eager, dense"))
    assert line.split()[2:] == ["4.6", "100", "90", "120", "10.0", "46.0"]
    assert "  graphs\n" not in text  # a column with nothing in it


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.png"
    assert save_picture(RESULT, path) == path
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300 and picture.std() > 0.05
    none = copy.deepcopy(RESULT)
    for one in none["batches"][0]["rows"]:
        one["tokens"] = None
    assert save_picture(none, tmp_path / "none.png") is None
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert save_picture(RESULT, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
