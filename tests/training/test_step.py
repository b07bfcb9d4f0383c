"""One optimiser step: accumulation, precision, clipping, finite values, several processes."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.training.losses import LossWeights
from spot_vit.training.objectives import SpotObjective, dense_objective
from spot_vit.training.step import NonFiniteStep, TrainStep
from support.models import build, images
from support.ranks import batch, converted, together
from support.stepping import RUNS, both, run, weights
from support.training import make_model
from support.wrapped import wrapped
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LABELS = torch.tensor([0, 4, 2, 6, 1, 5])


def pieces(x: Tensor, target: Any, sizes: list[int]) -> list[tuple[Tensor, Any]]:
    targets = [None] * len(sizes) if target is None else target.split(sizes)
    return list(zip(x.split(sizes), targets, strict=True))


def toy(steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    """A linear model, its optimizer with a state, and a batch."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), (x, torch.arange(8) % 3)


# ---- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3, 3], [2, 2, 2], [1, 3, 2]], ids=str)
@pytest.mark.parametrize("method", ["dense", "spot", "sparsifiner"])
def test_small_batches_make_the_step_of_the_large_one(method: str, sizes: list[int]) -> None:
    model = build(dtype=torch.float64).train() if method == "dense" else converted(method)
    plain: Any = dense_objective
    if method == "spot":  # masks of this one keep as many patches of every image
        plain = SpotObjective(0.6, build(dtype=torch.float64), LossWeights(ratio=3.0))
    x = images(build(dtype=torch.float64), 6)
    results = []
    for parts in ([6], sizes):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(
            [p for p in trained.parameters() if p.requires_grad], lr=1e-2, momentum=0.9
        )
        step = TrainStep(trained, optimizer, plain, clip_grad=0.5)
        results.append(([step(pieces(x, LABELS, parts)) for _ in range(3)], trained))
    (large, one), (small, other) = results
    for a, b in zip(large, small, strict=True):
        assert list(a) == list(b) and list(a)[:2] == ["loss", "gradient_norm"]
        assert a["gradient_norm"] > 0.5
        for name in set(a) - {"noise_share"}:
            assert a[name] == pytest.approx(b[name], rel=1e-10, abs=1e-10), name
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)
    assert not torch.equal(one.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_a_step_is_that_of_a_loop_by_hand() -> None:
    model, optimizer, (x, y) = toy()
    twin = copy.deepcopy(model)
    adam = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    step = TrainStep(model, optimizer, dense_objective, clip_grad=0.1)
    for _ in range(4):
        values = step([(x, y)])
        loss = nn.functional.cross_entropy(twin(x), y)
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        adam.step()
        assert values == {"loss": loss.item(), "gradient_norm": norm.item()}
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_what_follows_the_backward_pass_sees_the_whole_gradient_once() -> None:
    model, optimizer, (x, y) = toy()
    seen: list[Tensor] = []
    step = TrainStep(
        model,
        optimizer,
        dense_objective,
        clip_grad=1e-3,
        after_backward=lambda: seen.append(model.weight.grad.clone()),
    )
    nn.functional.cross_entropy(model(x), y).backward()
    expected = model.weight.grad.clone()
    step(pieces(x, y, [4, 4]))
    assert len(seen) == 1 and expected.norm() > 1e-2
    torch.testing.assert_close(seen[0], expected)


def test_batches_that_make_no_step_are_named() -> None:
    model, optimizer, (x, y) = toy()

    def uneven(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = dense_objective(model, x, target)
        return loss, {"ce" if len(x) > 3 else "kl": loss.detach()}

    for batches in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="expected at least one, with images in it"):
            TrainStep(model, optimizer, dense_objective)(batches)
    with pytest.raises(ValueError, match=r"same terms, got \['ce'\] and \['kl'\]"):
        TrainStep(model, optimizer, uneven)(pieces(x, y, [5, 3]))


# ---- values that are not finite ------------------------------------------------------------------


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    slots = [v for s in optimizer.state.values() for v in s.values()]
    return [t.clone() for t in [*model.state_dict().values(), *slots]]


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_moves_where_a_value_is_not_finite(where: str, amp: Any) -> None:
    model, optimizer, (x, y) = toy()
    bad = False

    def trouble(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = dense_objective(model, x, target)
        term = loss.detach()
        if bad and where == "loss":
            loss = loss * math.nan
        elif bad:  # sqrt(0) is finite, its derivative is not
            loss = loss + (model.weight * 0).sum().sqrt()
        return loss, {"term": term}

    step = TrainStep(model, optimizer, trouble, amp_dtype=amp)
    if step.scaler is not None:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # nothing left to try
    step([(x, y)])
    before, bad = state(model, optimizer), True
    with pytest.raises(NonFiniteStep, match=r"^not finite: loss .*gradient_norm .*term") as caught:
        step([(x, y)])
    assert isinstance(caught.value, FloatingPointError)
    values = caught.value.values
    assert list(values) == ["loss", "gradient_norm", "term"] and math.isfinite(values["term"])
    assert math.isnan(values["loss"]) is (where == "loss")
    assert all(map(torch.equal, before, state(model, optimizer)))
    bad = False
    assert step([(x, y)])["loss"] < 2 and step.skipped == 0
    assert not torch.equal(before[0], model.weight)


def test_the_error_says_where() -> None:
    error = NonFiniteStep({"loss": math.nan, "ce": 0.5}, " at step 3", "toy")
    assert str(error).startswith("toy: not finite at step 3: loss nan, ce 0.5; lower the learning")
    assert error.values["ce"] == 0.5


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_the_objective_runs_in_the_precision_that_is_asked_for(amp: torch.dtype) -> None:
    model, optimizer, (x, y) = toy()
    seen = []

    def watched(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(x)
        seen.append(logits.dtype)
        return logits.mean(), {}  # half as well, and too large for float16 once it is scaled

    step = TrainStep(model, optimizer, watched, amp_dtype=amp)
    values = step(pieces(x, y, [4, 4]))
    assert seen == [amp, amp] and model.weight.grad.dtype == torch.float32
    assert values["loss"] == pytest.approx(toy()[0](x).mean().item(), abs=2e-2)
    assert (step.scaler is not None) is (amp is torch.float16) and step.skipped == 0


@pytest.mark.parametrize("method", ["dense", "spot"])
def test_float16_steps_are_those_of_float32_nearly(method: str) -> None:
    made = build()
    if method == "spot":
        made = spot_vit.sparsify(made, keep=0.6, at=[1, 2], train_decision="topk", noise=0.0)
    x, found = images(made, 6), []
    for amp in (None, torch.float16):
        model = copy.deepcopy(made).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        step = TrainStep(
            model,
            optimizer,
            dense_objective if method == "dense" else SpotObjective(),
            amp_dtype=amp,
            scaler=None if amp is None else torch.amp.GradScaler("cpu", init_scale=64.0),
            clip_grad=1.0,
        )
        torch.manual_seed(4)
        found.append(step(pieces(x, LABELS, [3, 3])))
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=2e-2)
    assert found[1]["gradient_norm"] == pytest.approx(found[0]["gradient_norm"], rel=0.1)


def test_gradients_too_small_for_float16_are_there_with_the_scaler_alone() -> None:
    grads = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model, optimizer, (x, _) = toy()

        def tiny(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return model(x).float().mul(1e-8).sum(), {}

        step = TrainStep(model, optimizer, tiny, amp_dtype=torch.float16, scaler=scaler)
        values = step([(x, None)])
        grads.append(model.bias.grad.clone())
        assert values["gradient_norm"] == pytest.approx(
            math.hypot(model.bias.grad.norm(), model.weight.grad.norm())
        )
    torch.testing.assert_close(grads[0], torch.full((3,), 8e-8), rtol=1e-2, atol=0)
    assert grads[1].count_nonzero() == 0


def test_a_gradient_that_is_too_large_by_its_scale_is_skipped_and_counted() -> None:
    model, optimizer, (x, y) = toy()
    steep = True

    def sometimes(model: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = dense_objective(model, x, target)
        return loss + ((loss - loss.detach()) * 1e2 if steep else 0.0), {}

    step = TrainStep(model, optimizer, sometimes, amp_dtype=torch.float16, clip_grad=1.0)
    scaler = step.scaler
    assert scaler is not None and scaler.get_scale() == 2.0**16
    before, counts = state(model, optimizer), []
    while not optimizer.state:  # until it moves
        assert all(map(torch.equal, before, state(model, optimizer)))
        values = step([(x, y)])
        counts.append((step.skipped, scaler.get_scale()))
    assert len(counts) > 1
    assert counts[:-1] == [(n, 2.0 ** (16 - n)) for n in range(1, len(counts))]
    assert counts[-1] == (len(counts) - 1, counts[-2][1])
    assert math.isfinite(values["gradient_norm"])
    steep = False
    step([(x, y)])
    assert step.skipped == len(counts) - 1
    kept = copy.deepcopy(scaler.state_dict())
    assert kept["scale"] == counts[-1][1]


# ---- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "value"), [("norm", 0.3), ("value", 1e-3), ("agc", 0.02)])
def test_gradients_are_clipped_as_timm_does(mode: str, value: float) -> None:
    model, x = build().train(), images(build(), 6)
    twin = copy.deepcopy(model)
    step = TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        dense_objective,
        clip_grad=value,
        clip_mode=mode,
    )
    norm = step([(x, LABELS)])["gradient_norm"]
    nn.functional.cross_entropy(twin(x), LABELS).backward()
    plain = [p.grad.clone() for p in twin.parameters()]
    assert norm == pytest.approx(torch.stack([g.norm() for g in plain]).norm().item(), rel=1e-5)
    parameters = list(twin.parameters())
    dispatch_clip_grad(parameters[:-2] if mode == "agc" else parameters, value, mode)
    for (name, p), q in zip(model.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight.grad, plain[14])
    if mode == "agc":
        assert torch.equal(model.head.weight.grad, plain[-2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"amp_dtype": torch.float64}, "amp_dtype: expected torch.bfloat16, torch.float16 or None"),
        ({"clip_mode": "max"}, r"clip_mode: expected one of \['norm', 'value', 'agc'\], got 'max'"),
        ({"clip_grad": 0.0}, "clip_grad: expected more than 0"),
        ({"clip_grad": math.nan}, "clip_grad: expected more than 0"),
    ],
)
def test_settings_that_there_are_not_are_named(given: dict[str, Any], words: str) -> None:
    model, optimizer, _ = toy()
    with pytest.raises(ValueError, match=words):
        TrainStep(model, optimizer, dense_objective, **given)


# ---- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> Any:
    return together(both)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "clip", "clip_grad"), RUNS)
def test_two_processes_that_accumulate_are_one(
    results: Any, how: str, clip: str, clip_grad: float
) -> None:
    alone, accuracy = converted("spot"), 1e-10
    if how == "FSDP1":  # whose own norm knows float32 alone
        alone, accuracy = alone.float(), 1e-5
    x = batch().to(next(alone.parameters()).dtype)
    expected = run(alone, [(x, None)], clip, clip_grad)
    values, after = results["steps"][f"{how} {clip}"]
    for mine, theirs in zip(values, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=accuracy, abs=accuracy)
    own, start = weights(alone), weights(converted("spot"))
    assert set(after) == set(own)
    for name, value in own.items():
        torch.testing.assert_close(after[name], value, rtol=accuracy, atol=accuracy, msg=name)
    assert any(not torch.equal(own[name], start[name].to(x)) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_trouble_of_one_process_is_that_of_both(results: Any, how: str) -> None:
    found = results["trouble"]
    assert math.isinf(found[f"{how} endless"]["loss"])
    assert math.isfinite(found[f"{how} endless"]["gradient_norm"])
    assert found[f"{how} steep"] == (1, 2.0**14, True)
    norm, skipped = found[f"{how} after"]
    assert 0 < norm < math.inf and skipped == 1


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_processes_exchange_gradients_with_the_last_batch(
    kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    flags, switch = [True], FSDPModule.set_requires_gradient_sync

    def spy(module: Any, now: bool) -> None:
        flags.append(now)
        switch(module, now)

    monkeypatch.setattr(FSDPModule, "set_requires_gradient_sync", spy)
    with wrapped(nn.Sequential(nn.Linear(4, 3)), "DDP") as outside:
        model: Any = outside
        if kind == "FSDP2":
            model = fully_shard(outside.module, mesh=init_device_mesh("cpu", (1,)))

        def watched(given: nn.Module, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
            assert given is trained
            asked.append(flags[-1] if kind == "FSDP2" else model.require_backward_grad_sync)
            return given(x).sum(), {}

        trained = torch.compile(model, backend="eager") if compiled else model
        step = TrainStep(trained, torch.optim.SGD(model.parameters(), lr=1e-3), watched)
        for sizes in ([2, 2, 2], [6], [3, 3]):
            step(pieces(torch.randn(6, 4), None, sizes))
    assert asked == [False, False, True, True, False, True]


# ---- what it costs -------------------------------------------------------------------------------


class Transfers(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    NAMES = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Any:
    with Transfers() as transfers, Operations() as operations:
        yield transfers, operations


def test_a_step_waits_for_the_device_once_and_adds_few_operations() -> None:
    model = make_model()
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step = TrainStep(model, optimizer, dense_objective, clip_grad=1.0)
    with counted() as (transfers, by_step):
        step([(x, y)])
    with counted() as (_, by_hand):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert transfers.found == ["tolist"]
    assert 0 <= by_step.count - by_hand.count <= 12
    half = TrainStep(model, optimizer, dense_objective, amp_dtype=torch.float16)
    half([(x, y)])
    with counted() as (transfers, _):
        half(pieces(x, y, [4, 4]))
    assert transfers.found == ["tolist"] and half.skipped == 0
