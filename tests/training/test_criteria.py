"""Losses from plain settings, against timm's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from spot_vit.training.criteria import criterion_for
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
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
