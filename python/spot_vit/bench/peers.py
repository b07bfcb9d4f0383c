"""Other packages that make Vision Transformers sparse, beside ours where they are installed.

To add one, write a function that changes a dense timm model in place to a cost, and name it in
`PEERS`. Nothing is downloaded; a package that cannot be imported is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from spot_vit.bench.variants import cost

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        package: its name when imported.
        apply: changes a dense model in place so that it costs about as many multiply-accumulates
            per image as are given, at an image size; returns its name and setting, in words.
    """

    package: str
    apply: Callable[[Any, int, Size], str]

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.package) is not None


def _tome(model: Any, macs: int, size: Size) -> str:
    """Token merging: r tokens fewer in each block, by averaging similar ones."""
    importlib.import_module("tome").patch.timm(model)

    def distance(r: int) -> int:
        model.r = r
        return abs(cost(model, size)[0].total - macs)

    tokens = model.patch_embed.num_patches
    model.r = min(range(1, max(tokens // len(model.blocks), 1) + 1), key=distance)
    return f"ToMe r={model.r}"


PEERS = (Peer("tome", _tome),)
"""The peers that are known."""
