"""`spot demo --quick`: the whole way from nothing to the table, once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.cli.main import main
from spot_vit.data.digits import ClutteredDigits
from spot_vit.demos import first, setup
from spot_vit.demos.setup import Recipe
from spot_vit.models.saved import load

MODELS = ["dense", "dense, longer", "SPOT"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """Folder, printed text and summary of one quick run, under a seed that is not the default."""
    folder = tmp_path_factory.mktemp("demo") / "not" / "there"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        options = ["--quick", "--seed", "3", "--threads", "1", "--output", str(folder)]
        assert main(["demo", *options]) == 0
    torch.set_num_threads(threads)
    return folder, "\n".join(lines), json.loads((folder / "summary.json").read_text())


def test_the_files_are_there_and_named(ran: tuple[Path, str, dict]) -> None:
    folder, text, _ = ran
    names = {path.name for path in folder.iterdir()}
    shown = {"spot.safetensors", "summary.json", "kept.png"}
    assert names == shown | {"dense.safetensors", "dense-longer.safetensors"}
    assert all(str(folder / name) in text for name in shown)
    assert (folder / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_row_and_column(ran: tuple[Path, str, dict]) -> None:
    _, text, summary = ran
    lines = text.splitlines()
    header = next(line for line in lines if "top-1" in line)
    columns = [
        "top-1",
        "against dense",
        "GMACs",
        "batch 1",
        "batch 32",
        "training step",
        "foreground kept",
        "random",
    ]
    assert all(column in header for column in columns)
    for row in summary["rows"]:
        assert any(line.startswith(row["model"]) and f"{row['top1']:.2%}" in line for line in lines)
    assert [row["model"] for row in summary["rows"]] == MODELS


def test_the_summary_is_consistent(ran: tuple[Path, str, dict]) -> None:
    summary = ran[2]
    dense, longer, spot = summary["rows"]
    assert summary["seed"] == 3 and summary["quick"] and summary["seconds"] > 0
    assert dense["difference"] == dense["difference_standard_error"] == 0
    for row in (longer, spot):
        assert row["difference"] == pytest.approx(row["top1"] - dense["top1"])
    assert longer["gmacs"] == dense["gmacs"]
    assert spot["gmacs"] <= 0.6 * dense["gmacs"]
    for row in summary["rows"]:
        for measured in ("latency_batch1", "latency_batch32", "training_step"):
            latency = row[measured]
            assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    assert dense["latency_batch1"]["ratio"] == 1 and dense["foreground_kept"] is None
    assert spot["foreground_kept"]["random"] == pytest.approx([38 / 64, 23 / 64, 13 / 64])
    kept = spot["foreground_kept"]["foreground"]
    assert len(kept) == 3 and 1 >= kept[0] >= kept[1] >= kept[2] > 0


def test_the_checkpoint_comes_back_as_the_same_model(ran: tuple[Path, str, dict]) -> None:
    folder, _, summary = ran
    model = load(folder / "spot.safetensors")
    assert model.spot_config.keep == summary["recipe"]["keep"]
    batch = ClutteredDigits("test", summary["recipe"]["test_images"]).batch(range(360))
    with torch.inference_mode():
        correct = model(batch.image).argmax(1) == batch.label
    top1 = summary["rows"][2]["top1"]
    assert correct.float().mean().item() == pytest.approx(top1, abs=1.5 / 360)


def test_an_interrupted_run_goes_on_and_ends_as_another_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Recipe(width=16, depth=4, heads=2, steps=3, extra_steps=2, batch_size=4, test_images=40)
    monkeypatch.setattr(first, "QUICK", dataclasses.replace(small, latency_rounds=2))
    threads = torch.get_num_threads()
    command = ["demo", "--quick", "--threads", "1", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    phase, names = setup.train_phase, []

    def interrupted(*arguments: Any, **options: Any) -> None:
        names.append(arguments[4])
        if len(names) == 3:
            raise KeyboardInterrupt
        phase(*arguments, **options)

    monkeypatch.setattr(first, "train_phase", interrupted)
    folder = tmp_path / "halves"
    capsys.readouterr()
    assert main([*command, str(folder)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"spot demo: interrupted; finished phases are in {folder}, and the same command goes on "
        "behind them"
    )
    assert {path.name for path in folder.iterdir()} == {
        "dense.safetensors",
        "dense-longer.safetensors",
    }
    assert main([*command, str(folder)]) == 0
    assert names == ["dense ViT", "dense, longer", "SPOT ViT", "SPOT ViT"]
    states = [load(tmp_path / name / "spot.safetensors").state_dict() for name in ("whole", folder)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    monkeypatch.setattr(first, "train_phase", None)  # nothing is trained a third time
    assert main([*command, str(folder)]) == 0
    torch.set_num_threads(threads)


def test_a_damaged_phase_is_named_and_trained_again(tmp_path: Path) -> None:
    path, trained = tmp_path / "x.safetensors", []
    recipe = Recipe(width=16, depth=2, heads=2)
    for content in (None, b"damaged", None):
        if content is not None:
            path.write_bytes(content)
        model = setup.build_dense(recipe)
        with contextlib.ExitStack() as stack:
            if content is not None:
                stack.enter_context(
                    pytest.warns(
                        RuntimeWarning, match=r"x\.safetensors was not read.*trained again"
                    )
                )
            setup.train_once(path, model, {"seed": 3}, lambda: trained.append(3))
    assert len(trained) == 2
    setup.train_once(path, model, {"seed": 4}, lambda: trained.append(4))
    assert trained == [3, 3, 4]


def test_info_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--json"])
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "timm"])
def test_a_missing_package_names_the_extra(module: str, tmp_path: Path) -> None:
    """In a fresh interpreter that cannot import one of the packages."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from spot_vit.cli.main import main\n"
        f"sys.exit(main(['demo', '--quick', '--output', {str(tmp_path)!r}]))"
    )
    paths = [str(Path(__file__).resolve().parents[2] / part) for part in ("python", ".")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'spot-vit[" in done.stderr
    assert not any(tmp_path.iterdir())
