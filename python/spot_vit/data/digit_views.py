"""ClutteredDigits as models and recipes take them."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from spot_vit.data.digits import ClutteredDigits
from spot_vit.data.transforms import fitted
from spot_vit.utils.errors import UserError

_ENDLESS = 1 << 62
_OWN = ("val_length", "fresh")  # besides the settings of ClutteredDigits


class DigitView(Dataset[tuple[Tensor, int]]):
    """Cluttered digits resized, in as many channels and of the range that a model takes.

    Args:
        digits: an endless data set where images are new in every epoch.
        length: samples in an epoch.
        config: timm's data configuration: input_size (C, H, W), mean, std.
        fresh: whether epoch e shows samples e * length to (e + 1) * length - 1.
    """

    by_index = True

    def __init__(
        self, digits: ClutteredDigits, length: int, config: Mapping[str, Any], fresh: bool
    ) -> None:
        self.digits, self.length, self.fresh, self.first = digits, length, fresh, 0
        self.input_size = tuple(config["input_size"])
        channels = self.input_size[0]
        mean, std = config.get("mean") or (0.0,), config.get("std") or (1.0,)
        self.mean = torch.tensor(fitted(mean, channels)).view(-1, 1, 1)
        self.std = torch.tensor(fitted(std, channels)).view(-1, 1, 1)

    def __len__(self) -> int:
        return self.length

    def at_epoch(self, epoch: int) -> DigitView:
        """The data set of an epoch."""
        if not (self.fresh and epoch):
            return self
        view = copy.copy(self)
        view.first = epoch * self.length
        return view

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f"index: expected 0 to {self.length - 1}, got {index}")
        batch = self.digits.batch([self.first + index for index in indices])
        images = batch.image
        if images.shape[-2:] != self.input_size[1:]:
            images = F.interpolate(
                images, self.input_size[1:], mode="bilinear", align_corners=False
            )
        images = (images - self.mean) / self.std
        return list(zip(images, batch.label.tolist(), strict=True))

    def filename(self, index: int) -> str:
        """A name for the sample: data set, split and number."""
        return f"digits {self.digits.split} {self.first + index}"


class DigitSplit:
    """Makes a ``DigitView`` of the size that a model takes.

    Args:
        split: "train" or "test".
        settings: of ``ClutteredDigits``; "length" or, for the test split, "val_length" is the
            number of samples in an epoch, and "fresh", true by default, whether training's are
            new in each.
        seed: of training's images, where the settings have none.

    Raises:
        UserError: a setting that does not exist or does not fit.
    """

    def __init__(self, split: str, settings: Mapping[str, Any], seed: int) -> None:
        training = split == "train"
        known = [*list(inspect.signature(ClutteredDigits).parameters)[1:], *_OWN]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"data_args: digits has no {name!r}, but {known}{hint}")
        passed = {name: value for name, value in settings.items() if name not in _OWN}
        length = passed.pop("length", None) if training else settings.get("val_length")
        if training:
            passed.setdefault("seed", seed)
        else:
            passed |= {"ramp": 0, "seed": 0}
            passed.pop("length", None)
        try:
            plain = ClutteredDigits(split, length, **passed)
            self.length = len(plain)
            self.fresh = training and bool(settings.get("fresh", True))
            self.digits = ClutteredDigits(split, _ENDLESS, **passed) if self.fresh else plain
        except (ValueError, TypeError) as error:
            raise UserError(f"data_args: {error}") from error
        if self.length < 1:
            raise UserError(f"data_args: expected a length of at least 1, got {self.length}")

    def native(self) -> dict[str, Any]:
        """Timm's data configuration of the images as they are made."""
        return {
            "input_size": (1, self.digits.canvas, self.digits.canvas),
            "mean": (0.0,),
            "std": (1.0,),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }

    def dataset(
        self, config: Mapping[str, Any], augment: Mapping[str, Any] | None = None
    ) -> DigitView:
        """The data set for a model with this data configuration; there is no augmentation."""
        return DigitView(self.digits, self.length, config, self.fresh)
