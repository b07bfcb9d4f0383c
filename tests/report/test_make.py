"""`spot report`: from a model and pictures to files, and again without the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spot_vit
import timm
import torch
from report.test_show import photo
from spot_vit.cli.main import main
from spot_vit.report.make import accuracy_rows

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a folder of pictures by class."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        photo(tmp_path / "pictures" / name / f"{k}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=3)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    spot_vit.save("model.safetensors", model, classes=CLASSES)
    return tmp_path


def test_a_page_with_labels_budgets_traces_and_figures(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", "model.safetensors", "pictures", "--keep", "0.9,0.5", "--rounds", "1"]
    assert main([*command, "--trace", "run.json", "--figures", "figures"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("written: report.html (") and "open it in a browser" in printed
    first = spot_vit.Trace.load("run.json")
    assert [one.label for one in first.images] == [0, 1, 2]
    assert [one.name for one in first.images] == ["0.png", "1.png", "2.png"]
    assert spot_vit.Trace.load("run-2.json").model.keep == [0.5, 0.25]
    kinds = ["image1", "image2", "image3", "keep-1", "keep-2", "tokens", "gmacs", "ms", "scores-1",
             "scores-2"]  # fmt: skip
    assert sorted(path.name for path in Path("figures").iterdir()) == sorted(
        f"model{k}-{kind}.{ending}" for k in (1, 2) for kind in kinds for ending in ("png", "svg")
    )
    assert "and 43 files beside it" in printed
    assert main(["report", "--data", "run.json", "-o", "again.html"]) == 0
    page, again = (Path(name).read_text() for name in ("report.html", "again.html"))
    assert "0.png" in page and "0.png" in again and len(page) == pytest.approx(len(again), rel=0.01)


def test_several_models_single_files_and_results(here: Path) -> None:
    model = spot_vit.load("model.safetensors")
    spot_vit.set_keep(model, 0.9)
    spot_vit.save("other.safetensors", model, classes=CLASSES)
    rows = [row("baseline", None, 0.9, None), row("keep 0.6", 0.6, 0.88, [-0.02, 0.01])]
    Path("eval.json").write_text(json.dumps({"rows": rows}))
    command = [
        "report",
        "model.safetensors",
        "pictures/cat/0.png",
        "--compare",
        "other.safetensors",
    ]
    command += ["--rounds", "0", "--results", "eval.json", "--figures", "figures"]
    assert main(command) == 0
    page = Path("report.html").read_text()
    assert "other.safetensors" in page and "88" in page
    assert Path("figures/accuracy.png").is_file() and Path("figures/accuracy.svg").is_file()


def row(name: str, keep: object, top1: float, difference: object, **others: object) -> dict:
    """What the JSON of `spot eval` has of a budget."""
    source = "dense.safetensors" if name == "baseline" else "runs/photos"
    return {
        "name": name, "source": source, "keep": keep, "attention_keep": None, "gmacs": 1.0,
        "top1": top1, "difference": difference, **others,
    }  # fmt: skip


def test_budgets_of_a_checkpoint_are_one_line_of_the_chart(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    rows = [
        row("baseline", None, 0.9, None),
        row("keep 1", 1.0, 0.91, [0.01, 0.002]),
        row("keep 0.5", 0.5, 0.85, [-0.05, 0.01]),
        row("keep 0.7/0.49", [0.7, 0.49], 0.88, [-0.02, 0.01]),
        row("keep 0.5, attention 0.25", 0.5, 0.8, [-0.1, 0.01], attention_keep=0.25),
    ]
    path.write_text(json.dumps({"rows": rows}))
    found = accuracy_rows(path)
    assert [one["title"] for one in found] == [
        "baseline", "photos", "photos", "photos", "photos, attention 0.25",
    ]  # fmt: skip
    assert [one["keep"] for one in found] == pytest.approx([1, 1, 0.5, 0.7, 0.5])
    assert [one["top1"] for one in found] == pytest.approx([90, 91, 85, 88, 80])
    assert [one["error"] for one in found] == [None, *map(pytest.approx, (0.2, 1.0, 1.0, 1.0))]


def test_rows_of_a_real_evaluation(here: Path) -> None:
    command = ["eval", "model.safetensors", "pictures", "--keep", "0.9,0.5", "--speed", "0"]
    assert main([*command, "--output", "eval.json"]) == 0
    found = accuracy_rows(Path("eval.json"))
    assert [one["title"] for one in found] == ["model.safetensors"] * 3
    assert [one["keep"] for one in found] == [1.0, 0.9, 0.5]
    assert all(one["gmacs"] > 0 and 0 <= one["top1"] <= 100 for one in found)


def test_digits(here: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, in_chans=1, num_classes=10
    )
    spot_vit.save("digits.safetensors", spot_vit.sparsify(model, keep=0.7, at=[1]))
    command = ["report", "digits.safetensors", "digits", "--num-samples", "2", "--rounds", "0"]
    assert main([*command, "--trace", "digits.json"]) == 0
    found = spot_vit.Trace.load("digits.json")
    assert len(found.images) == 2 and all(0 <= one.label < 10 for one in found.images)


def test_what_is_wrong_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text("{}")
    for arguments, words in (
        ([], "checkpoint must name"),
        (["model.safetensors"], "images must name"),
        (["model.safetensors", "pictures", "--data", "run.json"], "data is a finished trace"),
        (["none.safetensors", "pictures"], "neither a file"),
        (["model.safetensors", "nowhere"], "no such file or folder"),
        (["--data", "none.json"], "missing"),
        (["model.safetensors", "pictures", "--results", "none.json"], "no such file"),
        (["model.safetensors", "pictures", "--results", "bad.json"], "not what spot eval writes"),
        (["model.safetensors", "pictures", "--keep", "0.9,0.5", "--compare", "b"], "compare goes"),
        (["model.safetensors", "pictures", "--keeps", "0.9"], "did you mean --keep?"),
    ):
        assert main(["report", *arguments]) == 2
        assert words in capsys.readouterr().err
        assert not Path("report.html").exists()
