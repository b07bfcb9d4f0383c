"""What a run tells: files that others read, a bar, lines, a picture; and how it compiles."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from spot_vit.runs import phase_run
from spot_vit.runs.folder import RunFolder
from spot_vit.runs.logs import Log
from spot_vit.runs.train import train
from spot_vit.utils.errors import UserError
from support.commands import SPOT, SYNTHETIC, environment
from support.runs import SMALL, records, small_recipe


def test_files_that_other_programs_read(tmp_path: Path) -> None:
    train(small_recipe(tmp_path, dense_epochs=1, model_ema=True))
    run = tmp_path / "run"

    def refuse(word: str) -> None:
        raise ValueError(word)

    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert {record["kind"] for record in found} == {"step", "epoch"}
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [record for record in found if record["kind"] == "epoch"]
    assert [float(row["top1"]) for row in rows] == [record["top1"] for record in epochs]
    assert [row["phase"] for row in rows] == ["dense", "finetune", "finetune"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert all(0 <= float(row["waiting"]) <= 1 for row in rows)
    assert "ema_top1" in rows[0]
    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary["results"]["finetune"]["top1"] == epochs[-1]["ema_top1"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = Log(RunFolder(tmp_path), {})
    log.write({"kind": "epoch", "step": 1, "loss": math.nan, "top1": math.inf, "seconds": 1.0})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"kind": "epoch", "step": 1, "loss": None, "top1": None, "seconds": 1.0}


def test_lines_behind_a_save_are_cut_off(tmp_path: Path) -> None:
    log = Log(RunFolder(tmp_path), {})
    for step in range(5):
        log.write({"kind": "epoch", "step": step})
    log.close()
    log = Log(RunFolder(tmp_path), {}, 3)
    assert log.lines == 3
    log.write({"kind": "epoch", "step": 30})
    log.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [0, 1, 2, 30]
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "kind,step", "epoch,0", "epoch,1", "epoch,2", "epoch,30",
    ]  # fmt: skip


def test_one_process_writes_into_a_folder(tmp_path: Path) -> None:
    log = Log(RunFolder(tmp_path), {})
    log.write({"kind": "epoch", "step": 1})
    with pytest.raises(UserError, match=r"another process is training in"):
        Log(RunFolder(tmp_path), {})
    log.write({"kind": "epoch", "step": 2})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    Log(RunFolder(tmp_path), {}, 2).close()


def test_tensorboard(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(small_recipe(tmp_path, log_tensorboard=True))
    events = reading.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("step/loss")]
    expected = [(r["step"], pytest.approx(r["loss"])) for r in records(tmp_path / "run")]
    assert losses == expected
    assert len(events.Scalars("epoch/top1")) == 2


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {"rows": [], "finished": 0}

    class Service:
        def log(self, row: dict[str, float], step: int) -> None:
            seen["rows"].append((step, row))

        def finish(self) -> None:
            seen["finished"] += 1

    def init(**given: Any) -> Service:
        seen["given"] = given
        return Service()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(small_recipe(tmp_path, log_wandb=True))
    assert seen["given"]["project"] == "spot-vit" and seen["given"]["name"] == "run"
    assert seen["given"]["config"]["keep"] == 0.7
    assert [step for step, _ in seen["rows"]] == sorted(step for step, _ in seen["rows"])
    assert sum("step/loss" in row for _, row in seen["rows"]) == 12
    assert sum("epoch/top1" in row for _, row in seen["rows"]) == 2
    assert seen["finished"] == 1


@pytest.mark.parametrize(
    ("flag", "package"), [("log_wandb", "wandb"), ("log_tensorboard", "torch.utils.tensorboard")]
)
def test_a_package_that_is_missing(
    flag: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{flag}: .*pip install 'spot-vit\[log\]'"):
        Log(RunFolder(tmp_path), {}, tensorboard=flag != "log_wandb", wandb=flag == "log_wandb")
    assert not list(tmp_path.iterdir())


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train(small_recipe(tmp_path, dense_epochs=1))
    with Image.open(tmp_path / "run/curve.png") as picture:
        width, height = picture.size
        colours = picture.convert("RGB").getcolors(width * height) or []
    assert width > 900 and height > 300
    assert len(colours) > 20, "something is drawn"


def on_a_terminal(*words: str) -> str:
    """What a command shows on a terminal of 110 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *SPOT, *words],
        env={**environment(), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


def test_what_a_terminal_shows(tmp_path: Path) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment", "run"]
    shown = on_a_terminal(*words, "--train-num-samples", "800")
    bars = [part for part in re.split(r"[\r\n]", shown) if "finetune: " in part and "%|" in part]
    assert len(bars) > 2
    last = bars[-1]
    assert re.search(r"200/200 \[\d\d:\d\d<00:00, ", last), last  # time so far, time left
    assert re.search(r"loss=\d\.\d+, images=\d+/s, memory=\d\.\d GiB", last), last
    lines = [part for part in re.split(r"[\r\n]", shown) if part.startswith("finetune, epoch")]
    assert len(lines) == 2, "a line an epoch"
    for number, line in enumerate(lines):
        assert line.startswith(f"finetune, epoch {number + 1}/2, step {100 * (number + 1)}: top-1 ")
        assert re.search(r"loss \d\.\d{4}, \d+ images/s, \d+% waiting for data, \d\.\d GiB", line)


# ---- compilation ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"sampled_keep": (0.5, 1.0)}, {"attention_keep": 0.5, "stage": "finetune"}],
    ids=["fixed", "sampled", "attention"],
)
def test_a_step_is_compiled_once_whatever_the_budgets(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    graphs = []
    compiled, evaluated = torch.nn.Module.compile, phase_run.evaluate

    def compile(self: torch.nn.Module) -> None:
        compiled(self, backend="eager")  # graphs are counted, not what is made of them

    def evaluate(*given: Any, **named: Any) -> Any:
        graphs.append(counters["stats"]["unique_graphs"])
        return evaluated(*given, **named)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(phase_run, "evaluate", evaluate)
    torch._dynamo.reset()
    counters.clear()
    try:
        model = {"model_kwargs": {**SMALL, "depth": 2}, "val_num_samples": 8}
        model |= {"at": (1,)} if "attention_keep" not in changes else {"method": "dense"}
        train(small_recipe(tmp_path, compile=True, steps=30, **model, **changes))
        assert len(records(tmp_path / "run")) == 30
        assert graphs[0] == 1, "six steps, six budgets"
        assert graphs[1:] == [graphs[1]] * 4, "24 further steps; evaluation has its own"
        assert graphs[1] == 2, "that of inference"
        assert not counters["graph_break"], counters["graph_break"]
    finally:
        torch._dynamo.reset()
        counters.clear()
