"""`spot bench`: flags become settings, tables are printed, what is wrong is one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from spot_vit.bench import timed
from spot_vit.cli.bench import settings_of
from spot_vit.cli.main import main, parser
from spot_vit.config.bench import BenchSettings
from support.benched import MODEL, NAME
from support.commands import refused

QUICK = [*MODEL, "--seconds", "0", "--patience", "0", "--runtimes", "eager", "-b", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timed, "contention", lambda *args: None)


def read(line: str) -> BenchSettings:
    return settings_of(parser().parse_args(["bench", *shlex.split(line)]))


def test_flags_become_settings() -> None:
    found = read(
        f"{NAME} -b 1 8 --keep 0.5,0.7 --runtimes eager fast --method evit --at 3 6 "
        "--attention-keep 0.25 --img-size 384 --threads 2 --dtype bfloat16 --seconds 2 "
        "--patience 3 --layers --no-peers -o b.json --model-kwargs depth=4 --device cpu"
    )
    assert found == BenchSettings(
        model=NAME, batch_size=(1, 8), keep=(0.5, 0.7), runtimes=("eager", "fast"), method="evit",
        at=(3, 6), attention_keep=0.25, img_size=384, threads=2, dtype="bfloat16", seconds=2.0,
        patience=3.0, layers=True, no_peers=True, output="b.json", model_kwargs={"depth": 4},
    )  # fmt: skip
    assert BenchSettings.from_dict(found.to_dict()) == found and found.picture == "b.png"
    for line in (f"{NAME} --keep 0.7", f"--keep 0.7 {NAME}", f"--keep 0.7 -- {NAME}"):
        assert read(line) == BenchSettings(model=NAME, keep=(0.7,))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{NAME} --runtimes onxn", "runtimes must be"),
        (f"{NAME} --keep 1.5", "keep must be"),
        (f"{NAME} --keeep 0.5", "--keeep is no flag; did you mean --keep?"),
        (f"{NAME} --output table.csv", "output must end in .json"),
        (f"{NAME} --dtype float16", "dtype must be one of"),
        ("a b", "expected one MODEL, got a, b"),
        ("--layers", "model must name one of timm"),
        (f"{NAME} --keep 2 --batch-size 0", "2 problems"),
    ],
)
def test_what_is_wrong_is_said(line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(line)
    assert message in str(error.value)


def test_without_a_model_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    text = capsys.readouterr().out
    assert "usage: spot bench MODEL [flags]" in text and "spot bench crossover" in text
    assert "--attention-keep" in text
    with pytest.raises(SystemExit) as left:
        main(["bench", "crossover", "--help"])
    assert left.value.code == 0 and "usage: spot bench crossover" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK, "--keep", "0.5", "--layers", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "batch 1\nside" in said.out and "eager, keep 0.5" in said.out
    assert "keep 0.5, layer by layer, batch 1" in said.out
    assert "written: spot-bench.json, spot-bench.png" in said.out
    assert "preparing eager, dense" in said.err
    result = json.loads(Path("spot-bench.json").read_text())
    assert result["machine"]["threads"] == 1 and len(result["batches"][0]["rows"]) == 2


@pytest.mark.usefixtures("quick")
def test_a_busy_machine_is_status_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed, "contention", lambda *args: "others work")
    assert main(["bench", *QUICK]) == 3
    assert "no ratios: the machine was busy: others work" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["nothing"], "neither a file or run folder, nor a model of timm"),
        ([NAME, "--keep", "0.0001"], "leaves none of 196 patch tokens"),
        ([NAME, "--device", "tpu"], "expected cpu or cuda"),
        ([NAME, "--at", "40"], "at names block 40"),
    ):
        assert message in refused(capsys, "bench", *words)
    assert not list(Path().iterdir())
