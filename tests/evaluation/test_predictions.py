"""The file of predictions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.evaluation.accuracy import Evaluation, evaluate
from spot_vit.evaluation.predictions import save_predictions
from torch import nn


class Fixed(nn.Module):
    """Gives the images back, which are logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


NAMES = ["cat", "dog, wet", 'a "bird"']


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def found(target: torch.Tensor) -> Evaluation:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    return evaluate(Fixed(), [(logits, target)], progress=False)


def test_every_image_and_model_has_a_line(tmp_path: Path) -> None:
    first = found(torch.tensor([0, 2]))
    first.kept = torch.tensor([0.25, 0.5])
    second = found(torch.tensor([0, 2]))
    second.index = torch.tensor([0, 4])
    path = tmp_path / "new" / "predictions.csv"
    classes = {"keep 1": NAMES, "keep 0.7": NAMES}
    results = {"keep 1": first, "keep 0.7": second}
    save_predictions(path, results, "picture {}.jpg".format, classes)
    lines = read(path)
    where = [(line["file"], line["model"]) for line in lines]
    assert where == [
        ("picture 0.jpg", "keep 1"),
        ("picture 0.jpg", "keep 0.7"),
        ("picture 1.jpg", "keep 1"),
        ("picture 4.jpg", "keep 0.7"),
    ]
    assert [line["label"] for line in lines] == ["cat", "cat", 'a "bird"', 'a "bird"']
    assert [line["predicted"] for line in lines] == ["cat", "cat", "dog, wet", "dog, wet"]
    assert [line["correct"] for line in lines] == ["1", "1", "0", "0"]
    assert lines[2]["top5"] == 'dog, wet | a "bird" | cat'
    assert [line["kept"] for line in lines] == ["0.25", "", "0.5", ""]
    expected = torch.tensor([3.0, 1.0, 2.0]).softmax(0)[0].item()
    assert float(lines[0]["probability"]) == pytest.approx(expected, rel=1e-5)


def test_several_labels(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    several = found(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    save_predictions(path, {"model": several}, str, {"model": NAMES})
    lines = read(path)
    assert [line["label"] for line in lines] == ['cat | a "bird"', ""]
    assert [line["correct"] for line in lines] == ["1", "0"]
