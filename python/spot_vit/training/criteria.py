"""The loss of logits and labels that a recipe asks for."""

from __future__ import annotations

from functools import partial

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from spot_vit.training.losses import Criterion, check_one_head, cross_entropy


def criterion_for(
    *,
    smoothing: float = 0.0,
    bce_loss: bool = False,
    bce_target_thresh: float | None = None,
    bce_sum: bool = False,
    mixup: bool = False,
) -> Criterion:
    """Softmax cross-entropy, or binary cross-entropy of each class, as timm's training has them.

    Args:
        smoothing: of class indices over all classes; with binary cross-entropy also of labels
            [B, classes], each towards one half.
        bce_loss: binary cross-entropy, for several labels an image or for one.
        bce_target_thresh: labels above it count as 1, all others as 0.
        bce_sum: sum over classes, and mean over images, in place of the mean over both.
        mixup: targets come mixed from timm's Mixup, which has smoothed them.

    Returns:
        Maps logits [B, classes] and a target, int64 [B] class indices or [B, classes]
        (probabilities, or labels for binary cross-entropy, of any dtype), to a scalar. A target
        that does not fit is a ValueError.

    Raises:
        ValueError: `smoothing` not in [0, 1), or options of binary cross-entropy without it.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a share in [0, 1), got {smoothing}")
    if not bce_loss:
        if bce_target_thresh is not None or bce_sum:
            raise ValueError("bce_target_thresh and bce_sum need bce_loss, which is off")
        return partial(cross_entropy, smoothing=smoothing)
    loss = BinaryCrossEntropy(
        smoothing=smoothing, target_threshold=bce_target_thresh, sum_classes=bce_sum
    )
    return partial(_binary_cross_entropy, loss, 0.0 if mixup else smoothing)


def _binary_cross_entropy(
    loss: BinaryCrossEntropy, smoothing: float, logits: Tensor, target: Tensor
) -> Tensor:
    check_one_head(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target.shape == logits.shape:
        # timm's own smoothing of labels (`smooth_dense`) is newer than the oldest timm we run with.
        target = target.to(logits.dtype) * (1 - smoothing) + 0.5 * smoothing
    elif target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError(
            "target: expected class indices, int64 [B], or labels [B, classes], for logits "
            f"{list(logits.shape)}, got {target.dtype} {list(target.shape)}"
        )
    return loss(logits, target)
