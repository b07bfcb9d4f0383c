"""ImageNet's reassessed labels ("ReaL", arXiv 2006.07159), which may be several for an image."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from spot_vit.evaluation.accuracy import Evaluation


def real_labels(path: str | os.PathLike[str] | None = None) -> dict[str, list[int]]:
    """Classes of each validation image by its file name; none where nobody could tell.

    Args:
        path: JSON as published, a list of lists of classes in the order of the validation images;
            None for the copy that timm has.

    Raises:
        ValueError: the file is not such a list.
    """
    if path is None:
        found = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        assert found is not None
        labels = json.loads(found)
    else:
        labels = json.loads(Path(path).read_text())
    if not isinstance(labels, list) or not all(isinstance(one, list) for one in labels):
        raise ValueError(f"{path} is not a list with a list of classes for each validation image")
    return {f"ILSVRC2012_val_{i + 1:08d}": one for i, one in enumerate(labels)}


def check_names(names: Iterable[str], labels: Mapping[str, Sequence[int]]) -> None:
    """Raises a ValueError where none of the files is one of ImageNet's validation images."""
    found = list(names)
    if not any(labels.get(Path(name).stem) for name in found):
        raise ValueError(
            "real labels are those of ImageNet's validation images (ILSVRC2012_val_00000001.JPEG "
            f"and so on), and none of these images is one; the first is {found[0]}"
        )


def real_accuracy(
    found: Evaluation, names: Mapping[int, str], labels: Mapping[str, Sequence[int]]
) -> dict[str, float | int]:
    """Accuracy against such labels; images that have none are left out.

    Args:
        found: result on ImageNet's validation images, in timm's order of classes.
        names: file name of each position in the data set; folders and endings do not matter.
        labels: of `real_labels`.

    Returns:
        "top1" and "top5", shares of the images that have labels, and "images", their number.

    Raises:
        ValueError: none of the images is one of ImageNet's validation images.
    """
    check_names(names.values(), labels)
    first, among, images = 0, 0, 0
    for index, best in zip(found.index.tolist(), found.best.tolist(), strict=True):
        truth = labels.get(Path(names[index]).stem, ())
        if truth:
            images += 1
            first += best[0] in truth
            among += any(one in truth for one in best)
    return {"top1": first / images, "top5": among / images, "images": images}
