"""A benchmark as a whole, of a tiny model."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.bench import run as module
from spot_vit.bench import timed
from spot_vit.bench.report import describe
from spot_vit.bench.run import bench, contended
from spot_vit.utils.errors import UserError
from support.benched import SMALL, settings

ROW = {
    "name", "runtime", "peer", "keep", "attention_keep", "gmacs", "tokens", "median_ms", "p10_ms",
    "p90_ms", "rounds", "images_per_s", "speedup", "gmacs_per_s", "share_of_peak", "memory_bytes",
    "graphs", "recompilations",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that is never busy, and a peak of small matrices."""
    monkeypatch.setattr(timed, "contention", lambda *args: None)
    peak = module.measured_peak
    monkeypatch.setattr(module, "measured_peak", lambda *args: peak(*args, size=128))
    monkeypatch.chdir(tmp_path)


def test_one_model_in_some_runtimes() -> None:
    said: list[str] = []
    found = bench(
        settings(runtimes=("eager", "fast"), keep=(0.5, 0.8), batch_size=(1, 3), layers=True),
        said.append,
    )
    assert [batch["batch"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        assert [row["name"] for row in batch["rows"]] == [
            f"{runtime}, {label}"
            for runtime in ("eager", "fast")
            for label in ("dense", "keep 0.5", "keep 0.8")
        ]
        dense = batch["rows"][0]
        for row in batch["rows"]:
            assert set(row) == ROW
            assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["rounds"] >= 20
            seconds = row["median_ms"] / 1e3
            assert row["images_per_s"] == pytest.approx(batch["batch"] / seconds)
            assert row["speedup"] == pytest.approx(dense["median_ms"] / row["median_ms"])
            assert row["gmacs_per_s"] == pytest.approx(row["gmacs"] * batch["batch"] / seconds)
            share = row["gmacs_per_s"] / found["peak"]["gmacs_per_s"]
            assert row["share_of_peak"] == pytest.approx(share)
            assert row["graphs"] is None and row["recompilations"] is None
    assert [one["batch"] for one in found["layers"]] == [1, 3]
    assert all(set(one["runtimes"]) == {"eager", "fast"} for one in found["layers"])
    assert found["layers"][0]["model"] == "keep 0.5"
    assert not contended(found)
    assert json.loads(Path("spot-bench.json").read_text()) == found
    assert found["picture"] == "spot-bench.png" and Path("spot-bench.png").stat().st_size > 1000
    assert "fast, keep 0.8" in describe(found) and "preparing fast, dense" in said
    assert found["settings"]["keep"] == [0.5, 0.8] and found["machine"]["threads"] == 2


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs/bench.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    found = bench(settings(runtimes=("eager",), layers=True))
    parts = found["layers"][0]["runtimes"]["eager"]
    groups = (found, found["model"], found["peak"], *found["batches"], *found["layers"], *parts)
    for keys in (*groups, *found["batches"][0]["rows"]):
        assert set(keys) <= named


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models_tell_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = bench(settings(runtimes=("compiled",), model_kwargs={**SMALL, "depth": 2}, at=(1,)))
    (batch,) = found["batches"]
    rows = {row["name"]: row for row in batch["rows"]}
    assert list(rows) == ["eager, dense", "compiled, dense", "compiled, keep 0.7"]
    assert rows["eager, dense"]["graphs"] is None
    for label in ("dense", "keep 0.7"):
        row = rows[f"compiled, {label}"]
        assert row["graphs"] >= 1 and row["recompilations"] == 0


def test_bfloat16() -> None:
    found = bench(
        settings(dtype="bfloat16", keep=(0.5,), no_peers=True, runtimes=("eager", "fast"))
    )
    assert len(found["batches"][0]["rows"]) == 4
    assert found["absent"]["onnx"] == "files compute in float32, not in bfloat16"


def test_a_busy_machine_gets_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "contention", lambda *args: "others work")
    found = bench(settings(runtimes=("eager",), layers=True))
    (layers,) = found["layers"]
    assert layers["contended"] == "others work"
    assert {part["share"] for part in layers["runtimes"]["eager"]} == {None}
    assert contended({"batches": [], "layers": [layers]})
    assert contended(found) and found["batches"][0]["contended"] == "others work"
    for row in found["batches"][0]["rows"]:
        assert row["speedup"] is None and row["share_of_peak"] is None and row["median_ms"] > 0
    assert "others work" in describe(found)


def test_a_side_that_fails_at_a_batch_size_is_left_out_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = module.Line.start

    def failing(line: Any, images: torch.Tensor) -> Any:
        if line.name == "eager, keep 0.7" and len(images) == 3:
            raise RuntimeError("out of memory\nof some kind")
        return start(line, images)

    monkeypatch.setattr(module.Line, "start", failing)
    found = bench(settings(runtimes=("eager",), batch_size=(1, 3)))
    assert [len(batch["rows"]) for batch in found["batches"]] == [2, 1]
    assert found["absent"]["eager, keep 0.7, batch 3"] == "out of memory"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "tpu"}, "expected cpu or cuda, got 'tpu'"),
        ({"runtimes": ("onnx",), "dtype": "bfloat16"}, "onnx cannot be used here: files compute"),
        ({"output": "nothing.json/x.json"}, "nothing.json"),
        ({"model": "resnet18", "model_kwargs": {}}, "resnet18"),
    ],
)
def test_refusals_come_first(given: dict[str, Any], message: str) -> None:
    Path("nothing.json").write_text("a file")
    with pytest.raises(UserError, match=message):
        bench(settings(**given))
    assert not Path("spot-bench.json").exists()
