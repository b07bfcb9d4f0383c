"""`spot demo budgets`: one checkpoint for every budget, against one trained for each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spot_vit.demos.setup import Recipe, trained_dense, trained_sparse
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.evaluation.statistics import difference, over_seeds, signed, spread
from spot_vit.models.convert import set_keep
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import facts
from spot_vit.utils.tables import format_table

KEEPS = (0.3, 0.5, 0.7, 0.9)
RANGE = (0.3, 1.0)


def run(
    output: Path, *, quick: bool = False, seed: int = 0, seeds: int = 3, threads: int = 2
) -> dict[str, Any]:
    """Trains and measures, prints the table, and writes budgets.json.

    All models of a seed start from the same dense one and see the same images for the same number
    of steps: one checkpoint with ρ drawn from 0.3 to 1 at every step, and one for each of four ρ.
    Trained models are kept in `output`: an interrupted run goes on where it stopped.

    Args:
        output: folder for the files, made when it is not there.
        quick: a run of seconds that only shows that everything works.
        seed: the first one.
        seeds: how many.
        threads: CPU threads that torch may use.

    Returns:
        The content of budgets.json.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    recipe = Recipe()
    if quick:
        recipe = dataclasses.replace(recipe, steps=4, extra_steps=2, batch_size=8, test_images=60)
    test = recipe.digits("test", recipe.test_images)
    loader = DataLoader(test, batch_size=120)
    dense_correct: list[Tensor] = []
    correct: dict[tuple[str, float], list[Tensor]] = {}
    for current in range(seed, seed + seeds):
        dense = trained_dense(output, recipe, current)
        dense_correct.append(evaluate(dense, loader, f"test dense, seed {current}").correct)
        one = trained_sparse(
            output / f"any-keep-seed{current}.safetensors",
            dense,
            recipe,
            current,
            RANGE,
            train_decision="topk",
        )
        for keep in KEEPS:
            name = f"keep{keep}-seed{current}"
            own = trained_sparse(
                output / f"{name}.safetensors",
                dense,
                recipe,
                current,
                keep=keep,
                train_decision="topk",
            )
            set_keep(one, keep)
            for kind, model in (("one", one), ("own", own)):
                found = evaluate(model, loader, f"test {kind} {name}").correct
                correct.setdefault((kind, keep), []).append(found)
    sources = test.sources(range(len(test)))
    summary: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "seeds": [*range(seed, seed + seeds)],
        "quick": quick,
        "threads": threads,
        "machine": facts(),
        "range": RANGE,
        "dense": [one.double().mean().item() for one in dense_correct],
        "rows": [
            {
                "keep": keep,
                **{
                    kind: [one.double().mean().item() for one in correct[kind, keep]]
                    for kind in ("one", "own")
                },
                "difference": difference(
                    torch.stack(correct["one", keep]), torch.stack(correct["own", keep]), sources
                ),
            }
            for keep in KEEPS
        ],
        "seconds": time.perf_counter() - started,
    }
    save_json(output / "budgets.json", summary)
    minutes = summary["seconds"] / 60
    print(f"\n{describe(summary)}\n\n{minutes:.1f} minutes; written: {output / 'budgets.json'}")
    return summary


def describe(summary: Mapping[str, Any]) -> str:
    """The table, from the content of budgets.json alone."""
    low, high = summary["range"]
    table = [["ρ", "one checkpoint", "one for each ρ", "difference"]]
    for row in summary["rows"]:
        cells = [spread(row["one"]), spread(row["own"]), signed(row["difference"])]
        table.append([f"{row['keep']:.1f}", *cells])
    note = ""
    if summary["quick"]:
        note = "\n\nA quick run: nothing is trained enough for the figures to mean anything."
    return f"""{format_table(table)}

one checkpoint  trained with ρ drawn from {low} to {high} at every step, run at the ρ of the row
one for each ρ  as many steps on the same images, at that ρ alone
                both: accuracy on {summary["recipe"]["test_images"]} images, \
{over_seeds(len(summary["seeds"]))}
difference      paired, in points, and its standard error, over images and seeds
dense           {spread(summary["dense"])}{note}"""
