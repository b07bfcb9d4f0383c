"""What models say of every image, as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spot_vit.evaluation.accuracy import Evaluation
from spot_vit.utils.files import atomic_write

COLUMNS = ("file", "model", "label", "predicted", "correct", "probability", "top5", "kept")


def save_predictions(
    path: str | os.PathLike[str],
    results: Mapping[str, Evaluation],
    filename: Callable[[int], str],
    classes: Mapping[str, Sequence[str]],
) -> None:
    """Writes a line for every image and model, an image's lines one below the other, atomically.

    Columns are the file, the model, the label and the predicted class by name (several labels, and
    the best five classes, with " | " between them), whether it is right (1 or 0), the probability
    of the predicted class, and the share of patches that the last stage kept, empty where the model
    removes none or cannot tell.

    Args:
        path: the file to write.
        results: by name of the model.
        filename: gives the name of the file at a position in the data set.
        classes: by name of the model, the names of its classes by label.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        places = {
            name: {int(index): i for i, index in enumerate(found.index)}
            for name, found in results.items()
        }
        for index in sorted(set().union(*places.values())):
            for name, found in results.items():
                if index in places[name]:
                    line = _line(found, places[name][index], classes[name])
                    writer.writerow([filename(index), name, *line])


def _line(found: Evaluation, i: int, classes: Sequence[str]) -> list[Any]:
    label, best = found.labels[i], [classes[c] for c in found.best[i].tolist()]
    if label.dim():
        labels = _joined([classes[c] for c in label.nonzero()[:, 0].tolist()])
    else:
        labels = classes[int(label)]
    kept = "" if found.kept is None else f"{found.kept[i]:.6g}"
    right, probability = int(found.correct[i]), f"{found.probability[i]:.6g}"
    return [labels, best[0], right, probability, _joined(best), kept]


def _joined(names: Sequence[str]) -> str:
    return " | ".join(names)
