"""What a run tells while it goes on: a bar, a line an epoch, JSONL, CSV, TensorBoard, W&B."""

from __future__ import annotations

import csv
import fcntl
import importlib
import io
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from spot_vit.runs.folder import RunFolder
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write

_HELD: set[int] = set()  # descriptors with a lock, which workers must not keep


def _let_go() -> None:
    """Closes in a forked process what keeps others out of a folder while its parent lives."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)

Record = dict[str, Any]
"""One line of metrics.jsonl. "kind" is "step" or "epoch"; every number is finite, or null."""


class Log:
    """Writes what happens into a run's folder, and shows it.

    Args:
        folder: of the run.
        config: the recipe as plain data, for W&B.
        keep: lines of metrics.jsonl that are part of the run so far; later ones go.
        tensorboard: write events for TensorBoard too.
        wandb: tell Weights & Biases.

    Attributes:
        lines: how many lines metrics.jsonl has.

    Raises:
        UserError: the package that a flag asks for is not installed, or another process is writing
            into the folder.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Mapping[str, Any],
        keep: int = 0,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
    ) -> None:
        self.folder = folder
        self._bar: tqdm[Any] | None = None
        events = _package("log_tensorboard", "torch.utils.tensorboard") if tensorboard else None
        service = _package("log_wandb", "wandb") if wandb else None
        self._file = os.open(folder.metrics, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._hold()
            self._trim(keep)
            self._events = events and events.SummaryWriter(str(folder.path / "tensorboard"))
            self._wandb = service and service.init(
                project="spot-vit",
                name=folder.path.name,
                dir=str(folder.path),
                config=dict(config),
                resume="allow",
            )
        except BaseException:
            self._release()
            raise

    def _hold(self) -> None:
        """Keeps other processes out of the folder for as long as this one lives."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output: another process is training in {self.folder.path} now; wait for it, or "
                "give another --experiment"
            ) from error
        except OSError:  # a file system without locks
            pass
        _HELD.add(self._file)

    def _release(self) -> None:
        _HELD.discard(self._file)
        os.close(self._file)

    def _trim(self, keep: int) -> None:
        """Leaves the first lines of metrics.jsonl, which a stop may have come after."""
        lines = self.folder.metrics.read_bytes().splitlines(keepends=True)[:keep]
        os.ftruncate(self._file, sum(map(len, lines)))
        self.lines = len(lines)
        self.epochs: list[Record] = [r for r in map(json.loads, lines) if r["kind"] == "epoch"]

    def write(self, record: Record) -> None:
        """Adds a record to the files."""
        plain = {name: _plain(value) for name, value in record.items()}
        # One call: a process that is killed leaves whole lines.
        os.write(self._file, (json.dumps(plain) + "\n").encode())
        self.lines += 1
        if record["kind"] == "epoch":
            self.epochs.append(plain)
            self._write_table()
        numbers = {name: v for name, v in plain.items() if isinstance(v, int | float)}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if self._wandb is not None:
            named = {f"{record['kind']}/{name}": value for name, value in numbers.items()}
            self._wandb.log(named, step=record["step"])

    def _write_table(self) -> None:
        names = list(dict.fromkeys(name for record in self.epochs for name in record))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(self.epochs)
        with atomic_write(self.folder.table) as temporary:
            temporary.write_text(text.getvalue())

    def begin(self, name: str, total: int, done: int) -> None:
        """Shows a bar of a phase's steps, on a terminal."""
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="step",
            mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, **shown: str) -> None:
        """Moves the bar by a step."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line beside the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Closes all that is open."""
        self.end()
        self._release()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def memory(device: torch.device) -> float:
    """The most memory used so far, GiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _package(flag: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{flag}: {error}; install it with: pip install 'spot-vit[log]'") from error
