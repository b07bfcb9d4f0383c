"""`SpotOutput` is a pytree: whoever walks through outputs finds its tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from support.models import build, images
from support.slow import most_slow
from torch.utils import _pytree

ROOT = Path(__file__).resolve().parents[2]


def spot(**config: Any) -> Any:
    return spot_vit.sparsify(build(), keep=0.6, at=[1, 2], **config)


@pytest.mark.parametrize("training", [False, True])
def test_flattens_to_its_tensors_and_back(training: bool) -> None:
    model = spot().train(training)
    output = model(images(model), aux=True)
    leaves, spec = _pytree.tree_flatten(output)
    parts = [output.logits, output.tokens, *output.masks, *output.logp, *output.index]
    assert len(leaves) == len(parts) and all(a is b for a, b in zip(leaves, parts, strict=True))
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, spot_vit.SpotOutput) and again.masks[0] is output.masks[0]


def test_exports_with_decisions() -> None:
    model = spot()
    x = images(model)
    program = torch.export.export(model, (x,), {"aux": True})
    found, expected = program.module()(x, aux=True), model(x, aux=True)
    assert isinstance(found, spot_vit.SpotOutput)
    torch.testing.assert_close(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.index, expected.index, strict=True))


RANK = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import spot_vit
from support.models import build

torch.set_num_threads(1)
rank, store, path, method = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
inside = spot_vit.sparsify(build(), keep=0.6, at=[1, 2], method=method).train()
model = DistributedDataParallel(inside, static_graph=True)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
torch.manual_seed(rank)
config = inside.spot_config
objective = spot_vit.SpotObjective(config.keep_ratios() if config.learned else [])
for step in range(3):
    loss, _ = objective(model, torch.randn(2, 3, 64, 64), torch.randint(7, (2,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save([p.detach() for p in inside.parameters()], path)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("method", most_slow(["spot", "evit"]))
def test_a_static_graph_synchronises_gradients(method: str, tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("python", ".", "tests"))
    command, store = [sys.executable, "-c", RANK], tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [*command, str(rank), store, tmp_path / f"{rank}.pt", method],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    start = spot_vit.sparsify(build(), keep=0.6, at=[1, 2], method=method).parameters()
    assert any(not torch.equal(a, b) for a, b in zip(one, start, strict=True))
