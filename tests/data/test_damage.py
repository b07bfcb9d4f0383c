"""ImageNet-C's damage on any data set, its folders, its summary."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spot_vit.data import damage
from spot_vit.data.damage import (
    ALEXNET_ERRORS,
    DAMAGES,
    EXTRA_DAMAGES,
    Damaged,
    imagenet_c,
    mean_corruption_error,
)
from spot_vit.data.loaders import EvalLoader
from spot_vit.data.open import open_data
from spot_vit.utils.errors import UserError
from support.pictures import folder, noise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CONFIG = {"input_size": (3, 40, 48), "mean": MEAN, "std": STD}
needs_library = pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="the extra `corruptions` is not installed"
)


class Images(torch.utils.data.Dataset[Any]):
    """Normalised noise pictures whose pixels are known."""

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels
        self.mean = torch.tensor(MEAN[:channels]).view(-1, 1, 1)
        self.std = torch.tensor(STD[:channels]).view(-1, 1, 1)

    def __len__(self) -> int:
        return 5

    def pixels(self, index: int) -> torch.Tensor:
        return torch.from_numpy(noise(index, channels=self.channels)).permute(2, 0, 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return (self.pixels(index) / 255 - self.mean) / self.std, index % 2


def damaged(kind: str, severity: int, channels: int = 3) -> Damaged:
    return Damaged(Images(channels), kind, severity, mean=MEAN[:channels], std=STD[:channels])


@needs_library
@pytest.mark.parametrize("kind", [*DAMAGES, *EXTRA_DAMAGES])
def test_every_kind_damages_more_when_severe(kind: str) -> None:
    clean = Images()
    far = []
    for severity in (1, 5):
        images = damaged(kind, severity)
        image, target = images[3]
        assert image.shape == (3, 40, 48) and image.dtype == torch.float32 and target == 1
        pixels = (image * clean.std + clean.mean) * 255
        assert pixels.min() > -1e-3 and pixels.max() < 255.01
        assert (pixels - pixels.round()).abs().max() < 1e-3
        far.append((pixels - clean.pixels(3)).abs().mean().item())
    assert far[0] > 0.3 and (far[1] > far[0] or kind == "saturate")  # that one goes both ways


@needs_library
@pytest.mark.parametrize("kind", [*DAMAGES, *EXTRA_DAMAGES])
def test_damage_is_a_function_of_its_index(kind: str) -> None:
    first = damaged(kind, 3)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    once = [first[i][0] for i in range(3)]
    assert (np.random.get_state()[1] == states[0]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.seed(7)
    again = [damaged(kind, 3)[i][0] for i in (2, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(once, again[::-1], strict=True))
    noisy = kind in ("gaussian_noise", "impulse_noise", "glass_blur")
    if noisy:  # another draw for every picture, kind and severity
        same = damaged(kind, 3)
        same.dataset.pixels = lambda index: torch.full((3, 40, 48), 128, dtype=torch.uint8)
        assert kind == "glass_blur" or not torch.equal(same[0][0], same[1][0])


@needs_library
def test_the_package_is_given_the_pixels_that_were_normalised() -> None:
    library = pytest.importorskip("imagecorruptions")
    pixels = np.ascontiguousarray(Images().pixels(2).permute(1, 2, 0).numpy())
    expected = library.corrupt(pixels, severity=4, corruption_name="contrast")
    image = damaged("contrast", 4)[2][0]
    found = (image * Images().std + Images().mean) * 255
    assert torch.equal(found.round().to(torch.uint8), torch.from_numpy(expected).permute(2, 0, 1))


@needs_library
def test_grey_images_stay_grey() -> None:
    image, _ = damaged("gaussian_noise", 2, channels=1)[1]
    assert image.shape == (1, 40, 48)


@needs_library
def test_damage_of_a_folder_in_workers(tmp_path: Path) -> None:
    data = open_data(str(folder(tmp_path)), train=False)
    view = Damaged(data.val_set(CONFIG), "glass_blur", 2, mean=MEAN, std=STD)
    here, there = (
        torch.cat([batch.images for batch in EvalLoader(view, 3, workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(here, there) and view.filename(0) == "cat/cat000.jpg"


@needs_library
def test_small_images_are_refused() -> None:
    images = damaged("fog", 1)
    images.dataset.pixels = lambda index: torch.zeros(3, 31, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 32 x 32, got 31 x 64"):
        images[0]


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [("rain", 1, "kind: expected one of"), ("fog", 0, "severity: expected one of")],
)
def test_unknown_damage_is_refused(kind: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        damaged(kind, severity)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    damage._library.cache_clear()
    monkeypatch.setattr(damage, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'spot-vit\[corruptions\]'"):
        damaged("fog", 1)


def test_folders_of_imagenet_c_packed_and_unpacked(tmp_path: Path) -> None:
    for name in ("fog/1/cat", "fog/3/cat", "noise/gaussian_noise/2/cat", "fog/readme"):
        (tmp_path / name).mkdir(parents=True)
    found = imagenet_c(tmp_path)
    assert list(found) == [("gaussian_noise", 2), ("fog", 1), ("fog", 3)]
    assert found["gaussian_noise", 2] == tmp_path / "noise/gaussian_noise/2"
    with pytest.raises(UserError, match=r"kind/severity/class.*got \['cat'\]"):
        imagenet_c(tmp_path / "fog/1")
    with pytest.raises(UserError, match="no such folder"):
        imagenet_c(tmp_path / "nowhere")


def test_published_rates_have_the_published_means() -> None:
    """The paper states means over severities, in percent of AlexNet's."""
    published = [
        0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572,
        0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500,
    ]  # fmt: skip
    means = [sum(rates) / 5 for rates in ALEXNET_ERRORS.values()]
    assert means == pytest.approx(published, abs=1e-6)


def test_mce_is_a_mean_of_ratios_of_means() -> None:
    errors = {"fog": [0.2, 0.4], "snow": [0.5, 0.7]}
    found = mean_corruption_error(errors, {"fog": [0.3, 0.3], "snow": [0.8, 0.8], "frost": [1, 1]})
    assert found["ce"] == pytest.approx({"fog": 1.0, "snow": 0.75})
    assert found["mce"] == pytest.approx(0.875)
    alexnet = mean_corruption_error({**ALEXNET_ERRORS, "spatter": [0.1] * 5})
    assert alexnet["mce"] == pytest.approx(1) and set(alexnet["ce"]) == set(DAMAGES)


@pytest.mark.parametrize(
    ("errors", "baseline", "message"),
    [
        ({"fog": [0.1, 0.2]}, None, "the 5 severities that the baseline has, got 2"),
        ({"fog": [0.1]}, {"snow": [0.1]}, "the 0 severities"),
        ({"fog": [0.1]}, {"fog": [0.0]}, "makes no error"),
        ({"rain": [0.1] * 5}, None, "expected some of"),
    ],
)
def test_rates_that_do_not_fit_are_refused(errors: Any, baseline: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_corruption_error(errors, baseline)
