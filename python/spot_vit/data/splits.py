"""Splits of opened pictures: labels checked and put in order, a share set aside."""

from __future__ import annotations

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from spot_vit.data.pictures import Labels, Pictures, PictureStream
from spot_vit.data.sources import Opened
from spot_vit.data.transforms import eval_transform, train_transform
from spot_vit.utils.errors import UserError


class PictureSplit:
    """Makes data sets of pictures of the size that a model takes.

    Args:
        opened: where they come from.
        labels: from the source's labels to targets.
        positions: which of the pictures; None is all.
        training: whether it is for training.
    """

    def __init__(
        self, opened: Opened, labels: Labels, positions: Sequence[int] | None, training: bool
    ) -> None:
        self.opened, self.labels = opened, labels
        self.positions, self.training = positions, training

    def dataset(
        self, config: Mapping[str, Any], augment: Mapping[str, Any] | None = None
    ) -> Dataset[Any]:
        """The data set for a model with this data configuration of timm's; see `Data`."""
        channels = config["input_size"][0]
        if channels not in (1, 3):
            raise UserError(f"in_chans: pictures have 1 or 3 channels, got {channels}")
        transform = (
            train_transform(config, **(augment or {})) if self.training else eval_transform(config)
        )
        mode = "RGB" if channels == 3 else "L"
        if self.opened.source is None:
            return PictureStream(
                self.opened.reader,
                transform,
                mode=mode,
                labels=self.labels,
                sized=self.opened.sized,
                whole=not self.training,
            )
        return Pictures(
            self.opened.source, transform, mode=mode, labels=self.labels, positions=self.positions
        )


def order_of(own: list[str] | None, names: list[str] | None) -> list[int] | None:
    """The label in `names` of each class of a split; None where nothing changes."""
    if own is None or names is None or own == names[: len(own)]:
        return None
    return [names.index(name) for name in own]


def check_labels(
    role: str, opened: Opened, names: list[str] | None, num_classes: int | None
) -> None:
    """Raises unless the model's classes cover those of a split."""
    what = "training" if role == "train" else "validation"
    if names is not None and opened.classes is not None:
        extra = [name for name in opened.classes if name not in set(names)]
        if extra:
            near = difflib.get_close_matches(extra[0], names, 1)
            hint = f" (is {extra[0]!r} meant to be {near[0]!r}?)" if near else ""
            raise UserError(
                f"the {what} pictures have {len(extra)} classes that are not among the "
                f"{len(names)} that the model learns: {', '.join(extra[:10])}{hint}; expected the "
                "same names"
            )
    if names is not None and num_classes is not None and num_classes < len(names):
        raise UserError(
            f"num_classes: the data have {len(names)} classes, got {num_classes}; expected at "
            "least as many, or leave it out"
        )
    if opened.targets is not None and len(opened.targets):
        lowest, highest = min(opened.targets), max(opened.targets)
        if lowest < 0:
            raise UserError(f"the {what} pictures have no labels (they are {lowest})")
        if names is None and num_classes is not None and highest >= num_classes:
            raise UserError(
                f"num_classes: the {what} pictures have labels up to {highest}, got {num_classes}"
            )


def counted(splits: dict[str, Opened]) -> int:
    """The number of classes by the largest label."""
    targets = [opened.targets for opened in splits.values()]
    if any(labels is None for labels in targets):
        raise UserError(
            "num_classes: this data set does not say how many classes it has; give --num-classes"
        )
    return 1 + max(max(labels, default=0) for labels in targets if labels is not None)


def set_aside(opened: Opened, share: float) -> tuple[list[int], list[int]]:
    """Positions that are kept for training and set aside for validation.

    Names decide, by their hash: pictures that come later move no other, and no seed matters.
    """
    if not 0 < share < 1:
        raise UserError(f"val_share: expected a share between 0 and 1, got {share}")
    if opened.source is None:
        raise UserError("val_share: nothing can be set aside of a stream; give --val-split")
    groups: defaultdict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for position in range(len(opened)):
        name = opened.source.name(position).encode(errors="surrogateescape")
        group = 0 if opened.targets is None else int(opened.targets[position])
        groups[group].append((hashlib.blake2b(name, digest_size=8).digest(), position))
    aside: set[int] = set()
    for members in groups.values():
        count = max(round(share * len(members)), 1) if len(members) > 1 else 0
        aside |= {position for _, position in sorted(members)[:count]}
    kept = [position for position in range(len(opened)) if position not in aside]
    return kept, sorted(aside)
