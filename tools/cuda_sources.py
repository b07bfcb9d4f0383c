"""The ops that have CUDA kernels, and a hash of the source of each."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cuda_ops(root: Path = ROOT) -> list[str]:
    """One op per file csrc/cuda/<op>.cu."""
    return sorted(path.stem for path in (root / "csrc/cuda").glob("*.cu"))


def source_hash(op: str, root: Path = ROOT) -> str:
    """Changes when the CUDA source of `op`, or a header it may include, changes."""
    shared = [root / "csrc/cuda/block.cuh", root / "csrc/cuda/device.h"]
    shared += (root / "csrc/common").glob("*.h")
    digest = hashlib.sha256()
    for path in [root / f"csrc/cuda/{op}.cu", *sorted(shared)]:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
