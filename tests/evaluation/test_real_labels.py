"""ImageNet's reassessed labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from spot_vit.evaluation.accuracy import Evaluation
from spot_vit.evaluation.real_labels import real_accuracy, real_labels
from timm.data import RealLabelsImagenet


def drawn(count: int) -> Evaluation:
    """A result whose best five classes are drawn, the k-th of each image from the k-th 200."""
    none = torch.empty(0)
    draw = torch.Generator().manual_seed(0)
    best = torch.randint(200, (count, 5), generator=draw) + 200 * torch.arange(5)
    return Evaluation(
        0.0, 0.0, none, 0.0, none, none, none, best, none, torch.arange(count), num_classes=1000
    )


def names(count: int) -> list[str]:
    return [f"val/n01440764/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(count)]


def test_of_all_images_it_is_what_timm_finds() -> None:
    labels, found = real_labels(), drawn(50000)
    for i in range(0, 50000, 3):  # or nearly nothing would be right
        if truth := labels[f"ILSVRC2012_val_{i + 1:08d}"]:
            found.best[i, truth[0] // 200] = truth[0]
    theirs = RealLabelsImagenet(names(50000))
    for best in found.best.split(1000):
        logits = torch.zeros(len(best), 1000)
        theirs.add_result(logits.scatter(1, best, torch.arange(5.0, 0, -1).expand_as(best)))
    ours = real_accuracy(found, dict(enumerate(names(50000))), labels)
    assert 0.05 < ours["top1"] < ours["top5"] < 0.5
    for k in (1, 5):
        assert 100 * ours[f"top{k}"] == pytest.approx(theirs.get_accuracy(k))
    assert ours["images"] == len(theirs.is_correct[1]) == 46837


def test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[3], [], [1, 2]]))
    found = drawn(3)
    found.best = torch.tensor([[3, 0], [4, 0], [0, 2]])
    assert real_accuracy(found, dict(enumerate(names(3))), real_labels(path)) == {
        "top1": 0.5, "top5": 1.0, "images": 2,
    }  # fmt: skip


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of these images is one; the first is cat\.jpg"):
        real_accuracy(drawn(1), {0: "cat.jpg"}, real_labels())
    path = tmp_path / "real.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"real\.json is not a list"):
        real_labels(path)
