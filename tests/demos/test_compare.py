"""`spot demo compare` and `--budgets`: the whole way once, and the arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spot_vit import count_flops, sparsify
from spot_vit.cli.main import main
from spot_vit.data.corruptions import CORRUPTIONS
from spot_vit.demos import budgets as demo_budgets
from spot_vit.demos import compare, setup
from spot_vit.demos.setup import Recipe, build_dense
from spot_vit.evaluation.statistics import difference, paired_difference

SMALL = Recipe(width=32, depth=4, heads=2, at=(1, 2))


def command(folder: Path, name: str, *options: str) -> tuple[str, Any]:
    """Runs the command; what it printed and the JSON it wrote."""
    lines: list[str] = []
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        # What stands before the name holds too.
        arguments = ["--quick", "--threads", "1", name, "--seeds", "2", "--output", str(folder)]
        assert main(["demo", *arguments, *options]) == 0
    torch.set_num_threads(threads)
    (path,) = folder.glob("*.json")
    return "\n".join(lines), json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def compared(folder: Path) -> tuple[str, Any]:
    return command(folder / "compare", "compare", "--seed", "4")


@pytest.fixture(scope="module")
def budgets(folder: Path) -> tuple[str, Any]:
    return command(folder / "budgets", "budgets")


def test_every_method_costs_what_was_asked_and_no_more(compared: tuple[str, Any]) -> None:
    _, summary = compared
    dense = summary["dense"]["gmacs"]
    rows = summary["rows"]
    assert [row["method"] for row in rows] == [*compare.METHODS] * len(summary["setting"]["shares"])
    for row in rows:
        assert 0.97 * row["share"] < row["gmacs"] / dense <= row["share"]


def test_the_table_says_what_the_json_says(compared: tuple[str, Any]) -> None:
    text, summary = compared
    assert compare.describe(summary) in text
    for row in summary["rows"]:
        assert len(row["top1"]) == summary["setting"]["seeds"] == 2
        name = compare.METHODS[row["method"]].label
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{row['gmacs']:.4f}" in line and f"{np.mean(row['top1']):.2%}" in line
        assert set(row["damaged"]) == set(CORRUPTIONS)
        ours = next(r for r in summary["rows"] if r["method"] == "spot")
        lead = np.mean(ours["top1"]) - np.mean(row["top1"])
        assert row["spot_leads"][0] == pytest.approx(lead, abs=1e-9)
        lead = np.mean([*ours["damaged"].values()]) - np.mean([*row["damaged"].values()])
        assert row["spot_leads_damaged"][0] == pytest.approx(lead, abs=1e-9)
        recall = [stages[-1] for stages in row["foreground"]]
        assert f"{np.mean(recall):.0%} ± {100 * np.std(recall, ddof=1):.1f}" in line
        for stages in row["foreground"]:
            assert len(stages) == len(row["random"]) == 3


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_finds_the_same(
    compared: tuple[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(setup, "train_phase", refuse)
    _, again = command(folder / "compare", "compare", "--seed", "4")
    assert again["rows"] == compared[1]["rows"]
    with pytest.raises(AssertionError, match="trained again"):
        command(folder / "compare", "compare", "--seed", "9")


def test_one_checkpoint_is_run_at_every_budget(budgets: tuple[str, Any]) -> None:
    text, summary = budgets
    assert demo_budgets.describe(summary) in text
    assert [row["keep"] for row in summary["rows"]] == [0.3, 0.5, 0.7, 0.9]
    for row in summary["rows"]:
        mean = np.mean(row["one"]) - np.mean(row["own"])
        assert row["difference"][0] == pytest.approx(mean, abs=1e-9)


def test_the_two_kinds_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "compare", "budgets"])
    assert "unrecognized arguments: budgets" in capsys.readouterr().err


def test_the_budget_is_the_largest_that_fits() -> None:
    dense = build_dense(SMALL)
    share = 0.8
    keep = compare.matching_keep(SMALL, "spot", share)
    limit = share * count_flops(dense, compare.INPUT).total
    below, above = (
        count_flops(sparsify(build_dense(SMALL), at=[1, 2], keep=ratio), compare.INPUT).total
        for ratio in (keep, round(keep + 0.001, 3))
    )
    assert below <= limit < above
    with pytest.raises(ValueError, match="out of reach"):
        compare.matching_keep(SMALL, "spot", 0.01)


def test_the_error_of_a_difference_counts_images_and_seeds() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(3, 40, generator=draw) < p for p in (0.9, 0.7))
    groups = np.arange(40) // 2
    mean, error = difference(ours, theirs, groups)
    by_seed = (ours.double() - theirs.double()).mean(1)
    assert mean == pytest.approx(by_seed.mean().item())
    _, images = paired_difference(ours.double().mean(0), theirs.double().mean(0), groups)
    assert error == pytest.approx(math.sqrt(images**2 + by_seed.var().item() / 3))
    assert difference(ours, ours, groups) == (0, 0)


def test_the_verdict_follows_the_figures() -> None:
    def row(method: str, clean: tuple[float, float], damaged: tuple[float, float]) -> Any:
        return {
            "method": method,
            "share": 0.5,
            "spot_leads": clean,
            "spot_leads_damaged": damaged,
        }

    rows = [
        row("spot", (0, 0), (0, 0)),
        row("dynamicvit", (0.01, 0.004), (0.01, 0.006)),
        row("evit", (-0.01, 0.004), (-0.01, 0.006)),
        row("random", (0.05, 0.001), (0.0, 0.0)),
    ]
    clean, damaged = compare.verdict(rows)
    assert clean.endswith(
        "SPOT leads DynamicViT (+1.00 ± 0.40), random (+5.00 ± 0.10); trails EViT (-1.00 ± 0.40)."
    )
    assert "clean images" in clean and "damaged images" in damaged
    assert "SPOT ties with DynamicViT" in damaged
    assert "leads" not in damaged and "trails" not in damaged


@pytest.mark.parametrize("name", ["compare", "budgets"])
def test_the_page_shows_the_committed_runs(name: str) -> None:
    """And none but these; without a run the page says so."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/comparison.md").read_text()
    section = page.split("\n## ")[1 + (name == "budgets")]
    runs = sorted((root / "benchmarks/results/demos").glob(f"{name}-*.json"))
    describe = compare.describe if name == "compare" else demo_budgets.describe
    assert ("No run is committed yet." in section) is not bool(runs)
    assert section.count("±") == sum(
        describe(json.loads(run.read_text())).count("±") for run in runs
    )
    for run in runs:
        summary = json.loads(run.read_text())
        assert not summary["quick"] and run.name in section
        assert f"```\n{describe(summary)}\n```" in section
