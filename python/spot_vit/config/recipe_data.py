"""Fields of a recipe that say which images are trained on, and what is done to them first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, mapping, setting

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclasses.dataclass(frozen=True)
class DataFields(Fields):
    """Data."""

    data: str = setting("digits", text="a folder of images, 'digits', or the root of --dataset")
    dataset: str | None = setting(
        None, text="kind of data set as timm names it: hfds/NAME, wds/NAME, tfds/NAME, torch/NAME"
    )
    dataset_download: bool = setting(False, text="let torch/ and tfds/ data sets download")
    train_split: str = setting("train", text="name of the split, or folder, to train on")
    val_split: str = setting("validation", text="name of the split, or folder, to evaluate on")
    val_share: float | None = setting(
        None, above=0, high=0.9, text="share of the training images to evaluate on instead"
    )
    class_map: str | None = setting(None, text="file that names the classes in their order")
    input_key: str | None = setting(None, text="field of a sample with the image")
    target_key: str | None = setting(None, text="field of a sample with the label")
    train_num_samples: int | None = setting(None, low=1, text="number of training images to use")
    val_num_samples: int | None = setting(None, low=1, text="number of evaluation images to use")
    data_args: Mapping[str, Any] = mapping(
        text="settings of ClutteredDigits for digits, else of timm's create_dataset"
    )
    synthetic: bool = setting(False, text="random images and labels instead of DATA")
    bad_share: float = setting(0.05, low=0, high=1, text="share of unreadable images that is borne")
    mean: tuple[float, ...] | None = setting(None, text="of each channel (the model's)")
    std: tuple[float, ...] | None = setting(None, above=0, text="of each channel (the model's)")
    interpolation: str | None = setting(
        None, choices=INTERPOLATIONS, text="resizing for evaluation (the model's)"
    )
    crop_pct: float | None = setting(
        None, above=0, high=1, text="share of the side that evaluation crops (the model's)"
    )


@dataclasses.dataclass(frozen=True)
class AugmentationFields(Fields):
    """Augmentation."""

    no_aug: bool = setting(False, text="no augmentation at all, whatever else is said here")
    scale: tuple[float, float] = setting(
        (0.08, 1.0), above=0, high=1, text="share of the area that a random crop takes, LO HI"
    )
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), above=0, text="width by height of a random crop, LO HI"
    )
    hflip: float = setting(0.5, low=0, high=1, text="probability of a flip, left to right")
    vflip: float = setting(0.0, low=0, high=1, text="probability of a flip, top to bottom")
    color_jitter: float = setting(0.4, low=0, text="strength of colour jitter, where --aa has none")
    aa: str | None = setting(None, text="AutoAugment or RandAugment policy: rand-m9-mstd0.5-inc1")
    reprob: float = setting(0.0, low=0, high=1, text="probability of random erasing")
    remode: str = setting(
        "pixel", choices=("const", "rand", "pixel"), text="what random erasing fills in"
    )
    recount: int = setting(1, low=1, text="rectangles that random erasing takes")
    train_interpolation: str = setting(
        "random", choices=("random", *INTERPOLATIONS), text="resizing for training"
    )
    mixup: float = setting(0.0, low=0, text="alpha of mixup, 0 for none")
    cutmix: float = setting(0.0, low=0, text="alpha of CutMix, 0 for none")
    mixup_prob: float = setting(1.0, low=0, high=1, text="probability that a batch is mixed")
    mixup_switch_prob: float = setting(
        0.5, low=0, high=1, text="probability of CutMix where mixup is on too"
    )
    mixup_mode: str = setting(
        "batch", choices=("batch", "pair", "elem"), text="what shares a mixing weight"
    )
    mixup_off_epoch: int = setting(0, low=0, text="epoch from which on nothing is mixed, 0: none")
    smoothing: float = setting(0.1, low=0, high=0.999, text="label smoothing")
    bce_loss: bool = setting(False, text="binary cross-entropy of each class")
    bce_target_thresh: float | None = setting(
        None, low=0, high=1, text="targets above it are 1 and others 0 (soft targets stay)"
    )
    bce_sum: bool = setting(False, text="add the classes' binary cross-entropies, not their mean")
