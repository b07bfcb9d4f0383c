"""ImageNet-C: its kinds of damage done to any data set of pictures, its folders, its summary."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spot_vit.data.batches import images_and_target
from spot_vit.data.seeded import kept_states, plant, seed_of
from spot_vit.data.transforms import fitted
from spot_vit.utils.errors import UserError

ALEXNET_ERRORS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
"""AlexNet's error rates on ImageNet-C at severities 1 to 5 (arXiv 1903.12261)."""
DAMAGES = tuple(ALEXNET_ERRORS)
EXTRA_DAMAGES = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
_OWN_SEED = ("impulse_noise", "glass_blur")  # these draw from no generator that can be seeded
_LEAST_SIDE = 32


class Damaged(Dataset[Any]):
    """The samples of a data set with their images damaged, after resizing and cropping.

    As in ImageNet-C, by the package imagecorruptions-imaug. Targets and names stay. The damage is
    a function of kind, severity and index alone.

    Args:
        dataset: of samples in any form that `images_and_target` knows; images are float
            [C, H, W], normalised, with one or three channels and at least 32 pixels a side.
        kind: one of ``DAMAGES`` or ``EXTRA_DAMAGES``.
        severity: 1 to 5.
        mean: that the images were normalised with.
        std: that the images were normalised with.

    Raises:
        UserError: the package is missing.
        ValueError: there is no such kind or severity, or images are too small.
    """

    def __init__(
        self,
        dataset: Any,
        kind: str,
        severity: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        kinds = (*DAMAGES, *EXTRA_DAMAGES)
        if kind not in kinds:
            raise ValueError(f"kind: expected one of {kinds}, got {kind!r}")
        if severity not in SEVERITIES:
            raise ValueError(f"severity: expected one of {SEVERITIES}, got {severity!r}")
        self.dataset, self.kind, self.severity = dataset, kind, severity
        self.mean, self.std = tuple(mean), tuple(std)
        self._damaged(np.zeros((_LEAST_SIDE, _LEAST_SIDE, 3), np.uint8), 0)  # compiles, maybe

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = images_and_target(self.dataset[index])
        channels, height, width = image.shape
        if min(height, width) < _LEAST_SIDE:
            raise ValueError(
                f"damage needs images of at least {_LEAST_SIDE} x {_LEAST_SIDE}, got "
                f"{height} x {width}"
            )
        mean, std = (
            torch.tensor(fitted(values, channels)).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        plain = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        damaged = self._damaged(plain.permute(1, 2, 0).expand(-1, -1, 3).numpy(), index)
        again = torch.from_numpy(damaged).permute(2, 0, 1).float()
        if channels == 1:
            again = again.mean(dim=0, keepdim=True)
        return (again / 255 - mean) / std, target

    def filename(self, index: int) -> str:
        """The name that the data set underneath gives."""
        return self.dataset.filename(index)

    def _damaged(self, pixels: np.ndarray, index: int) -> np.ndarray:
        """The damaged pixels, uint8 [H, W, 3], of undamaged ones."""
        seed = seed_of(zlib.crc32(self.kind.encode()), self.severity, index)
        own = {"seed": seed & 0xFFFFFFFF} if self.kind in _OWN_SEED else {}
        with kept_states():
            plant(seed)
            damaged = _library().corrupt(
                np.ascontiguousarray(pixels),
                severity=self.severity,
                corruption_name=self.kind,
                **own,
            )
        return np.array(damaged)  # some are views that must not be written to


@cache
def _library() -> Any:
    """The package imagecorruptions, on one thread: a pool of OpenCV's would not survive a fork."""
    try:
        library, opencv = map(import_module, ("imagecorruptions", "cv2"))
    except ImportError as error:
        raise UserError(
            "damaging pictures needs a package that is missing: pip install "
            "'spot-vit[corruptions]' (imagecorruptions-imaug)"
        ) from error
    opencv.setNumThreads(1)
    return library


def imagenet_c(root: str | Path) -> dict[tuple[str, int], Path]:
    """The folders of ImageNet-C by kind and severity; each has a folder for each class.

    Args:
        root: has folders kind/severity, such as fog/3, or the groups that ImageNet-C is packed in
            (blur, digital, noise, weather, extra) with these.

    Raises:
        UserError: there are none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; expected that of ImageNet-C")
    found = {}
    for pattern in ("*/*", "*/*/*"):
        for folder in sorted(root.glob(pattern)):
            if folder.name in map(str, SEVERITIES) and folder.is_dir():
                found[folder.parent.name, int(folder.name)] = folder
    if not found:
        raise UserError(
            f"{root}: expected ImageNet-C's folders, kind/severity/class such as fog/3/n01440764, "
            f"got {sorted(path.name for path in root.iterdir())[:10]}"
        )
    order = {kind: place for place, kind in enumerate((*DAMAGES, *EXTRA_DAMAGES))}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0][0], 99), item[0])))


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The mCE of ImageNet-C: errors relative to a baseline's, kind by kind, then their mean.

    Args:
        errors: error rates from 0 to 1 by kind, at the severities measured.
        baseline: the same of another model; None is AlexNet, which needs severities 1 to 5, and
            knows no other kinds than the 15 of ImageNet-C: others are then left out.

    Returns:
        "mce", and "ce" by kind; 1 is as good as the baseline (papers state percent).

    Raises:
        ValueError: baseline and errors do not fit.
    """
    relative_to: Mapping[str, Sequence[float]] = ALEXNET_ERRORS if baseline is None else baseline
    kinds = [kind for kind in errors if baseline is not None or kind in relative_to]
    if not kinds:
        raise ValueError(f"errors: expected some of {DAMAGES}, got {list(errors)}")
    ce = {}
    for kind in kinds:
        ours, theirs = errors[kind], relative_to.get(kind, ())
        if not len(ours) or len(ours) != len(theirs):
            raise ValueError(
                f"{kind}: expected error rates at the {len(theirs)} severities that the baseline "
                f"has, got {len(ours)}"
            )
        if not sum(theirs):
            raise ValueError(f"{kind}: the baseline makes no error, so nothing is relative to it")
        ce[kind] = statistics.fmean(ours) / statistics.fmean(theirs)
    return {"mce": statistics.fmean(ce.values()), "ce": ce}
