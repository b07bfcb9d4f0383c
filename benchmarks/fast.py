"""Cases of whole models after `spot_vit.fast`, against dense models in every runtime that is there.

Random weights. "timm, eager" is the model as timm gives it; other dense sides are what a user could
run in its place: `fast` too, torch.compile, ONNX Runtime and OpenVINO where they are installed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import spot_vit
from spot_vit.export import available, export, open_exported
from spot_vit.utils.timing import Case

EAGER = "timm, eager"
SMALL = "deit_small_patch16_224"
# Architecture, pixels, batch, ρ: the bar against timm's dense model.
FLOAT32 = {
    (SMALL, 224, 8, 0.7): 2.05,
    (SMALL, 224, 1, 0.7): 1.85,
    (SMALL, 224, 8, 0.5): 2.75,
    (SMALL, 224, 1, 0.5): 2.3,
    (SMALL, 384, 4, 0.7): 2.0,
    ("deit_tiny_patch16_224", 224, 1, 0.7): 1.5,
    ("deit_base_patch16_224", 224, 8, 0.7): 1.8,
}
DENSE_RUNTIMES = {8: 1.5, 1: 1.32}  # bars against the best of them, DeiT-S at ρ = 0.7, by batch
BFLOAT16 = 1.85  # against timm's in bfloat16, batch 8
BOTH = 1.85  # with sparse attention at 512 pixels, batch 2
ONNX = {8: 1.3, 1: 1.15}  # ONNX file against the dense one, by batch

Side = Callable[[int], Any]


def cases(device: str) -> Iterator[Case]:
    """Forward passes against those of dense models."""
    for (name, size, batch, keep), bar in FLOAT32.items():
        dense = _dense(name, size, device)
        sparse = spot_vit.sparsify(copy.deepcopy(dense), keep=keep).eval()
        x = torch.randn(batch, 3, size, size, device=device)
        others, bars = {EAGER: _side(dense, x)}, {EAGER: bar}
        others["the same without fast"] = _side(copy.deepcopy(sparse), x)
        others["dense, fast"] = _side(spot_vit.fast(copy.deepcopy(dense)), x)
        if (name, size, keep) == (SMALL, 224, 0.7):
            others |= _dense_runtimes(dense, x)
            runtimes = [other for other in others if other.startswith("dense, ")]
            bars |= dict.fromkeys(runtimes, DENSE_RUNTIMES[batch])
        ours = _side(spot_vit.fast(sparse), x)
        label = f"{name.split('_patch')[0]} at {size} px, ρ = {keep}, batch {batch}"
        yield Case(label, ours, others, bars if device == "cpu" else {})
    yield from _other_dtypes(device)
    yield _with_sparse_attention(device)
    if device == "cpu" and available()["onnx"] is None:
        yield from _in_onnx_runtime()


def _other_dtypes(device: str) -> Iterator[Case]:
    dense = _dense(SMALL, 224, device)
    sparse = spot_vit.sparsify(copy.deepcopy(dense), keep=0.7).eval()
    for batch in (8, 1):
        x = torch.randn(batch, 3, 224, 224, device=device)
        half = torch.bfloat16
        others = {
            "timm, eager, bfloat16": _side(copy.deepcopy(dense).to(half), x.to(half)),
            EAGER: _side(dense, x),
        }
        bars = {"timm, eager, bfloat16": BFLOAT16} if (batch, device) == (8, "cpu") else {}
        ours = _side(spot_vit.fast(copy.deepcopy(sparse), half), x)
        yield Case(f"deit_small in bfloat16, ρ = 0.7, batch {batch}", ours, others, bars)
        if device == "cpu":
            int8 = torch.int8
            others = {
                EAGER: _side(dense, x),
                "dense, fast, int8": _side(spot_vit.fast(copy.deepcopy(dense), int8), x),
            }
            ours = _side(spot_vit.fast(copy.deepcopy(sparse), int8), x)
            yield Case(f"deit_small in int8, ρ = 0.7, batch {batch}", ours, others)


def _with_sparse_attention(device: str) -> Case:
    dense = _dense(SMALL, 512, device)
    model = spot_vit.sparsify_attention(copy.deepcopy(dense), 0.25)
    spot_vit.sparsify(model, keep=0.7).eval()
    x = torch.randn(2, 3, 512, 512, device=device)
    others = {EAGER: _side(dense, x), "the same without fast": _side(copy.deepcopy(model), x)}
    bars = {EAGER: BOTH} if device == "cpu" else {}
    label = "deit_small at 512 px, a quarter of the keys, ρ = 0.7, batch 2"
    return Case(label, _side(spot_vit.fast(model), x), others, bars)


def _dense_runtimes(dense: Any, x: torch.Tensor) -> dict[str, Side]:
    """The dense model in every other runtime that is there."""
    found = {"dense, torch.compile": _side(torch.compile(copy.deepcopy(dense)), x)}
    if x.device.type == "cpu":
        for kind, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            if available()[kind] is None:
                found[f"dense, {name}"] = _side(_exported(dense, kind), x)
    return found


def _in_onnx_runtime() -> Iterator[Case]:
    dense = _dense(SMALL, 224, "cpu")
    sparse = spot_vit.sparsify(copy.deepcopy(dense), keep=0.7).eval()
    ours, other = _exported(sparse, "onnx"), _exported(dense, "onnx")
    for batch, bar in ONNX.items():
        x = torch.randn(batch, 3, 224, 224)
        name = "dense, ONNX Runtime"
        label = f"deit_small in ONNX Runtime, ρ = 0.7, batch {batch}"
        yield Case(label, _side(ours, x), {name: _side(other, x)}, {name: bar})


def _exported(model: Any, kind: str) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="spot-benchmark-"))
    suffix = {"onnx": "model.onnx", "openvino": "model.xml"}[kind]
    return open_exported(export(model, folder / suffix, kind, verify=False))


def _dense(name: str, size: int, device: str) -> Any:
    torch.manual_seed(0)
    given = {} if size == 224 else {"img_size": size}
    return timm.create_model(name, pretrained=False, **given).to(device).eval()


def _side(model: Any, x: torch.Tensor) -> Side:
    return partial(_forward, model, x)


@torch.inference_mode()
def _forward(model: Any, x: torch.Tensor, i: int) -> Any:
    return model(x)
