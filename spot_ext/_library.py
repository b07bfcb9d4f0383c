"""Finds and loads the compiled libraries.

A failed load does not raise here: the error is kept in `error`, every public function raises it in
full, and `python -m spot_ext.info` prints it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import struct
from pathlib import Path

import torch

DISTRIBUTION = "spot-vit"
OPS, CUDA_OPS = "libspot_ops.so", "libspot_ops_cuda.so"

error: ImportError | None = None
cuda_error: str | None = None
loaded: list[Path] = []


def _installed_folder() -> Path | None:
    """Where the installed distribution put the package; differs when run from a checkout."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("spot_ext")))


def _find() -> Path:
    """Folder with the compiled libraries: beside this file, else in the installed distribution."""
    here = Path(__file__).resolve().parent
    candidates = [here]
    if (installed := _installed_folder()) is not None and installed.resolve() != here:
        candidates.append(installed)
    for folder in candidates:
        if (folder / OPS).exists():
            return folder
    raise ImportError(
        f"SPOT's compiled library {OPS} was not found.\n"
        f"  looked in: {', '.join(str(folder) for folder in candidates)}\n"
        "  what to run: pip install . (from the SPOT checkout)"
    )


def _mapped(name: str) -> list[str]:
    """Files of that name that are mapped into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if line.endswith(name)}
    return sorted(path for path in paths if os.path.basename(path) == name)


def _refuse_second_copy(wanted: Path) -> None:
    """A second definition of the `spot` namespace would abort the process inside torch."""
    others = [path for path in _mapped(OPS) if not os.path.samefile(path, wanted)]
    taken = any(name.startswith("spot::") for name in torch._C._dispatch_get_all_op_names())
    if others or (taken and not _mapped(OPS)):
        raise ImportError(
            "another copy of SPOT's operators is already loaded in this process.\n"
            f"  loaded: {others[0] if others else 'a library not named ' + OPS}\n"
            f"  wanted: {wanted}\n"
            "  what to run: keep one of the two (pip uninstall spot-vit, or fix sys.path)"
        )


def _truncated(path: Path) -> bool:
    """Whether the file ends before its ELF section table; the loader would die of SIGBUS."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False  # the loader says what is wrong
    (table,) = struct.unpack_from("<Q", head, 0x28)
    size, count = struct.unpack_from("<HH", head, 0x3A)
    return path.stat().st_size < table + size * count


def _load(path: Path) -> None:
    try:
        if _truncated(path):
            raise OSError("the file is truncated")
        torch.ops.load_library(str(path))
    except OSError as cause:
        raise ImportError(
            f"SPOT's compiled library does not load.\n  file: {path}\n"
            "  built for: torch 2.11 and newer (LibTorch stable ABI), Linux\n"
            f"  found: torch {torch.__version__} (CUDA {torch.version.cuda})\n"
            f"  loader says: {cause.__cause__ or cause}\n"
            "  what to run: pip install 'torch>=2.11', then pip install . again"
        ) from cause
    loaded.append(path)


def _load_all() -> list[str]:
    """Loads what fits this torch; returns the folders to add to the package's path."""
    global error, cuda_error
    try:
        folder = _find()
        _refuse_second_copy(folder / OPS)
        _load(folder / OPS)
    except ImportError as found:
        error = found
        return []
    if torch.version.cuda is None:
        cuda_error = f"torch {torch.__version__} is a CPU-only build"
    elif not (folder / CUDA_OPS).exists():
        cuda_error = "SPOT was built without CUDA kernels (no nvcc, or SPOT_WITH_CUDA=off)"
    else:
        try:
            _load(folder / CUDA_OPS)
        except ImportError as found:
            cuda_error = str(found)
    return [str(folder)]


def require(device_type: str = "cpu") -> None:
    """Raises the kept load error, or says why `device_type` has no kernels."""
    if error is not None:
        raise ImportError(str(error))
    if device_type == "cuda" and cuda_error is not None:
        raise ImportError(
            f"SPOT has no CUDA kernels here: {cuda_error}. `python -m spot_ext.info` tells more."
        )


def library_path() -> str:
    """File of the compiled ops, for programs that run exported models without this package.

        path = spot_ext.library_path()           # where spot_ext is installed; copy the file along
        torch.ops.load_library(path)             # where it is not
        model = torch.export.load("model.pt2").module()

    It needs torch and nothing else, holds every op for the CPU, and is loaded before the model is.
    The file `libspot_ops_cuda.so` beside it, where there is one, adds the kernels for CUDA: load it
    second.

    Raises:
        ImportError: the library was not found or does not load; says what to do.
    """
    require()
    return str(loaded[0])


extra_paths = _load_all()
