"""The training loop, evaluation, and files that are complete or not there."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.training.fit import cosine_schedule, fit
from spot_vit.training.objectives import SpotObjective, dense_objective
from support.models import build
from support.models import images as pictures
from support.training import make_loader, make_model, make_optimizer
from torch import Tensor, nn


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


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_spot_model_is_trained_by_its_own_loss(wrap: Any) -> None:
    reports = []
    for objective in (None, SpotObjective()):
        model = spot_vit.sparsify(build(), keep=0.5, at=[1, 2])
        batches = [(pictures(model, 4), torch.tensor([0, 1, 2, 3]))]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.manual_seed(2)
        reports.append(fit(wrap(model), batches, optimizer, objective))
    assert {"ce", "ratio", "noise_share"} < set(reports[0])
    assert all(reports[0][name] == reports[1][name] for name in reports[0] if name != "seconds")
    model = build()
    report = fit(model, batches, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert set(report) == {"steps", "seconds", "loss", "gradient_norm"}


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: (x,), lambda x: [x, None]])
def test_batches_may_come_without_labels(batch: Any) -> None:
    model = spot_vit.sparsify(build(), keep=0.5, at=[1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report = fit(model, [batch(pictures(model, 4))], optimizer, SpotObjective(teacher=build()))
    assert report["kl"] > 0 and "ce" not in report
    with pytest.raises(ValueError, match="learns from labels"):
        fit(build(), [batch(pictures(model, 4))], optimizer, dense_objective)


def test_an_empty_loader_is_named() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"toy: the loader is empty; does drop_last"):
        fit(model, [], make_optimizer(model), name="toy")


def test_a_group_that_never_trains_is_named() -> None:
    def groups(**options: Any) -> torch.optim.Optimizer:
        model = spot_vit.sparsify(build(), keep=0.5, at=[1, 2])
        return torch.optim.AdamW(spot_vit.param_groups(model, **options))

    model = make_model()
    words = r"3 epochs, .*: backbone \(freeze_epochs=5\), backbone_no_decay \(freeze_epochs=5\);"
    with pytest.warns(UserWarning, match=words):
        fit(model, make_loader(), groups(), dense_objective, epochs=3)
    with pytest.warns(UserWarning, match="rest for all of them"):
        fit(model, make_loader(), groups(freeze_epochs=1), dense_objective, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, make_loader(), groups(freeze_epochs=1), dense_objective, epochs=2)
        fit(model, make_loader(), make_optimizer(model), epochs=1)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: [x, y, "name"],
        lambda x, y: {"image": x, "label": y},
        lambda x, y: {"pixel_values": x, "labels": y, "names": ["a"]},
    ],
)
def test_batches_may_be_of_any_form(form: Any) -> None:
    reports = []
    for made in (lambda x, y: (x, y), form):
        model = make_model()
        batches = [made(x, y) for x, y in make_loader()]
        reports.append(fit(model, batches, make_optimizer(model)))
    assert reports[1]["loss"] == reports[0]["loss"]
    with pytest.raises(TypeError, match="batch: expected a tensor of images"):
        fit(make_model(), ["images"], make_optimizer(make_model()))


def test_accumulated_batches_are_steps_of_large_ones() -> None:
    found = []
    for size, accumulate in ((48, 1), (16, 3)):  # 128 images: two steps of 48 and one of 32
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        batches = [(x.double(), y) for x, y in make_loader(size)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        report = fit(model, batches, optimizer, epochs=2, warmup=1, accumulate=accumulate)
        found.append((report, model.weight.detach()))
    (large, one), (small, other) = found
    assert large["steps"] == small["steps"] == 6
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-10)
    torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="accumulate: expected at least 1 batch a step, got 0"):
        fit(make_model(), make_loader(), make_optimizer(make_model()), accumulate=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_as_well(dtype: torch.dtype) -> None:
    model, loader, seen = make_model(), make_loader(), set()
    model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    fit(model, loader, make_optimizer(model), epochs=10, warmup=5, clip_grad=1.0, amp_dtype=dtype)
    assert seen == {dtype}
    assert evaluate(model, loader).top1 > 0.95
