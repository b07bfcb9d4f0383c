"""Writes exported programs of all ops, which later versions have to load: once for each release.

    python tools/release/programs.py        # tests/ext/programs/<version>

Run it with the oldest torch at hand: a program loads in the torch that wrote it and in newer ones.
`tests/ext/test_programs.py` loads all of them. A released folder never changes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]

import torch  # noqa: E402
from ops.cases import OPS  # noqa: E402
from ops.cases.base import Op  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

from spot_ext import __version__  # noqa: E402

FOLDER = ROOT / "tests/ext/programs"


class Call(torch.nn.Module):
    """One call of an op; tensors are the inputs, all else is part of the program."""

    def __init__(self, op: Op, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.call = op.call
        self.leaves, self.structure = pytree.tree_flatten(arguments)
        self.places = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        self.inputs = tuple(self.leaves[k].detach() for k in self.places)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the op gives."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, inputs, strict=True):
            leaves[place] = tensor
        return self.call(*pytree.tree_unflatten(leaves, self.structure))


def main() -> None:
    """Writes a program for each op, and what it is given and gives."""
    folder = FOLDER / __version__
    folder.mkdir(parents=True, exist_ok=True)
    examples: dict[str, Any] = {}
    for name, op in OPS.items():
        sample = next((one for one in op.samples if one.traced), op.samples[0])
        call = Call(op, sample.args("cpu", torch.float32))
        with torch.no_grad():
            program = torch.export.export(call, call.inputs)
            outputs = pytree.tree_leaves(call(*call.inputs))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # which names folders of this machine
        torch.export.save(program, folder / f"{name}.pt2")
        examples[name] = {"inputs": list(call.inputs), "outputs": outputs, "exact": op.exact}
    torch.save({"torch": torch.__version__.split("+")[0], "ops": examples}, folder / "examples.pt")
    print(f"{len(examples)} programs in {folder}, by torch {torch.__version__}")


if __name__ == "__main__":
    main()
