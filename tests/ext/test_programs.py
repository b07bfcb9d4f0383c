"""Programs that released versions exported load, and give what they gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import spot_ext  # noqa: F401  (loads the ops)

FOLDER = Path(__file__).parent / "programs"
RELEASES = {
    folder.name: torch.load(folder / "examples.pt", weights_only=True)
    for folder in sorted(FOLDER.iterdir())
    if folder.is_dir()
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def test_there_is_a_program_of_each_op_of_the_first_release() -> None:
    frozen = (Path(__file__).parent / "schemas.txt").read_text().splitlines()
    names = {line.split("(")[0].removeprefix("spot::") for line in frozen if "(" in line}
    assert set(RELEASES["0.1.0"]["ops"]) == names


@pytest.mark.parametrize(
    ("release", "op"), [(name, op) for name, found in RELEASES.items() for op in found["ops"]]
)
def test_a_released_program_gives_what_it_gave(release: str, op: str) -> None:
    written: str = RELEASES[release]["torch"]
    if numbers(torch.__version__) < numbers(written):
        pytest.skip(f"written by torch {written}, which programs need at least")
    example: dict[str, Any] = RELEASES[release]["ops"][op]
    program = torch.export.load(FOLDER / release / f"{op}.pt2").module()
    outputs = pytree.tree_leaves(program(*example["inputs"]))
    for ours, theirs in zip(outputs, example["outputs"], strict=True):
        if example["exact"] or not ours.is_floating_point():
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
