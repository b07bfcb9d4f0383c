"""One phase of a run: model, optimiser and everything else that a step needs, and the loop."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spot_vit.data.batches import grouped, images_and_target
from spot_vit.data.loaders import EvalLoader
from spot_vit.evaluation.accuracy import Evaluation, evaluate
from spot_vit.measure.flops import count_flops
from spot_vit.models.checkpoint_files import logger
from spot_vit.models.saved import load, save
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.runs import build
from spot_vit.runs.initial import initial_state
from spot_vit.runs.logs import Log, memory
from spot_vit.runs.parallel import (
    FSDP,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    spread,
)
from spot_vit.runs.phases import CONNECTIVITY, DENSE, FINETUNE, Phase, Rates
from spot_vit.runs.randomness import random_state, seed_all, set_random_state
from spot_vit.runs.run import Run
from spot_vit.runs.stopping import Stopped
from spot_vit.training.sparsifiner import training_of
from spot_vit.training.step import NonFiniteStep, TrainStep
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write, save_torch
from spot_vit.utils.modes import unwrap
from spot_vit.utils.slow_steps import SlowSteps

SAVE_SECONDS = 600.0
"""Seconds from one save to the next, besides those at the ends of epochs."""

TELL_SECONDS = 300.0
"""Seconds from one word about slow steps to the next."""


class PhaseRun:
    """One phase: model, optimiser and everything else that a step needs.

    Args:
        run: it is part of.
        phase: which.
        stack: closes what the phase opens.
    """

    def __init__(self, run: Run, phase: Phase, stack: ExitStack) -> None:
        self.run, self.phase = run, phase
        self.log: Log | None = None
        # Each phase goes on where the one before stopped: with other orders and other images.
        self.epochs_before = sum(one.epochs for one in run.phases[: run.at.phase])
        recipe, processes = run.recipe, run.processes
        self.recipe, self.processes, self.at = recipe, processes, run.at
        self.sharded = recipe.parallel == FSDP and phase.name != CONNECTIVITY
        seed_all(recipe.seed)
        model = self._model()
        model = model.to(processes.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._who_learns(model, stack)
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing()
        if recipe.sync_bn and processes.world > 1:
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        self.ema = self._average(model)
        self.gmacs = count_flops(model, run.data.input_size).total / 1e9
        teacher = None
        if phase.name == FINETUNE:
            teacher = run.teacher
            if teacher is None and recipe.dense_epochs:
                teacher = load(run.folder.dense)
        if teacher is not None:
            teacher = teacher.to(processes.device)
            build.check_teacher(recipe, phase, model, teacher, run.data.input_size)
        if recipe.compile and phase.name != CONNECTIVITY:
            model.compile()
        self.model: nn.Module = model
        if phase.name != CONNECTIVITY:
            self.model = spread(model, processes, recipe.parallel, recipe.static_graph)
        self.draw = build.draw_of(recipe, phase)
        criterion = run.criterion or run.data.criterion
        objective = build.objective_of(recipe, phase, teacher, criterion, self.draw)
        self.optimizer = build.optimizer_of(
            recipe, phase, build.groups_of(recipe, phase, self.model)
        )
        self.rates = Rates(self.optimizer, phase, recipe)
        self.step = TrainStep(
            self.model,
            self.optimizer,
            objective,
            amp_dtype=getattr(torch, recipe.amp_dtype) if recipe.amp else None,
            clip_grad=recipe.clip_grad or math.inf,
            clip_mode=recipe.clip_mode,
            after_backward=self._average_gradients if phase.name == CONNECTIVITY else None,
        )
        self.mixup = None if phase.name == CONNECTIVITY else run.data.mixup()
        seed_all(recipe.seed + 1000 * (run.at.phase + 1) + processes.rank)
        self.saved = time.monotonic()
        self.slow, self.told = SlowSteps(), -math.inf
        self.pace = {"images_per_second": 0.0, "waiting": 0.0}  # of the last epoch
        if run.state is not None:
            self._load(run.state)

    # ---- what is trained ---------------------------------------------------------------------

    def _model(self) -> Any:
        """The phase's model, with the weights that it starts from."""
        recipe, data, number = self.recipe, self.run.data, self.at.phase
        model = build.dense_model(recipe, data.model_arguments)
        if self.phase.name != DENSE:
            model = build.convert(model, recipe)
        before = self.run.phases[number - 1].name if number else None
        start: Any
        if before is not None:
            start = self.run.folder.dense if before == DENSE else self.run.folder.last
        else:
            start = None if self.run.state else self._initial_checkpoint()
        if start is not None:
            model.load_state_dict(initial_state(model, start), strict=False)
        return model

    def _initial_checkpoint(self) -> str | None:
        """The file that the recipe names; random images are a trial, which goes without it."""
        path = self.recipe.initial_checkpoint
        if path is None or not self.recipe.synthetic or Path(path).is_file():
            return path
        if self.processes.first:
            logger.warning("initial_checkpoint: there is no file %s; weights are random here", path)
        return None

    def _who_learns(self, model: Any, stack: ExitStack) -> None:
        connectivity = self.phase.name == CONNECTIVITY
        if connectivity or self.recipe.attention_keep is not None:
            own = connectivity or self.recipe.self_distillation > 0
            stack.enter_context(training_of(model, backbone=not connectivity, connectivity=own))
        if self.recipe.head == "linear" and not connectivity:
            stack.callback(build.train_head_only(model))

    def _average(self, model: Any) -> ModelEmaV3 | None:
        if not self.recipe.model_ema or self.phase.name == CONNECTIVITY:
            return None
        ema = ModelEmaV3(
            model, decay=self.recipe.model_ema_decay, use_warmup=self.recipe.model_ema_warmup
        )
        if self.sharded:
            spread(ema.module, self.processes, FSDP)
        return ema

    def _average_gradients(self) -> None:
        own = predictor_parameters(self.model).values()
        self.processes.average([p.grad for p in own if p.grad is not None])

    # ---- the loop ----------------------------------------------------------------------------

    def go(self, log: Log | None) -> None:
        """Trains to the end of the phase, evaluates and saves.

        Args:
            log: of the run, on the first process.
        """
        self.log, at, phase = log, self.at, self.phase
        if self.log is not None:
            self.log.begin(phase.name, phase.steps, at.step)
        result: Evaluation | None = None
        while at.step < phase.steps or at.owed:
            if not at.owed:
                self._epoch()
            last = at.step >= phase.steps
            due = (at.epoch + 1) % self.recipe.val_interval == 0
            at.owed = last or due
            if at.owed:
                result = self._evaluate()
                at.owed = False
                self.slow.pause()
            at.epoch, at.batch = at.epoch + 1, 0
            if not last:
                self._heed(save=True)
        self._finish(result)

    def _epoch(self) -> None:
        """One pass over the data, or what is left of it, or of the phase."""
        at, phase, recipe = self.at, self.phase, self.recipe
        self.model.train()
        loader = self.run.data.loader
        waited, began = loader.waited, time.perf_counter()
        images_seen, last = 0, began
        if self.mixup is not None:
            self.mixup.mixup_enabled = not 0 < recipe.mixup_off_epoch <= at.epoch
        epoch = self.epochs_before + at.epoch
        for batches in grouped(loader.epoch(epoch, at.batch), recipe.grad_accum_steps):
            before = self._drawn()
            ready = [self._ready(batch) for batch in batches]
            rate = self.rates.set(at.step)
            try:
                values = self.step(ready)
            except NonFiniteStep as error:
                raise self._keep_for_replay(error, ready, before) from error
            except ValueError as error:  # operators refuse what is no number, and name it
                if not re.search(r"got -?(nan|inf)\b", str(error)):
                    raise
                found = NonFiniteStep({"loss": math.nan})
                raise self._keep_for_replay(found, ready, before) from error
            if phase.name == CONNECTIVITY:  # the others are averaged by what wraps the model
                values = self.processes.means(values)
            at.batch, at.step, at.total = at.batch + len(batches), at.step + 1, at.total + 1
            if self.ema is not None:
                self.ema.update(unwrap(self.model), step=at.step)
            images_seen += sum(len(images) for images, _ in ready) * self.processes.world
            now = time.perf_counter()
            if self.log is not None:
                self._tell(values, rate, images_seen / (now - began), now - last)
            last = now
            reason = self.slow(loader.waited)
            if reason and self.log is not None and now > self.told + TELL_SECONDS:
                self.log.say(reason)
                self.told = now
            if at.step >= phase.steps:
                break
            self._heed()
        else:
            if images_seen == 0 and at.batch == 0:
                raise UserError("data: the training set gave no batch in a whole pass")
        seconds = time.perf_counter() - began
        self.pace = {
            "images_per_second": images_seen / seconds,
            "waiting": min((loader.waited - waited) / seconds, 1.0),
        }

    def _ready(self, batch: Any) -> tuple[Tensor, Any]:
        """A batch on the device, mixed."""
        images, target = images_and_target(batch)
        images = images.to(self.processes.device, non_blocking=True)
        if isinstance(target, Tensor):
            target = target.to(self.processes.device, non_blocking=True)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        return images, target

    def _tell(
        self, values: dict[str, float], rate: float, images_per_second: float, seconds: float
    ) -> None:
        assert self.log is not None
        at = self.at
        if at.total % self.recipe.log_interval == 0 or at.step == self.phase.steps:
            self.log.write(
                {
                    "kind": "step",
                    "phase": self.phase.name,
                    "epoch": at.epoch,
                    "step": at.total,
                    "lr": rate,
                    **values,
                    "seconds": seconds,
                }
            )
        self.log.advance(
            loss=f"{values['loss']:.3f}",
            images=f"{images_per_second:.0f}/s",
            memory=f"{memory(self.processes.device):.1f} GiB",
        )

    def _heed(self, save: bool = False) -> None:
        """Saves, and stops, where it is time; all processes do the same."""
        due = self.recipe.recovery_interval
        save |= time.monotonic() - self.saved > SAVE_SECONDS
        save |= due > 0 and self.at.total % due == 0
        signal, save_now = self.processes.largest(self.run.stop.signal, int(save))
        if signal or save_now:
            self._save()
            self.slow.pause()
        if signal:
            raise Stopped(signal, self._stopped())

    def _stopped(self) -> str:
        """What to say of a signal behind a step."""
        return (
            f"stopped behind step {self.at.total}, and saved; go on with: "
            f"spot train --resume {self.run.folder.path}"
        )

    def _keep_for_replay(
        self, error: NonFiniteStep, batches: list[tuple[Tensor, Any]], before: dict[str, Any]
    ) -> NonFiniteStep:
        """Saves the state before the step, and its batches; gives an error that says where."""
        path = self.run.folder.path / f"nonfinite-step{self.at.total + 1}.pt"
        state = self._state(before)
        state |= {"values": error.values, "batches": self.processes.gathered(batches)}
        self.processes.by_first(lambda: save_torch(path, state))
        return NonFiniteStep(
            error.values,
            f" at step {self.at.total + 1} of seed {self.recipe.seed} (its batch and the state "
            f"before it are in {path}; the step again: spot train --resume {path})",
        )

    # ---- evaluation and files ------------------------------------------------------------------

    def _evaluate(self) -> Evaluation | None:
        """Evaluates the model, and its average; keeps what is best so far; tells."""
        at, data = self.at, self.run.data
        record: dict[str, Any] = {
            "kind": "epoch",
            "phase": self.phase.name,
            "epoch": at.epoch,
            "step": at.total,
            **self.pace,
        }
        found = None
        if data.val_loader is not None and self.phase.name != CONNECTIVITY:
            before = self._drawn()
            try:
                # Of several processes one alone may be told, and the others would wait for it.
                with self._at_once() if self.processes.world == 1 else nullcontext():
                    found = self._evaluation(self.model, data.val_loader)
                    record |= _figures(found, "")
                    if self.ema is not None:
                        found = self._evaluation(self.ema.module, data.val_loader)
                        record |= _figures(found, "ema_")
            except Stopped:
                self._save(before)
                raise
            self.model.train()
            self._keep_best(found)
        if self.log is not None:
            self.log.write(record)
            self.log.say(_line(record, self.phase, memory(self.processes.device)))
        self._name_unreadable()
        return found

    def _at_once(self) -> AbstractContextManager[None]:
        return self.run.stop.at_once(self._stopped())

    def _evaluation(self, model: nn.Module, loader: EvalLoader) -> Evaluation:
        inside = model if self.sharded else unwrap(model)
        return evaluate(inside, loader, "validate", progress=False)

    def _name_unreadable(self) -> None:
        found = self.run.data.unreadable()
        if found and self.log is not None:
            lines = [f"{name}: {reason}" for name, reason in sorted(found.items())]
            with atomic_write(self.run.folder.unreadable) as temporary:
                temporary.write_text("\n".join(lines) + "\n")
            if len(found) > self.run.named:
                shown = ", ".join(sorted(found)[:5]) + (", …" if len(found) > 5 else "")
                some = "1 picture", "is"
                if len(found) > 1:
                    some = f"{len(found)} pictures", "are"
                self.log.say(
                    f"{some[0]} could not be read and {some[1]} left out: {shown} "
                    f"(all of them, and why: {self.run.folder.unreadable})"
                )
            self.run.named = len(found)

    def _keep_best(self, found: Evaluation) -> None:
        """Writes the epoch's weights where it is among the best, and forgets the worst."""
        run, metric = self.run, self.recipe.eval_metric
        value = -found.loss if metric == "loss" else _figures(found, "").get(metric, found.top1)
        path = run.folder.history(self.phase.name, self.at.epoch)
        entry = {"file": path.name, "value": value}
        best = sorted([*run.best, entry], key=lambda one: -one["value"])  # the earlier of equals
        kept = best[: max(self.recipe.checkpoint_hist, 1)]
        if entry in kept:
            weights = self._weights()
            if self.processes.first and self.recipe.checkpoint_hist:
                self._write_weights(path, weights)
            if self.processes.first and best[0] is entry:
                self._write_weights(run.folder.best, weights)
        if self.processes.first:
            run.folder.forget([one["file"] for one in best if one not in kept])
        run.best = kept

    def _weights(self) -> dict[str, Any]:
        """What a user wants of the model: the average, where there is one."""
        model = self.model if self.ema is None else self.ema.module
        return model_state(model, self.sharded)

    def _write_weights(self, path: Path, weights: dict[str, Any]) -> None:
        save(
            path,
            unwrap(self.model),
            state=weights,
            classes=self.run.data.classes,
            data_config=self.run.data.data_config,
        )

    def _finish(self, result: Evaluation | None) -> None:
        """Weights of the phase, and what it came to."""
        run, folder = self.run, self.run.folder
        weights = self._weights()
        if self.processes.first:
            self._write_weights(folder.last, weights)
            if self.phase.name == DENSE:
                self._write_weights(folder.dense, weights)
            if not run.best:  # nothing was evaluated
                self._write_weights(folder.best, weights)
        run.results[self.phase.name] = {
            "steps": self.at.step,
            "gmacs": self.gmacs,
            **({} if result is None else _figures(result, "")),
        }
        if self.log is not None:
            self.log.end()
        self._save(finished=True)

    # ---- state -----------------------------------------------------------------------------------

    def _save(self, drawn: dict[str, Any] | None = None, finished: bool = False) -> None:
        """Writes everything that going on needs; behind the end of the phase that is little.

        Args:
            drawn: what `_drawn` gave before something that is to be done again.
            finished: whether the phase is over.
        """
        self.saved = time.monotonic()
        if finished:
            state = {**self._state_of_run(), "at": dataclasses.asdict(self.at.next_phase())}
            state["best"] = []
        else:
            state = self._state(drawn or self._drawn())
        self.processes.by_first(lambda: self.run.folder.save_state(state))

    def _state_of_run(self) -> dict[str, Any]:
        return {
            "at": dataclasses.asdict(self.at),
            "step": self.at.total,
            "results": self.run.results,
            "best": self.run.best,
            "data": self.run.data.fingerprint,
            "lines": 0 if self.log is None else self.log.lines,
        }

    def _drawn(self) -> dict[str, Any]:
        """Everything that the next random draws depend on."""
        draw = None if self.draw is None else self.draw.state_dict()
        return {"random": random_state(self.processes.device), "draw": draw}

    def _state(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """The state with which the next step begins, given what `_drawn` gave before it."""
        scaler = self.step.scaler
        return {
            **self._state_of_run(),
            "model": model_state(self.model, self.sharded),
            "optimizer": optimizer_state(self.model, self.optimizer, self.sharded),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else model_state(self.ema.module, self.sharded),
            "pace": self.pace,
            "draw": drawn["draw"],
            "random": self.processes.gathered(drawn["random"]),
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Goes on from what `_save` wrote."""
        if "model" not in state:
            return
        states = state["random"]
        if len(states) != self.processes.world:
            raise UserError(
                f"resume: the run had {len(states)} processes and has "
                f"{self.processes.world} now; a run goes on with as many (--initial-checkpoint "
                "takes its weights to another number)"
            )
        load_model_state(self.model, state["model"], self.sharded)
        load_optimizer_state(self.model, self.optimizer, state["optimizer"], self.sharded)
        if self.step.scaler is not None:
            self.step.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            load_model_state(self.ema.module, state["ema"], self.sharded)
        if self.draw is not None:
            self.draw.load_state_dict(state["draw"])
        self.pace = state.get("pace", self.pace)
        set_random_state(states[self.processes.rank], self.processes.device)


def _figures(found: Evaluation, prefix: str) -> dict[str, float]:
    top5 = found.top5 if found.num_classes > 5 else None  # of five classes it is always right
    names = {"top1": found.top1, "top5": top5, "val_loss": found.loss, "map": found.mean_ap}
    return {f"{prefix}{name}": value for name, value in names.items() if value is not None}


def _line(record: dict[str, Any], phase: Phase, used: float) -> str:
    """The line of an epoch."""
    figures = [
        f"{label} {record[name]:.2%}"
        for name, label in (
            ("top1", "top-1"),
            ("top5", "top-5"),
            ("map", "mAP"),
            ("ema_top1", "average's top-1"),
        )
        if name in record
    ]
    if "val_loss" in record:
        figures.append(f"loss {record['val_loss']:.4f}")
    pace = f"{record['images_per_second']:.0f} images/s, {record['waiting']:.0%} waiting for data"
    epoch = f"{phase.name}, epoch {record['epoch'] + 1}/{phase.epochs}, step {record['step']}"
    return f"{epoch}: {', '.join([*figures, pace])}, {used:.1f} GiB"
