"""`spot demo`: a dense ViT, the SPOT ViT made from it, and one table that compares them."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from spot_vit.data.digits import ClutteredDigits
from spot_vit.demos.setup import Recipe, build_dense, train_once, train_phase
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.evaluation.foreground import foreground_kept
from spot_vit.evaluation.pictures import save_kept
from spot_vit.evaluation.statistics import paired_difference
from spot_vit.measure.flops import count_flops
from spot_vit.measure.latency import compare_latency, compare_training
from spot_vit.models.convert import sparsify
from spot_vit.training.objectives import SpotObjective, dense_objective
from spot_vit.training.param_groups import param_groups
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import facts
from spot_vit.utils.tables import format_table

_BATCH_SIZES = (1, 32)  # at which latency is measured


QUICK = Recipe(steps=40, extra_steps=10, test_images=360, latency_rounds=5)


def run(output: Path, *, quick: bool = False, seed: int = 0, threads: int = 2) -> dict[str, Any]:
    """Trains, compares, prints the table, and writes spot.safetensors, summary.json and kept.png.

    Trained models are kept in `output`: an interrupted run goes on behind its last phase.

    Args:
        output: folder for the files, made when it is not there.
        quick: a run of seconds that only shows that everything works.
        seed: of initialisation, training images and decisions; the test images stay the same.
        threads: CPU threads that torch may use.

    Returns:
        The content of summary.json.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    recipe = QUICK if quick else Recipe()
    test = recipe.digits("test", recipe.test_images)

    torch.manual_seed(seed)
    dense = build_dense(recipe)
    about = {"recipe": dataclasses.asdict(recipe), "seed": seed, "threads": threads}

    def phase(name: str, model: Any, parameters: Any, words: str, **more: Any) -> Path:
        path = output / f"{name}.safetensors"
        train_once(
            path,
            model,
            {**about, "phase": name},
            lambda: train_phase(model, parameters, recipe, seed, words, **more),
        )
        return path

    phase("dense", dense, dense.parameters(), "dense ViT", first=True)
    longer = copy.deepcopy(dense)
    phase("dense-longer", longer, longer.parameters(), "dense, longer")
    spot: Any = sparsify(copy.deepcopy(dense), keep=recipe.keep, at=list(recipe.at))
    groups = param_groups(
        spot,
        lr=recipe.predictor_lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.extra_lr / recipe.predictor_lr,
        freeze_epochs=0,
        head="pretrained",
    )
    objective = SpotObjective(teacher=copy.deepcopy(dense))
    weights = phase("spot", spot, groups, "SPOT ViT", objective=objective)

    models = {"dense": dense, "dense, longer": longer, "SPOT": spot}
    summary = {
        **about,
        "quick": quick,
        "machine": facts(),
        "rows": _compare(models, recipe, test),
    }
    files = [weights, output / "summary.json", output / "kept.png"]
    save_kept(files[2], spot, test.batch(range(12)))
    summary["seconds"] = time.perf_counter() - started
    save_json(files[1], summary)
    print(_describe(summary, files))
    return summary


def _compare(models: dict[str, Any], recipe: Recipe, test: ClutteredDigits) -> list[dict[str, Any]]:
    """Measures every model: one row each, the first is the baseline."""
    loader = DataLoader(test, batch_size=120)
    sources = test.sources(range(len(test)))
    results = {name: evaluate(model, loader, f"test {name}") for name, model in models.items()}
    baseline = next(iter(results.values())).correct
    latency = {
        size: compare_latency(
            models,
            test.batch(range(size)).image,
            rounds=recipe.latency_rounds,
            name=f"latency at batch {size}",
        )
        for size in _BATCH_SIZES
    }
    batch = test.batch(range(recipe.batch_size))
    training = compare_training(
        models,
        {name: SpotObjective() if name == "SPOT" else dense_objective for name in models},
        batch.image,
        batch.label,
        rounds=max(recipe.latency_rounds // 4, 2),
        name="training step",
    )
    rows = []
    for name, model in models.items():
        difference, error = paired_difference(results[name].correct, baseline, sources)
        row = {
            "model": name,
            "top1": results[name].top1,
            "difference": difference,
            "difference_standard_error": error,
            "gmacs": count_flops(model, input_size=(1, 64, 64)).total / 1e9,
        }
        for size, measured in latency.items():
            row[f"latency_batch{size}"] = dataclasses.asdict(measured[name])
        row["training_step"] = dataclasses.asdict(training[name])
        sparse = hasattr(model, "spot_config")
        row["foreground_kept"] = (
            dataclasses.asdict(foreground_kept(model, loader)) if sparse else None
        )
        rows.append(row)
    return rows


def _describe(summary: dict[str, Any], files: list[Path]) -> str:
    """The table, how to read it, and where the files are."""
    rows = summary["rows"]
    table = [
        [
            "",
            "top-1",
            "against dense",
            "GMACs/image",
            "ms, batch 1",
            "ms, batch 32",
            "training step",
            "foreground kept",
            "at random",
        ]
    ]
    for row in rows:
        cells = [row["model"], f"{row['top1']:.2%}"]
        difference, error = 100 * row["difference"], 100 * row["difference_standard_error"]
        cells.append("" if row is rows[0] else f"{difference:+.2f} ± {error:.2f}")
        cells.append(f"{row['gmacs']:.4f} {row['gmacs'] / rows[0]['gmacs']:5.0%}")
        for size in _BATCH_SIZES:
            cells.append(_time(row[f"latency_batch{size}"]))
        cells.append(_time(row["training_step"]))
        kept = row["foreground_kept"] or {"foreground": [1.0], "random": [1.0]}
        for shares in (kept["foreground"], kept["random"]):
            cells.append(" ".join(f"{share:.0%}" for share in shares))
        table.append(cells)
    minutes, written = summary["seconds"] / 60, ", ".join(map(str, files))
    note = ""
    if summary["quick"]:
        note = "\nA quick run: nothing is trained enough for the figures to mean anything."
    return f"""
{format_table(table)}

top-1            accuracy on {summary["recipe"]["test_images"]} images of digits never trained on
against dense    paired difference on the same images and its standard error, points
GMACs/image      multiply-accumulates of everything, stem, predictors and statistics included
ms               median time of a batch (CPU threads: {summary["threads"]}), ratio to dense
training step    the same for forward, loss and backward of a training batch, without a teacher
foreground kept  patches of the digit that survive each stage of SPOT, and what chance would keep

{minutes:.1f} minutes; written: {written}{note}"""


def _time(latency: dict[str, float]) -> str:
    return f"{latency['median']:.2f} x{latency['ratio']:.2f}"
