"""Checkpoints: weights and configuration, and writers that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spot_vit.training.checkpoint import load_checkpoint, read_config, save_checkpoint
from support.training import make_model
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def test_checkpoints_bring_weights_and_config_back(tmp_path: Path) -> None:
    path, model, other = tmp_path / "new" / "model.safetensors", make_model(0), make_model(1)
    config = {"keep": 0.6, "at": [1, 2, 3], "name": "ä"}
    save_checkpoint(path, model, config)
    assert read_config(path) == config
    assert load_checkpoint(path, other) == config
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(RuntimeError, match=r"[Mm]issing|size mismatch"):
        load_checkpoint(path, nn.Linear(4, 2))


KILLED_WRITERS = """
import itertools, os, signal, sys, time
import torch
from torch import nn
from spot_vit.training.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)  # fork and thread pools do not mix
path, steps, model = sys.argv[1], itertools.count(), nn.Linear(1000, 1000)
save_checkpoint(path, model, {"step": -1})
for trial in range(30):
    pid = os.fork()
    if pid == 0:
        for step in steps:
            nn.init.constant_(model.weight, step)
            nn.init.constant_(model.bias, step)
            save_checkpoint(path, model, {"step": step})
    time.sleep(0.02 + 0.003 * trial)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = load_checkpoint(path, model)["step"]
    assert step == -1 or ((model.weight == step).all() and (model.bias == step).all()), step
    left = os.listdir(os.path.dirname(path))
    print(trial, step, len(left))
"""


def test_a_killed_writer_never_leaves_a_broken_checkpoint(tmp_path: Path) -> None:
    """kill -9 at 30 moments: what lies under the name is always one whole step."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"}
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(trials) == 30
    assert max(count for _, _, count in trials) > 1, "no kill fell into a write"
