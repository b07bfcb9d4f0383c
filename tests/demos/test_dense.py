"""`spot demo dense`: the whole way once, its maps and its measure by hand, the committed page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spot_vit import sparsify
from spot_vit.cli.main import main
from spot_vit.data.digits import DigitBatch
from spot_vit.demos import dense
from spot_vit.demos.dense import HEADS, QUICK, VARIANTS, Maps, Variant, maps_of, mean_iou
from spot_vit.demos.setup import build_dense
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "benchmarks/results/demos").glob("dense-*.json"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What the command printed and the JSON it wrote."""
    folder, lines, threads = tmp_path_factory.mktemp("dense"), [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        options = ["--quick", "--threads", "1", "dense", "--seeds", "2", "--output", str(folder)]
        assert main(["demo", *options]) == 0
    torch.set_num_threads(threads)
    return "\n".join(lines), json.loads((folder / "dense.json").read_text())


@pytest.fixture
def data() -> DigitBatch:
    return QUICK.recipe.digits("test", 6).batch(range(6))


@pytest.fixture
def sparse() -> Any:
    torch.manual_seed(0)
    model = sparsify(build_dense(QUICK.recipe), keep=0.5, at=[1, 2, 3]).eval()
    with torch.no_grad():
        model.norm.bias.normal_()
    return model


def test_the_table_says_what_the_json_says(ran: tuple[str, Any]) -> None:
    text, summary = ran
    assert dense.describe(summary) in text and "A quick run" in text
    assert len(summary["rows"]) == len(VARIANTS)
    lines = text.splitlines()[3:]
    for row, line in zip(summary["rows"], lines, strict=False):
        for head in HEADS:
            scores = np.array(row[head])
            assert scores.shape == (2, 3) and (scores >= 0).all() and (scores <= 1).all()
            assert " ".join(f"{100 * mean:.1f}" for mean in scores.mean(axis=0)) in line
    for row in summary["rows"][:2]:  # the dense model's own head is the one it gives
        assert row["given"] == row["two_layers"]
    assert 0 < min(summary["foreground_kept"]) < 1


def test_maps_by_hand(sparse: Any, data: DigitBatch) -> None:
    with torch.no_grad():
        full = sparse.forward_intermediates(data.image, output_fmt="NLC", norm=True)[1][-1]
        plain = sparse.forward_intermediates(data.image, output_fmt="NLC")[1][-1]
    made = {norm: maps_of(sparse, data, Variant(norm=norm), 4) for norm in ("no", "all", "kept")}
    kept = made["kept"].masks[-1] > 0.5
    assert kept.sum(dim=1).tolist() == [8] * 6
    torch.testing.assert_close(made["no"].x, plain)
    torch.testing.assert_close(made["all"].x, full)
    torch.testing.assert_close(made["kept"].x[kept], full[kept])
    torch.testing.assert_close(made["kept"].x[~kept], plain[~kept])
    zero = maps_of(sparse, data, Variant(fill="zero", norm="all"))
    assert not zero.x[~kept].any() and zero.x[kept].all()
    shown = torch.where(data.foreground, data.label[:, None] + 1, 0)
    assert torch.equal(zero.target, shown) and shown.any()


def test_a_lens_without_labels_comes_nearer(sparse: Any, data: DigitBatch) -> None:
    maps = maps_of(sparse, data, Variant())
    goal = maps.x + 2 * (maps.masks[0][..., None] - 0.5)  # differs by stage
    setting = dense.Setting(QUICK.recipe, epochs=60, patches=128, lr=3e-2)
    lens = dense._lens(maps, goal, setting, 0)
    before, after = F.mse_loss(maps.x, goal), F.mse_loss(lens(maps.x, maps.masks), goal)
    assert after < 0.1 * before


def test_heads_learn(sparse: Any) -> None:
    torch.manual_seed(0)
    target = torch.randint(dense.CLASSES, (16, 64))
    masks = [torch.ones(16, 64)]
    maps = Maps(F.one_hot(target, 16).float() + 0.1 * torch.randn(16, 64, 16), masks, target)
    setting = dense.Setting(QUICK.recipe, epochs=40, patches=256)
    kept = torch.rand(16, 64) < 0.5
    for hidden in (False, True):
        head = dense._head(maps, setting, 0, hidden=hidden)
        assert dense._score(head, maps, kept) == [1.0, 1.0, 1.0]


def test_mean_iou_by_hand() -> None:
    target = torch.tensor([0, 0, 0, 4, 4, 7])
    found = torch.tensor([0, 0, 4, 4, 0, 7])
    assert mean_iou(found, target) == pytest.approx((2 / 4 + 1 / 3 + 1) / 3)
    assert mean_iou(target, target) == 1
    assert mean_iou(torch.zeros_like(target), target) == pytest.approx(3 / 6 / 3)


def test_the_page_shows_the_committed_run() -> None:
    page = (ROOT / "docs/dense_prediction.md").read_text()
    assert RUNS
    for run in RUNS:
        summary = json.loads(run.read_text())
        assert not summary["quick"] and run.name in page
        assert f"```\n{dense.describe(summary)}\n```" in page


def test_the_committed_run_holds_what_the_page_claims() -> None:
    for run in RUNS:
        rows = {
            tuple(row[key] for key in ("model", "fill", "norm", "lens")): row
            for row in json.loads(run.read_text())["rows"]
        }
        last = rows["SPOT", "last", "no", False]

        def lead(head: str, place: int, *row: Any, of: Any = last, rows: Any = rows) -> float:
            """By how many points that row leads another."""
            ours = rows[("SPOT", *row)]
            ours, theirs = (np.array(one[head])[:, place] for one in (ours, of))
            return 100 * float((ours - theirs).mean())

        everywhere, kept, dropped = range(3)
        for head in HEADS:
            assert lead(head, everywhere, "nearest", "no", False) < -10
            assert lead(head, dropped, "zero", "no", False) < -4
            assert lead(head, everywhere, "last", "no", True) > 1
        assert abs(lead("two_layers", everywhere, "zero", "no", False)) < 1
        assert lead("two_layers", kept, "zero", "no", False) > 2
        assert lead("two_layers", everywhere, "last", "all", False) < -2
        normed = rows["SPOT", "last", "all", False]
        assert lead("given", everywhere, "last", "kept", False, of=normed) < -5
        assert lead("given", everywhere, "zero", "all", False, of=normed) < -10
        assert lead("given", everywhere, "last", "all", True, of=normed) > 3
