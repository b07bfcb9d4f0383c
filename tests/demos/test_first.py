"""`spot demo --quick`: the whole way from nothing to the table, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spot_vit.cli.main import main
from spot_vit.data.digits import ClutteredDigits
from spot_vit.demos import first
from spot_vit.training.checkpoint import read_config

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
    assert names == {"spot.safetensors", "summary.json", "kept.png"}
    assert all(str(folder / name) in text for name in names)
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
    model = first.load(folder / "spot.safetensors")
    assert read_config(folder / "spot.safetensors")["spot"]["keep"] == summary["recipe"]["keep"]
    batch = ClutteredDigits("test", summary["recipe"]["test_images"]).batch(range(360))
    with torch.inference_mode():
        correct = model(batch.image).argmax(1) == batch.label
    top1 = summary["rows"][2]["top1"]
    assert correct.float().mean().item() == pytest.approx(top1, abs=1.5 / 360)


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
