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
    assert len(list(Path("figures").glob("*.png"))) == len(list(Path("figures").glob("*.svg"))) == 6
    assert main(["report", "--data", "run.json", "-o", "again.html"]) == 0
    page, again = (Path(name).read_text() for name in ("report.html", "again.html"))
    assert "0.png" in page and "0.png" in again and len(page) == pytest.approx(len(again), rel=0.01)


def test_several_models_single_files_and_results(here: Path) -> None:
    model = spot_vit.load("model.safetensors")
    spot_vit.set_keep(model, 0.9)
    spot_vit.save("other.safetensors", model, classes=CLASSES)
    rows = [
        {"name": "dense", "keep": None, "gmacs": 1.0, "top1": 0.9, "difference": None},
        {"name": "ours", "keep": 0.6, "gmacs": 0.6, "top1": 0.88, "difference": [-0.02, 0.01]},
    ]
    Path("eval.json").write_text(json.dumps({"rows": rows}))
    command = [
        "report",
        "model.safetensors",
        "pictures/cat/0.png",
        "--compare",
        "other.safetensors",
    ]
    assert main([*command, "--rounds", "0", "--results", "eval.json"]) == 0
    page = Path("report.html").read_text()
    assert "other.safetensors" in page and "88" in page


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
