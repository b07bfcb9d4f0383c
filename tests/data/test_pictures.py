"""Pictures of every kind, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spot_vit.data.fetch import Unreadable
from spot_vit.data.folders import open_folder
from spot_vit.data.pictures import Labels, Pictures
from spot_vit.data.seeded import kept_states, plant
from spot_vit.data.transforms import eval_transform, train_transform
from support.pictures import BROKEN, ODD, folder, write

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.filterwarnings("error")
def test_odd_pictures_become_tensors(tmp_path: Path, name: str, channels: int) -> None:
    write(tmp_path / "a" / name, 3)
    config = {**CONFIG, "input_size": (channels, 32, 32)}
    mode = "RGB" if channels == 3 else "L"
    transforms = [
        eval_transform(config),
        train_transform(config),
        train_transform(config, no_aug=True),
        train_transform(config, aa="rand-m9-mstd0.5-inc1", reprob=1.0),
    ]
    for transform in transforms:
        pictures = Pictures(open_folder(tmp_path).source, transform, mode=mode)
        with kept_states():
            plant(0)
            image, target = pictures[0]
        assert image.shape == (channels, 32, 32) and image.dtype == torch.float32
        assert image.isfinite().all() and target == 0
        assert name == "thin.png" or image.std() > 0.05  # a crop of that is one pixel


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_unreadable_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a" / name, 9)
    pictures = Pictures(open_folder(tmp_path).source, eval_transform(CONFIG))
    with pytest.raises(Unreadable) as caught:
        pictures[0]
    assert caught.value.name == str(tmp_path / "a" / name)
    reason = {
        "truncated.jpg": "truncated",
        "text.jpg": "not a picture",
        "empty.png": "not a picture",
        "bomb.png": "decompression bomb",
    }[name]
    assert reason in caught.value.reason.lower() and "\n" not in str(caught.value)
    assert "0x" not in caught.value.reason


def test_a_picture_that_has_gone_is_unreadable(tmp_path: Path) -> None:
    folder(tmp_path)
    pictures = Pictures(open_folder(tmp_path).source)
    (tmp_path / "dog" / "dog001.jpg").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        pictures[5]
    assert pictures[4][0].size == (48, 40)


def test_positions_choose_pictures_and_their_names(tmp_path: Path) -> None:
    source = open_folder(folder(tmp_path)).source
    pictures = Pictures(source, positions=[6, 1])
    assert len(pictures) == 2
    assert [pictures.filename(i) for i in range(2)] == ["dog/dog002.jpg", "cat/cat001.jpg"]
    assert [pictures[i][1] for i in range(2)] == [1, 0]
    for index in (-1, 2):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            pictures[index]


def test_labels_are_put_in_order() -> None:
    assert [Labels([2, 0, 1])(label) for label in (0, 1, 2)] == [2, 0, 1]
    assert Labels()(np.int64(3)) == 3
    hot = Labels(num_classes=4)
    assert hot([0, 3, 3]).tolist() == [1, 0, 0, 1] and hot([]).tolist() == [0, 0, 0, 0]
    assert Labels([3, 1], num_classes=4)([0]).tolist() == [0, 0, 0, 1]
    assert Labels(num_classes=3, dense=True)([0.0, 0.5, 1.0]).tolist() == [0, 0.5, 1]
