"""Whole runs, small ones: phases, files, what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
import yaml
from spot_vit.config.recipe import Recipe
from spot_vit.runs.train import train
from spot_vit.training.step import NonFiniteStep
from spot_vit.utils.errors import UserError
from support.runs import folder_of_pictures, records, small_recipe, trace

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "spot": {"method": "spot"},
    "dynamicvit": {"method": "dynamicvit"},
    "evit": {"method": "evit", "keep_epochs": (0, 1)},
    "random": {"method": "random"},
    "sparsifiner": {"method": "dense", "attention_keep": 0.5, "connectivity_epochs": 1},
    "both": {"method": "spot", "attention_keep": 0.5, "connectivity_epochs": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_and_is_written(kind: str, tmp_path: Path) -> None:
    dense_first = {} if kind == "dense" else {"dense_epochs": 1}
    summary = train(small_recipe(tmp_path, **KINDS[kind], **dense_first))
    folder = tmp_path / "run"
    names = ["connectivity"] if "attention_keep" in KINDS[kind] else []
    names = [*(["dense"] if dense_first else []), *names, "finetune"]
    assert list(summary["results"]) == names
    steps = records(folder)
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == 12 + 6 * (len(names) - 1)
    assert all(r["loss"] > 0 and r["gradient_norm"] > 0 for r in steps)
    model = spot_vit.load(folder / "last.safetensors")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert not model.training
    assert json.loads((folder / "summary.json").read_text())["results"] == summary["results"]
    assert summary["results"]["finetune"]["top1"] >= 0
    for name in ("metrics.csv", "best.safetensors", "resume.pt", "curve.png"):
        assert (folder / name).stat().st_size > 100, name


def test_the_saved_recipe_is_enough_to_run_again(tmp_path: Path) -> None:
    train(small_recipe(tmp_path, keep=(0.8, 0.6, 0.5)))
    saved = Recipe.from_dict(yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()))
    train(saved.replace(experiment="again"))
    assert trace(tmp_path / "run") == trace(tmp_path / "again")


def test_a_run_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=1)
    train(recipe)
    with pytest.raises(UserError, match=r"there is a run in .*run; go on with it by --resume"):
        train(recipe)


def test_pictures_of_a_folder_are_learned(tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "pictures")
    summary = train(
        small_recipe(
            tmp_path, synthetic=False, data=str(tmp_path / "pictures"), num_classes=None,
            train_num_samples=None, val_num_samples=None, method="dense", epochs=8, lr=3e-3,
            warmup_epochs=0, no_aug=True,
        )
    )  # fmt: skip
    assert summary["results"]["finetune"]["top1"] > 0.9
    model = spot_vit.load(tmp_path / "run/best.safetensors")
    assert model.num_classes == 3


def test_a_budget_that_leaves_nothing_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampled_keep: keep=0\.2 leaves none of 16 patch tokens"):
        train(small_recipe(tmp_path, sampled_keep=(0.2, 1.0)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dense", "spot"])
def test_weights_that_are_no_numbers_stop_the_run(method: str, tmp_path: Path) -> None:
    recipe = small_recipe(
        tmp_path, method=method, opt="sgd", lr=1e30, warmup_epochs=0, warmup_lr=1e30, epochs=3
    )
    with pytest.raises(NonFiniteStep, match=r"not finite at step \d+ of seed 42 .*--resume"):
        train(recipe)
    assert list((tmp_path / "run").glob("nonfinite-step*.pt"))
