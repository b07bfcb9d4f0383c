"""The ops that have CUDA kernels, and a hash of the source of each."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r'(?m)^\s*#\s*include\s+"([^"]+)"')


def cuda_ops(root: Path = ROOT) -> list[str]:
    """One op per file csrc/cuda/<op>.cu."""
    return sorted(path.stem for path in (root / "csrc/cuda").glob("*.cu"))


def sources(op: str, root: Path = ROOT) -> list[Path]:
    """csrc/cuda/<op>.cu and every header of ours that it includes, directly or not."""
    found: set[Path] = set()
    left = [(root / f"csrc/cuda/{op}.cu").resolve()]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [(path.parent / name).resolve() for name in _INCLUDE.findall(path.read_text())]
    return sorted(found)


def source_hash(op: str, root: Path = ROOT) -> str:
    """Changes when the CUDA source of `op`, or a header of ours that it includes, changes."""
    digest = hashlib.sha256()
    for path in sources(op, root):
        digest.update(f"{path.relative_to(root.resolve()).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
