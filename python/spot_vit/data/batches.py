"""Images and targets of a batch, in whatever form a data loader gives it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

_IMAGES = ("image", "images", "pixel_values")
_TARGETS = ("label", "labels", "target", "targets")


def images_and_target(batch: Any) -> tuple[Any, Any]:
    """The images and the target of a batch, or of one sample.

    Args:
        batch: images alone (a tensor); a tuple or list of images, target and whatever follows; or
            a mapping with the images at ``image``, ``images`` or ``pixel_values`` and the target,
            if any, at ``label``, ``labels``, ``target`` or ``targets``.

    Returns:
        images and target, as they were; target is None where there is none.

    Raises:
        TypeError: the batch has none of these forms.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return _one(batch, _IMAGES, "images", True), _one(batch, _TARGETS, "the target", False)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
        return batch[0], batch[1] if len(batch) > 1 else None
    found = f"an empty {type(batch).__name__}" if batch in ((), []) else type(batch).__name__
    raise TypeError(
        "batch: expected a tensor of images, a tuple or list (images, target, ...), or a mapping "
        f"with one of {list(_IMAGES)} and one of {list(_TARGETS)}, got {found}"
    )


def _one(batch: Mapping[str, Any], names: tuple[str, ...], what: str, needed: bool) -> Any:
    """The value at the one of `names` that is there."""
    found = [name for name in names if name in batch]
    if len(found) > 1 or (needed and not found):
        raise TypeError(
            f"batch: expected {what} at one of {list(names)}, got a mapping with {list(batch)}"
        )
    return batch[found[0]] if found else None


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches in groups, each of one optimiser step; the last group may be smaller."""
    rest = iter(batches)
    while group := list(islice(rest, size)):
        yield group
