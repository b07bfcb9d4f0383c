"""What the phases of a run share: its recipe, data and processes, and how far it has come."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import nn

from spot_vit.config.recipe import Recipe
from spot_vit.config.recipe_files import to_yaml
from spot_vit.runs import build
from spot_vit.runs.curve import save_curve
from spot_vit.runs.data import RunData
from spot_vit.runs.folder import RunFolder
from spot_vit.runs.logs import Log
from spot_vit.runs.phases import FINETUNE, phases_of
from spot_vit.runs.processes import Processes
from spot_vit.runs.randomness import seed_all
from spot_vit.runs.stopping import Stop
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write, save_json
from spot_vit.utils.folders import prepare
from spot_vit.utils.machine import facts


@dataclasses.dataclass
class Position:
    """How far a run has come.

    Attributes:
        phase: number of the phase.
        epoch: of the phase.
        batch: micro-batches of the epoch that were read.
        step: optimiser steps of the phase.
        total: optimiser steps of all phases.
        owed: whether the epoch's steps are made, and its evaluation is not.
    """

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int = 0
    owed: bool = False

    def next_phase(self) -> Position:
        """The beginning of the next phase."""
        return Position(phase=self.phase + 1, total=self.total)


class Run:
    """A run, new or read from its folder.

    Args:
        recipe: what to do.
        folder: of the run.
        processes: this one among all.
        stop: whether a signal came.
        given: see `train`.

    Attributes:
        at: how far it has come.
        data: what it reads.
        phases: all of them.
        teacher: that the recipe names, or None.
        criterion: in place of the recipe's, or None.
        best: files and values of this phase's best epochs, the best first.
        results: figures of the phases that are over, by name.
        state: what the folder holds of the phase that goes on, or None.

    Raises:
        UserError: the recipe cannot be carried out here, or the data are not those of the run.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, processes: Processes, stop: Stop, **given: Any
    ) -> None:
        self.recipe, self.folder, self.processes, self.stop = recipe, folder, processes, stop
        self.criterion = given.pop("criterion", None)
        self.at = Position()
        self.best: list[dict[str, Any]] = []  # of this phase: file, value, the best first
        self.results: dict[str, Any] = {}
        self._began = time.perf_counter()
        self.named = 0  # pictures that could not be read and were told of
        state = None
        if recipe.resume is not None:
            path = Path(recipe.resume)
            given_file = path if path.is_file() else None
            state = processes.by_first(lambda: folder.load_state(given_file))
        self.state = processes.from_first(state)
        seed_all(recipe.seed)
        self.data = RunData(recipe, processes, **given)
        self.phases = phases_of(recipe, self.data.batches)
        if self.state is not None:
            self._refuse_other_data()
            self.at = Position(**self.state["at"])
            self.results = self.state["results"]
            self.best = self.state["best"]
        build.check(recipe, self.data.model_arguments, self.data.input_size)
        self.teacher = None
        if recipe.teacher is not None and any(p.name == FINETUNE for p in self.phases):
            self.teacher = build.teacher_of(
                recipe, self.data.num_classes, self.data.model_arguments
            )

    def _refuse_other_data(self) -> None:
        was, now = self.state["data"], self.data.fingerprint
        if was == now:
            return
        if isinstance(was, list) and was == [now["images"], now["classes"]]:
            self.data.description += "\nthe run does not say which pictures it had, only how many"
            return
        names = {"digest": "names of files or classes"}
        known = was if isinstance(was, dict) else dict(zip(now, was, strict=False))
        changed = [
            names.get(key, f"{key} {known.get(key)} then, {value} now")
            for key, value in now.items()
            if known.get(key) != value
        ]
        raise UserError(
            f"resume: the data are others than those of the run ({', '.join(changed)}); a run goes "
            "on with the same pictures only (--initial-checkpoint takes weights to other data)"
        )

    def begin(self, model: nn.Module | None) -> Log | None:
        """Writes the recipe, and opens the log, on the first process.

        Args:
            model: to be trained, whose checkpoints need room; None where all is done.
        """
        return self.processes.by_first(lambda: self._begin(model))

    def _begin(self, model: nn.Module | None) -> Log:
        recipe = self.recipe
        weights = 0 if model is None else sum(4 * p.numel() for p in model.parameters())
        copies = 2 * 4 + 2 + recipe.checkpoint_hist  # two states, last, best, history
        prepare(self.folder.path, copies * weights)
        log = Log(  # first, as it keeps others out of the folder
            self.folder,
            recipe.to_dict(),
            self.state["lines"] if self.state else 0,
            tensorboard=recipe.log_tensorboard,
            wandb=recipe.log_wandb,
        )
        try:
            if recipe.resume is None:
                with atomic_write(self.folder.recipe) as temporary:
                    temporary.write_text(to_yaml(recipe))
        except BaseException:
            log.close()
            raise
        self._introduce(log)
        return log

    def _introduce(self, log: Log) -> None:
        data, where = self.data, self.folder.path
        many = f", {self.processes.world} processes" if self.processes.world > 1 else ""
        log.say(f"{data.description}; on {self.processes.device}{many}; run folder {where}")
        if self.at.total:
            log.say(f"going on behind step {self.at.total}")

    def summary(self) -> dict[str, Any]:
        """What the run came to; the first process writes it, and draws the curve."""
        summary = {
            "recipe": self.recipe.to_dict(),
            "steps": self.at.total,
            "seconds": time.perf_counter() - self._began,  # since it was begun or gone on with
            "results": self.results,
            "machine": facts(self.processes.device),
        }
        if self.processes.first:
            save_json(self.folder.summary, summary)
            save_curve(self.folder)
        return summary
