"""Folders and tar files of pictures, one folder a class."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from spot_vit.data.sources import Opened, ReaderSource, named_in_order
from spot_vit.utils.errors import UserError

ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
)  # as timm's data.create_dataset knows them


def split_folder(root: Path, split: str) -> Path | None:
    """The folder or tar file of a split in `root`, by its name or one of timm's synonyms.

    Raises:
        UserError: `root` is not there, or may not be read.
    """
    try:
        if not root.exists():
            near = _near(root.name, [path.name for path in _entries(root.parent)])
            raise UserError(f"{root}: there is no such folder of pictures{near}")
        names = next((group for group in _SYNONYMS if split in group), ())
        for name in (split, *names):
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
    except PermissionError as error:
        raise _unreadable(error) from error
    return None


def folders_in(root: Path) -> list[str]:
    """Names of the folders and tar files in a folder, sorted."""
    entries = (path for path in _entries(root) if not path.name.startswith("."))
    return sorted(path.name for path in entries if path.is_dir() or path.suffix == ".tar")


def open_folder(
    path: Path, class_map: str | Mapping[str, int] | None = None, endings: str | None = None
) -> Opened:
    """A folder with a folder for each class, or a tar file of such folders.

    Args:
        path: of the folder or the tar file.
        class_map: timm's: a text file of class names by line, or a mapping from names to labels.
        endings: of the files that are pictures, separated by semicolons; by default `ENDINGS`.

    Raises:
        UserError: there is nothing to read there, no folder for each class, or one that may not be
            read.
    """
    mapping = None if class_map is None else _class_map(class_map, path)
    if path.is_file():
        return _open_tar(path, mapping)
    wanted = endings.split(";") if endings else ENDINGS
    others, loose, empty = _scan(path, {ending.lower() for ending in wanted})
    try:
        reader = ReaderImageFolder(str(path), class_map=mapping or "", input_key=";".join(wanted))
        if loose and mapping is None:
            folders = {name: label for label, name in enumerate(_folders_of(reader))}
            if not folders:
                raise UserError(
                    f"{path}: {len(loose)} pictures lie in it, but in no folder of a class; "
                    f"expected {path.name}/CLASS/PICTURE: make a folder for each class"
                )
            reader = ReaderImageFolder(str(path), class_map=folders, input_key=";".join(wanted))
    except RuntimeError as error:  # no picture at all
        raise UserError(_nothing_in(path, others, wanted, mapping)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    opened = Opened(
        ReaderSource(reader, str(path)),
        classes=named_in_order(mapping or reader.class_to_idx),
        targets=[label for _, label in reader.samples],
    )
    left = [*others, *(loose if mapping is None else [])]
    opened.left_out = [os.path.join(str(path), name) for name in left]
    opened.notes = _notes(path, others, loose if mapping is None else [], empty)
    return opened


def _open_tar(path: Path, mapping: Mapping[str, int] | None) -> Opened:
    if path.suffix.lower() != ".tar":
        raise UserError(f"{path}: expected a folder of pictures or a .tar file, got another file")
    try:
        reader = _tar_reader(path, mapping)
        named = sorted(set(reader.class_name_to_idx) - {"", "."}, key=natural_key)
        if not named:
            raise ValueError("its pictures are in no folder of a class")
        if len(named) < len(reader.class_name_to_idx) and mapping is None:
            reader = _tar_reader(path, {name: label for label, name in enumerate(named)})
    except Exception as error:  # tarfile, pickle, and unpacking of nothing
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: this tar file cannot be read: {reason}") from error
    classes = named_in_order(mapping or reader.class_name_to_idx)
    targets = [int(label) for label in reader.targets]
    return Opened(ReaderSource(reader, str(path)), classes=classes, targets=targets)


def _tar_reader(path: Path, mapping: Mapping[str, int] | None) -> ReaderImageInTar:
    """Timm's reader; it opens the file anew for each picture: workers would share one position."""
    return ReaderImageInTar(str(path), class_map=mapping or "", cache_tarfiles=False)


def _folders_of(reader: ReaderImageFolder) -> list[str]:
    """Class names by label, without the empty one that stands for no folder."""
    return [name for name in named_in_order(reader.class_to_idx) or [] if name]


def _class_map(class_map: str | Mapping[str, int], path: Path) -> dict[str, int]:
    if isinstance(class_map, Mapping):
        return dict(class_map)
    try:
        return load_class_map(class_map, str(path if path.is_dir() else path.parent))
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(f"class_map: {error}; expected a .txt file, one class a line") from error


def _scan(path: Path, endings: set[str]) -> tuple[list[str], list[str], list[str]]:
    """Names relative to `path`: files that are no pictures, pictures in no class, empty folders."""
    others, loose, empty = [], [], []

    def refuse(error: OSError) -> None:  # a class must not be missing without a word
        raise _unreadable(error) from error

    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        inside = os.path.relpath(folder, path)
        relative = [os.path.normpath(os.path.join(inside, name)) for name in sorted(files)]
        pictures = [name for name in relative if os.path.splitext(name)[1].lower() in endings]
        others += [name for name in relative if name not in set(pictures)]
        if inside == os.curdir:
            loose = pictures
        elif not pictures and not folders and not inside.startswith("."):
            empty.append(inside)
    return others, loose, sorted(empty)


def _unreadable(error: OSError) -> UserError:
    return UserError(
        f"{error.filename} cannot be read: {error.strerror}; change its permissions, or move it"
    )


def _notes(path: Path, others: list[str], loose: list[str], empty: list[str]) -> list[str]:
    notes = []
    if others:
        count = f"{len(others)} files" if len(others) > 1 else "1 file"
        notes.append(f"{path}: {count} left out, no pictures by their ending: {_some(others)}")
    if loose:
        notes.append(f"{path}: pictures in no class folder left out: {_some(loose)}")
    if empty:
        notes.append(f"{path}: class folders without a picture: {_some(empty)}")
    return notes


def _nothing_in(
    path: Path, others: list[str], endings: tuple[str, ...] | list[str], mapping: object
) -> str:
    if mapping:
        return f"{path}: no picture lies in a folder that class_map names"
    if any(name.endswith(".tar") for name in others):
        return (
            f"{path}: no pictures, but tar files ({_some(others)}): name one of them as DATA, or "
            "read WebDataset's with --dataset wds/ and --train-split 'NAME-{000..999}.tar'"
        )
    held = f"{len(others)} other files ({_some(others)})" if others else "no file at all"
    return f"{path}: no pictures ({' '.join(endings)}) in it or below, but {held}"


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _near(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
