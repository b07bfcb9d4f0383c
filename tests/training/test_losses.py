"""The training loss against hand computation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spot_vit.training.losses import (
    LossWeights,
    Teacher,
    cross_entropy,
    feature_distillation,
    sigmoid_distillation,
    softmax_distillation,
    spot_loss,
)
from timm.data import Mixup
from torch.nn import functional as F

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


def several_labels(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_targets_of_several_labels_are_refused_with_the_cure(dtype: torch.dtype) -> None:
    words = r"whose rows sum to 1.*sums to 3; .*criterion=.*binary_cross_entropy_with_logits"
    for call in (cross_entropy, lambda logits, target: spot_loss(make_output(), target, RATIOS)):
        with pytest.raises(ValueError, match=words):
            call(make_output().logits, several_labels(dtype))
    with pytest.raises(ValueError, match="sums to 0"):  # no label at all
        spot_loss(make_output(), torch.zeros(3, 5), RATIOS)
    negative = torch.tensor([[2.0, -1, 0, 0, 0]]).expand(3, -1)
    with pytest.raises(ValueError, match="rows sum to 1"):
        spot_loss(make_output(), negative, RATIOS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_and_smoothed_targets_are_probabilities(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    labels = torch.randint(1000, (64,))
    _, target = mixup(torch.randn(64, 3, 8, 8), labels)
    target, logits = target.to(dtype), torch.randn(64, 1000, dtype=dtype)
    assert torch.equal(cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_a_criterion_takes_the_place_of_the_cross_entropy() -> None:
    target, bce = several_labels(), F.binary_cross_entropy_with_logits
    total, parts = spot_loss(
        make_output(), target, RATIOS, weights=LossWeights(ce=3.0), criterion=bce
    )
    p = make_output().logits.detach().sigmoid()
    by_hand = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert set(parts) == {"criterion", "ratio"}
    torch.testing.assert_close(parts["criterion"], by_hand)
    torch.testing.assert_close(total, 3 * by_hand + 2 * parts["ratio"])


def test_distillation_fits_the_criterion_or_is_asked_for() -> None:
    target, bce = several_labels(), F.binary_cross_entropy_with_logits
    output, teacher = make_output(), make_teacher()
    with pytest.raises(ValueError, match=r"distillation=spot_vit\.sigmoid_distillation"):
        spot_loss(output, target, RATIOS, teacher, criterion=bce)
    total, parts = spot_loss(
        output, target, RATIOS, teacher, criterion=bce, distillation=sigmoid_distillation
    )
    assert set(parts) == {"criterion", "ratio", "distillation", "mse"}
    s, t = (x.logits.detach().double().sigmoid() for x in (output, teacher))
    by_hand = (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).mean()
    torch.testing.assert_close(parts["distillation"].double(), by_hand, rtol=1e-5, atol=0)
    terms = parts["criterion"] + 2 * parts["ratio"] + 0.5 * (parts["distillation"] + parts["mse"])
    torch.testing.assert_close(total, terms)
    _, parts = spot_loss(output, target, RATIOS, teacher, LossWeights(kl=0), criterion=bce)
    assert set(parts) == {"criterion", "ratio", "mse"}
    _, parts = spot_loss(
        output, target, RATIOS, teacher, criterion=bce, distillation=softmax_distillation
    )
    assert parts["kl"] > 0


def test_distillation_is_least_where_the_student_is_the_teacher() -> None:
    logits = make_teacher().logits.double()
    for distil in (sigmoid_distillation, softmax_distillation, feature_distillation):
        same = logits.clone().requires_grad_()
        loss = distil(same, logits)
        loss.backward()
        assert abs(loss.item()) < 1e-15 and same.grad.abs().max() < 1e-15
        assert distil(logits + torch.randn_like(logits), logits) > 1e-3


def test_without_a_target_the_teacher_is_all_there_is() -> None:
    output, teacher = make_output(), make_teacher()
    _, full = spot_loss(output, torch.tensor([0, 4, 2]), RATIOS, teacher)
    total, parts = spot_loss(output, None, RATIOS, teacher)
    assert set(parts) == {"ratio", "mse"}
    torch.testing.assert_close(total, 2 * full["ratio"] + 0.5 * full["mse"])
    _, parts = spot_loss(output, None, RATIOS, teacher, distillation=softmax_distillation)
    assert parts == {name: full[name] for name in ("kl", "ratio", "mse")}
    _, parts = spot_loss(output, None, [], teacher, distillation=feature_distillation)
    by_hand = (output.logits - teacher.logits).square().mean()
    torch.testing.assert_close(parts["distillation"], by_hand.detach())
    with pytest.raises(ValueError, match="nothing to learn from"):
        spot_loss(output, None, RATIOS)


def test_tokens_that_are_logits_are_compared_by_kl_over_kept_patches() -> None:
    output, teacher, target = make_output(), make_teacher(), torch.tensor([0, 4, 2])
    total, parts = spot_loss(output, target, RATIOS, teacher, token_term="kl")
    s, t = output.tokens.detach().double().softmax(2), teacher.tokens.double().softmax(2)
    kept = [(0, 0), (1, 0), (1, 1)]
    by_hand = sum((t[i, 1 + n] * (t[i, 1 + n] / s[i, 1 + n]).log()).sum() for i, n in kept) / 3
    torch.testing.assert_close(parts["token_kl"].double(), by_hand, rtol=1e-5, atol=0)
    rest = parts["ce"] + 0.5 * parts["kl"] + 2 * parts["ratio"]
    torch.testing.assert_close(total, rest + 0.5 * parts["token_kl"])
    with pytest.raises(ValueError, match="token_term must be one of"):
        spot_loss(output, target, RATIOS, teacher, token_term="l1")


def test_a_teacher_of_other_classes_is_named() -> None:
    teacher = make_teacher()
    with pytest.raises(ValueError, match="teacher: it has 1000 classes, the student 5"):
        spot_loss(make_output(), torch.tensor([0, 4, 2]), RATIOS,
                  Teacher(torch.randn(3, 1000), teacher.tokens))  # fmt: skip
    with pytest.raises(ValueError, match=r"teacher.logits: expected shape \[3, 5\]"):
        spot_loss(make_output(), torch.tensor([0, 4, 2]), RATIOS,
                  Teacher(torch.randn(2, 5), teacher.tokens))  # fmt: skip
