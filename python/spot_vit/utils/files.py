"""Files that are either complete or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spot_vit.utils.errors import UserError

_CURES = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room there, or write elsewhere",
    errno.EFBIG: "write elsewhere, or raise the limit (ulimit -f)",
    errno.EACCES: "write elsewhere, or change the permissions",
    errno.EPERM: "write elsewhere, or change the permissions",
    errno.EROFS: "write elsewhere",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.EEXIST: "a part of the path is a file: name a folder",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What a user can do about an error number; other errors are not the user's."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the same folder; on success it replaces ``path`` at one stroke.

    The data reaches the disk before the name does, so a crash at any time leaves the old file or
    the new one, never a part. Each writer has a temporary path of its own, so that any number may
    write one name at a time; the last one stays. What killed writers left is removed.

    Args:
        path: of the file; folders are made, and a link is followed.

    Raises:
        UserError: no space, no permission, or a path that cannot be one; the old file is untouched.
    """
    path = Path(os.path.realpath(path))
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _remove_stale(path)
        temporary, lock = _own_temporary(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
        _sync(path.parent)  # the rename itself


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns errors of writing `path` into one line; what else fails meanwhile stays as it is."""
    try:
        yield
    except OSError as error:
        where = path if error.filename is None else Path(os.fsdecode(error.filename))
        ours = where.parent == path.parent or where in path.parents
        if error.errno not in _CURES or not ours:
            raise
        raise UserError(write_trouble(path, error)) from error


def write_trouble(path: str | os.PathLike[str], error: OSError) -> str:
    """One line that says why a file or folder cannot be written, and the cure where one is known.

    Args:
        path: of what was to be written.
        error: what came of it.
    """
    cure = _CURES.get(error.errno or 0)
    cause = error.strerror or str(error)
    return f"{os.fspath(path)} cannot be written: {cause}" + (f"; {cure}" if cure else "")


def _own_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked while its writer lives, and the descriptor of the lock."""
    while True:
        name = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        temporary = path.with_name(name)
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = temporary.exists()
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks, where nobody removes it
            mine = True
        if mine:
            return temporary, lock
        os.close(lock)  # before it was locked, a neighbour took it for a dead writer's
        temporary.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Removes what killed writers of `path` left: nobody holds the lock of it."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        temporary = path.with_name(name)
        with suppress(OSError):
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON file, atomically.

    Raises:
        UserError: as `atomic_write`.
        ValueError: a number that is not finite.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_torch(path: str | os.PathLike[str], content: Any) -> None:
    """Writes what `torch.load` reads, atomically.

    Args:
        path: of the file.
        content: as `torch.save` takes it.

    Raises:
        UserError: as `atomic_write`.
    """
    import torch  # not above: commands write files and messages where torch is missing

    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of a zip file cut short, which hides why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
