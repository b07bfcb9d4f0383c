"""A run that is stopped, killed or damaged goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spot_vit
import torch
import yaml
from PIL import Image
from spot_vit.config.recipe import Recipe
from spot_vit.runs import phase_run
from spot_vit.runs.stopping import Stopped
from spot_vit.runs.train import train
from spot_vit.training.step import NonFiniteStep, TrainStep
from spot_vit.utils.errors import UserError
from support.runs import command, folder_of_pictures, records, small_recipe, trace
from support.slow import most_slow

EVERYTHING: dict[str, Any] = {
    "sampled_keep": (0.4, 1.0),
    "noise": 0.5,
    "grad_accum_steps": 2,
    "model_ema": True,
    "model_ema_decay": 0.9,
    "mixup": 0.5,
    "cutmix": 0.5,
    "dense_epochs": 1,
    "drop_path": 0.2,
    "recovery_interval": 2,
}


class Crash(Exception):
    """What ends a run in these tests."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the run die in the forward pass of its n-th optimiser step from now."""
    count = 0
    before = TrainStep.__call__

    def counted(self: TrainStep, batches: Any) -> Any:
        nonlocal count
        count += 1
        if count > step:
            raise Crash
        return before(self, batches)

    monkeypatch.setattr(TrainStep, "__call__", counted)


@pytest.mark.parametrize(
    ("kind", "workers"),
    most_slow([("everything", 2), ("everything", 0), ("attention", 0), ("attention", 2)]),
)
def test_crashes_change_nothing(
    kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(EVERYTHING)
    if kind == "attention":
        options = {"attention_keep": 0.5, "connectivity_epochs": 1, "recovery_interval": 2}
        options |= {"self_distillation": 0.01, "keep_epochs": (0, 1)}
    whole = small_recipe(tmp_path, experiment="whole", workers=workers, **options)
    train(whole)
    expected = trace(tmp_path / "whole")
    assert len(expected) >= 9
    recipe = whole.replace(experiment="broken")
    draw, crashes = random.Random(3), 0
    for _ in range(20):
        with monkeypatch.context() as patch:
            crash_at(patch, draw.randrange(1, 5))
            try:
                train(recipe)
            except Crash:
                crashes += 1
                if (tmp_path / "broken/resume.pt").exists():
                    recipe = Recipe(resume=str(tmp_path / "broken"))
                else:
                    (tmp_path / "broken/recipe.yaml").unlink()
            else:
                break
    else:
        raise AssertionError("never finished")
    assert crashes >= 2
    assert trace(tmp_path / "broken") == expected
    states = [
        spot_vit.load(tmp_path / name / "last.safetensors").state_dict()
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_that_began_from_weights_needs_them_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_recipe(tmp_path, experiment="before", method="dense", steps=2))
    start = str(tmp_path / "before/last.safetensors")
    recipe = small_recipe(tmp_path, initial_checkpoint=start, recovery_interval=2)
    train(recipe.replace(experiment="whole"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 3)
        train(recipe)
    Path(start).unlink()
    train(Recipe(resume=str(tmp_path / "run")))
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def words_of(recipe: Any, path: Path) -> list[str]:
    """The command that trains as a recipe says."""
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return ["train", recipe.data, "--config", str(path)]


def everything(tmp_path: Path, workers: int, epochs: int) -> Any:
    """A recipe with all that must go on: a folder of pictures, workers, sampled budgets, …"""
    return small_recipe(
        tmp_path, experiment="whole",
        **{
            **EVERYTHING, "synthetic": False, "num_classes": None, "workers": workers,
            "data": str(folder_of_pictures(tmp_path / "pictures", per_class=16)),
            "train_num_samples": None, "val_num_samples": None, "epochs": epochs,
            "recovery_interval": 1,
        },
    )  # fmt: skip


def whole_and_broken(tmp_path: Path, recipe: Any) -> tuple[list[Any], list[str]]:
    """What an uninterrupted run computes, and the command of one that will be interrupted."""
    process = command(*words_of(recipe, tmp_path / "whole.yaml"))
    assert process.wait(300) == 0, process.communicate()[1]
    words = words_of(recipe.replace(experiment="broken"), tmp_path / "broken.yaml")
    return trace(tmp_path / "whole"), words


def nothing_half_written(folder: Path) -> None:
    """Every file under a final name is whole."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".pt":
            assert "step" in torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            spot_vit.load(path)
        elif path.suffix == ".jsonl":
            trace(folder)
        elif path.suffix == ".yaml":
            Recipe.from_dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param((signal.SIGKILL,), id="kill"),
        pytest.param((signal.SIGTERM, signal.SIGINT), id="signals", marks=pytest.mark.slow),
    ],
)
def test_kill_9_and_signals_change_nothing(signals: tuple[int, ...], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    expected, words = whole_and_broken(tmp_path, everything(tmp_path, workers=1, epochs=6))
    for number in signals:
        process = command(*words)
        begun = len(trace(broken)) if (broken / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 120
        while not ((broken / "resume.pt").exists() and len(trace(broken)) >= min(begun + 3, 18)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        output = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number, output
            assert re.search(r"go on with: spot train --resume \S+broken", "".join(output))
            assert "Traceback" not in "".join(output)
        words = ["train", "--resume", str(broken)]
        nothing_half_written(broken)
    process = command(*words)
    assert process.wait(300) == 0, process.communicate()
    assert trace(broken) == expected


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_changes_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    expected, first = whole_and_broken(tmp_path, everything(tmp_path, workers=2, epochs=40))
    draw, kills = random.Random(0), 0
    while True:
        begun = (broken / "resume.pt").exists()
        if not begun and broken.exists():
            shutil.rmtree(broken)
        process = command(*(["train", "--resume", str(broken)] if begun else first))
        try:
            process.wait(draw.uniform(4, 9) if kills < 20 else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            print("killed behind step", len(trace(broken)) if begun else 0)
            nothing_half_written(broken) if broken.exists() else None
        else:
            assert process.returncode == 0, process.communicate()
            break
    assert kills == 20
    assert trace(broken) == expected


def test_a_damaged_state_is_named_and_the_previous_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tmp_path, recovery_interval=2)
    train(recipe.replace(experiment="whole"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 7)
        train(recipe)
    state = tmp_path / "run/resume.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    train(Recipe(resume=str(tmp_path / "run")))
    assert re.search(r"resume\.pt was not read.*going on from \S+resume-previous\.pt", caplog.text)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 0.5},
            r"goes on as it began, and lr was 0\.001 and is 0\.5; .*--initial-checkpoint",
        ),
        ({"resume": "nowhere"}, r"resume: there is no run in nowhere"),
    ],
)
def test_what_resume_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=2)
    train(recipe)
    given = recipe.replace(**{"resume": str(tmp_path / "run"), **changes})
    with pytest.raises(UserError, match=message):
        train(given)


def test_a_signal_in_the_middle_saves_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tmp_path)
    train(recipe.replace(experiment="whole"))
    before = TrainStep.__call__

    def signalled(self: TrainStep, batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        with pytest.raises(Stopped, match=r"behind step 1, and saved; go on with: spot train"):
            train(recipe)
    train(Recipe(resume=str(tmp_path / "run")))
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_step_that_is_not_finite_is_kept_and_happens_again(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, sampled_keep=(0.4, 1.0), mixup=0.5, drop_path=0.2)

    class Breaks:
        """Cross-entropy that is NaN at its eighth call in training."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            loss = torch.nn.functional.cross_entropy(logits, target)
            return loss * (float("nan") if self.calls == 8 else 1.0)

    with pytest.raises(NonFiniteStep, match=r"at step 8 of seed 42 .* nan") as first:
        train(recipe, criterion=Breaks())
    path = tmp_path / "run/nonfinite-step8.pt"
    assert str(path) in str(first.value)
    content = torch.load(path, weights_only=True)
    assert len(content["batches"]) == 1 and content["batches"][0][0][0].shape == (8, 3, 32, 32)
    again = Breaks()
    again.calls = 7
    with pytest.raises(NonFiniteStep) as second:
        train(Recipe(resume=str(path)), criterion=again)
    for name, value in first.value.values.items():
        found = second.value.values[name]
        assert found == value or (math.isnan(found) and math.isnan(value)), name


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_signal_within_an_evaluation_changes_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model or its average, after an epoch or the last one: it is done again."""
    given: dict[str, Any] = {"sampled_keep": (0.4, 1.0), "model_ema": True, "drop_path": 0.2}
    recipe = small_recipe(tmp_path, method="random", **given)  # whose evaluation draws too
    train(recipe.replace(experiment="whole"))
    before, calls = phase_run.evaluate, 0

    def signalled(*words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        found = before(*words, **named)
        if calls == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(phase_run, "evaluate", signalled)
        with pytest.raises(Stopped, match=r"behind step \d+, and saved; go on with: spot train"):
            train(recipe)
    assert len(records(tmp_path / "run", "epoch")) == number // 2
    train(Recipe(resume=str(tmp_path / "run")))
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    for there, here in zip(
        *(records(tmp_path / name, "epoch") for name in ("whole", "run")), strict=True
    ):
        assert there.keys() == here.keys()
        for name in there.keys() - {"images_per_second", "waiting"}:
            assert there[name] == here[name], name


def test_other_pictures_of_the_same_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = folder_of_pictures(tmp_path / "pictures")
    recipe = small_recipe(
        tmp_path, synthetic=False, data=str(pictures), num_classes=None,
        train_num_samples=None, val_num_samples=None, recovery_interval=1,
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 2)
        train(recipe)
    again = Recipe(resume=str(tmp_path / "run"))
    one = pictures / "train/class1/003.png"
    one.rename(one.with_name("other.png"))
    with pytest.raises(UserError, match=r"data are others .* \(names of files or classes\); a run"):
        train(again)
    one.with_name("other.png").unlink()
    with pytest.raises(UserError, match=r"\(images 36 then, 35 now, names of files"):
        train(again)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(one)
    pictures.rename(tmp_path / "moved")  # where they are may change
    moved = again.replace(data=str(tmp_path / "moved"))
    state = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    torch.save({**state, "data": [36, 3]}, tmp_path / "run/resume.pt")  # as older versions wrote it
    torch.save({**state, "data": [37, 3]}, tmp_path / "older.pt")
    with pytest.raises(UserError, match=r"\(images 37 then, 36 now, names"):
        shutil.copy(tmp_path / "older.pt", tmp_path / "run/older.pt")
        train(moved.replace(resume=str(tmp_path / "run/older.pt")))
    train(moved)
    assert "does not say which pictures it had, only how many" in capsys.readouterr().out
    assert [step for _, step, *_ in trace(tmp_path / "run")] == list(range(1, 9))


def test_random_images_start_from_the_weights_that_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = small_recipe(tmp_path, method="dense", steps=1)
    train(dense.replace(experiment="before"))
    start = str(tmp_path / "before/last.safetensors")
    for name, path in (("with", start), ("without", None), ("absent", "absent.pth")):
        train(dense.replace(experiment=name, initial_checkpoint=path))
    first = {name: trace(tmp_path / name)[0] for name in ("with", "without", "absent")}
    assert first["with"] != first["without"] == first["absent"]
    assert "there is no file absent.pth; weights are random here" in caplog.text
