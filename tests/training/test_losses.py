"""The training loss against hand computation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spot_vit.training.losses import LossWeights, Teacher, spot_loss

RATIOS = [0.5, 0.25]


def make_output(seed: int = 0, batch: int = 3, patches: int = 4) -> Any:
    """What a SPOT ViT gives in training: two stages, a class token and four patches."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])[:batch]
    second = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])[:batch]
    return SimpleNamespace(
        logits=torch.randn(batch, 5, generator=draw).requires_grad_(),
        tokens=torch.randn(batch, 1 + patches, 6, generator=draw).requires_grad_(),
        masks=[first.requires_grad_(), second.requires_grad_()],
        logp=[],
        index=[],
    )


def make_teacher(seed: int = 1) -> Teacher:
    draw = torch.Generator().manual_seed(seed)
    return Teacher(torch.randn(3, 5, generator=draw), torch.randn(3, 5, 6, generator=draw))


def test_every_term_equals_its_definition() -> None:
    output, teacher, target = make_output(), make_teacher(), torch.tensor([0, 4, 2])
    total, parts = spot_loss(output, target, RATIOS, teacher)

    student, guide = (x.detach().double().softmax(1) for x in (output.logits, teacher.logits))
    ce = -sum(math.log(student[i, target[i]]) for i in range(3)) / 3
    kl = (guide * (guide / student).log()).sum().item() / 3
    kept = [(0, 0), (1, 0), (1, 1)]  # (image, patch) that survive the last stage
    errors = [
        (output.tokens[i, 1 + t] - teacher.tokens[i, 1 + t]).square().mean().item() for i, t in kept
    ]
    mse = sum(errors) / 3
    shares = [[2 / 4, 4 / 4, 1 / 4], [1 / 4, 2 / 4, 0]]
    ratio = sum((goal - s) ** 2 for goal, row in zip(RATIOS, shares, strict=True) for s in row) / 6

    for name, value in {"ce": ce, "kl": kl, "mse": mse, "ratio": ratio}.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-5), name
    assert total.item() == pytest.approx(ce + 0.5 * kl + 0.5 * mse + 2 * ratio, rel=1e-5)


def test_removed_patches_are_compared_at_their_own_places() -> None:
    """As masking does; EViT's fused tokens have no place and do not count."""
    masked, teacher, target = make_output(), make_teacher(), torch.tensor([0, 4, 2])
    index = torch.tensor([[0, 2], [1, 3], [2, 3]])
    masked.masks[1] = torch.zeros(3, 4).scatter(1, index, 1.0)
    _, expected = spot_loss(masked, target, RATIOS, teacher)
    rows = index[..., None].expand(-1, -1, 6)
    kept = masked.tokens[:, 1:].gather(1, rows)
    removed = SimpleNamespace(**vars(masked))
    removed.tokens = torch.cat([masked.tokens[:, :1], kept], dim=1)
    removed.index = [index[:, :1], index]
    _, parts = spot_loss(removed, target, RATIOS, teacher)
    assert parts["mse"].item() == pytest.approx(expected["mse"].item(), rel=1e-6)

    fused = torch.full((3, 1), 5)  # the token that cut 1 made, N + 1
    removed.index = [index, torch.cat([fused, index], dim=1)]
    removed.tokens = torch.cat([masked.tokens[:, :1], torch.randn(3, 1, 6), kept], dim=1)
    _, parts = spot_loss(removed, target, RATIOS, teacher)
    assert parts["mse"].item() == pytest.approx(expected["mse"].item(), rel=1e-6)


def test_weights_scale_the_terms_and_parts_stay_unweighted() -> None:
    target, weights = torch.tensor([0, 4, 2]), LossWeights(ce=2.0, kl=3.0, mse=5.0, ratio=7.0)
    total, parts = spot_loss(make_output(), target, RATIOS, make_teacher(), weights)
    _, plain = spot_loss(make_output(), target, RATIOS, make_teacher())
    assert parts == plain
    by_hand = sum(getattr(weights, name) * part for name, part in parts.items())
    assert total.item() == pytest.approx(float(by_hand), rel=1e-6)


def test_without_a_teacher_only_two_terms_remain() -> None:
    total, parts = spot_loss(make_output(), torch.tensor([0, 4, 2]), RATIOS)
    assert set(parts) == {"ce", "ratio"}
    assert total.item() == pytest.approx((parts["ce"] + 2 * parts["ratio"]).item(), rel=1e-6)


def test_gradients_reach_logits_kept_tokens_and_masks_only() -> None:
    output, teacher = make_output(), make_teacher()
    total, _ = spot_loss(output, torch.tensor([0, 4, 2]), RATIOS, teacher)
    total.backward()
    assert output.logits.grad.abs().sum() > 0
    moved = output.tokens.grad.abs().sum(2) > 0
    assert moved.tolist() == [
        [False, True, *[False] * 3],
        [False, True, True, False, False],
        [False] * 5,
    ]
    # d/dm of 2 * mean over 6 of (goal - mean of 4 m)^2: the distillation term leaves masks alone.
    for goal, mask in zip(RATIOS, output.masks, strict=True):
        by_hand = 2 * 2 / 6 * (mask.detach().mean(1, keepdim=True) - goal) / 4
        assert torch.allclose(mask.grad, by_hand.expand_as(mask), atol=1e-7)


def test_an_image_with_nothing_kept_is_no_nan() -> None:
    output = make_output()
    output.masks[1] = torch.zeros(3, 4)
    total, parts = spot_loss(output, torch.tensor([0, 4, 2]), RATIOS, make_teacher())
    assert parts["mse"].item() == 0 and total.isfinite()


def test_soft_targets_are_accepted() -> None:
    target = torch.tensor([0, 4, 2])
    soft = torch.nn.functional.one_hot(target, 5).float()
    hard_total, _ = spot_loss(make_output(), target, RATIOS)
    soft_total, _ = spot_loss(make_output(), soft, RATIOS)
    assert soft_total.item() == pytest.approx(hard_total.item(), rel=1e-6)


def test_what_does_not_fit_is_named() -> None:
    target = torch.tensor([0, 4, 2])
    with pytest.raises(ValueError, match="keep_ratios: expected 2 values"):
        spot_loss(make_output(), target, [0.5])
    teacher = make_teacher()
    with pytest.raises(ValueError, match=r"teacher.tokens: expected shape \[3, 5, 6\]"):
        spot_loss(make_output(), target, RATIOS, Teacher(teacher.logits, teacher.tokens[:, 1:]))
