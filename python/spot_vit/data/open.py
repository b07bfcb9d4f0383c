"""DATA of a command: digits, a folder, a data set by name, or random images."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset

from spot_vit.data.digit_views import DigitSplit
from spot_vit.data.folders import folders_in, open_folder, split_folder
from spot_vit.data.pictures import Labels
from spot_vit.data.schemes import SCHEMES, is_scheme, open_scheme
from spot_vit.data.sources import Opened
from spot_vit.data.splits import PictureSplit, check_labels, counted, order_of, set_aside
from spot_vit.data.synthetic import SyntheticSplit
from spot_vit.utils.errors import UserError

DIGITS = "digits"
_SYNTHETIC = (50_000, 512, 1000)  # training and validation images, classes
_FOLDERS = ("", "folder", "image_folder", "tar")


class Split(Protocol):
    """One split of the data, from which data sets for a model are made."""

    def dataset(
        self, config: Mapping[str, Any], augment: Mapping[str, Any] | None = None
    ) -> Dataset[Any]:
        """A data set for a model with this data configuration of timm's; see `Data`."""


@dataclass
class Data:
    """What a run knows of its data before there is a model.

    Attributes:
        classes: names by label, or None where the data set has none.
        num_classes: how many the model must tell apart.
        multi_label: whether targets are float32 [num_classes], several of which may be 1.
        native: timm's data configuration of data that have a size and range of their own
            (digits); None for pictures, which are scaled to whatever the model takes.
        notes: sentences that the user should see: what was left out, and what was assumed.
        left_out: files that are in the folders and are not read.
        train: the split for training, if it was opened.
        val: the split for validation, if it was opened.
    """

    classes: list[str] | None
    num_classes: int
    multi_label: bool = False
    native: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    train: Split | None = None
    val: Split | None = None

    def train_set(self, config: Mapping[str, Any], **augment: Any) -> Dataset[Any]:
        """The data set for training; samples are (float32 [C, H, W], target).

        Args:
            config: as timm's ``resolve_data_config`` gives it: input_size (C, H, W), mean, std,
                interpolation, crop_pct.
            augment: keyword arguments of `spot_vit.data.transforms.train_transform`; digits and
                synthetic images take none.

        Raises:
            ValueError: the training split was not opened.
        """
        if self.train is None:
            raise ValueError("open_data was called with train=False: there is no training split")
        return self.train.dataset(config, augment)

    def val_set(self, config: Mapping[str, Any]) -> Dataset[Any]:
        """The data set for validation; samples are (float32 [C, H, W], target).

        Args:
            config: as in `train_set`.

        Raises:
            ValueError: the validation split was not opened.
        """
        if self.val is None:
            raise ValueError("open_data was called with val=False: there is no validation split")
        return self.val.dataset(config)


def open_data(
    data: str,
    *,
    dataset: str = "",
    train_split: str = "train",
    val_split: str = "validation",
    class_map: str | Mapping[str, int] | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    train_num_samples: int | None = None,
    val_num_samples: int | None = None,
    data_args: Mapping[str, Any] | None = None,
    synthetic: bool = False,
    val_share: float | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    train: bool = True,
    val: bool = True,
) -> Data:
    """Opens the data of a run: names and labels, no picture yet.

    Args:
        data: "digits"; a folder with a folder for each class, in folders train and val or not; a
            tar file of these; or the root of `dataset`, or its name.
        dataset: name with timm's prefix, such as "hfds/cifar10", "torch/cifar10" or "wds/".
        train_split: name of the split for training.
        val_split: name of the split for validation.
        class_map: file or mapping from class names to labels, as timm reads it.
        input_key: column of the pictures; for folders the endings of their files ("png;jpg").
        target_key: column of the labels; several, separated by commas, are labels on and off.
        train_num_samples: training samples of a stream that does not know, or synthetic ones.
        val_num_samples: as many for validation.
        data_args: settings of `ClutteredDigits` for digits, see `DigitSplit`; otherwise more
            arguments of timm's ``create_dataset``.
        synthetic: whether random images take the place of all data.
        val_share: share of the training pictures that is set aside for validation, where there is
            no split for it; by the names of the files alone, so it is always the same ones, about
            equally many of each class.
        num_classes: of the model, where it is given; the data may have fewer.
        classes: names by label that a trained model knows: labels follow them.
        seed: of the run, for digits and for the shuffling of streams.
        batch_size: a hint for streams.
        train: whether the split for training is wanted.
        val: whether the split for validation is wanted. A folder without splits is all of it where
            training is not wanted.

    Raises:
        UserError: the data cannot be used as they are; one line says what and how to mend it.
    """
    if synthetic:
        length, val_length, count = _SYNTHETIC
        number = num_classes or (len(classes) if classes is not None else count)
        return Data(
            None if classes is None else list(classes),
            number,
            train=SyntheticSplit(train_num_samples or length, number, seed),
            val=SyntheticSplit(val_num_samples or val_length, number, seed + 1),
        )
    if data == DIGITS and not dataset:
        return _open_digits(dict(data_args or {}), seed, num_classes, classes)
    if not dataset and is_scheme(data) and not Path(data).exists():
        data, dataset = "", data
    if dataset in _FOLDERS:
        splits = _open_folders(
            Path(data), train_split, val_split, class_map, input_key, val_share, train, val
        )
    elif is_scheme(dataset):
        shared: dict[str, Any] = {
            "class_map": class_map,
            "input_key": input_key,
            "target_key": target_key,
        }
        shared |= {"seed": seed, "batch_size": batch_size, "data_args": data_args}
        wanted = {
            "train": (train or val_share is not None, train_split, train_num_samples),
            "val": (val and val_share is None, val_split, val_num_samples),
        }
        splits = {
            name: open_scheme(
                dataset,
                data or None,
                split,
                training=name == "train" and val_share is None,
                num_samples=number,
                **shared,
            )
            for name, (needed, split, number) in wanted.items()
            if needed
        }
    else:
        schemes = ", ".join(f"{name}/..." for name in SCHEMES)
        raise UserError(
            f"dataset: expected nothing (a folder) or one of {schemes}, got {dataset!r}"
        )
    return _assembled(splits, classes, num_classes, val_share, train, val, seed)


def _open_digits(
    settings: Mapping[str, Any], seed: int, num_classes: int | None, classes: Sequence[str] | None
) -> Data:
    names = [str(digit) for digit in range(10)]
    if classes is not None and list(classes) != names:
        raise UserError(f"digits has the classes {names}, but the model knows {list(classes)}")
    if num_classes is not None and num_classes < len(names):
        raise UserError(f"num_classes: digits has 10 classes, got {num_classes}")
    train, val = DigitSplit("train", settings, seed), DigitSplit("test", settings, seed)
    return Data(names, num_classes or len(names), native=train.native(), train=train, val=val)


def _open_folders(
    root: Path,
    train_split: str,
    val_split: str,
    class_map: str | Mapping[str, int] | None,
    endings: str | None,
    val_share: float | None,
    train: bool,
    val: bool,
) -> dict[str, Opened]:
    """The splits by "train" and "val"; a share is set aside of "train" later."""
    train_folder = _folder_of(root, train_split, "train")
    val_folder = _folder_of(root, val_split, "validation")
    if val_folder is not None and val_share is not None:
        raise UserError(
            f"{root} has pictures for validation in {val_folder.name}, and val_share={val_share} "
            "asks for others: leave one of them out"
        )
    if train_folder is None and val_folder is not None and train:
        raise UserError(
            f"{root} has {val_folder.name} but no folder for training; expected "
            f"{train_split!r} (--train-split NAME), got {folders_in(root)}"
        )
    opened = {}
    if train or val_share is not None:
        opened["train"] = open_folder(train_folder or root, class_map, endings)
    if val and val_share is None:
        if val_folder is None and (train or train_folder is not None):
            known = f", but {folders_in(root)[:10]}" if train_folder is not None else ""
            raise UserError(
                f"{root} has no folder for validation, {val_split!r}{known}: name it with "
                "--val-split, or set a share of the training pictures aside with --val-share 0.1"
            )
        opened["val"] = open_folder(val_folder or root, class_map, endings)
        if val_folder is None:
            opened["val"].notes.append(f"{root} has no splits: all of its pictures are taken")
    return opened


def _folder_of(root: Path, split: str, default: str) -> Path | None:
    """The folder of a split; None where nobody asked for it by name and it is not there."""
    found = split_folder(root, split)
    if found is None and split != default and root.is_dir():
        known = folders_in(root)
        near = difflib.get_close_matches(split, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{root} has no folder {split!r}, but {known[:20]}{hint}")
    return found


def _assembled(
    splits: dict[str, Opened],
    classes: Sequence[str] | None,
    num_classes: int | None,
    val_share: float | None,
    train: bool,
    val: bool,
    seed: int,
) -> Data:
    """The data of opened splits, with their classes checked against each other."""
    first = splits.get("train") or splits["val"]
    names = list(classes) if classes is not None else first.classes
    for role, opened in splits.items():
        check_labels(role, opened, names, num_classes)
    if train and names is not None and len(names) == 1 and not first.multi_label:
        raise UserError(
            f"there is one class alone, {names[0]!r}, and nothing to tell apart: expected a folder "
            "for each of two classes or more"
        )
    number = num_classes or (len(names) if names is not None else counted(splits))
    data = Data(names, number, first.multi_label)
    for opened in splits.values():
        data.notes += opened.notes
        data.left_out += opened.left_out
    made: dict[str, tuple[Opened, Sequence[int] | None]] = {}
    if val_share is None:
        made = {role: (opened, None) for role, opened in splits.items()}
    else:
        kept, aside = set_aside(first, val_share)
        made = {"train": (first, kept), "val": (first, aside)}
        data.notes.append(
            f"{len(aside)} of {len(first)} training pictures are set aside for validation "
            f"(--val-share {val_share:g})"
        )
    for role, (opened, positions) in made.items():
        labels = Labels(
            order_of(opened.classes, names), number if opened.multi_label else None, opened.dense
        )
        split = PictureSplit(opened, labels, positions, role == "train")
        if role == "train" and train:
            data.train = split
        if role == "val" and val:
            data.val = split
    if names is not None and "val" in splits and "train" in splits:
        missing = [name for name in names if name not in set(splits["val"].classes or names)]
        if missing:
            data.notes.append(f"no validation pictures of: {', '.join(missing[:10])}")
    return data
