"""Training losses of a SPOT ViT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from spot_vit.models.loop import SpotOutput

Criterion = Callable[[Tensor, Any], Tensor]
"""Maps (logits, target) to a scalar, as `torch.nn.functional.cross_entropy` does."""

Distillation = Callable[[Tensor, Tensor], Tensor]
"""Maps the student's and the teacher's logits to a scalar."""

TOKEN_TERMS = ("mse", "kl")
_LOGITS_ALONE = (
    "a teacher without tokens of the student's grid and width can teach by its logits alone: "
    "weights=LossWeights(mse=0) (--token-weight 0)"
)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four terms; the defaults are DynamicViT's (SPOT's are not published).

    Attributes:
        ce: of the cross-entropy, or of the criterion that takes its place.
        kl: of the logits' distillation.
        mse: of the tokens' distillation.
        ratio: of the keep-ratio penalty.
    """

    ce: float = 1.0
    kl: float = 0.5
    mse: float = 0.5
    ratio: float = 2.0


class Teacher(NamedTuple):
    """Logits and tokens that a dense teacher gives for a batch.

    Attributes:
        logits: [B, classes].
        tokens: [B, P+N, C], final normalised token features, prefix tokens first; None of a teacher
            that has none of the student's grid and width.
    """

    logits: Tensor
    tokens: Tensor | None


# ---- single terms --------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, mean over images.

    Args:
        logits: [B, classes].
        target: int64 [B] class indices, or [B, classes] probabilities (smoothed labels, mixup).
        smoothing: share of class indices' probability that is spread evenly over all classes;
            probabilities are taken as they are.

    Raises:
        ValueError: rows of the target that are no probabilities, such as those of several labels:
            softmax cross-entropy of them is no loss anyone wants.
    """
    check_one_head(logits)
    several = target.ndim > 1 and target.shape == logits.shape
    if several and not torch.compiler.is_compiling():
        # 1e-2: smoothed labels of a thousand classes in bfloat16 add up to so much.
        sums = target.detach().float().sum(dim=1)
        wrong = ((sums - 1).abs() > 1e-2).any() | (target < 0).any()
        if wrong or not target.is_floating_point():
            odd = sums[(sums - 1).abs().argmax()].item()
            raise ValueError(
                "target: expected class indices, int64 [B], or probabilities, a float [B, classes] "
                f"whose rows sum to 1, got {target.dtype} {list(target.shape)} with a row that "
                f"sums to {odd:g}; for several labels an image give "
                "criterion=torch.nn.functional.binary_cross_entropy_with_logits (--bce-loss)"
            )
    return F.cross_entropy(logits, target, label_smoothing=0.0 if target.ndim > 1 else smoothing)


def softmax_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of logits [B, classes], mean over images (published).

    What fits a cross-entropy: one label an image.
    """
    return F.kl_div(
        F.log_softmax(student, dim=-1),
        F.log_softmax(teacher, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def sigmoid_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the sigmoid of each of the logits [B, classes], mean over all.

    What fits `binary_cross_entropy_with_logits`: several labels an image (our choice).
    """
    goal = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, goal)
    return cross - F.binary_cross_entropy_with_logits(teacher, goal)


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of pooled features [B, C], the "logits" of a model without a head."""
    return F.mse_loss(student, teacher)


# ---- all of them ---------------------------------------------------------------------------------


def spot_loss(
    output: SpotOutput,
    target: Tensor | None,
    keep_ratios: Sequence[float],
    teacher: Teacher | None = None,
    weights: LossWeights | None = None,
    *,
    criterion: Criterion | None = None,
    distillation: Distillation | None = None,
    token_term: str = "mse",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds up cross-entropy, distillation from a dense teacher, and the keep-ratio penalty.

    SPOT (arXiv 2511.10488) does not publish its loss; this is DynamicViT's (arXiv 2106.02034), our
    choice:

    - ce: cross-entropy of the logits, or "criterion", what takes its place;
    - kl: KL(teacher || student) of the logits, mean over images, or "distillation";
    - mse: mean squared error of the final patch features against the teacher's, over the patches
      that survive the last stage; or "token_kl", see `token_term`;
    - ratio: mean over stages and images of (target keep ratio - kept share)^2.

    Args:
        output: what ``model(x, aux=True)`` returned in training mode: tokens of all N patches, or
            of the survivors where training removes the others.
        target: int64 [B] class indices, or [B, classes] probabilities; what `criterion` takes where
            one is given. None leaves the cross-entropy out, and with it kl, unless `distillation`
            is given: logits of a model without a head are features, which have no softmax.
        keep_ratios: the share of the N patches that each of the K stages should keep; empty leaves
            the ratio term out.
        teacher: the dense teacher's view of the same batch; without it kl and mse are left out,
            without its tokens mse.
        weights: weight of each term.
        criterion: takes the place of the cross-entropy, e.g.
            `torch.nn.functional.binary_cross_entropy_with_logits` for several labels an image; the
            target goes to it unchecked.
        distillation: takes the place of kl, which fits a cross-entropy alone: with a criterion and
            a teacher it must be given, e.g. `sigmoid_distillation`, or `softmax_distillation` where
            that fits after all.
        token_term: "mse", or "kl" for KL(teacher || student) of the softmax of each token, mean
            over the patches that survive: where tokens are logits (DynamicViT on LV-ViT).

    Returns:
        The weighted total (scalar) and the unweighted terms by name, detached.

    Raises:
        ValueError: a target, ratios or a teacher that do not fit, or no term at all.
    """
    weights = weights or LossWeights()
    check_terms(criterion, distillation, teacher is not None, weights, token_term)
    found: list[tuple[str, float, Tensor]] = []  # name, weight, term
    if target is not None and criterion is None:
        found.append(("ce", weights.ce, cross_entropy(output.logits, target)))
    elif target is not None and criterion is not None:
        found.append(("criterion", weights.ce, criterion(output.logits, target)))
    if len(keep_ratios):
        found.append(("ratio", weights.ratio, _ratio(output.masks, keep_ratios)))
    if teacher is not None:
        if distillation is None and target is not None and criterion is None:
            distillation = softmax_distillation
        if distillation is not None:
            _check_logits(output.logits, teacher.logits)
            name = "kl" if distillation is softmax_distillation else "distillation"
            found.append((name, weights.kl, distillation(output.logits, teacher.logits)))
        if teacher.tokens is not None:
            name = "mse" if token_term == "mse" else "token_kl"
            found.append((name, weights.mse, _kept_error(output, teacher.tokens, token_term)))
        elif weights.mse:
            raise ValueError(
                f"teacher.tokens: expected [B, P+N, C], got None, and the weight of the tokens' "
                f"distillation is {weights.mse}; {_LOGITS_ALONE}"
            )
    if target is None and teacher is None:
        raise ValueError(
            "nothing to learn from: there is no teacher, and no target (a model without a head, "
            "num_classes=0, learns from a teacher alone)"
        )
    total = torch.stack([weight * term for _, weight, term in found]).sum()
    return total, {name: term.detach() for name, _, term in found}


def check_terms(
    criterion: Criterion | None,
    distillation: Distillation | None,
    teacher: bool,
    weights: LossWeights | None,
    token_term: str = "mse",
) -> None:
    """Raises a ValueError unless the terms of `spot_loss` fit each other."""
    if token_term not in TOKEN_TERMS:
        raise ValueError(f"token_term must be one of {list(TOKEN_TERMS)}, got {token_term!r}")
    needed = (weights or LossWeights()).kl != 0
    if teacher and needed and criterion is not None and distillation is None:
        raise ValueError(
            "a criterion of your own and a teacher: KL of the softmax may not fit the criterion; "
            "say which distillation does: distillation=spot_vit.sigmoid_distillation (several "
            "labels an image), distillation=spot_vit.softmax_distillation (one label), a function "
            "of yours, or weights=LossWeights(kl=0) for none"
        )


def check_one_head(logits: Any) -> None:
    """Raises a TypeError unless logits are those of one head."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor, got {type(logits).__name__}: a distilled model gives those "
            "of both heads after set_distilled_training(True); switch it off, which trains their "
            "mean, or write an objective for two heads"
        )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    check_one_head(student)
    check_one_head(teacher)
    if student.shape == teacher.shape:
        return
    if student.shape[:-1] == teacher.shape[:-1]:
        raise ValueError(
            f"teacher: it has {teacher.shape[-1]} classes, the student {student.shape[-1]}; give "
            "the teacher the student's head (timm's reset_classifier, then train it), or train "
            "without a teacher"
        )
    raise ValueError(
        f"teacher.logits: expected shape {list(student.shape)}, as the student's, got "
        f"{list(teacher.shape)}"
    )


def _ratio(masks: Sequence[Tensor], keep_ratios: Sequence[float]) -> Tensor:
    """Mean square of (goal - kept share), over K stages with masks [B, N]."""
    if len(keep_ratios) != len(masks):
        raise ValueError(
            f"keep_ratios: expected {len(masks)} values, one a stage, got {len(keep_ratios)}"
        )
    stacked = torch.stack(list(masks))  # [K, B, N]
    goal = stacked.new_tensor(list(keep_ratios))
    return (goal[:, None] - stacked.mean(dim=2)).square().mean()


def _kept_error(output: SpotOutput, reference: Tensor, term: str) -> Tensor:
    """How far final tokens are from `reference` [B, P+N, C], mean over kept patches."""
    mask, tokens = output.masks[-1].detach(), output.tokens
    grid = mask.shape[1]
    # Before the survivors are prefix tokens, and perhaps the token that the last cut made.
    before = tokens.shape[1] - (output.index[-1].shape[1] if output.index else grid)
    fits = [(len(tokens), n + grid, tokens.shape[2]) for n in (before, before - 1)]
    if reference.shape not in fits[: 2 if output.index else 1]:
        raise ValueError(
            f"teacher.tokens: expected shape {list(fits[0])}, as the student's in training, got "
            f"{list(reference.shape)}; {_LOGITS_ALONE}"
        )
    if output.index:  # training removed the others: survivors [B, n, C] against their own places
        index = output.index[-1]
        mask = (index < grid).to(mask.dtype)  # the teacher has no fused tokens
        places = index.clamp(max=grid - 1)[..., None].expand(-1, -1, reference.shape[2])
        tokens = tokens[:, before:]
        reference = reference[:, reference.shape[1] - grid :].gather(1, places)
    if term == "mse":
        error = (tokens - reference).square().mean(dim=2)
    else:
        goal = reference.log_softmax(dim=2)
        error = F.kl_div(tokens.log_softmax(dim=2), goal, reduction="none", log_target=True).sum(2)
    return (error[:, -mask.shape[1] :] * mask).sum() / mask.sum().clamp(min=1)
