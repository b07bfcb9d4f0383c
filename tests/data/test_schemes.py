"""Data sets that timm knows by the prefix of their names."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from spot_vit.data.loaders import EvalLoader, TrainLoader
from spot_vit.data.open import open_data
from spot_vit.utils.errors import UserError
from support.pictures import folder, noise, write

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
needs_wds = pytest.mark.skipif(find_spec("webdataset") is None, reason="webdataset is missing")
needs_hf = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is missing")


def shards(root: Path, count: int = 2, each: int = 10, broken: int = -1) -> str:
    """Tar files of pictures whose labels are their numbers modulo 3; JSON has lists of labels."""
    root.mkdir(exist_ok=True)
    for shard in range(count):
        with tarfile.open(root / f"part-{shard:03d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                write(root / "picture.jpg", number)
                picture = (root / "picture.jpg").read_bytes()
                files = {
                    "jpg": b"nothing" if number == broken else picture,
                    "cls": str(number % 3).encode(),
                    "json": json.dumps({"many": [number % 3, 3]}).encode(),
                }
                for ending, body in files.items():
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return str(root)


def wds(root: str, **given: Any) -> Any:
    given = {"num_classes": 4, "train_num_samples": 20, **given}
    pattern = "part-{000..001}.tar"
    return open_data(root, dataset="wds/", train_split=pattern, val_split=pattern, **given)


@needs_wds
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_train_and_evaluate(tmp_path: Path, workers: int) -> None:
    data = wds(shards(tmp_path / "s"))
    loader = TrainLoader(data.train_set(CONFIG), 5, seed=1, workers=workers)
    assert not loader.unknown_length and len(loader) == 4
    first = list(loader.epoch(1))
    assert len(first) == 4 and first[0].images.shape == (5, 3, 32, 32)
    again = TrainLoader(data.train_set(CONFIG), 5, seed=1, workers=workers)
    list(again.epoch(0))  # what came before does not matter
    for a, b in zip(first[2:], again.epoch(1, 2), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.target, b.target)
    val = data.val_set(CONFIG)
    for world in (1, 2):
        labels = [
            label
            for rank in range(world)
            for batch in EvalLoader(val, 3, rank=rank, world=world, workers=workers)
            for label, index in zip(batch.target.tolist(), batch.indices.tolist(), strict=True)
            if index >= 0
        ]
        assert sorted(labels) == sorted(i % 3 for i in range(20))


@needs_wds
def test_the_length_of_shards_depends_on_workers(tmp_path: Path) -> None:
    """Each worker gives whole batches: 20 samples are 5 batches of 4, or 3 of each of two."""
    data = wds(shards(tmp_path / "s"), batch_size=4)
    for workers, count in ((2, 6), (0, 5)):
        loader = TrainLoader(data.train_set(CONFIG), 4, workers=workers)
        assert len(loader) == count == len(list(loader.epoch(0))) == len(loader)


@needs_wds
def test_shards_of_unknown_length_go_on_without_end(tmp_path: Path) -> None:
    data = wds(shards(tmp_path / "s"), train_num_samples=None)
    loader = TrainLoader(data.train_set(CONFIG), 4)
    assert loader.unknown_length
    with pytest.raises(TypeError, match="--steps"):
        len(loader)
    batches = loader.epoch(0)
    assert [len(next(batches).images) for _ in range(12)] == [4] * 12  # more than 20 samples


@needs_wds
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_of_shards_are_named(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = shards(tmp_path / "s", broken=7)
    loader = EvalLoader(wds(root).val_set(CONFIG), 4, workers=workers, bad_share=0.2)
    assert sum((batch.indices >= 0).sum().item() for batch in loader) == 19
    assert loader.unreadable == {f"{root}/part-000.tar: 0007": "not a picture"}
    log = logging.getLogger("timm.data.readers.reader_wds")
    assert log.propagate and not log.handlers and "0007" not in caplog.text


@needs_wds
def test_labels_of_shards_may_be_lists(tmp_path: Path) -> None:
    data = wds(shards(tmp_path / "s"), target_key="many")
    assert data.multi_label and data.num_classes == 4
    batch = next(iter(EvalLoader(data.val_set(CONFIG), 4)))
    assert batch.target.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]]


@needs_wds
def test_pictures_of_shards_are_turned_and_converted(tmp_path: Path) -> None:
    root = tmp_path / "s"
    shards(root)
    write(root / "turned.jpg", 3)
    body = (root / "turned.jpg").read_bytes()
    with tarfile.open(root / "part-000.tar", "w") as tar:
        for ending, content in (("jpg", body), ("cls", b"1")):
            info = tarfile.TarInfo(f"0.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = open_data(
        str(root), dataset="wds/", val_split="part-000.tar", num_classes=4, train=False
    )
    view: Any = data.val_set(CONFIG)
    view.transform = None
    picture, _ = next(iter(view))
    upright = np.rot90(noise(3), 3).astype(int)
    assert picture.size == (40, 48) and abs(np.asarray(picture) - upright).mean() < 5


def hf(root: Path, **splits: int) -> str:
    for name, count in splits.items():
        folder(root / name, count=count)
    return f"hfds/{root}"


@needs_hf
def test_hugging_face_data_sets(tmp_path: Path) -> None:
    name = hf(tmp_path / "d", train=6, test=2)
    for given in ({"data": name}, {"data": str(tmp_path / "cache"), "dataset": name}):
        data = open_data(**given, val_split="test")
        assert data.classes == ["cat", "dog"] and data.num_classes == 2
        train, val = data.train_set(CONFIG), data.val_set(CONFIG)
        assert len(train) == 12 and len(val) == 4  # type: ignore[arg-type]
        assert [val[i][1] for i in range(4)] == [0, 0, 1, 1]
        assert val.filename(2) == "dog/dog000.jpg"  # type: ignore[attr-defined]
    batches = list(TrainLoader(train, 6, workers=2).epoch(0))
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(12))
    share = open_data(name, val_share=0.5)
    assert len(share.val_set(CONFIG)) == 6  # type: ignore[arg-type]


@needs_hf
def test_streams_of_hugging_face(tmp_path: Path) -> None:
    name = hf(tmp_path / "d", train=6, test=2).replace("hfds", "hfids")
    data = open_data(name, val_split="test", num_classes=2, train_num_samples=12)
    loader = TrainLoader(data.train_set(CONFIG), 4)
    assert len(loader) == 3
    labels = torch.cat([batch.target for batch in loader.epoch(0)])
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
    counted = [i for batch in EvalLoader(data.val_set(CONFIG), 3) for i in batch.target.tolist()]
    assert counted == [0, 0, 1, 1]
    endless = open_data(name, val_split="test", num_classes=2)
    assert TrainLoader(endless.train_set(CONFIG), 4).unknown_length


@needs_hf
def test_hugging_face_columns_may_be_labels(tmp_path: Path) -> None:
    root = tmp_path / "d/train"
    root.mkdir(parents=True)
    rows = [(f"{i}.jpg", i % 2, int(i > 3)) for i in range(6)]
    with (root / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "odd", "large"), *rows])
    for i in range(6):
        write(root / f"{i}.jpg", i)
    pytest.importorskip("timm.data.target_transforms")  # timm 1.0.31
    data = open_data(f"hfds/{tmp_path}/d", target_key="odd,large", val_share=0.5)
    assert data.multi_label and data.classes == ["odd", "large"] and data.num_classes == 2
    train, val = data.train_set(CONFIG), data.val_set(CONFIG)
    found = {
        Path(view.filename(i)).name: view[i][1].tolist()  # type: ignore[attr-defined]
        for view in (train, val)
        for i in range(3)
    }
    assert found == {name: [float(odd), float(large)] for name, odd, large in rows}


@needs_hf
def test_hugging_face_trouble_is_a_line(tmp_path: Path) -> None:
    name = hf(tmp_path / "d", train=3, test=2)
    for given, message in (
        ({}, "cannot be opened as 'validation'.*train.*test"),
        ({"val_split": "test", "target_key": "labl"}, "labl"),
        ({"val_split": "test", "input_key": "picture"}, "'picture' holds no pictures"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_data(name, **given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


class Fake:
    """A data set as torchvision's are: it decodes by itself."""

    def __init__(self, root: str, train: bool, download: bool, labels: Any = (0, 1, 1, 2)) -> None:
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.root, self.train, self.targets = root, train, list(labels)
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(noise(index + 10 * self.train, 28, 28, 1)[..., 0]), self.targets[
            index
        ]


def test_torchvisions_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data import dataset_factory

    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "mnist", Fake)
    with pytest.raises(UserError, match=r"torch/mnist in .*download.*--data-args"):
        open_data(str(tmp_path), dataset="torch/mnist")
    with pytest.raises(UserError, match="torch/mnist needs DATA"):
        open_data("torch/mnist")
    data = open_data(str(tmp_path), dataset="torch/mnist", data_args={"download": True})
    assert data.classes == ["a", "b", "c"]
    val = data.val_set(CONFIG)
    assert [val[i][1] for i in range(4)] == [0, 1, 1, 2] and val[0][0].shape == (3, 32, 32)
    assert val.filename(3) == "3"  # type: ignore[attr-defined]
    assert not torch.equal(
        val[0][0],
        open_data(
            str(tmp_path),
            dataset="torch/mnist",
            train_split="validation",
            val_split="train",
            data_args={"download": True},
        ).val_set(CONFIG)[0][0],
    )


def test_labels_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from timm.data import dataset_factory

    def fake(labels: list[int]) -> Any:
        def made(**given: Any) -> Fake:
            data = Fake(labels=labels, **given)
            del data.classes
            return data

        return partial(made)

    given: dict[str, Any] = {"dataset": "torch/mnist", "data_args": {"download": True}}
    for labels, classes, message in (
        ([0, -1], None, "have no labels"),
        ([0, 5], 3, "labels up to 5, got 3"),
    ):
        monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "mnist", fake(labels))
        with pytest.raises(UserError, match=message):
            open_data(str(tmp_path), num_classes=classes, **given)
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "mnist", fake([0, 4]))
    assert open_data(str(tmp_path), **given).num_classes == 5


@pytest.mark.skipif(find_spec("tensorflow_datasets") is not None, reason="it is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"tfds/mnist needs .*pip install tensorflow-datasets"):
        open_data("tfds/mnist")
