"""`spot eval`: flags become settings, what is wrong is said, what was found is printed."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest
from spot_vit.cli.eval import settings_of
from spot_vit.cli.main import main, parser
from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.utils.errors import UserError


def read(line: str) -> EvaluationSettings:
    return settings_of(parser().parse_args(["eval", *shlex.split(line)]))


def test_flags_become_settings() -> None:
    found = read(
        "run photos --keep 0.5,0.7 -b 8 -j 0 --results-file a.csv --no-dense "
        "--corruptions fog,snow --severities 1 3 --img-size 96 "
        "--mean 0.5 0.5 0.5 --data-args canvas=48 --speed 0"
    )
    assert found == EvaluationSettings(
        checkpoint="run",
        data="photos",
        keep=(0.5, 0.7),
        batch_size=8,
        workers=0,
        output="a.csv",
        no_dense=True,
        corruptions=("fog", "snow"),
        severities=(1, 3),
        img_size=96,
        mean=(0.5, 0.5, 0.5),
        data_args={"canvas": 48},
        speed=0.0,
    )


@pytest.mark.parametrize(
    "line",
    ["run photos --keep 0.5", "run --keep 0.5 -- photos", "run --keep 0.5 photos",
     "run --data photos --keep 0.5", "--keep 0.5 --no-dense run photos --dense"],
)  # fmt: skip
def test_data_may_stand_anywhere(line: str) -> None:
    found = read(line)
    assert (found.checkpoint, found.data, found.keep) == ("run", "photos", (0.5,))


def test_flags_of_timm_are_known() -> None:
    found = read(
        "model --data-dir folder --dataset hfds/x --split val --batch-size 4 --workers 1 --amp "
        "--amp-dtype float16 --channels-last --class-map m.txt --num-classes 10 --use-ema "
        "--model deit_tiny_patch16_224 --real-labels r.json --results-format json --torchcompile "
        "--input-key image --target-key label --crop-pct 0.9 --interpolation bicubic --device cpu"
    )
    assert found.data == "folder" and found.use_ema and found.compile and found.amp


def test_everything_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *shlex.split("a b c --keep 1.5 -b none --baselin x --checkpoint y")]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "Traceback" not in found.err
    for words in (
        "spot eval: 5 problems",
        "--baselin is no flag; did you mean --baseline?",
        "--checkpoint is no flag; say CHECKPOINT without a flag",
        "expected CHECKPOINT and DATA, got a, b, c",
        "keep must be",
        "batch_size must be a whole number of 1 or more",
    ):
        assert words in found.err


def test_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval"]) == 2
    assert "checkpoint must name" in capsys.readouterr().err


def test_faults_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spot_vit.runs import evaluate as module

    def fail(settings: Any) -> Any:
        raise UserError("there is no file run")

    monkeypatch.setattr(module, "evaluate", fail)
    assert main(["eval", "run", "digits"]) == 2
    assert capsys.readouterr().err == "spot eval: there is no file run\n"


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "spot_vit.runs.evaluate", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "spot_vit.runs.evaluated", raising=False)
    assert main(["eval", "run", "digits"]) == 1
    assert "timm" in capsys.readouterr().err
