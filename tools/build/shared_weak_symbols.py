"""Fails when two object files define the same weak symbol (see cmake/weak_symbols.cmake)."""

from __future__ import annotations

import subprocess
import sys


def weak_symbols(path: str) -> set[str]:
    """Weak symbols an object file defines."""
    listing = subprocess.run(
        ["nm", "--defined-only", path], check=True, capture_output=True, text=True
    )
    rows = (line.split() for line in listing.stdout.splitlines())
    return {row[-1] for row in rows if len(row) >= 3 and row[-2] in "WVwvu"}


def main(paths: list[str]) -> int:
    """Prints what is shared; exit status 1 when anything is."""
    owner: dict[str, str] = {}
    shared = [
        f"{symbol}: {owner[symbol]} and {path}"
        for path in paths
        for symbol in sorted(weak_symbols(path))
        if owner.setdefault(symbol, path) != path
    ]
    print("\n".join(shared), file=sys.stderr)
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
