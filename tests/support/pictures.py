"""Folders of small pictures, the odd ones of real folders among them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112


def noise(seed: int, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    """Smooth random colours, uint8 [height, width, channels]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _save(image: Image.Image, path: Path, **options: object) -> None:
    image.save(path, **options)  # type: ignore[arg-type]


def _plain(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed)), path, quality=90)


def _grey(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed, channels=1)[..., 0]), path)


def _cmyk(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed)).convert("CMYK"), path)


def _alpha(path: Path, seed: int) -> None:
    rgba = noise(seed, channels=4)
    rgba[:20, :, 3] = 0  # the upper half shows what is behind it
    rgba[20:, :, 3] = 255
    _save(Image.fromarray(rgba, "RGBA"), path)


def _grey_alpha(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed, channels=2), "LA"), path)


def _palette(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed)).convert("P", palette=Image.Palette.ADAPTIVE), path)


def _palette_alpha(path: Path, seed: int) -> None:
    image = Image.fromarray(noise(seed)).convert("P", palette=Image.Palette.ADAPTIVE)
    _save(image, path, transparency=image.getpixel((0, 0)))


def _bits16(path: Path, seed: int) -> None:
    values = noise(seed, channels=1)[..., 0].astype(np.uint16) * 257
    _save(Image.fromarray(values), path)


def _turned(path: Path, seed: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # taken with the camera on its side
    _save(Image.fromarray(noise(seed)), path, exif=exif, quality=95)


def _thin(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed, 3000, 1)), path)


def _bilevel(path: Path, seed: int) -> None:
    _save(Image.fromarray(noise(seed)).convert("1"), path)


def _truncated(path: Path, seed: int) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(seed)).save(file, "JPEG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


def _text(path: Path, seed: int) -> None:
    path.write_text("this is no picture\n")


def _empty(path: Path, seed: int) -> None:
    path.write_bytes(b"")


def _bomb(path: Path, seed: int) -> None:
    """A PNG whose header promises ten gigapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


ODD: dict[str, Callable[[Path, int], None]] = {
    "grey.jpg": _grey,
    "cmyk.jpg": _cmyk,
    "alpha.png": _alpha,
    "greyalpha.png": _grey_alpha,
    "palette.gif": _palette,
    "palettealpha.png": _palette_alpha,
    "bits16.png": _bits16,
    "bits16.tif": _bits16,
    "turned.jpg": _turned,
    "thin.png": _thin,
    "bilevel.png": _bilevel,
    "webp.webp": _plain,
    "UPPER.JPG": _plain,
}
BROKEN: dict[str, Callable[[Path, int], None]] = {
    "truncated.jpg": _truncated,
    "text.jpg": _text,
    "empty.png": _empty,
    "bomb.png": _bomb,
}
OTHER: dict[str, Callable[[Path, int], None]] = {"notes.txt": _text}


def write(path: Path, seed: int) -> None:
    """Writes one picture, of the kind that its name says; any other name is a plain JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (ODD | BROKEN | OTHER).get(path.name, _plain)(path, seed)


def folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, extra: object = ()
) -> Path:
    """Writes `count` plain pictures for each class, and the `extra` names in turn."""
    for number, name in enumerate(classes):
        for i in range(count):
            write(root / name / f"{name}{i:03d}.jpg", 100 * number + i)
    for number, name in enumerate(extra):  # type: ignore[arg-type, var-annotated]
        write(root / classes[number % len(classes)] / name, 1000 + number)
    return root
