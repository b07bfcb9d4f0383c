"""The rows of a benchmark: what runs a model, and what could not be had."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.bench import lines as module
from spot_vit.bench import runtimes
from spot_vit.bench.lines import Line, lines
from spot_vit.bench.peers import PEERS
from spot_vit.bench.runtimes import TABLE, absent
from spot_vit.bench.variants import Variant, cost, variants
from spot_vit.models.fast import is_fast
from support.benched import SMALL, settings
from support.exported import needs
from support.slow import most_slow
from torch import Tensor, nn


def prepared(
    folder: Path, *names: str, missing: dict[str, str] | None = None, **given: Any
) -> list[Line]:
    asked = settings(runtimes=names, **given)
    missing = {} if missing is None else missing
    return lines(variants(asked), asked, names, folder, missing, lambda text: None)


def test_dense_in_eager_mode_comes_first_always(tmp_path: Path) -> None:
    found = prepared(tmp_path, "fast", keep=(0.5,))
    assert [line.name for line in found] == ["eager, dense", "fast, dense", "fast, keep 0.5"]
    eager, dense, sparse = found
    assert is_fast(dense.open()) and is_fast(sparse.open()) and not is_fast(eager.open())
    assert sparse.gmacs < dense.gmacs < eager.gmacs  # fast leaves out what the head does not read
    assert sparse.tokens is not None and eager.tokens == 17 and sparse.tokens < 17


@pytest.mark.parametrize("runtime", most_slow(["eager", "fast", "onnx", "openvino"], 3))
def test_runtimes_give_what_the_model_gives(runtime: str, tmp_path: Path) -> None:
    if runtime in runtimes.FILES:
        needs(runtime)
    images = torch.randn(2, 3, 64, 64)
    found = prepared(tmp_path, runtime, keep=(0.5,), model_kwargs={**SMALL, "depth": 2})
    dense = found[0].open()(images)
    for line in found:
        assert line.start(images)(0).shape == (2, 7)
        assert line.memory is None or line.memory >= 0
        if line.variant.keep is None:
            torch.testing.assert_close(line.open()(images), dense, rtol=1e-4, atol=1e-4)


def test_what_fails_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Any:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setitem(module.TABLE, "fast", runtimes.Runtime(broken))
    missing: dict[str, str] = {}
    found = prepared(tmp_path, "fast", missing=missing)
    assert [line.name for line in found] == ["eager, dense"]
    assert missing == dict.fromkeys(["fast, dense", "fast, keep 0.7"], "no such operator")
    monkeypatch.setitem(module.TABLE, "eager", runtimes.Runtime(broken))
    with pytest.raises(RuntimeError, match="no such operator"):
        prepared(tmp_path / "again", "fast")


def test_runtimes_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runtimes, "available", lambda: {"aoti": "no compiler", "onnx": None, "openvino": "absent"}
    )
    assert absent(settings()) == {
        "aoti": "no compiler", "compiled": "no compiler", "openvino": "absent",
    }  # fmt: skip
    half = absent(settings(dtype="bfloat16"))
    assert half["onnx"] == "files compute in float32, not in bfloat16" and "fast" not in half
    assert absent(settings(device="cuda"))["onnx"] == "files are run on the CPU"


@pytest.mark.usefixtures("fresh_compiler")
def test_graphs_of_the_first_pass_and_of_later_ones() -> None:
    class Model(nn.Module):
        width = 1

        def forward(self, x: Tensor) -> Tensor:
            return x * self.width

    model = Model()
    compiled = torch.compile(model, backend="eager")
    variant = Variant("dense", model, (3, 4, 4))
    line = Line("", "compiled", variant, None, lambda: compiled, TABLE["compiled"], 1.0, None)
    call = line.start(torch.zeros(2, 3, 4, 4))
    call(1)
    assert (line.graphs, line.recompilations) == (1, 0)
    model.width = 2  # a guard fails, and again only where the number became a symbol
    call(2)
    assert (line.graphs, line.recompilations) == (1, 1)
    line.start(torch.zeros(2, 3, 4, 4))
    assert (line.graphs, line.recompilations) == (0, 0)


def test_memory_of_runtimes_that_keep_it_is_that_of_the_first_call() -> None:
    calls: list[int] = []

    def model(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images

    variant = Variant("dense", None, (3, 4, 4))
    for kind, before in ((TABLE["onnx"], 1), (TABLE["eager"], 2)):
        calls.clear()
        Line("", "", variant, None, lambda: model, kind, 1.0, None).start(torch.zeros(2, 3, 4, 4))
        assert len(calls) == before


# ---- peers ---------------------------------------------------------------------------------------


class Merging(nn.Module):
    """A stand-in for a block of a peer: r tokens fewer."""

    def __init__(self, block: nn.Module, model: Any) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm1, self.norm2 = (
            getattr(block, name) for name in ("attn", "mlp", "norm1", "norm2")
        )
        self.settings = model.__dict__

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x[:, : max(x.shape[1] - self.settings["r"], 1)]
        return x + self.mlp(self.norm2(x))


def test_peers_that_are_installed_stand_beside_at_the_same_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = next(peer for peer in PEERS if peer.package == "tome")
    assert not peer.installed
    assert len(prepared(tmp_path / "a", "eager")) == 2

    def patch(model: Any) -> None:
        model.__dict__["r"] = 0
        model.blocks = nn.Sequential(*(Merging(block, model) for block in model.blocks))

    package = types.ModuleType("tome")
    package.patch = types.SimpleNamespace(timm=patch)  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace(name="tome")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "tome", package)
    found = prepared(tmp_path / "b", "eager", keep=(0.5,))
    dense, ours, theirs = found
    assert theirs.name == theirs.peer == "ToMe r=3" and theirs.runtime == "eager"
    assert abs(theirs.gmacs - ours.gmacs) < 0.1 * ours.gmacs
    same = prepared(tmp_path / "e", "eager", keep=(0.5, 0.51))
    assert [line.peer for line in same] == [None, None, None, "ToMe r=3"]  # once
    assert theirs.start(torch.zeros(2, 3, 64, 64))(0).shape == (2, 7)
    assert cost(dense.open(), (3, 64, 64))[0].total / 1e9 == dense.gmacs  # which is as it was
    assert len(prepared(tmp_path / "c", "eager", no_peers=True)) == 2

    def broken(model: Any) -> None:
        raise AttributeError("an old timm")

    package.patch.timm = broken  # type: ignore[attr-defined]
    missing: dict[str, str] = {}
    assert len(prepared(tmp_path / "d", "eager", missing=missing)) == 2
    assert missing == {"tome, as keep 0.7": "an old timm"}
