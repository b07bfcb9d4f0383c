"""Data sets of pictures that survive what real folders hold."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from spot_vit.data.decoding import decoded
from spot_vit.data.fetch import Unreadable
from spot_vit.data.transforms import Transform

Sample = tuple[Any, Any]  # a tensor, or a PIL image without a transform, and the target


class Source(Protocol):
    """Where pictures and labels come from, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """A path, an open file or a PIL image, and the label."""

    def name(self, index: int) -> str:
        """What leads to the picture, relative to the data set."""

    def path(self, index: int) -> str:
        """What leads to the picture, from here."""


class Labels:
    """From labels as a source gives them to targets.

    Args:
        order: the target of each label of the source, or None where they are the same.
        num_classes: of multi-label targets; None for one label each.
        dense: whether multi-label targets come as vectors, not as lists of labels.
    """

    def __init__(
        self,
        order: Sequence[int] | None = None,
        num_classes: int | None = None,
        dense: bool = False,
    ) -> None:
        self.order, self.num_classes, self.dense = order, num_classes, dense

    def __call__(self, label: Any) -> Any:
        """An int, or float32 [num_classes]."""
        if self.num_classes is None:
            return int(label) if self.order is None else self.order[int(label)]
        if self.dense:
            return torch.as_tensor(label, dtype=torch.float32)
        labels = [int(one) if self.order is None else self.order[int(one)] for one in label]
        hot = torch.zeros(self.num_classes)
        hot[labels] = 1
        return hot


class Pictures(Dataset[Sample]):
    """Pictures of a source, decoded, transformed, with their targets.

    Grey, CMYK, transparent, palette and 16-bit pictures all become what the model takes, turned as
    their EXIF tag says. Whatever cannot be read raises ``Unreadable`` with its name and the reason,
    which loaders replace or leave out, and count.

    Args:
        source: of files and labels.
        transform: from a PIL image to a tensor; None leaves the PIL image.
        mode: of the PIL image: "RGB" or "L".
        labels: from the source's labels to targets.
        positions: which of the source's items these are, in this order; None is all.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        *,
        mode: str = "RGB",
        labels: Labels | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.source, self.transform, self.mode = source, transform, mode
        self.labels, self.positions = labels or Labels(), positions

    def __len__(self) -> int:
        return len(self.source) if self.positions is None else len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        picture, target = self.picture(index)
        return (picture if self.transform is None else self.transform(picture)), target

    def picture(self, index: int) -> tuple[Image.Image, Any]:
        """The picture before any transform, and its target."""
        position = self._position(index)
        try:
            file, label = self.source[position][:2]
            try:
                picture = decoded(file, self.mode)
            finally:
                if hasattr(file, "close") and not isinstance(file, Image.Image):
                    file.close()
        except (MemoryError, KeyError):  # a machine too small, a column that is not there
            raise
        except Exception as error:  # decoders raise whatever they like
            raise Unreadable(self.source.path(position), _reason(error)) from error
        return picture, self.labels(label)

    def filename(self, index: int) -> str:
        """The name of the picture's file, relative to the data set."""
        return self.source.name(self._position(index))

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return int(index if self.positions is None else self.positions[index])


def _reason(error: Exception) -> str:
    """One line of what PIL says, without the object's address that it adds."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix("[Errno 2] ").removeprefix("[Errno 13] ")


class PictureStream(IterableDataset[Sample]):
    """Pictures of a reader of timm's that gives them one after another.

    Args:
        reader: timm's WebDataset, TensorFlow or streaming Hugging Face reader, made so that it
            leaves pictures in the mode they have.
        transform: from a PIL image to a tensor.
        mode: of the PIL image: "RGB" or "L".
        labels: from the reader's labels to targets.
        sized: whether the number of samples is known.
        whole: whether the stream holds every sample in every process, for an evaluation.
    """

    def __init__(
        self,
        reader: Any,
        transform: Transform | None = None,
        *,
        mode: str = "RGB",
        labels: Labels | None = None,
        sized: bool = True,
        whole: bool = False,
    ) -> None:
        self.reader, self.transform, self.mode = reader, transform, mode
        self.labels, self.sized, self.whole = labels or Labels(), sized, whole

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("this stream of pictures does not know its length")
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Tells the reader which epoch its shuffling is for."""
        if hasattr(self.reader, "set_epoch"):
            self.reader.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tells the reader how many workers share its samples."""
        if hasattr(self.reader, "set_loader_cfg"):
            self.reader.ds = None  # a reader that has begun does not listen
            self.reader.set_loader_cfg(num_workers=num_workers)

    def __iter__(self) -> Iterator[Any]:
        reader = self.reader
        reader.ds = None  # begin anew: what an earlier epoch drew would change this one
        if self.whole:
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        with _Skipped() as skipped:
            for picture, label in reader:
                while skipped.found:
                    yield skipped.found.pop(0)
                try:
                    picture = decoded(picture, self.mode)
                except Exception as error:
                    yield Unreadable("a picture of a stream", _reason(error))
                    continue
                target = self.labels(label)
                yield (picture if self.transform is None else self.transform(picture)), target
            yield from skipped.found


class _Skipped(logging.Handler):
    """Collects what timm's WebDataset reader skips: it says so in its log, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Unreadable] = []
        self.log = logging.getLogger("timm.data.readers.reader_wds")

    def emit(self, record: logging.LogRecord) -> None:
        """Notes the sample whose error is being handled."""
        error = sys.exc_info()[1]
        if not isinstance(error, Exception):
            return
        trace, sample = error.__traceback__, None
        while trace is not None and not isinstance(sample, dict):
            sample = trace.tb_frame.f_locals.get("sample")
            trace = trace.tb_next
        named = sample if isinstance(sample, dict) else {}
        name = f"{named.get('__url__', 'a stream')}: {named.get('__key__', 'a sample')}"
        self.found.append(Unreadable(name, _reason(error)))

    def __enter__(self) -> _Skipped:
        self.log.addHandler(self)
        self.before, self.log.propagate = self.log.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        self.log.removeHandler(self)
        self.log.propagate = self.before
