"""What a model says of every image, collected batch by batch and put together over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from spot_vit.utils.errors import UserError

BEST = 5
"""How many classes are remembered of every image, the best ones."""


class Outcomes:
    """Collects what one model says of the images of a data set.

    Every image has: `index`, its position in the data set; `best`, its highest scoring classes;
    `probability` of the first of them; `loss`; `correct` and `correct5`, whether a label is the
    first of them or among them; `finite`, whether its logits were; `label`; `kept`, the share of
    its patches that was kept, where that is known; `score`, all logits, where it may have several
    labels.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self.num_classes = 0

    def add(self, logits: Tensor, target: Tensor, index: Tensor, kept: Tensor | None) -> None:
        """Adds one batch.

        Args:
            logits: [B, C].
            target: int64 [B] classes, or [B, C] with a one for each label of an image.
            index: int64 [B] positions in the data set; -1 for an image that does not count.
            kept: [B] shares of the patches that were kept, if known.

        Raises:
            UserError: labels that the model has no logits for, or logits of another shape.
        """
        if logits.dim() != 2:
            raise UserError(f"a classifier gives logits [B, C], got {list(logits.shape)}")
        check_target(target, logits.shape[1])
        self.num_classes = logits.shape[1]
        found = outcome_of(logits.float(), target.to(logits.device))
        found["index"] = index
        if kept is not None:
            found["kept"] = kept.float()
        for name, value in found.items():
            self._parts.setdefault(name, []).append(value)

    def together(self, sharded: bool) -> dict[str, Tensor]:
        """Everything on the CPU, by position in the data set, every image once.

        Args:
            sharded: whether each process of the default group saw a part of the images; then all
                of them get the whole.

        Raises:
            UserError: there were no images.
        """
        found = {name: torch.cat(parts).cpu() for name, parts in self._parts.items()}
        if sharded and distributed.is_available() and distributed.is_initialized():
            found = _gathered(found)
        if not found or not (found["index"] >= 0).any():
            raise UserError("there are no images to evaluate on: the loader gave none that count")
        index = found["index"]
        order = index.argsort(stable=True)
        index = index[order]
        first = torch.cat([index.new_ones(1, dtype=torch.bool), index[1:] != index[:-1]])
        chosen = order[first & (index >= 0)]
        return {name: value[chosen] for name, value in found.items()}


def _gathered(own: dict[str, Tensor]) -> dict[str, Tensor]:
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return {name: torch.cat([one[name] for one in every]) for name in own}


def check_target(target: Tensor, num_classes: int) -> None:
    """Raises a UserError unless labels fit a model of so many classes."""
    if target.dim() == 2:
        if target.shape[1] != num_classes:
            raise UserError(
                f"targets name {target.shape[1]} classes, the model has logits of {num_classes}"
            )
        return
    if target.dim() != 1 or target.is_floating_point():
        raise UserError(
            "labels must be int64 [B], or [B, C] with a one for each label of an image; got "
            f"{target.dtype} {list(target.shape)}"
        )
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < num_classes:
        raise UserError(
            f"labels from {int(target.min())} to {int(target.max())} do not fit a model of "
            f"{num_classes} classes, which are 0 to {num_classes - 1}"
        )


def outcome_of(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What `Outcomes` says of each image, from float logits [B, C] and checked targets."""
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :BEST]
    finite = logits.isfinite().all(dim=1)
    found = {"best": best, "finite": finite}
    first = best[:, :1]
    if target.dim() == 1:
        hits = best == target[:, None]
        found["label"] = target
        found["loss"] = F.cross_entropy(logits, target, reduction="none")
        found["probability"] = logits.softmax(dim=1).gather(1, first)[:, 0]
    else:
        labels = target > 0.5
        hits = labels.gather(1, best)
        found["label"] = labels
        every = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        found["loss"] = every.mean(dim=1)
        found["probability"] = logits.gather(1, first)[:, 0].sigmoid()
        found["score"] = logits
    # Not-a-numbers sort first: without this, a broken model could be called right.
    found["correct"] = hits[:, 0] & finite
    found["correct5"] = hits.any(dim=1) & finite
    return found
