"""What timm opens, in one shape: pictures and labels by number, class names, labels at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_vit.data.pictures import Source


@dataclass
class Opened:
    """A split of a data set, as it was opened.

    Attributes:
        source: of pictures by number; None for a stream.
        reader: timm's, of a stream; None otherwise.
        classes: names by label, or None where the data set has none.
        targets: label of every picture, or None where only reading all would tell.
        multi_label: whether a picture has several labels.
        dense: whether these come as vectors.
        sized: whether the length of a stream is known.
        left_out: files that are not read, and why, by name.
        notes: sentences for the user.
    """

    source: Source | None = None
    reader: Any = None
    classes: list[str] | None = None
    targets: Sequence[int] | None = None
    multi_label: bool = False
    dense: bool = False
    sized: bool = True
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.reader if self.source is None else self.source)


def named_in_order(class_to_idx: Any) -> list[str] | None:
    """Class names by label, from a mapping of names to labels 0, 1, ...; None if it is none."""
    labels = sorted(class_to_idx or {}, key=lambda name: class_to_idx[name])
    if not labels or [class_to_idx[name] for name in labels] != list(range(len(labels))):
        return None
    return [str(name) for name in labels]


class ReaderSource:
    """Pictures of a reader of timm's: of a folder, a tar file, or a Hugging Face data set.

    Args:
        reader: ``reader[i]`` is an open file and a label.
        where: the folder, file or name that was opened.
    """

    def __init__(self, reader: Any, where: str) -> None:
        self.reader, self.where = reader, where

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """An open file, and the label."""
        file, label = self.reader[index][:2]
        return file, label

    def name(self, index: int) -> str:
        """The file's name relative to the data set, or the row's number where it has none."""
        name = self.reader.filename(index) or str(index)
        return os.path.join(*Path(name).parts[-2:]) if os.path.isabs(name) else name

    def path(self, index: int) -> str:
        """The file's path, or where it is and its name."""
        name = self.name(index)
        return os.path.join(self.where, name) if os.path.isdir(self.where) else self._inside(name)

    def _inside(self, name: str) -> str:
        return f"{self.where}: {name}"


class TorchSource:
    """Pictures of one of torchvision's data sets, which decodes them itself.

    Args:
        dataset: ``dataset[i]`` is a PIL image and a label.
        where: its name.
    """

    def __init__(self, dataset: Any, where: str) -> None:
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """A PIL image, and the label."""
        picture, label = self.dataset[index][:2]
        return picture, label

    def name(self, index: int) -> str:
        """The picture's number."""
        return str(index)

    def path(self, index: int) -> str:
        """The data set and the picture's number."""
        return f"{self.where}: {index}"
