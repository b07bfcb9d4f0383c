"""Losses from plain settings, against timm's."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from spot_vit.training.criteria import criterion_for
from spot_vit.training.losses import sigmoid_distillation, softmax_distillation
from spot_vit.training.objectives import SpotObjective, dense_objective
from spot_vit.training.sparsifiner import SparsifinerObjective
from spot_vit.training.step import TrainStep
from support.models import build, images
from support.ranks import converted
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

torch.manual_seed(0)
LOGITS = torch.randn(6, 5, dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 1, 1, 3])
SEVERAL = (torch.rand(6, 5) > 0.6).long()


def mixed(smoothing: float) -> Tensor:
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=5)
    return mix(torch.randn(6, 3, 8, 8), LABELS)[1].double()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_label_an_image_is_timms_cross_entropy(smoothing: float) -> None:
    own = criterion_for(smoothing=smoothing)
    theirs = LabelSmoothingCrossEntropy(smoothing)
    torch.testing.assert_close(own(LOGITS, LABELS), theirs(LOGITS, LABELS))
    soft = mixed(smoothing)
    for criterion in (own, criterion_for(smoothing=smoothing, mixup=True)):
        torch.testing.assert_close(criterion(LOGITS, soft), SoftTargetCrossEntropy()(LOGITS, soft))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("thresh", [None, 0.3])
@pytest.mark.parametrize("total", [False, True])
def test_binary_cross_entropy_is_timms(smoothing: float, thresh: Any, total: bool) -> None:
    given = {"bce_loss": True, "bce_target_thresh": thresh, "bce_sum": total}
    theirs = BinaryCrossEntropy(smoothing, target_threshold=thresh, sum_classes=total)
    own = criterion_for(smoothing=smoothing, **given)
    torch.testing.assert_close(own(LOGITS, LABELS), theirs(LOGITS, LABELS))
    soft = mixed(smoothing)
    blended = criterion_for(smoothing=smoothing, mixup=True, **given)
    torch.testing.assert_close(blended(LOGITS, soft), theirs(LOGITS, soft))
    # Labels of any dtype, and towards one half.
    expected = SEVERAL.double() * (1 - smoothing) + smoothing / 2
    if thresh is not None:
        expected = (expected > thresh).double()
    loss = F.binary_cross_entropy_with_logits(LOGITS, expected, reduction="none")
    loss = loss.sum(1).mean() if total else loss.mean()
    for target in (SEVERAL, SEVERAL.bool(), SEVERAL.double()):
        torch.testing.assert_close(own(LOGITS, target), loss)


def test_half_precision_does_not_round_the_labels() -> None:
    logits = LOGITS.bfloat16()
    loss = criterion_for(smoothing=0.1, bce_loss=True)(logits, SEVERAL)
    expected = SEVERAL * 0.9 + 0.05
    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(logits.float(), expected.float())
    )


def test_several_labels_are_not_trained_with_softmax() -> None:
    for given in ({}, {"smoothing": 0.1}, {"mixup": True}):
        with pytest.raises(ValueError, match=r"rows sum to 1.*\(--bce-loss\)"):
            criterion_for(**given)(LOGITS, SEVERAL.double())


@pytest.mark.parametrize("target", [SEVERAL[:, :4], LABELS.double(), LABELS[:4], LABELS[:, None]])
def test_targets_of_another_shape_are_named(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"target: expected class indices.*for logits \[6, 5\]"):
        criterion_for(bce_loss=True)(LOGITS, target)


def test_two_heads_are_named() -> None:
    for given in ({}, {"bce_loss": True}):
        with pytest.raises(TypeError, match="logits must be a tensor, got tuple"):
            criterion_for(**given)((LOGITS, LOGITS), LABELS)  # type: ignore[arg-type]


def test_settings_that_do_not_fit_are_named() -> None:
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match="smoothing: expected a share"):
            criterion_for(smoothing=smoothing)
    for given in ({"bce_sum": True}, {"bce_target_thresh": 0.2}):
        with pytest.raises(ValueError, match="need bce_loss"):
            criterion_for(**given)  # type: ignore[arg-type]


def test_criteria_are_copied_and_pickled() -> None:
    for given in ({"smoothing": 0.1}, {"bce_loss": True, "smoothing": 0.1}):
        criterion = criterion_for(**given)  # type: ignore[arg-type]
        for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            assert torch.equal(other(LOGITS, LABELS), criterion(LOGITS, LABELS))


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "spot", "both"])
@pytest.mark.parametrize("bce", [False, True])
def test_every_objective_trains_with_them(kind: str, bce: bool, amp: Any) -> None:
    model: nn.Module = (build() if kind == "dense" else converted(kind).float()).train()
    x = images(build(), 6)
    target = (torch.rand(6, 7) > 0.6).long() if bce else torch.randn(6, 7).softmax(1)
    criterion = criterion_for(smoothing=0.1, bce_loss=bce, mixup=not bce)
    given: dict[str, Any] = {
        "teacher": build(),
        "criterion": criterion,
        "distillation": sigmoid_distillation if bce else softmax_distillation,
    }
    objective: Any = {
        "dense": partial(dense_objective, criterion=criterion),
        "spot": SpotObjective(**given),
        "both": SparsifinerObjective(**given),
    }[kind]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step = TrainStep(model, optimizer, objective, amp_dtype=amp)
    values = [step([(x, target)]) for _ in range(4)]
    losses = [one["loss"] for one in values]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert criterion(model(x), target).item() == pytest.approx(
            values[-1]["loss" if kind == "dense" else "criterion"], rel=0.1
        )
