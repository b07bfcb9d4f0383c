"""The data of a run: opened from its recipe, loaded, mixed, and with the loss that fits them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_data_config
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from spot_vit.config.recipe import Recipe
from spot_vit.data.batches import images_and_target
from spot_vit.data.loaders import EvalLoader, TrainLoader
from spot_vit.data.open import open_data
from spot_vit.data.workers import default_number
from spot_vit.models.named import NAMED
from spot_vit.runs.processes import Processes
from spot_vit.training.criteria import criterion_for
from spot_vit.training.losses import Criterion
from spot_vit.utils.errors import UserError

_AUGMENT = (
    "no_aug", "scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "reprob", "remode",
    "recount", "train_interpolation",
)  # fmt: skip


class RunData:
    """What a run reads, and what its model must fit.

    Args:
        recipe: of the run.
        processes: this one among all.
        train_data: a data set in place of the recipe's.
        val_data: likewise; None with `train_data` for no evaluation.
        classes: names of the classes of those.

    Attributes:
        loader: of training.
        val_loader: of evaluation, or None.
        batches: micro-batches of an epoch of this process, None where nobody knows.
        classes: names, or None.
        num_classes: how many there are.
        input_size: (channels, height, width) of an image.
        data_config: how images are made ready, as timm has it.
        model_arguments: of `timm.create_model`, that the data ask for.
        criterion: the loss of the recipe.
        description: what there is, in a line.
        fingerprint: what a run must find again when it goes on: how many images and classes, and
            a digest of the names of classes and files; plain data.

    Raises:
        UserError: the data cannot be used so.
    """

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        *,
        train_data: Any = None,
        val_data: Any = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        if train_data is None:
            self._open()
        else:
            self._take(train_data, val_data, classes)
        if self.classes is not None:  # the model may have outputs for which there is no picture
            self.classes += [str(n) for n in range(len(self.classes), self.num_classes)]
        self._metric_is_there()
        self.model_arguments = self._arguments()
        self.batches = None if self.loader.unknown_length else len(self.loader)
        self.mixes = recipe.mixup > 0 or recipe.cutmix > 0
        self.criterion = self._criterion()
        self.fingerprint = {
            "images": _length(self.loader.dataset),
            "classes": self.num_classes,
            "digest": _digest(self.classes, self.loader.dataset),
        }

    # ---- where images come from --------------------------------------------------------------

    def _open(self) -> None:
        recipe = self.recipe
        data = open_data(
            recipe.data,
            dataset=recipe.dataset or "",
            train_split=recipe.train_split,
            val_split=recipe.val_split,
            class_map=recipe.class_map,
            input_key=recipe.input_key,
            target_key=recipe.target_key,
            train_num_samples=recipe.train_num_samples,
            val_num_samples=recipe.val_num_samples,
            data_args=_data_args(recipe),
            synthetic=recipe.synthetic,
            val_share=recipe.val_share,
            num_classes=recipe.num_classes,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
        )
        self.classes, self.num_classes = data.classes, data.num_classes
        self.multi_label = data.multi_label
        self.native = data.native
        self.data_config = self._config(data.native)
        augment = {name: getattr(recipe, name) for name in _AUGMENT}
        train = data.train_set(self.data_config, **augment)
        val = data.val_set(self.data_config)
        self._load(train, val)
        counts = f"{_count(train)} training and {_count(val)} validation images"
        name = "synthetic" if recipe.synthetic else recipe.data
        about = f"{name}: {counts}, {self.num_classes} classes"
        self.description = "\n".join([*data.notes, about])

    def _take(self, train: Any, val: Any, classes: Sequence[str] | None) -> None:
        self.classes = None if classes is None else list(classes)
        image, label = _first(train)
        self.multi_label = isinstance(label, Tensor) and label.ndim == 1
        number = self.recipe.num_classes or (None if classes is None else len(classes))
        if number is None and self.multi_label:
            number = len(label)
        if number is None:
            raise UserError("num_classes: give it, or classes, with data sets of your own")
        self.num_classes = number
        self.native = {"input_size": tuple(image.shape)}
        self.data_config = self._config(self.native)
        self._load(train, val)
        counts = f"{_count(train)} training and {'no' if val is None else _count(val)} validation"
        self.description = f"data sets of your own: {counts} images, {number} classes"

    def _load(self, train: Dataset[Any], val: Dataset[Any] | None) -> None:
        recipe, processes = self.recipe, self.processes
        common: dict[str, Any] = {
            "rank": processes.rank,
            "world": processes.world,
            "workers": default_number() if recipe.workers is None else recipe.workers,
            "pin": recipe.pin_mem and processes.device.type == "cuda",
            "bad_share": recipe.bad_share,
        }
        self.loader = TrainLoader(train, recipe.batch_size, seed=recipe.seed, **common)
        size = recipe.validation_batch_size or recipe.batch_size
        self.val_loader = None if val is None else EvalLoader(val, size, **common)

    # ---- what the model must fit ---------------------------------------------------------------

    def _config(self, native: dict[str, Any] | None) -> dict[str, Any]:
        """Timm's data configuration: what the recipe says, else the data, else the model."""
        recipe, data = self.recipe, native or {}
        found = timm.get_pretrained_cfg(NAMED.get(recipe.model, recipe.model))
        cfg = {**({} if found is None else found.to_dict()), **data}
        channels, *size = cfg.get("input_size", (3, 224, 224))
        asked = recipe.in_chans or recipe.model_kwargs.get("in_chans") or channels
        if data and asked != channels:
            raise UserError(f"in_chans: images of these data have {channels}, got {asked}")
        side = recipe.img_size or recipe.model_kwargs.get("img_size") or size
        size = [side] * 2 if isinstance(side, int) else list(side)
        own = recipe.model_kwargs.get("img_size")
        if own is not None and recipe.img_size not in (None, own):
            raise UserError(f"img_size: {recipe.img_size} here and {own} in model_kwargs; give one")
        given: dict[str, Any] = {"input_size": (asked, *size)}
        if asked != channels:
            given |= {"mean": (0.5,), "std": (0.5,)}
        for name in ("mean", "std", "interpolation", "crop_pct"):
            if getattr(recipe, name) is not None:
                given[name] = getattr(recipe, name)
        for name in ("mean", "std"):
            if len(given.get(name, (0,))) not in (1, asked):
                raise UserError(
                    f"{name}: expected one number or {asked}, one for each channel, got "
                    f"{list(given[name])}"
                )
        return resolve_data_config(given, pretrained_cfg=cfg)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.data_config["input_size"]

    def _arguments(self) -> dict[str, Any]:
        """What `timm.create_model` must be told: classes, and a size that is not its own."""
        found = timm.get_pretrained_cfg(NAMED.get(self.recipe.model, self.recipe.model))
        own = (3, 224, 224) if found is None else found.input_size
        channels, *size = self.input_size
        arguments: dict[str, Any] = {"num_classes": self.num_classes}
        if channels != own[0]:
            arguments["in_chans"] = channels
        if tuple(size) != tuple(own[1:]):
            arguments["img_size"] = size[0] if size[0] == size[1] else tuple(size)
        return arguments

    def _metric_is_there(self) -> None:
        """Raises unless an evaluation of these data gives what `eval_metric` asks for."""
        metric = self.recipe.eval_metric
        if not self.multi_label and metric == "map":
            raise UserError("eval_metric: map is of images with several labels; say top1 or loss")
        if metric == "top5" and self.num_classes <= 5:
            raise UserError(
                f"eval_metric: top5 of {self.num_classes} classes is always 1; say top1"
            )

    # ---- losses and mixing ---------------------------------------------------------------------

    def _criterion(self) -> Criterion:
        recipe = self.recipe
        if self.multi_label and not recipe.bce_loss:
            raise UserError(
                "bce_loss: images of these data may have several labels, which softmax "
                "cross-entropy cannot learn; add --bce-loss"
            )
        return criterion_for(
            smoothing=recipe.smoothing,
            bce_loss=recipe.bce_loss,
            bce_target_thresh=recipe.bce_target_thresh,
            bce_sum=recipe.bce_sum,
            mixup=self.mixes,
        )

    def mixup(self) -> Any:
        """Timm's Mixup of the recipe, or None."""
        recipe = self.recipe
        if not self.mixes:
            return None
        return Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            mode=recipe.mixup_mode,
            label_smoothing=recipe.smoothing,
            num_classes=self.num_classes,
            **({"multi_label": True} if self.multi_label else {}),
        )

    def unreadable(self) -> dict[str, str]:
        """Pictures that could not be read so far, and why, of all processes."""
        own = dict(self.loader.unreadable)
        if self.val_loader is not None:
            own |= self.val_loader.unreadable
        found: dict[str, str] = {}
        for one in self.processes.gathered(own):
            found |= one
        return found


def _data_args(recipe: Recipe) -> dict[str, Any]:
    given = {"download": True} if recipe.dataset_download else {}
    return {**given, **recipe.data_args}


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _digest(classes: Sequence[str] | None, dataset: Any) -> str:
    """A digest of the names of classes, and of files relative to the data set, in their order.

    The order counts: a batch is a function of positions. A second for a million files.
    """
    found = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    if hasattr(dataset, "filename"):
        for index in range(len(dataset)):
            found.update(os.fsencode(dataset.filename(index)) + b"\0")
    return found.hexdigest()


def _count(dataset: Any) -> str:
    number = _length(dataset)
    return "unknown" if number is None else f"{number:,}"


def _first(dataset: Any) -> Any:
    try:
        stream = isinstance(dataset, IterableDataset)  # whose __getitem__ only raises
        sample = next(iter(dataset)) if stream else dataset[0]
    except (IndexError, StopIteration):
        raise UserError("train_data: the data set is empty") from None
    image, label = images_and_target(sample)
    return torch.as_tensor(image), label
