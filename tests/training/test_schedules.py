"""Schedules: the budget by EViT's formula, the noise evenly, and both gone afterwards."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from spot_vit import sparsify
from spot_vit.training.fit import fit
from spot_vit.training.objectives import SpotObjective
from spot_vit.training.schedules import KeepSchedule, NoiseSchedule
from support.models import build, images
from torch import nn
from torch._dynamo.testing import CompileCounter


def published(step: int, per_epoch: int, start: int, end: int, keep: float) -> float:
    """EViT's keep rate at a step, as its code has it."""
    epoch = step // per_epoch
    if epoch < start:
        return 1.0
    if epoch >= end:
        return keep
    share = (step - per_epoch * start) / (per_epoch * (end - start))
    return keep + (1 - keep) * (math.cos(share * math.pi) + 1) * 0.5


def test_the_budget_is_that_of_the_published_formula_at_every_step() -> None:
    model: Any = sparsify(build(), method="evit", keep=0.5, at=[1, 2, 3]).train()
    schedule, x = KeepSchedule(4, start=2, end=5), images(model, 2)
    seen = []
    for step in range(24):
        rate = published(step, 4, 2, 5, 0.5)
        with schedule(model) as ratios:
            assert ratios == pytest.approx([rate, rate**2, rate**3], abs=3e-6)
            index = model(x, aux=True).index
        alive = 16
        for stage in index:
            keep = math.ceil(rate * alive)
            assert stage.shape[1] == keep
            alive = keep + (keep < alive)  # the fused token competes
        assert model.spot_config.keep == 0.5
        seen.append(index[-1].shape[1])
    assert seen[0] == 16 and seen[-1] < 5 and sorted(seen, reverse=True) == seen
    assert schedule.step == 24


def test_a_list_of_ratios_falls_stage_by_stage_and_a_step_can_be_set() -> None:
    model: Any = sparsify(build(), keep=(0.8, 0.4), at=[1, 2])
    schedule = KeepSchedule(10, start=0, end=2, step=10)
    with schedule(model) as ratios:
        assert ratios == pytest.approx([0.9, 0.7])  # half way
    schedule.step = 20
    with schedule(model) as ratios:
        assert ratios == [0.8, 0.4]
    with pytest.raises(RuntimeError, match="inside"), KeepSchedule(10)(model):
        raise RuntimeError("inside")
    assert model.spot_config.keep == (0.8, 0.4)


@pytest.mark.parametrize("method", ["evit", "spot"])
def test_fit_follows_the_schedule(method: str) -> None:
    model: Any = sparsify(build(), method=method, keep=0.5, at=[1, 2])
    batches = [(images(model, 2), torch.tensor([0, 1])) for _ in range(2)]
    seen = []
    model.register_forward_pre_hook(lambda net, args: seen.append(net.spot_config.keep))
    schedule = KeepSchedule(len(batches), start=1, end=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    report = fit(model, batches, optimizer, SpotObjective(schedule), epochs=3)
    assert seen == pytest.approx([1, 1, 1, 0.75, 0.5, 0.5])
    assert model.spot_config.keep == 0.5 and "ratio" in report


def test_noise_falls_evenly_and_the_own_is_back() -> None:
    model: Any = sparsify(build(), at=[1, 2], train_decision="topk", noise=0.7)
    schedule = NoiseSchedule(8, start=1.0, end=0.0)
    seen = []
    for _ in range(10):
        with schedule(model) as noise:
            assert model.spot_config.noise == model.spot_config.noise_scale == noise
        assert model.spot_config.noise == 0.7
        seen.append(noise)
    assert seen == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]
    seen.clear()
    model.register_forward_pre_hook(lambda net, args: seen.append(net.spot_config.noise))
    objective = SpotObjective(noise=NoiseSchedule(1, 0.5, 0.1))
    for _ in range(3):
        objective(model.train(), images(model, 2), torch.tensor([0, 1]))
    assert seen == [0.5, 0.1, 0.1] and model.spot_config.noise == 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda **changes: KeepSchedule(**{"steps_per_epoch": 4, "start": 1, "end": 3, **changes}),
        lambda **changes: NoiseSchedule(**{"steps": 9, "start": 0.75, "end": 0.25, **changes}),
    ],
)
def test_a_state_goes_on_where_it_was(make: Any) -> None:
    model: Any = sparsify(build(), keep=0.5, at=[1, 2], train_decision="topk")

    def follow(schedule: Any, count: int) -> list[Any]:
        seen = []
        for _ in range(count):
            with schedule(model) as value:
                seen.append(value)
        return seen

    schedule = make()
    follow(schedule, 5)
    state = json.loads(json.dumps(schedule.state_dict()))
    assert state["step"] == 5
    expected = follow(schedule, 6)
    other = make()
    other.load_state_dict(state)
    assert follow(other, 6) == expected and follow(make(), 6) != expected
    with pytest.raises(ValueError, match=r"state of \w+Schedule: end was 3.5 and is"):
        other.load_state_dict(make(end=3.5).state_dict())
    with pytest.raises(ValueError, match=r"expected \['end', 'start', .*got \['step'\]"):
        other.load_state_dict({"step": 1})
    assert other.step == 11


def test_a_compiled_model_is_not_compiled_anew_for_every_scale(fresh_compiler: None) -> None:
    model: Any = sparsify(build(), keep=0.5, at=[1, 2], train_decision="topk").train()
    counter = CompileCounter()
    compiled, schedule = torch.compile(model, backend=counter), NoiseSchedule(12)
    for _ in range(13):
        with schedule(compiled):
            compiled(images(model, 2))
    assert counter.frame_count <= 3  # the first one, any other, and none


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= start <= end, got start=5, end=4"):
        KeepSchedule(10, start=5, end=4)
    for kind, name, least in ((KeepSchedule, "steps_per_epoch", 1), (NoiseSchedule, "steps", 1)):
        for wrong in (0, True, 1.5, "1", None, math.nan, 2**80):
            with pytest.raises(ValueError, match=f"^{name} must be a whole number of {least} or"):
                kind(wrong)
        for wrong in (-1, True, 1.0, "1", 2**80):
            with pytest.raises(ValueError, match=r"^step must be a whole number of 0 or more"):
                kind(5, step=wrong)
            with pytest.raises(ValueError, match=r"^step must be a whole number of 0 or more"):
                kind(5).load_state_dict({**kind(5).state_dict(), "step": wrong})
        for field in ("start", "end"):
            for wrong in (-0.1, math.nan, math.inf, True, "1", None, [1], 1e308):
                with pytest.raises(ValueError, match=f"^{field} must be a number"):
                    kind(5, **{field: wrong})
    for schedule in (KeepSchedule(1), NoiseSchedule(1)):
        with pytest.raises(TypeError, match="expected a SPOT model"), schedule(nn.Linear(2, 2)):
            pass


def test_defaults_and_edges() -> None:
    keep, noise = KeepSchedule(4), NoiseSchedule(4)
    assert keep.state_dict() == {"steps_per_epoch": 4, "start": 10, "end": 100, "step": 0}
    assert noise.state_dict() == {"steps": 4, "start": 1.0, "end": 0.0, "step": 0}
    assert KeepSchedule(1, start=0, end=0).at(0) == 0
    sudden = KeepSchedule(2, start=3, end=3)
    assert [sudden.at(step) for step in (5, 6, 7)] == [1.0, 0.0, 0.0]
    assert NoiseSchedule(1, start=1e6, end=1e6).at(0) == 1e6
    for name in ("start", "end"):
        with pytest.raises(ValueError, match=rf"{name} must be a number from 0 to 1e\+06"):
            NoiseSchedule(1, **{name: 1_000_000.5})
    falling = KeepSchedule(1, start=0, end=7)
    for keeps in ((0.7, 0.3), 0.7):
        model: Any = sparsify(build(), keep=keeps, at=[1, 2])
        with KeepSchedule(1, start=0, end=7, step=1)(model):
            first = model.spot_config.keep
        expected = 0.7 + 0.3 * falling.at(1)
        first = first[0] if isinstance(first, tuple) else first
        assert first == round(first, 6) and abs(first - expected) <= 5.1e-7
        assert first == round(expected, 6) != round(expected, 7)
