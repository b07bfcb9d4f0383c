"""Photos as a model takes them, from files, folders, or the digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from spot_vit.data.decoding import decoded
from spot_vit.data.folders import ENDINGS
from spot_vit.data.open import DIGITS, open_data
from spot_vit.models.saved import preprocessing
from spot_vit.utils.errors import UserError


@dataclass
class Photos:
    """Images for a model.

    Attributes:
        images: float32 [B, C, H, W], scaled, cropped and normalised as the model wants it.
        names: of the files.
        folders: name of the folder that each is in, which is its class in a folder of classes.
        known: index of each image's class, of data that say it.
    """

    images: Tensor
    names: list[str]
    folders: list[str]
    known: list[int] | None = None

    def labels(self, classes: Sequence[str] | None) -> list[int] | None:
        """Index of each image's class: known, or where every folder is called like a class."""
        if self.known is not None:
            return self.known
        index = {name: label for label, name in enumerate(classes or ())}
        if not index or any(folder not in index for folder in self.folders):
            return None
        return [index[folder] for folder in self.folders]


def read_photos(
    model: Any, sources: Sequence[str | Path | Image.Image], most: int | None = None
) -> Photos:
    """Reads pictures and prepares them as the model was evaluated.

    Args:
        model: whose configuration says size, crop, mean and deviation.
        sources: files, PIL images, and folders, whose pictures are taken in order, subfolders too.
        most: how many of them to read, evenly spread; all by default.

    Raises:
        UserError: there is no such file, no picture, or one that cannot be read.
    """
    config = preprocessing(model, {})
    channels = config["input_size"][0]
    transform = create_transform(**config, is_training=False)
    images: list[Tensor] = []
    names: list[str] = []
    folders: list[str] = []
    files = _files(sources)
    if most is not None and len(files) > most:
        files = [files[k * len(files) // most] for k in range(most)]
    for source in files:
        try:
            picture = decoded(source, "L" if channels == 1 else "RGB")
        except Exception as error:  # PIL's decoders raise whatever they like
            raise UserError(f"{source} cannot be read as a picture: {error}") from error
        images.append(transform(picture))
        path = Path(source) if isinstance(source, str | Path) else None
        names.append(f"image {len(names)}" if path is None else path.name)
        folders.append("" if path is None else path.resolve().parent.name)
    return Photos(torch.stack(images), names, folders)


def read_digits(model: Any, count: int) -> Photos:
    """The first of the digits for testing.

    Args:
        model: whose configuration says size, channels, mean and deviation.
        count: how many.
    """
    digits = open_data(DIGITS, train=False).val_set(preprocessing(model, {}))
    samples = [digits[k] for k in range(count)]
    labels = [int(label) for _, label in samples]
    names = [f"digit {k}" for k in range(count)]
    return Photos(torch.stack([image for image, _ in samples]), names, [""] * count, labels)


def _files(sources: Sequence[str | Path | Image.Image]) -> list[Path | Image.Image]:
    """Every picture that is named, folders opened."""
    found: list[Path | Image.Image] = []
    for source in sources:
        if isinstance(source, Image.Image):
            found.append(source)
            continue
        path = Path(source)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS]
            if not inside:
                raise UserError(f"{path}: there is no picture in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file or folder of pictures")
    if not found:
        raise UserError("name at least one picture, or a folder of pictures")
    return found
