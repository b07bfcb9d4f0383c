"""One model at several budgets: each place runs at its own, costs are its own, differences pair."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import spot_vit
import torch
from spot_vit.evaluation import sweep
from spot_vit.evaluation.accuracy import Evaluation, evaluate, evaluate_all
from spot_vit.evaluation.statistics import paired_difference
from spot_vit.evaluation.sweep import Prepared, gmacs_of, paired, speed_of
from spot_vit.measure.latency import Latency
from spot_vit.utils.modes import unwrap
from support.models import build, images
from torch import nn

SIZE = (3, 64, 64)


def places(model: nn.Module) -> dict[str, Prepared]:
    return {
        f"{keep}": Prepared(model, partial(spot_vit.set_keep, tokens=keep))
        for keep in (1.0, 0.7, 0.4)
    }


def test_one_pass_gives_what_each_budget_gives_alone() -> None:
    model = spot_vit.sparsify(build(), keep=0.7, at=[1, 3])
    x = images(model, 6)
    loader = [(part, torch.tensor([0, 1, 2])) for part in x.split(3)]
    found = evaluate_all(places(model), loader, progress=False)
    assert len({tuple(one.losses.tolist()) for one in found.values()}) == 3
    for keep, one in found.items():
        alone = evaluate(spot_vit.set_keep(model, float(keep)), loader, progress=False)
        assert torch.equal(one.losses, alone.losses) and torch.equal(one.best, alone.best)
    dense = evaluate(build(), loader, progress=False)
    assert torch.equal(found["1.0"].losses, dense.losses)  # the same weights, nothing removed


def test_cost_is_that_of_the_budget_and_not_of_the_last_one() -> None:
    model = spot_vit.sparsify(build(), keep=0.7, at=[1, 3])
    every = places(model)
    costs = [gmacs_of(every[keep], SIZE) for keep in ("0.4", "1.0", "0.7")]
    assert costs[0] and costs[1] and costs[2] and costs[0] < costs[2] < costs[1]
    expected = spot_vit.count_flops(spot_vit.set_keep(model, 0.4), SIZE).total / 1e9
    assert costs[0] == expected
    assert unwrap(every["0.4"]) is model


def test_a_model_that_cannot_be_counted_has_no_cost() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())  # reads a value, which meta tensors have not

    assert gmacs_of(Prepared(Host()), SIZE) is None


def test_precision_of_a_place() -> None:
    model = build()
    logits = Prepared(model, None, torch.bfloat16)(images(model))
    assert logits.dtype == torch.bfloat16 and Prepared(model)(images(model)).dtype == torch.float32


def latency(milliseconds: float, ratio: float) -> Latency:
    return Latency(milliseconds, milliseconds, milliseconds, ratio)


@pytest.mark.parametrize("reason", [None, "other processes used 1.50 CPUs (0.10 allowed)"])
def test_speed_states_no_ratio_on_a_busy_machine(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def compare(
        models: dict[str, nn.Module], x: torch.Tensor, **options: int
    ) -> dict[str, Latency]:
        rounds.append(options["rounds"])
        return {"dense": latency(40.0, 1.0), "sparse": latency(20.0, 0.5)}

    monkeypatch.setattr(sweep, "compare_latency", compare)
    monkeypatch.setattr(sweep, "contention", lambda *_: reason)
    monkeypatch.setattr(sweep, "wait_for_quiet", lambda patience: patience)
    models = {"dense": nn.Identity(), "sparse": nn.Identity()}
    found = speed_of(models, dict.fromkeys(models, torch.zeros(8, 1)), 0.6)
    assert found.images_per_second == {"dense": pytest.approx(200), "sparse": pytest.approx(400)}
    assert found.ratio == ({} if reason else {"dense": 1.0, "sparse": 0.5})
    assert found.busy == reason and found.batch == 8
    assert rounds == [2, 10]  # 0.6 s of 60 ms


def test_speed_is_measured_on_images_of_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "wait_for_quiet", lambda patience: patience)
    sides = {"small": build(), "large": build(img_size=80)}
    shown: dict[str, set[int]] = {name: set() for name in sides}
    for name, model in sides.items():
        model.register_forward_pre_hook(lambda _, args, n=name: shown[n].add(args[0].shape[-1]))
    given = {name: images(model) for name, model in sides.items()}
    found = speed_of(sides, given, seconds=0.01)
    assert shown == {"small": {64}, "large": {80}}
    assert all(value > 0 for value in found.images_per_second.values())
    assert not sides["small"].training


def result(correct: list[int], index: list[int]) -> Evaluation:
    none = torch.empty(0)
    right = torch.tensor(correct, dtype=torch.bool)
    return Evaluation(
        0.0, 0.0, right, 0.0, right, none, none, none, none, torch.tensor(index), num_classes=2
    )


def test_differences_are_of_the_images_that_both_have_seen() -> None:
    ours = result([1, 1, 0, 1, 1], [0, 1, 2, 5, 7])
    theirs = result([0, 1, 1, 0, 0, 1], [1, 2, 3, 5, 6, 7])
    expected = paired_difference(
        torch.tensor([True, False, True, True]), torch.tensor([False, True, False, True]), range(4)
    )
    assert paired(ours, theirs) == expected and expected[0] == 0.25
    groups = np.array([0, 1, 1, 2, 2, 3, 3, 3])
    grouped = paired(ours, theirs, groups)
    assert grouped[0] == 0.25 and grouped[1] != expected[1]
    with pytest.raises(ValueError, match="no image in common"):
        paired(result([1], [0]), result([1], [3]))
