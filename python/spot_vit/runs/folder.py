"""The folder of a run: what its files are called, and how each is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spot_vit.models.checkpoint_files import logger, read_torch
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import save_torch


class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder.
        recipe: the recipe, yaml, enough to run again.
        state: everything that going on needs; `previous` is the one before it.
        metrics: one JSON object a line.
        table: one line an epoch, CSV.
        curve: picture of losses and accuracies.
        summary: what the run came to, JSON.
        last: weights at the end, or at the last save; of the moving average where there is one.
        best: weights of the best epoch so far.
        dense: weights of the dense model, where the run trained it first.
        unreadable: names of the pictures that could not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.state = self.path / "resume.pt"
        self.previous = self.path / "resume-previous.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.table = self.path / "metrics.csv"
        self.curve = self.path / "curve.png"
        self.summary = self.path / "summary.json"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.dense = self.path / "dense.safetensors"
        self.unreadable = self.path / "unreadable.txt"

    def history(self, phase: str, epoch: int) -> Path:
        """Weights of one of the best epochs."""
        return self.path / f"{phase}-epoch{epoch + 1:03d}.safetensors"

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Writes the state; the one that was there becomes the previous one."""
        spare = self.path / f".{self.previous.name}"
        spare.unlink(missing_ok=True)
        if self.state.exists():
            os.link(self.state, spare)  # a name more, so that at no time there is no state
        save_torch(self.state, state)
        if spare.exists():
            os.replace(spare, self.previous)

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from; a run that failed at once left a recipe."""
        return any(file.exists() for file in (self.state, self.previous, self.summary))

    def load_state(self, path: Path | None = None) -> dict[str, Any] | None:
        """The last state; the previous one, with a warning, where that is damaged.

        Args:
            path: of another state of the run.

        Returns:
            None where the run ended before it saved anything: it begins anew.

        Raises:
            UserError: there is none that can be read.
        """
        reasons: list[str] = []
        for file in (self.state, self.previous) if path is None else (path,):
            if not file.exists():
                continue
            try:
                state = read_torch(file)
                if isinstance(state, dict) and "step" in state:
                    if reasons:
                        logger.warning("%s; going on from %s", reasons[0], file)
                    return state
                reasons.append(f"{file} holds no state of a run")
            except (ValueError, OSError, KeyError, TypeError) as error:
                reasons.append(str(error))
        if path is None and not self.begun:
            return None
        raise UserError(
            "; ".join(reasons) or f"resume: there is no {self.state.name} in {self.path}, so no run"
        )

    def forget(self, paths: list[str]) -> None:
        """Removes files of the history, by name."""
        for name in paths:
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
