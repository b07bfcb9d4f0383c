"""Timm's transforms of pictures, for training and for evaluation, from plain arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

from spot_vit.utils.errors import UserError

Transform = Callable[[Image.Image], Tensor]
MAX_ASPECT = 32


class Trimmed:
    """A transform behind one that trims very thin pictures.

    Where the short side is scaled to the input size before the middle is cut out, a picture of
    1 x 5000 pixels would grow to gigabytes. More of the long side than `MAX_ASPECT` times the
    short one never reaches the crop.

    Args:
        transform: what follows.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, picture: Image.Image) -> Tensor:
        """The transformed picture."""
        width, height = picture.size
        most = MAX_ASPECT * min(width, height)
        if max(width, height) > most:
            left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
            picture = picture.crop((left, top, left + min(width, most), top + min(height, most)))
        return self.transform(picture)


def eval_transform(config: Mapping[str, Any]) -> Transform:
    """Resize, centre crop, tensor, normalise: float32 [C, H, W].

    Args:
        config: as timm's ``resolve_data_config`` gives it: input_size (C, H, W), mean, std,
            interpolation, crop_pct, crop_mode; what is missing has timm's default.
    """
    return Trimmed(create_transform(**_common(config), is_training=False, **_crop(config)))


def train_transform(
    config: Mapping[str, Any],
    *,
    no_aug: bool = False,
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] | None = 0.4,
    aa: str | None = None,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    train_interpolation: str = "random",
) -> Transform:
    """Random crop, flips, colours, RandAugment and erasing: float32 [C, H, W].

    Args:
        config: as in `eval_transform`.
        no_aug: whether pictures are only resized and cut in the middle.
        scale: smallest and largest share of a picture's area in a crop, (0.08, 1) by default.
        ratio: narrowest and widest crop, (3/4, 4/3) by default.
        hflip: probability of a flip from left to right.
        vflip: probability of a flip upside down.
        color_jitter: strength of changes of brightness, contrast and saturation; without effect
            beside most of `aa`.
        aa: timm's AutoAugment string, such as "rand-m9-mstd0.5-inc1".
        reprob: probability of random erasing.
        remode: what erased regions show: "const", "rand" or "pixel".
        recount: most regions erased.
        train_interpolation: "random", or one of PIL's by name.

    Raises:
        UserError: timm knows no augmentation `aa`.
    """
    arguments: dict[str, Any] = {
        "no_aug": no_aug,
        "scale": None if scale is None else tuple(scale),
        "ratio": None if ratio is None else tuple(ratio),
        "hflip": hflip,
        "vflip": vflip,
        "color_jitter": color_jitter,
        "auto_augment": aa,
        "re_prob": reprob,
        "re_mode": remode,
        "re_count": recount,
        "interpolation": train_interpolation,
    }
    try:
        transform = _mended(create_transform(**_common(config) | arguments, is_training=True))
    except (AssertionError, KeyError, ValueError) as error:
        if aa is None or no_aug:
            raise
        raise UserError(
            f"aa: timm makes no augmentation of {aa!r} ({error}); expected such as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original"
        ) from error
    return Trimmed(transform) if no_aug else transform


def _mended(transform: Any) -> Any:
    """Timm's transform with a posterize that takes what timm's own magnitudes ask for.

    Of magnitude 10 on, which "rand-m9-mstd0.5-inc1" draws too, pictures keep no bit. Pillow made
    them black, and refuses since version 13.
    """
    for step in getattr(transform, "transforms", ()):
        policy = chain.from_iterable(getattr(step, "policy", ()))
        for operation in (*getattr(step, "ops", ()), *policy):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits_to_keep: int, **given: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(picture.mode, picture.size)
    return auto_augment.posterize(picture, bits_to_keep, **given)


def fitted(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Mean or deviation for as many channels: those of other channels are averaged."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config["input_size"][0]
    found = {name: config[name] for name in ("interpolation",) if config.get(name)}
    found |= {n: fitted(config[n], channels) for n in ("mean", "std") if config.get(n) is not None}
    return {"input_size": tuple(config["input_size"]), **found}


def _crop(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("crop_pct", "crop_mode") if config.get(name)}
