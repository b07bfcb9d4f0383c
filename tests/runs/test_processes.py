"""Two processes are one process: the same losses, every image counted once, one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.runs.train import train
from support.ranks import together
from support.runs import records, small_recipe, trace

ALIKE: dict[str, Any] = {
    "train_num_samples": 400,
    "val_num_samples": 23,
    "epochs": 1,
    "steps": 50,
    "noise": 0.0,
    "train_decision": "topk",
    "model_ema": True,
    "model_ema_decay": 0.9,
    "dense_epochs": 1,
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "static graph": {"static_graph": True},
    "fsdp": {"parallel": "fsdp"},
    "accumulation": {"grad_accum_steps": 2, "batch_size": 2},
    "attention": {"attention_keep": 0.5, "connectivity_epochs": 1, "self_distillation": 0.01},
    "ddp compiled": {"compile": True},
    "fsdp compiled": {"parallel": "fsdp", "compile": True},
}


def worker(rank: int, output: str, ways: list[str], steps: int) -> dict[str, Any]:
    return {
        way: train(_recipe(Path(output), way, steps).replace(experiment=way))["results"]
        for way in ways
    }


def _recipe(output: Path, way: str, steps: int, **changes: Any) -> Any:
    given = {**ALIKE, "batch_size": 4, **WAYS[way], "steps": steps, **changes}
    if not given.get("compile"):
        return small_recipe(output, **given)
    return small_recipe(output, **{**given, "dense_epochs": 0, "model_ema": False})


@pytest.mark.parametrize(
    ("ways", "steps"),
    [(["ddp", "fsdp"], 50), (["static graph", "accumulation", "attention"], 8)],
    ids=["fifty steps", "other ways"],
)
def test_two_processes_equal_one(ways: list[str], steps: int, tmp_path: Path) -> None:
    found = together(worker, str(tmp_path), ways, steps)
    for way in ways:
        accumulated = WAYS[way].get("grad_accum_steps", 1)
        alone = train(
            _recipe(tmp_path, way, steps, experiment=f"{way} alone", parallel="ddp",
                    batch_size=8 // accumulated)
        )["results"]  # fmt: skip
        losses = {phase: [] for phase in alone}
        for two, one in zip(trace(tmp_path / way), trace(tmp_path / f"{way} alone"), strict=True):
            assert two[:2] == one[:2]
            losses[two[0]].append(abs(two[2] - one[2]))
        assert set(losses) == set(found[way])
        assert all(len(some) == steps and max(some) < 1e-5 for some in losses.values()), losses
        for phase, figures in alone.items():
            for name, value in figures.items():
                assert found[way][phase][name] == pytest.approx(value, abs=1e-4), (way, name)
        states = [
            spot_vit.load(tmp_path / name / "last.safetensors").state_dict()
            for name in (way, f"{way} alone")
        ]
        assert all(torch.allclose(states[0][key], states[1][key], atol=1e-4) for key in states[0])
        assert len(records(tmp_path / way, "epoch")) == len(
            records(tmp_path / f"{way} alone", "epoch")
        )


def test_two_processes_compiled_equal_one(tmp_path: Path) -> None:
    ways = ["ddp compiled", "fsdp compiled"]
    together(worker, str(tmp_path), ways, 3)
    train(_recipe(tmp_path, "ddp compiled", 3, experiment="alone", batch_size=8, compile=False))
    one = trace(tmp_path / "alone")
    for way in ways:
        two = trace(tmp_path / way)
        assert len(two) == 3
        assert all(abs(a[2] - b[2]) < 1e-4 for a, b in zip(one, two, strict=True)), way
