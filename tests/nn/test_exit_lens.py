"""ExitLens: the identity at first, an affine map per stage, and what it learns."""

from __future__ import annotations

import pytest
import spot_vit
import torch
from spot_vit import ExitLens
from support.models import build, images

DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def drawn_masks(stages: int, batch: int = 2, grid: int = 12) -> list[torch.Tensor]:
    masks, alive = [], torch.ones(batch, grid, dtype=torch.float64)
    for _ in range(stages):
        alive = alive * (torch.rand(batch, grid, generator=DRAW) < 0.7)
        masks.append(alive)
    return masks


def filled(stages: int, dim: int = 5) -> ExitLens:
    lens = ExitLens(dim, stages).double()
    with torch.no_grad():
        lens.weight.copy_(random(*lens.weight.shape))
        lens.bias.copy_(random(*lens.bias.shape))
    return lens


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_every_token_by_the_map_of_its_stage(stages: int) -> None:
    lens, x, masks = filled(stages), random(2, 12, 5), drawn_masks(4)
    found = lens(x, masks)
    for b in range(2):
        for n in range(12):
            k = int(sum(mask[b, n] for mask in masks[:stages]))
            expected = x[b, n] + x[b, n] @ lens.weight[k] + lens.bias[k]
            torch.testing.assert_close(found[b, n], expected, rtol=0, atol=1e-12)


def test_it_starts_as_the_identity_and_takes_both_layouts() -> None:
    x, masks = random(2, 12, 5), drawn_masks(2)
    assert torch.equal(ExitLens(5, 2).double()(x, masks), x)
    lens = filled(2)
    image = x.transpose(1, 2).unflatten(2, (3, 4))
    expected = lens(x, masks).transpose(1, 2).unflatten(2, (3, 4))
    assert torch.equal(lens(image, masks), expected)
    assert repr(lens) == "ExitLens(dim=5, stages=2)"


def test_it_learns_what_stages_differ_by() -> None:
    x, masks, truth = random(8, 12, 5), drawn_masks(2, 8), filled(2)
    wanted = truth(x, masks).detach()
    lens = ExitLens(5, 2).double()
    optimizer = torch.optim.Adam(lens.parameters(), lr=0.05)
    for _ in range(400):
        loss = (lens(x, masks) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4 < 0.1 < (x - wanted).square().mean()


def test_on_the_maps_of_a_model_training_and_inference_agree() -> None:
    model = spot_vit.sparsify(build("class token", torch.float64), keep=0.6, at=[1, 2, 3])
    x, lens = images(model), filled(3, 48)
    ask = {"indices": [4], "intermediates_only": True, "aux": True}
    with torch.no_grad():
        (expected,), out = model.forward_intermediates(x, **ask)
        (found,), trained = model.train().forward_intermediates(x, kept=out.index, **ask)
        assert lens(expected, out.masks).shape == expected.shape
        torch.testing.assert_close(
            lens(found, trained.masks), lens(expected, out.masks), rtol=0, atol=1e-8
        )


def test_what_does_not_fit_is_named() -> None:
    lens = ExitLens(5, 2)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        lens(torch.randn(2, 12, 5), drawn_masks(1))
    with pytest.raises(ValueError, match=r"masks\[0\] must have the map's grid, \[2, 9\]"):
        lens(torch.randn(2, 9, 5), drawn_masks(2))
    with pytest.raises(ValueError, match="stages >= 0, got 5 and -1"):
        ExitLens(5, -1)
