"""A budget drawn at every step: exact, reproducible, and gone afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit import SampledKeep, set_keep, sparsify
from spot_vit.demos.setup import Recipe, build_dense
from spot_vit.training.objectives import SpotObjective
from torch import nn

RECIPE = Recipe(width=16, depth=4, heads=2)


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"keep": 0.6, "at": [1, 2], "train_decision": "topk", **changes}
    return sparsify(build_dense(RECIPE), **settings).train()


def test_every_step_keeps_exactly_what_was_drawn_and_then_the_own_budget_is_back() -> None:
    model, draw, seen = make_model(), SampledKeep(0.3, 1.0, seed=1), []
    images = torch.rand(2, 1, 64, 64)
    for _ in range(8):
        with draw(model) as ratios:
            keep = model.spot_config.keep
            masks = model(images, aux=True).masks
        assert 0.3 <= keep <= 1 and ratios == pytest.approx([keep, keep**2])
        for stage, mask in enumerate(masks, start=1):
            exact = 64 * round(keep * 1000) ** stage // 1000**stage
            assert (mask.sum(dim=1) == exact).all()
        assert model.spot_config.keep == 0.6
        seen.append(keep)
    assert len(set(seen)) == 8
    again = SampledKeep(0.3, 1.0, seed=1)
    for keep in seen:
        with again(model):
            assert model.spot_config.keep == keep


def test_a_state_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    model, draw = make_model(), SampledKeep(0.3, 1.0, seed=4)

    def drawn(draw: SampledKeep, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            with draw(model) as ratios:
                seen.append(ratios[0])
        return seen

    before = drawn(draw, 700)  # beyond the 624 words of a state
    torch.save(draw.state_dict(), tmp_path / "state.pt")
    texts = json.dumps(draw.state_dict())
    expected = drawn(draw, 700)
    assert len(set(before + expected)) > 300
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), json.loads(texts)):
        other = SampledKeep(0.3, 1.0, seed=9)
        other.load_state_dict(state)
        assert drawn(other, 700) == expected


def test_a_state_of_other_settings_is_refused() -> None:
    draw = SampledKeep(0.3, 1.0, seed=4)
    kept = draw.state_dict()
    with pytest.raises(ValueError, match=r"SampledKeep: low was 0.4 and is 0.3, power was 1.0 and"):
        draw.load_state_dict(SampledKeep(0.4, 1.0, power=1.0).state_dict())
    with pytest.raises(ValueError, match=r"expected \['high', .*got \['step'\]"):
        draw.load_state_dict({"step": 3})
    assert draw.state_dict() == kept


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_draws_cover_the_whole_range(power: float) -> None:
    model, draw, seen = make_model(), SampledKeep(0.3, 1.0, power=power), []
    for _ in range(400):
        with draw(model):
            seen.append(model.spot_config.keep)
    assert min(seen) < 0.33 and max(seen) > 0.97
    assert sum(seen) / 400 == pytest.approx(0.3 + 0.7 / (1 + power), abs=0.04)


def test_an_error_inside_brings_the_budget_back_too() -> None:
    model = make_model(keep=(0.8, 0.5))
    with pytest.raises(RuntimeError, match="inside"), SampledKeep()(model):
        raise RuntimeError("inside")
    assert model.spot_config.keep == (0.8, 0.5)


def test_the_objective_draws_through_a_wrapper() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.module(*args, **options)

    model = make_model()
    images, labels = torch.rand(2, 1, 64, 64), torch.tensor([1, 2])
    torch.manual_seed(3)
    loss, parts = SpotObjective(SampledKeep(0.45, 0.45))(Wrapped(model), images, labels)
    loss.backward()
    fixed = set_keep(copy.deepcopy(model), 0.45)
    torch.manual_seed(3)
    expected, _ = SpotObjective(fixed.spot_config.keep_ratios())(fixed, images, labels)
    assert torch.equal(loss, expected)
    assert parts["ratio"].item() < 1e-3  # exact but for rounding down
    assert all(p.grad is not None for p in model.blocks[1].relevance.parameters())


def test_what_cannot_work_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="train_decision='topk'"),
        SampledKeep()(make_model(train_decision="gumbel")),
    ):
        pass
    with pytest.raises(TypeError, match="expected a SPOT model"), SampledKeep()(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"low <= high, got low=0.5, high=0.4"):
        SampledKeep(0.5, 0.4)
    for name in ("low", "high", "power", "seed"):
        for wrong in (0.0, 1e-9, -1e-9, True, "1", None, float("nan"), float("inf"), [0.5]):
            if name == "power" and wrong == 1e-9:
                continue
            with pytest.raises(ValueError, match=f"^{name} must be a (whole )?number"):
                SampledKeep(**{name: wrong})
    with pytest.raises(ValueError, match=r"^high must be a number from 0\.001 to 1, got 1\.1"):
        SampledKeep(high=1.1)
    draw = SampledKeep()
    for words in ([], [2**80], "x", [1.5] * 625):
        place = {"version": 3, "words": words}
        with pytest.raises(ValueError, match="state of SampledKeep"):
            draw.load_state_dict({**draw.state_dict(), "random": place})
    with pytest.raises(ValueError, match="state of SampledKeep"):
        draw.load_state_dict({**draw.state_dict(), "random": 3})


def test_defaults_and_edges() -> None:
    draw = SampledKeep()
    settings = {name: draw.state_dict()[name] for name in ("low", "high", "power")}
    assert settings == {"low": 0.3, "high": 1.0, "power": 3.0}
    assert draw.state_dict() == SampledKeep(seed=0).state_dict() != SampledKeep(seed=1).state_dict()
    assert SampledKeep(1.0, 1.0).low == 1.0 and SampledKeep(1e-3, 1e-3).high == 1e-3
    SampledKeep(seed=2**63), SampledKeep(seed=-5)
    with pytest.raises(ValueError, match="seed must be"):
        SampledKeep(seed=2**63 + 1)
    model, found = make_model(keep=0.5), []
    for _ in range(20):
        with draw(model):
            found.append(model.spot_config.keep)
    assert all(keep == round(keep, 3) for keep in found)
    assert any(keep != round(keep, 2) for keep in found)
