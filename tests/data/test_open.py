"""DATA of a command in all its forms, and what cannot be used."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.data.fetch import Fetch
from spot_vit.data.loaders import EvalLoader, TrainLoader
from spot_vit.data.open import Data, open_data
from spot_vit.utils.errors import UserError
from support.pictures import BROKEN, ODD, OTHER, folder, write
from torch.utils.data import default_collate

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def splits(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> str:
    folder(root / "train", train, count=3)
    folder(root / "val", val, count=2)
    return str(root)


def targets(data: Data, config: dict[str, Any] = CONFIG) -> list[int]:
    view = data.val_set(config)
    return [int(view[i][1]) for i in range(len(view))]  # type: ignore[arg-type]


def refused(message: str, *args: Any, **given: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_data(*args, **given)
    assert "\n" not in str(caught.value)


def test_a_folder_with_both_splits(tmp_path: Path) -> None:
    data = open_data(splits(tmp_path, ("cat", "dog"), ("cat", "dog")))
    assert data.classes == ["cat", "dog"] and data.num_classes == 2 and not data.multi_label
    assert data.native is None and data.notes == []
    train, val = data.train_set(CONFIG), data.val_set(CONFIG)
    assert len(train) == 6 and len(val) == 4  # type: ignore[arg-type]
    image, target = train[5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and target == 1
    assert val.filename(3) == "dog/dog001.jpg"  # type: ignore[attr-defined]


def test_the_odd_folder_trains_and_evaluates_with_its_bad_files_named(tmp_path: Path) -> None:
    folder(tmp_path, count=100, extra=[*ODD, *BROKEN, *OTHER])
    data = open_data(str(tmp_path), val_share=0.3)
    assert data.left_out == [str(tmp_path / "dog/notes.txt")]
    train = TrainLoader(
        data.train_set(CONFIG, aa="rand-m9-mstd0.5-inc1", reprob=0.25), 8, workers=2
    )
    val = EvalLoader(data.val_set(CONFIG), 8, workers=2)
    seen = [batch for epoch in range(2) for batch in train.epoch(epoch)]
    counted = [i for batch in val for i in batch.indices.tolist() if i >= 0]
    assert all(batch.images.isfinite().all() for batch in seen)
    named = {Path(name).name for name in train.unreadable | val.unreadable}
    assert named == set(BROKEN)
    assert len(counted) == len(set(counted)) == len(val.dataset) - len(val.unreadable)
    train.close()


def test_a_share_is_set_aside_by_name_whatever_else_is_there(tmp_path: Path) -> None:
    root = str(folder(tmp_path, count=40))

    def parts(**given: Any) -> tuple[set[str], set[str]]:
        data = open_data(root, val_share=0.25, **given)
        sets = data.train_set(CONFIG), data.val_set(CONFIG)
        return tuple({s.filename(i) for i in range(len(s))} for s in sets)  # type: ignore

    train, val = parts()
    assert not train & val and len(train) == 60
    for name in ("cat", "dog"):  # equally many of each class
        assert sum(file.startswith(name) for file in val) == 10
    assert parts(seed=5) == (train, val)
    for i in range(3):
        write(tmp_path / "cat" / f"new{i}.jpg", i)
    more_train, more_val = parts()
    assert len((train | val) - more_train - more_val) == 0
    assert len(val - more_val) <= 1 and len(train - more_train) <= 1
    alone = open_data(root, val_share=0.25, train=False)  # as an evaluation opens it
    view = alone.val_set(CONFIG)
    assert {view.filename(i) for i in range(len(view))} == more_val  # type: ignore
    with pytest.raises(ValueError, match="no training split"):
        alone.train_set(CONFIG)


def test_share_of_tiny_classes_and_bad_shares(tmp_path: Path) -> None:
    folder(tmp_path, ("cat", "dog"), count=2)
    write(tmp_path / "emu/a.jpg", 1)
    data = open_data(str(tmp_path), val_share=0.1)
    assert targets(data) == [0, 1]  # one of each that can spare one
    assert "2 of 5 training pictures are set aside" in data.notes[-1]
    for share in (0.0, 1.0, -0.2, 1.5):
        refused("val_share: expected a share between 0 and 1", str(tmp_path), val_share=share)


def test_folders_without_validation_say_how(tmp_path: Path) -> None:
    folder(tmp_path / "flat")
    refused("no folder for validation, .*--val-share 0.1", str(tmp_path / "flat"))
    folder(tmp_path / "half/train")
    folder(tmp_path / "half/tests")
    refused(
        r"no folder for validation, 'validation', but \['tests', 'train'\]", str(tmp_path / "half")
    )
    refused(
        "has no folder 'test', but .*did you mean tests",
        str(tmp_path / "half"),
        val_split="test",
    )
    assert len(open_data(str(tmp_path / "half"), val_split="tests").val_set(CONFIG)) == 8  # type: ignore
    folder(tmp_path / "other/val")
    refused("has val but no folder for training.*--train-split", str(tmp_path / "other"))
    splits(tmp_path / "both", ("cat", "dog"), ("cat", "dog"))
    refused("leave one of them out", str(tmp_path / "both"), val_share=0.2)


def test_a_folder_without_splits_is_evaluated_whole(tmp_path: Path) -> None:
    data = open_data(str(folder(tmp_path)), train=False)
    assert targets(data) == [0] * 4 + [1] * 4 and data.train is None
    assert data.notes == [f"{tmp_path} has no splits: all of its pictures are taken"]


def test_missing_folders_and_single_classes(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refused("there is no such folder of pictures; did you mean photos", str(tmp_path / "photo"))
    refused("no pictures", str(tmp_path / "photos"), val_share=0.1)
    folder(tmp_path / "one", ("cat",))
    refused("one class alone, 'cat'", str(tmp_path / "one"), val_share=0.5)
    assert open_data(str(tmp_path / "one"), train=False).num_classes == 1


def test_validation_classes_follow_those_of_training(tmp_path: Path) -> None:
    root = splits(tmp_path, ("cat", "dog", "emu"), ("dog", "emu"))
    data = open_data(root)
    assert targets(data) == [1, 1, 2, 2]  # not 0 and 1, as the folder alone would say
    assert data.notes == ["no validation pictures of: cat"]
    folder(tmp_path / "val", ("emus",), count=1)
    refused(r"validation pictures have 1 classes that are not.*emus \(is 'emus' meant.*emu", root)


def test_classes_of_a_model_give_the_labels(tmp_path: Path) -> None:
    root = str(folder(tmp_path, ("cat", "dog")))
    data = open_data(root, train=False, classes=["emu", "dog", "cat"])
    assert targets(data) == [2] * 4 + [1] * 4
    assert data.classes == ["emu", "dog", "cat"] and data.num_classes == 3
    refused("1 classes that are not among the 2", root, train=False, classes=["cat", "dug"])


def test_the_number_of_classes_must_do(tmp_path: Path) -> None:
    root = str(folder(tmp_path, ("cat", "dog", "emu")))
    refused("have 3 classes, got 2", root, val_share=0.5, num_classes=2)
    assert open_data(root, val_share=0.5, num_classes=7).num_classes == 7


def test_grey_models_get_one_channel_and_others_are_refused(tmp_path: Path) -> None:
    data = open_data(str(folder(tmp_path)), val_share=0.5)
    config = {**CONFIG, "input_size": (1, 24, 24)}
    assert data.train_set(config)[0][0].shape == (1, 24, 24)
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        data.val_set({**CONFIG, "input_size": (4, 24, 24)})


def test_digits_are_new_in_every_epoch() -> None:
    data = open_data("digits", seed=3, data_args={"length": 100, "val_length": 40})
    assert data.classes == [str(i) for i in range(10)] and data.native is not None
    train, val = data.train_set(data.native), data.val_set(data.native)
    loader = TrainLoader(train, 100)
    first, second = (next(loader.epoch(epoch)) for epoch in range(2))
    assert first.images.shape == (100, 1, 64, 64) and len(val) == 40  # type: ignore[arg-type]
    assert sorted(first.indices.tolist()) == list(range(100))
    seen = {image.numpy().tobytes() for image in torch.cat([first.images, second.images])}
    assert len(seen) == 200
    again = TrainLoader(
        open_data("digits", seed=3, data_args={"length": 100}).train_set(data.native), 100
    )
    assert torch.equal(next(again.epoch(1)).images, second.images)


def test_digits_refuse_what_they_do_not_know() -> None:
    refused("digits has no 'cavnas'.*did you mean canvas", "digits", data_args={"cavnas": 32})
    refused("data_args: num_distractors", "digits", data_args={"num_distractors": 9})
    refused("length of at least 1", "digits", data_args={"length": 0})
    refused("num_classes: digits has 10 classes, got 5", "digits", num_classes=5)
    refused("the model knows", "digits", classes=["a", "b"])


def test_random_images_of_any_size_and_number() -> None:
    data = open_data("nowhere", synthetic=True, num_classes=7, train_num_samples=33, seed=1)
    train = data.train_set({"input_size": (3, 48, 40)}, aa="ignored")
    batch = next(TrainLoader(train, 33).epoch(0))
    assert batch.images.shape == (33, 3, 48, 40) and set(batch.target.tolist()) <= set(range(7))
    assert abs(batch.images.mean()) < 0.01 and abs(batch.images.std() - 1) < 0.01
    assert len(set(batch.target.tolist())) > 3
    other = data.val_set({"input_size": (3, 48, 40)})
    assert len(other) == 512 and not torch.equal(other[0][0], train[0][0])  # type: ignore
    assert open_data("x", synthetic=True).num_classes == 1000


def test_unknown_schemes_are_named(tmp_path: Path) -> None:
    refused(r"expected nothing \(a folder\) or one of torch/", str(tmp_path), dataset="zip/photos")


@pytest.mark.parametrize("kind", ["folder", "digits", "synthetic"])
def test_data_sets_can_be_sent_to_workers_that_are_not_forked(tmp_path: Path, kind: str) -> None:
    data = {
        "folder": lambda: open_data(str(folder(tmp_path)), val_share=0.5),
        "digits": lambda: open_data("digits"),
        "synthetic": lambda: open_data("", synthetic=True),
    }[kind]()
    view = data.train_set(CONFIG, no_aug=True)
    again = pickle.loads(pickle.dumps(Fetch(view, 0, default_collate, True))).dataset
    assert torch.equal(again[1][0], view[1][0]) and again[1][1] == view[1][1]
