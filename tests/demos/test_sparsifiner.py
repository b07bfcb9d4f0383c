"""`spot demo sparsifiner`: the whole way once, windows of a canvas, and the committed page."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit import count_flops
from spot_vit.cli.main import main
from spot_vit.demos import setup, sparsifiner
from spot_vit.demos.large_canvas import Canvas, Phase, WindowObjective, build
from spot_vit.demos.sparsifiner import BATCH_SIZES, BOTH
from torch.nn import functional as F

SMALL = Canvas(width=32, depth=2, heads=1, phases=(Phase(32, 1, 1, 1e-3), Phase(64, 2, 1, 1e-3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparsifiner")


def command(folder: Path) -> tuple[str, Any]:
    """Runs the command; what it printed and the JSON it wrote."""
    lines: list[str] = []
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setattr(sparsifiner, "wait_for_quiet", lambda _: 0.0)
        options = ["--quick", "--threads", "1", "--output", str(folder)]
        assert main(["demo", "sparsifiner", *options]) == 0
    torch.set_num_threads(threads)
    return "\n".join(lines), json.loads((folder / "sparsifiner.json").read_text())


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[str, Any]:
    return command(folder)


def test_the_table_says_what_the_json_says(ran: tuple[str, Any]) -> None:
    text, summary = ran
    assert sparsifiner.describe(summary) in text
    rows = summary["rows"]
    assert [row["model"] for row in rows] == ["dense", "Sparsifiner", BOTH]
    assert rows[0]["difference"] == [0, 0]
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(row["model"]))
        assert f"{row['top1']:.2%}" in line and f"{row['gmacs']:.3f}" in line
        assert row["difference"][0] == pytest.approx(row["top1"] - rows[0]["top1"], abs=1e-6)
        for batch in BATCH_SIZES:
            assert f"{row[f'latency_batch{batch}']['median']:.1f} x" in line
    assert rows[0]["latency_batch8"]["ratio"] == 1
    assert rows[1]["gmacs"] < rows[0]["gmacs"] and rows[1]["mhsa_mmacs"] < rows[0]["mhsa_mmacs"]
    share = summary["setting"]["share"]
    assert 0.95 * share < rows[2]["gmacs"] / rows[0]["gmacs"] <= share


def test_a_second_run_only_measures(
    ran: tuple[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    for name in ("finetune", "train_connectivity"):
        monkeypatch.setattr(sparsifiner, name, refuse)
    monkeypatch.setattr("spot_vit.demos.large_canvas.fit", refuse)
    _, again = command(folder)
    for before, after in zip(ran[1]["rows"], again["rows"], strict=True):
        for key in ("top1", "difference", "gmacs", "mhsa_mmacs", "keep"):
            assert after[key] == before[key]
    # Settings of the measurement alone train nothing either; others do.
    quick = sparsifiner.QUICK
    sparsifiner.trained(folder, dataclasses.replace(quick, latency_rounds=7), 0)
    with pytest.raises(AssertionError, match="trained again"):
        sparsifiner.trained(folder, dataclasses.replace(quick, lr=7e-4), 0)


def test_stages_start_where_they_should(ran: tuple[str, Any], folder: Path) -> None:
    models = sparsifiner.trained(folder, sparsifiner.QUICK, 0)
    states = {name: model.state_dict() for name, model in models.items()}
    for key, value in states["Sparsifiner"].items():
        if ".connectivity." in key:  # learned in the first stage, and then at rest
            assert torch.equal(value, states[BOTH][key])
    moved = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(states["dense"][moved], states["Sparsifiner"][moved])
    assert not torch.equal(states[BOTH][moved], states["Sparsifiner"][moved])
    fresh = sparsifiner.sparse_model(models["dense"], sparsifiner.QUICK)
    key = "blocks.0.attn.connectivity.proj_n"
    assert not torch.equal(fresh.state_dict()[key], states["Sparsifiner"][key])


def test_a_busy_machine_and_a_quick_run_are_said(ran: tuple[str, Any]) -> None:
    summary = copy.deepcopy(ran[1])
    summary["contended"] = None
    assert "busy" not in sparsifiner.describe(summary)
    assert "A quick run" in sparsifiner.describe(summary)
    summary["contended"], summary["quick"] = "others", False
    assert "The machine was busy, so times mean little: others." in sparsifiner.describe(summary)
    assert "A quick run" not in sparsifiner.describe(summary)


def test_the_last_phase_is_the_canvas_and_no_image_comes_twice() -> None:
    canvas = Canvas()
    test = canvas.digits("test", 8)
    assert (test.canvas, test.num_fragments) == (192, 24)
    assert build(SMALL).pos_embed.shape == (1, 65, 32)
    first, second = (canvas.digits("train", 4, phase, seed=phase) for phase in (0, 1))
    assert (first.canvas, second.canvas, first.ramp) == (64, 128, 0)
    assert canvas.digits("train", 10, 0, ramp=True).ramp == 4


def test_a_window_is_the_model_on_part_of_its_grid() -> None:
    torch.manual_seed(0)
    model, target = build(SMALL).eval(), torch.tensor([3, 1])
    images = torch.rand(2, 1, 32, 32)
    window = build(dataclasses.replace(SMALL, phases=SMALL.phases[:1])).eval()
    state = model.state_dict()
    grid = state["pos_embed"][:, 1:].reshape(8, 8, 32)
    objective = WindowObjective(seed=5)
    seen = set()
    for _ in range(4):
        loss, _ = objective(model, images, target)
        matches = []
        for top in range(5):
            for left in range(5):
                part = grid[top : top + 4, left : left + 4].reshape(1, 16, 32)
                positions = torch.cat([state["pos_embed"][:, :1], part], dim=1)
                window.load_state_dict({**state, "pos_embed": positions})
                if torch.allclose(F.cross_entropy(window(images), target), loss, atol=1e-6):
                    matches.append((top, left))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 1
    whole = torch.rand(2, 1, 64, 64)
    loss, _ = objective(model, whole, target)
    torch.testing.assert_close(loss, F.cross_entropy(model(whole), target))
    assert model.patch_embed.strict_img_size  # as it was
    loss.backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_positions_start_alike_wherever_the_window_is() -> None:
    positions = build(Canvas()).pos_embed[0, 1:].reshape(24, 24, 128)
    near = (positions[3, 4] * positions[5, 5]).sum()
    there = (positions[17, 12] * positions[19, 13]).sum()
    torch.testing.assert_close(near, there)
    assert near < (positions[3, 4] ** 2).sum()


def test_phases_of_the_dense_model_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = dataclasses.replace(SMALL, batch_size=2)
    first = sparsifiner.trained_dense(tmp_path, canvas, 3)
    later = dataclasses.replace(
        canvas, phases=(canvas.phases[0], dataclasses.replace(canvas.phases[1], lr=1e-2))
    )
    names: list[str] = []
    fit = setup.train_once

    def count(path: Path, *arguments: Any) -> None:
        before = path.stat().st_mtime_ns if path.exists() else 0
        fit(path, *arguments)
        if path.stat().st_mtime_ns != before:
            names.append(path.name)

    monkeypatch.setattr("spot_vit.demos.large_canvas.train_once", count)
    again = sparsifiner.trained_dense(tmp_path, canvas, 3)
    assert names == []
    assert torch.equal(again.pos_embed, first.pos_embed)
    sparsifiner.trained_dense(tmp_path, later, 3)
    assert names == ["dense-seed3-phase1.safetensors"]


def test_the_page_shows_the_committed_run() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/comparison.md").read_text()
    section = next(part for part in page.split("\n## ") if part.startswith("Sparsifiner"))
    runs = sorted((root / "benchmarks/results/demos").glob("sparsifiner-*.json"))
    assert ("No run is committed yet." in section) is not bool(runs)
    for run in runs:
        summary = json.loads(run.read_text())
        assert not summary["quick"] and run.name in section
        assert f"```\n{sparsifiner.describe(summary)}\n```" in section


def test_the_committed_run_holds_what_it_claims() -> None:
    root = Path(__file__).resolve().parents[2]
    for run in (root / "benchmarks/results/demos").glob("sparsifiner-*.json"):
        summary = json.loads(run.read_text())
        dense, alone, both = summary["rows"]
        assert summary["tokens"] >= 401 and summary["setting"]["keep_rate"] == 0.25
        assert dense["top1"] > 0.9
        assert alone["difference"][0] >= -0.005 and both["difference"][0] >= -0.01
        assert both["gmacs"] <= 0.5 * dense["gmacs"]


def test_counting_follows_the_setting() -> None:
    dense = build(SMALL)
    setting = dataclasses.replace(sparsifiner.QUICK, canvas=SMALL, at=(1,), share=0.9)
    model = sparsifiner.sparse_model(dense, setting)
    assert model.sparsifiner_config.keep_rate == 0.25
    both = sparsifiner.with_tokens_removed(model, dense, setting)
    size = SMALL.input_size
    assert count_flops(both, size).total <= 0.9 * count_flops(dense, size).total
    assert [*both.spot_config.at] == [1]
