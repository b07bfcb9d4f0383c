"""`spot export`: flags become settings, files appear, what is wrong is one line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import spot_vit
from spot_vit.cli.export import settings_of
from spot_vit.cli.main import main, parser
from spot_vit.config.export import ExportSettings
from spot_vit.export import open_exported
from support.commands import refused
from support.exported import needs, small, written

CLASSES = [f"class {c}" for c in range(7)]


def read(line: str) -> ExportSettings:
    return settings_of(parser().parse_args(["export", *shlex.split(line)]))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of `save` in the folder that is current."""
    monkeypatch.chdir(tmp_path)
    spot_vit.save("best.safetensors", small("both"), classes=CLASSES)
    return "best.safetensors"


def test_flags_become_settings() -> None:
    found = read(
        "run --format openvino --keep 0.7 0.5 0.3 --attention-keep 0.25 -o m.xml --force -b 4 "
        "--img-size 96 --opset 21 --threads 2 --model deit_tiny_patch16_224 --use-ema"
    )
    assert found == ExportSettings(
        checkpoint="run", format="openvino", keep=(0.7, 0.5, 0.3), attention_keep=0.25,
        output="m.xml", force=True, batch_size=4, img_size=96, opset=21, threads=2,
        model="deit_tiny_patch16_224", use_ema=True,
    )  # fmt: skip
    assert ExportSettings.from_dict(found.to_dict()) == found
    for line in ("run --keep 0.7", "--keep 0.7 run", "--keep 0.7 -- run"):
        assert read(line) == ExportSettings(checkpoint="run", keep=(0.7,))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --format onxn", "format must be one of"),
        ("run --opset 12", "opset must be"),
        ("run --keep 1.5", "keep must be"),
        ("run --keeep 0.5", "--keeep is no flag; did you mean --keep?"),
        ("a b", "expected one CHECKPOINT, got a, b"),
        ("--format onnx", "checkpoint must name a file"),
        ("run --no-pretrained --model deit_tiny_patch16_224", "no_pretrained draws weights"),
        ("run --keep 2 --opset 1", "2 problems"),
    ],
)
def test_what_is_wrong_is_said(line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(line)
    assert message in str(error.value)


def test_a_saved_model(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At another budget; its classes travel, and a second export needs --force."""
    line = ["export", checkpoint, "--format", "torch", "--keep", "0.5", "--attention-keep", "0.75"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "verified: decisions identical" in said.err
    assert "best.pt2: vit_tiny_patch16_224, keep 0.5, attention keep 0.75, as torch" in said.out
    assert "takes images [batch, 3, 64, 64] float32" in said.out
    assert "gives logits [batch, 7], kept_1 [batch, 8], kept_2 [batch, 4]" in said.out
    assert "needs torch" in said.out and "import spot_ext" in said.out
    file = open_exported("best.pt2")
    assert file.metadata["classes"] == CLASSES == file.pretrained_cfg["label_names"]
    assert written(Path()) == ["best.pt2", checkpoint]
    assert "best.pt2 is there already" in refused(capsys, *line)


def test_a_name_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnx")
    monkeypatch.chdir(tmp_path)
    name = "spot_deit_tiny_patch16_224"
    line = ["export", name, "--no-pretrained", "--num-classes", "5", "--img-size", "64"]
    assert main(line) == 0
    file = open_exported(f"{name}.onnx")
    assert file.num_classes == 5 and file.metadata["inputs"]["images"] == ["batch", 3, 64, 64]
    assert file.metadata["architecture"] == "deit_tiny_patch16_224" and file.metadata["keep"] == 0.7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.safetensors"], "neither a file or run folder, nor a model of timm"),
        (["spot_deit_tini_patch16_224", "--no-pretrained"], "knows no 'spot_deit_tini"),
        (["deit_tiny_patch16_224", "--no-pretrained", "--keep", "0.5"], "removes no tokens"),
        (["best.safetensors", "-o", "m.pt2"], "ends in .onnx"),
        (["best.safetensors", "-o", "."], "is a folder"),
        (["best.safetensors", "--keep", "0.5", "0.7"], "keep must not rise"),
    ],
)
def test_refusals(
    words: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "export", *words)
    assert written(Path()) == [checkpoint]


@pytest.mark.slow
def test_evaluation_of_a_file(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`spot eval` finds of a file what it finds of the model, cost included."""
    import json

    assert main(["export", checkpoint, "--format", "torch"]) == 0
    images = ["--synthetic", "--num-samples", "9", "-b", "4", "--speed", "0", "-j", "0"]
    assert main(["eval", "best.pt2", *images, "--baseline", checkpoint, "--output", "e.json"]) == 0
    theirs, ours = json.loads(Path("e.json").read_text())["rows"]
    assert ours["model"] == "vit_tiny_patch16_224, keep 0.6, attention keep 0.5, torch file"
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ours["top1"] == theirs["top1"] and ours["gmacs"] == pytest.approx(theirs["gmacs"])
    for flags, message in (
        (["--keep", "0.5"], "keep: best.pt2"),
        (["--img-size", "96"], "was exported for 64x64 pixels"),
        (["--amp"], "run as it was exported, so leave --amp out"),
        (["--compile"], "leave --compile out"),
    ):
        assert message in refused(capsys, "eval", "best.pt2", *images, *flags)


def test_a_missing_package_is_named(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = "spot_vit.export.formats.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    said = refused(capsys, "export", checkpoint, "--format", "openvino")
    assert "pip install 'spot-vit[export]'" in said
