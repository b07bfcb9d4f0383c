"""Data sets that timm knows by the prefix of their names: torch, hfds, hfids, tfds, wds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from timm.data import create_dataset

from spot_vit.data.sources import Opened, ReaderSource, TorchSource, named_in_order
from spot_vit.utils.errors import UserError

SCHEMES = ("torch", "hfds", "hfids", "tfds", "wds")
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}
_ENDLESS = 1 << 40  # samples, where their number is unknown: timm's readers begin again


def is_scheme(name: str) -> bool:
    """Whether timm reads data sets of that name by its prefix."""
    return "/" in name and name.partition("/")[0].lower() in SCHEMES


def open_scheme(
    dataset: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    class_map: str | Mapping[str, int] | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    data_args: Mapping[str, Any] | None = None,
) -> Opened:
    """A split of a data set by timm's ``create_dataset``, whose arguments these are.

    Args:
        dataset: with its prefix, such as "hfds/cifar10" or "wds/".
        root: folder that it is in, or is downloaded to.
        split: as the data set names it; for WebDataset a pattern of shards will do.
        training: whether streams are shuffled.
        class_map: see timm.
        input_key: column or ending of the pictures.
        target_key: column or key of the labels.
        num_samples: of a stream that does not know.
        seed: of a stream's shuffling.
        batch_size: a hint for streams.
        data_args: more arguments.

    Raises:
        UserError: it cannot be opened; the line gives the reason.
    """
    scheme = dataset.partition("/")[0].lower()
    arguments: dict[str, Any] = {
        "root": root,
        "split": split,
        "class_map": class_map,
        "is_training": training,
        "batch_size": batch_size,
        "seed": seed,
        "num_samples": num_samples,
        "input_img_mode": "",  # we convert pictures ourselves
        "input_key": input_key,
        "target_key": target_key,
        **(data_args or {}),
    }
    if scheme == "torch" and root is None:
        raise UserError(f"{dataset} needs DATA: the folder that it is in, or is downloaded to")
    try:
        return _opened(dataset, arguments)
    except Exception as error:  # of four libraries
        raise UserError(_trouble(dataset, root, split, error)) from error


def _opened(dataset: str, arguments: dict[str, Any]) -> Opened:
    sized = True
    try:
        opened = create_dataset(dataset, **arguments)
    except (ValueError, RuntimeError) as error:
        if "num_samples" not in str(error):
            raise
        sized = False
        arguments = arguments | {"num_samples": _ENDLESS}
        opened = create_dataset(dataset, **arguments)
    if not hasattr(opened, "reader"):
        return Opened(
            TorchSource(opened, dataset),
            classes=_texts(getattr(opened, "classes", None)),
            targets=_numbers(getattr(opened, "targets", None)),
        )
    reader = opened.reader
    found = Opened(classes=named_in_order(reader.class_to_idx), sized=sized)
    found.multi_label, found.dense = _several(reader)
    if hasattr(reader, "__getitem__"):
        key, columns = reader.image_key, reader.dataset.column_names
        if len(reader) and reader.dataset[0][key] is None:  # timm adds a column that is missing
            raise ValueError(f"input_key: column {key!r} holds no pictures; there are {columns}")
        found.source = ReaderSource(reader, f"{dataset} ({arguments['split']})")
        if not found.multi_label:
            found.targets = _numbers(reader.dataset[reader.label_key])
    else:
        found.reader = reader
        if arguments["target_key"] and not found.multi_label:
            label = _first_label(dataset, arguments)
            found.multi_label = isinstance(label, list | tuple)
    return found


def _first_label(dataset: str, arguments: dict[str, Any]) -> Any:
    """The label of a stream's first sample; a stream for evaluation fills no buffer before."""
    reader = create_dataset(dataset, **arguments | {"is_training": False}).reader
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return next(iter(reader), (None, None))[1]


def _several(reader: Any) -> tuple[bool, bool]:
    """Whether pictures have several labels, and whether these come as vectors."""
    dense = bool(getattr(reader, "dense_target", False))
    if dense or getattr(reader, "target_keys", None):
        return True, dense
    info = getattr(getattr(reader, "dataset", None) or getattr(reader, "builder", None), "info", 0)
    features = getattr(info, "features", None) or {}
    key = getattr(reader, "label_key", None) or getattr(reader, "target_key", None)
    feature = features.get(key) if hasattr(features, "get") else None
    return hasattr(feature, "feature"), False  # a list of labels


def _texts(names: Iterable[Any] | None) -> list[str] | None:
    return None if names is None else [str(name) for name in names]


def _numbers(labels: Any) -> list[int] | None:
    """Labels as a list; None where they are none, or something else than whole numbers."""
    if labels is None:
        return None
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return values if all(type(value) is int for value in values) else None


def _trouble(dataset: str, root: str | None, split: str, error: Exception) -> str:
    scheme = dataset.partition("/")[0].lower()
    where = f" in {root}" if root else ""
    if isinstance(error, ImportError):
        package = _PACKAGES.get(scheme, error.name)
        return f"{dataset} needs a package that is missing: pip install {package}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if scheme == "torch" and "ownload" in reason:
        reason += " (--data-args '{\"download\": true}' downloads it)"
    return f"{dataset}{where} cannot be opened as {split!r}: {reason}"
