"""The training loop, evaluation, and files that are complete or not there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from spot_vit.train import (
    SpotObjective,
    atomic_write,
    cosine_schedule,
    dense_objective,
    eval_mode,
    evaluate,
    fit,
    load_checkpoint,
    read_config,
    save_checkpoint,
    save_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 2))


def make_loader(batch: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """Two classes, told apart by the sign of one input."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 4, generator=draw)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=batch)


def make_optimizer(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def test_fit_learns_and_counts() -> None:
    model, loader = make_model(), make_loader()
    before = evaluate(model, loader)
    report = fit(model, loader, make_optimizer(model), epochs=10, warmup=5, clip_grad=1.0)
    after = evaluate(model, loader)
    assert report["steps"] == 80
    assert report["seconds"] > 0 and report["gradient_norm"] > 0
    assert after.top1 > 0.95 > before.top1 and after.loss < before.loss


def test_fit_repeats_exactly_from_the_same_seed() -> None:
    states = []
    for _ in range(2):
        model = make_model()
        fit(model, make_loader(), make_optimizer(model), epochs=2)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_schedule_warms_up_then_falls_to_zero_and_keeps_the_groups_apart() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    schedule = cosine_schedule(optimizer, steps=100, warmup=10)
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    first = [rate[0] for rate in rates]
    assert 0 < first[0] < 0.1 and first[10] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(first[:11]))
    assert all(a > b for a, b in pairwise(first[10:]))
    assert first[55] == pytest.approx(0.5) and 0 < first[-1] < 1e-3
    assert all(second == pytest.approx(0.2 * rate) for rate, second in rates)


def test_clip_bounds_the_step() -> None:
    model = nn.Linear(4, 2)
    start = model.weight.detach().clone()
    loader = make_loader(128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fit(model, loader, optimizer, clip_grad=1e-3)
    assert report["gradient_norm"] > 1e-2  # reported as it was before clipping
    assert 0 < (model.weight - start).norm() <= 1e-3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_training_stops_at_the_first_value_that_is_not_finite(where: str) -> None:
    model = make_model()
    kept = {}

    def objective(
        net: nn.Module, images: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective.calls += 1  # type: ignore[attr-defined]
        loss, _ = dense_objective(net, images, target)
        if objective.calls == 3:  # type: ignore[attr-defined]
            kept.update({name: p.detach().clone() for name, p in net.named_parameters()})
            # sqrt(0) is finite, its derivative is not.
            loss = loss * math.nan if where == "loss" else loss + (net[0].weight * 0).sum().sqrt()
        return loss, {"term": loss.detach()}

    objective.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=r"toy: not finite at step 2: loss .*term"):
        fit(model, make_loader(), make_optimizer(model), objective, name="toy")
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())


def test_evaluate_counts_in_order_and_restores_every_mode() -> None:
    model, loader = make_model(), make_loader(50)
    model.train()
    model[1].eval()
    result = evaluate(model, loader)
    assert [module.training for module in model] == [True, False, True, True]
    inputs, target = loader.dataset.tensors  # type: ignore[attr-defined]
    with eval_mode(model), torch.no_grad():
        logits = model(inputs)
    assert torch.equal(result.correct, logits.argmax(1) == target)
    assert result.top1 == pytest.approx(result.correct.float().mean().item())
    loss = nn.functional.cross_entropy(logits, target).item()
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_a_teacher_is_frozen_and_gets_no_gradient() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(1, 6), nn.Linear(6, 3)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.embed(x)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.head(x[:, 0])

    class Student(Dense):
        def forward(self, x: Tensor, aux: bool) -> object:
            tokens = self.forward_features(x)
            mask = torch.ones(len(x), 4)

            class Output:
                logits, masks, index = self.forward_head(tokens), [mask], ()

            Output.tokens = tokens  # type: ignore[attr-defined]
            return Output

    teacher, student = Dense(), Student()
    teacher.train()
    student.load_state_dict(teacher.state_dict())
    objective = SpotObjective([0.5], teacher)
    loss, parts = objective(student, torch.randn(2, 5, 1), torch.tensor([0, 2]))
    loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    # The student still equals its teacher: nothing to distil.
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6) and parts["mse"].item() == 0
    assert parts["ratio"].item() == pytest.approx(0.25)


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


def test_json_is_written_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    save_json(path, {"top1": 0.5, "kept": [1, 2]})
    assert json.loads(path.read_text()) == {"top1": 0.5, "kept": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        save_json(path, {"top1": math.nan})
    assert json.loads(path.read_text())["top1"] == 0.5
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


KILLED_WRITERS = """
import itertools, os, signal, sys, time
import torch
from torch import nn
from spot_vit.train import load_checkpoint, save_checkpoint

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
