"""Carries out a recipe: `train(recipe)` is `spot train`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from spot_vit.config.recipe import Recipe
from spot_vit.runs.folder import RunFolder
from spot_vit.runs.logs import Log
from spot_vit.runs.phase_run import PhaseRun
from spot_vit.runs.phases import DENSE
from spot_vit.runs.processes import started
from spot_vit.runs.resume import folder_of, resumed
from spot_vit.runs.run import Run
from spot_vit.runs.stopping import Stop


def train(recipe: Recipe, **given: Any) -> dict[str, Any]:
    """Trains as a recipe says, evaluates, and writes everything into the run's folder.

    Under torchrun or `accelerate launch` every process calls it.

    Args:
        recipe: what to do; with `resume`, the run of that folder goes on.
        **given: what a recipe cannot name: `train_data` and `val_data`, data sets (a `Dataset` or
            an `IterableDataset`) of (image, label), in place of those of `recipe.data`; `classes`,
            their names; `criterion`, a loss in place of the recipe's.

    Returns:
        What summary.json holds: figures of each phase's model on the validation data.

    Raises:
        UserError: the recipe cannot be carried out here; nothing was trained.
        Stopped: SIGINT or SIGTERM came; what was trained is saved. It comes at once while data and
            model are made ready and, of one process, during an evaluation; else behind a step.
        NonFiniteStep: loss or gradient stopped being finite; the batch is saved for replay.
    """
    recipe = resumed(recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with Stop() as stop, started(recipe.device) as processes:
        folder = RunFolder(processes.from_first(folder_of(recipe)))
        with stop.at_once(_unchanged(folder)):
            run = Run(recipe, folder, processes, stop, **given)
        return _carry_out(run)


def _unchanged(folder: RunFolder) -> str:
    """What to say of a signal before a step."""
    go_on = f"go on with: spot train --resume {folder.path}"
    return f"stopped before a step was made; {go_on if folder.begun else 'nothing had begun'}"


def _carry_out(run: Run) -> dict[str, Any]:
    """The phases that are left, one after the other."""
    log: Log | None = None
    begun = False
    try:
        while run.at.phase < len(run.phases):
            with ExitStack() as stack:
                with run.stop.at_once(_unchanged(run.folder)):
                    phase = PhaseRun(run, run.phases[run.at.phase], stack)
                    # Whatever may be wrong was, by now: only then is anything written.
                    if not begun:
                        log, begun = run.begin(phase.model), True
                phase.go(log)
            run.at = run.at.next_phase()
            run.best, run.state = [], None
        if not begun:
            log = run.begin(None)
        summary = run.summary()
        if log is not None:
            log.say(conclusion(run.results, run.folder))
            log.say(f"{summary['seconds'] / 60:.1f} minutes")
    finally:
        if log is not None:
            log.close()
    return summary


def conclusion(results: dict[str, dict[str, Any]], folder: RunFolder) -> str:
    """What a run came to, in a few lines."""
    dense = results.get(DENSE)
    lines = []
    shown = {n: f for n, f in results.items() if len(f) > 2} or results  # what was evaluated
    for name, found in shown.items():
        words = [f"{name}: {found['gmacs']:.3f} GMACs"]
        if dense is not None and found is not dense:
            words[0] += f" ({found['gmacs'] / dense['gmacs']:.0%} of dense)"
        for key, label in (("top1", "top-1"), ("map", "mAP")):
            if key in found:
                words.append(f"{label} {found[key]:.2%}")
                if dense is not None and found is not dense:
                    words[-1] += f" ({100 * (found[key] - dense[key]):+.2f} points)"
        lines.append(", ".join(words))
    lines.append(f"weights: {folder.best} (best), {folder.last} (last)")
    lines.append(f"evaluate: spot eval {folder.best} DATA; in Python: spot_vit.load(...)")
    return "\n".join(lines)
