"""The versions that this package asks for, and those that are installed; imports nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

PACKAGE = "spot-vit"
_OPERATORS = {
    ">=": lambda found, wanted: found >= wanted,
    "<": lambda found, wanted: found < wanted,
    "==": lambda found, wanted: found == wanted,
}


class Requirement(NamedTuple):
    """A package that is needed.

    Attributes:
        name: as pip knows it.
        wanted: versions, as pip takes them, such as ">=1.0.30,<2".
        found: the version that is installed, or None.
    """

    name: str
    wanted: str
    found: str | None

    @property
    def met(self) -> bool:
        """Whether the installed version is among those wanted; not where there is none."""
        if self.found is None:
            return False
        clauses = re.findall(r"(>=|==|<)\s*([\d.]+)", self.wanted)
        return all(_OPERATORS[sign](_numbers(self.found), _numbers(v)) for sign, v in clauses)

    def __str__(self) -> str:
        if self.met:
            return f"{self.name}{self.wanted}, found {self.found}"
        found = "is not installed" if self.found is None else f"is needed, found {self.found}"
        what = f"'{self.name}{self.wanted}'"
        return f"{self.name}{self.wanted} {found}: pip install --upgrade {what}"


def requirements() -> list[Requirement]:
    """What models need: the package's own requirements, and those of its extra `models`."""
    return [Requirement(name, wanted, _installed(name)) for name, wanted in _wanted()]


def timm_trouble(cause: ImportError) -> str | None:
    """Why timm could not be imported, and the cure; None where timm is not to blame."""
    if (cause.name or "").split(".")[0] != "timm":
        return None
    if isinstance(cause, ModuleNotFoundError) and cause.name == "timm":
        return f"spot_vit needs timm; install it with: pip install '{PACKAGE}[models]'"
    unmet = [str(need) for need in requirements() if need.name == "timm" and not need.met]
    return f"spot_vit cannot use this timm: {unmet[0]}" if unmet else None


def _wanted() -> Iterator[tuple[str, str]]:
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # not installed, only on the path
        return
    for line in lines:
        what, _, marker = line.partition(";")
        match = re.match(r"([\w-]+)\s*([^\[]*)$", what.strip())
        if match and (not marker or re.search(r"extra == .models.", marker)):
            versions = sorted(match[2].replace(" ", "").split(","), reverse=True)  # from, then to
            yield match[1], ",".join(versions)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release, without zeros at its end: 2.0 is 2."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
