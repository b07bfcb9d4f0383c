"""Accuracy of models on labelled images."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spot_vit.data.batches import images_and_target
from spot_vit.evaluation.outcomes import Outcomes
from spot_vit.utils.errors import UserError
from spot_vit.utils.modes import eval_mode, unwrap


@dataclass
class Evaluation:
    """Result of ``evaluate``; what it says of images stands in the order of the data set.

    Where images may have several labels (a target is [B, C]), an image counts as correct if the
    class that scores highest is one of them.

    Attributes:
        top1: share of images whose label scored highest, 0 to 1.
        loss: mean cross-entropy; with several labels mean binary cross-entropy.
        correct: bool [images].
        top5: share of images with a label among the five that scored highest.
        correct5: bool [images], the same of each.
        losses: float32 [images].
        labels: int64 [images]; with several labels bool [images, classes].
        best: int64 [images, 5] classes, the highest scoring first; fewer with fewer classes.
        probability: float32 [images], of the first of them.
        index: int64 [images], positions in the data set.
        num_classes: number of logits.
        not_finite: number of images whose logits were not all finite; none of them is correct.
        kept: float32 [images], share of the patches that the last stage kept; None if not asked.
        average_precision: float64 [classes] with several labels, NaN for a class that no image has.
        mean_ap: its mean over the other classes, None without several labels.
    """

    top1: float
    loss: float
    correct: Tensor = field(repr=False)
    top5: float
    correct5: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    best: Tensor = field(repr=False)
    probability: Tensor = field(repr=False)
    index: Tensor = field(repr=False)
    num_classes: int
    not_finite: int = 0
    kept: Tensor | None = field(default=None, repr=False)
    average_precision: Tensor | None = field(default=None, repr=False)
    mean_ap: float | None = None

    def per_class(self) -> list[tuple[int, float]]:
        """Images of each class, and the share of them that is correct; NaN where there are none.

        With several labels, the average precision of the class in place of the share.
        """
        if self.average_precision is not None:
            images, shares = self.labels.sum(dim=0), self.average_precision
        else:
            images = torch.bincount(self.labels, minlength=self.num_classes)
            right = torch.bincount(self.labels[self.correct], minlength=self.num_classes)
            shares = right.double() / images
        return list(zip(images.tolist(), shares.tolist(), strict=True))


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    name: str = "evaluate",
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    progress: bool = True,
    kept: bool = False,
) -> Evaluation:
    """Classifies everything the loader yields, in eval mode; the model's mode is restored.

    Args:
        model: gives logits [B, C], or an object with such `logits`; wrapped or not.
        loader: batches as `images_and_target` understands them. If it has an attribute `sharded`,
            the third entry of a batch is int64 [B] with positions in the data set: -1 does not
            count, and what is there twice counts once. Where `sharded` is true and torch's default
            process group is there, every process gets the result of the whole data set.
        name: label of the progress bar.
        amp_dtype: of autocast; None computes as the model is.
        channels_last: memory format of images.
        progress: show a progress bar.
        kept: note the share of patches that each image keeps, where the model can tell.

    Raises:
        UserError: no images, no labels, or labels that do not fit the model.
    """
    options = {"amp_dtype": amp_dtype, "channels_last": channels_last, "progress": progress}
    return evaluate_all({"": model}, loader, name, kept=kept, **options)[""]  # type: ignore[arg-type]


# Not inference_mode: what modules cache in it could not be used by training later.
@torch.no_grad()
def evaluate_all(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    name: str = "evaluate",
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    progress: bool = True,
    kept: bool = False,
) -> dict[str, Evaluation]:
    """Several models in one pass over the data: each batch is shown to all of them.

    Args:
        models: by name; arguments are those of `evaluate`.
        loader: as above.
        name: as above.
        amp_dtype: as above.
        channels_last: as above.
        progress: as above.
        kept: as above.

    Returns:
        The result of each model.
    """
    outcomes = {key: Outcomes() for key in models}
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(eval_mode(model))
        count = 0
        for batch in tqdm(loader, desc=name, unit="batch", mininterval=0.5, disable=not progress):
            images, target = images_and_target(batch)
            if target is None:
                raise UserError("these batches have no labels to evaluate with")
            if hasattr(loader, "sharded"):
                index = batch[2]
            else:
                index = torch.arange(count, count + len(target))
            count += len(target)
            for key, model in models.items():
                output, share = _run(model, images, amp_dtype, channels_last, kept)
                outcomes[key].add(output, target, index, share)
    sharded = getattr(loader, "sharded", False)
    return {key: _evaluation(one, sharded) for key, one in outcomes.items()}


def _run(
    model: nn.Module,
    images: Tensor,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
    kept: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, C], and the share [B] of patches that was kept, if it is asked for and known."""
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    layout = torch.channels_last if channels_last and images.dim() == 4 else torch.preserve_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    aux = {"aux": True} if kept and tells_kept(model) else {}
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        output = model(images, **aux)
    share = output.masks[-1].float().mean(dim=1) if aux else None
    return getattr(output, "logits", output), share


def tells_kept(model: nn.Module) -> bool:
    """Whether the model removes tokens, and says which when it is called with `aux=True`."""
    inside = unwrap(model)
    return hasattr(inside, "spot_config") and "aux" in inspect.signature(inside.forward).parameters


def _evaluation(outcomes: Outcomes, sharded: bool) -> Evaluation:
    found = outcomes.together(sharded)
    precision = None
    if "score" in found:
        precision = average_precision(found["label"], found["score"])
    return Evaluation(
        top1=found["correct"].double().mean().item(),
        loss=found["loss"].double().mean().item(),
        correct=found["correct"],
        top5=found["correct5"].double().mean().item(),
        correct5=found["correct5"],
        losses=found["loss"],
        labels=found["label"],
        best=found["best"],
        probability=found["probability"],
        index=found["index"],
        num_classes=outcomes.num_classes,
        not_finite=int((~found["finite"]).sum()),
        kept=found.get("kept"),
        average_precision=precision,
        mean_ap=None if precision is None else precision.nanmean().item(),
    )


def average_precision(labels: Tensor, scores: Tensor) -> Tensor:
    """Average precision of each class, as scikit-learn defines it.

    Args:
        labels: bool [images, classes].
        scores: [images, classes], higher where a class is more likely.

    Returns:
        float64 [classes], NaN for a class that no image has, or whose scores are not finite.

    Raises:
        ImportError: scikit-learn is missing; what to install is said.
    """
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise ImportError(
            "mean average precision needs scikit-learn: pip install 'spot-vit[train]'"
        ) from error
    found = torch.full((labels.shape[1],), float("nan"), dtype=torch.float64)
    for c in range(labels.shape[1]):
        if labels[:, c].any() and scores[:, c].isfinite().all():
            truth, score = labels[:, c].numpy(), scores[:, c].numpy()
            found[c] = float(average_precision_score(truth, score))
    return found
