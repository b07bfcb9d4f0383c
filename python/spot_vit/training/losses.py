"""Training losses of a SPOT ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from spot_vit.models.loop import SpotOutput


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four terms; the defaults are DynamicViT's (SPOT's are not published)."""

    ce: float = 1.0
    kl: float = 0.5
    mse: float = 0.5
    ratio: float = 2.0


class Teacher(NamedTuple):
    """Logits and tokens that a dense teacher gives for a batch.

    Attributes:
        logits: [B, classes].
        tokens: [B, P+N, C], final normalised token features, prefix tokens first.
    """

    logits: Tensor
    tokens: Tensor


def spot_loss(
    output: SpotOutput,
    target: Tensor,
    keep_ratios: Sequence[float],
    teacher: Teacher | None = None,
    weights: LossWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds up cross-entropy, distillation from a dense teacher, and the keep-ratio penalty.

    SPOT (arXiv 2511.10488) does not publish its loss; this is DynamicViT's (arXiv 2106.02034), our
    choice:

    - ce: cross-entropy of the logits;
    - kl: KL(teacher || student) of the logits, mean over images;
    - mse: mean squared error of the final patch features against the teacher's, over the patches
      that survive the last stage;
    - ratio: mean over stages and images of (target keep ratio - kept share)^2.

    Args:
        output: what ``model(x, aux=True)`` returned in training mode: tokens of all N patches, or
            of the survivors where training removes the others.
        target: int64 [B] class indices, or [B, classes] probabilities.
        keep_ratios: the share of the N patches that each of the K stages should keep; empty leaves
            the ratio term out.
        teacher: the dense teacher's view of the same batch; without it kl and mse are left out.
        weights: weight of each term.

    Returns:
        The weighted total (scalar) and the unweighted terms by name, detached.
    """
    weights = weights or LossWeights()
    parts = {"ce": F.cross_entropy(output.logits, target)}
    if len(keep_ratios):
        masks = torch.stack(list(output.masks))  # [K, B, N]
        goal = masks.new_tensor(list(keep_ratios))
        if len(goal) != len(masks):
            raise ValueError(
                f"keep_ratios: expected {len(masks)} values, one a stage, got {len(goal)}"
            )
        parts["ratio"] = (goal[:, None] - masks.mean(dim=2)).square().mean()
    if teacher is not None:
        parts["kl"] = F.kl_div(
            F.log_softmax(output.logits, dim=-1),
            F.log_softmax(teacher.logits, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        parts["mse"] = _kept_mse(output, teacher.tokens)
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def _kept_mse(output: SpotOutput, reference: Tensor) -> Tensor:
    """Mean squared difference of final features to `reference` [B, P+N, C], over kept patches."""
    mask, tokens = output.masks[-1].detach(), output.tokens
    grid = mask.shape[1]
    if output.index:  # training removed the others: survivors [B, n, C] against their own places
        index = output.index[-1]
        mask = (index < grid).to(mask.dtype)  # the teacher has no fused tokens
        places = index.clamp(max=grid - 1)[..., None].expand(-1, -1, reference.shape[2])
        tokens = tokens[:, tokens.shape[1] - index.shape[1] :]
        reference = reference[:, reference.shape[1] - grid :].gather(1, places)
    if tokens.shape != reference.shape:
        raise ValueError(
            f"teacher.tokens: expected shape {list(tokens.shape)}, as the student's in training, "
            f"got {list(reference.shape)}"
        )
    error = (tokens - reference).square().mean(dim=2)[:, -mask.shape[1] :]
    return (error * mask).sum() / mask.sum().clamp(min=1)
