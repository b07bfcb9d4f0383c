"""Output folders: made and checked before any work is done."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from spot_vit.utils.errors import UserError
from spot_vit.utils.files import write_trouble


def prepare(path: str | os.PathLike[str], needed_bytes: int = 0) -> Path:
    """Makes an output folder where it is missing, and checks that files can be written there.

    Args:
        path: of the folder; its parents are made too.
        needed_bytes: free space that the work will take.

    Returns:
        The folder.

    Raises:
        UserError: a file is in the way, the folder is read-only, or it has too little space;
            nothing was made then.
    """
    folder = Path(path)
    for part in (folder, *folder.parents):
        if part.exists() or part.is_symlink():
            break
    if not part.is_dir():
        raise UserError(f"{folder} cannot be the output folder: {part} is a file; name another")
    total, _, free = shutil.disk_usage(part)
    if total and free < needed_bytes:  # some file systems do not tell
        raise UserError(
            f"{folder} has too little space: {_size(needed_bytes)} are needed and {_size(free)} "
            "free; make room there, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # permissions alone do not tell
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        raise UserError(write_trouble(folder, error)) from error
    return folder


def prepare_file(path: str | os.PathLike[str], needed_bytes: int = 0) -> Path:
    """Checks that a file can be written, and makes its folder where it is missing.

    Args:
        path: of the file, which may be there.
        needed_bytes: free space that it will take.

    Returns:
        The path.

    Raises:
        UserError: it is a folder, or as `prepare` of its folder.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{file} cannot be the output file: it is a folder; name a file")
    prepare(file.parent, needed_bytes)
    return file


def _size(count: int) -> str:
    """Bytes as text."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
