"""`spot` as a new user types it, and as a careless one does."""

from __future__ import annotations

import csv
import json
import os
import pkgutil
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from PIL import Image
from spot_vit.cli.main import main
from support.commands import (
    SPOT,
    SYNTHETIC,
    TINY,
    TORCHRUN,
    begun,
    files,
    python,
    refused,
    wait_for,
)
from support.pictures import BROKEN, ODD, OTHER, folder
from support.runs import records
from timm.data import create_transform, resolve_model_data_config

BAD = ("bomb.png", "text.jpg", "truncated.jpg")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures of two classes, all kinds of odd ones and files that are none among them."""
    root = tmp_path_factory.mktemp("pictures")
    assert set(BAD) < set(BROKEN)
    folder(root / "train", count=83, extra=[*ODD, *ODD, *OTHER, *BAD, *OTHER])
    folder(root / "val", count=17, extra=[*ODD, *OTHER, "text.jpg"])
    count = sum(path.is_file() for path in root.rglob("*"))
    assert 230 <= count <= 250
    return root


# ---- from a folder to a model ------------------------------------------------------------------


def test_a_folder_of_odd_pictures_becomes_a_model(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(odd), "--config", "spot-deit-t", "--no-pretrained", *TINY, "--epochs", "1"]
    words += ["--output", str(tmp_path), "--at", "1", "2", "3"]
    assert main(["train", *words, "--dense-epochs", "1", "--experiment", "one"]) == 0
    said = capsys.readouterr().out
    run = tmp_path / "one"
    assert "left out, no pictures by their ending: cat/notes.txt" in said
    assert re.search(r"\d pictures? could not be read and (is|are) left out: \S+/(cat|dog)/", said)
    named = (run / "unreadable.txt").read_text().splitlines()
    assert {line.split(": ")[0].rpartition("/")[2] for line in named} == set(BAD)
    assert any(line.endswith("text.jpg: not a picture") for line in named)
    found = json.loads((run / "summary.json").read_text())["results"]
    assert list(found) == ["dense", "finetune"]
    assert found["finetune"]["gmacs"] < found["dense"]["gmacs"]
    assert "kl" in records(run)[-1], "taught by the dense model of the same run"

    dense = str(run / "dense.safetensors")
    assert main(["train", *words, "--teacher", dense, "--experiment", "two"]) == 0
    assert "kl" in records(tmp_path / "two")[-1]

    best, table = str(run / "best.safetensors"), tmp_path / "predictions.csv"
    report = tmp_path / "report.json"
    words = ["eval", best, str(odd), "--keep", "0.5,0.9", "-j", "0", "--output", str(report)]
    capsys.readouterr()
    assert main([*words, "--predictions", str(table)]) == 0
    assert "text.jpg" in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    good = sum(p.suffix != ".txt" and p.name not in BAD for p in (odd / "val").rglob("*.*"))
    assert len({row["file"] for row in rows}) == good

    model: Any = spot_vit.load(best)
    transform: Any = create_transform(**resolve_model_data_config(model))
    picture = transform(Image.open(next((odd / "val/cat").glob("cat*.jpg"))))
    with torch.no_grad():
        assert model(picture[None]).softmax(-1).sum().item() == pytest.approx(1, abs=1e-5)


def test_a_model_of_one_channel(odd: Path, tmp_path: Path) -> None:
    words = [str(odd), *TINY, "--in-chans", "1", "--steps", "1", "--experiment", "grey"]
    assert main(["train", *words, "--output", str(tmp_path)]) == 0
    model = spot_vit.load(tmp_path / "grey/best.safetensors")
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def test_classes_without_pictures_have_a_number_for_a_name(odd: Path, tmp_path: Path) -> None:
    words = [str(odd), *TINY, "--num-classes", "4", "--steps", "1", "--experiment", "run"]
    assert main(["train", *words, "--output", str(tmp_path)]) == 0
    model = spot_vit.load(tmp_path / "run/best.safetensors")
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "2", "3"]


# ---- what is refused, in one line and before anything is written ---------------------------------


WRONG: dict[str, tuple[str, str]] = {
    "no such folder": ("{tmp}/photo {tiny}", r"there is no such folder.*did you mean photos\?"),
    "pictures in no class": ("{tmp}/loose {tiny}", "in no folder of a class; expected loose/CLASS"),
    "one class": ("{tmp}/one {tiny}", r"one class alone, 'cat'"),
    "an empty folder": ("{tmp}/empty {tiny}", "no pictures .* but no file at all"),
    "a file": ("{tmp}/file {tiny}", "expected a folder of pictures or a .tar file"),
    "an unknown split": ("{odd} {tiny} --val-split vall", r"no folder 'vall'.*did you mean val\?"),
    "a file in the way": ("x {synthetic} --output {tmp}/file", "file is a file; name another"),
    "a folder that is read-only": ("x {synthetic} --output /proc/spot", "cannot be written"),
    "an unknown model": ("x {synthetic} --model deit_tinny", "near: deit_tiny_patch16_224"),
    "arguments of no model": ("x {synthetic} --model-kwargs depht=3", "'depht'"),
    "two image sizes": ("x {synthetic} --img-size 48", "48 here and 32 in model_kwargs"),
    "an unknown optimizer": ("x {synthetic} --opt adamww", "adamww not found.*near: adamw"),
    "an optimizer's argument": ("x {synthetic} --opt-kwargs foo=1", "opt adamw: .*'foo'"),
    "a rate that is NaN": ("x {synthetic} --lr nan", "lr must be a number above 0, got nan"),
    "an unknown augmentation": ("{odd} {tiny} --aa foo", "aa: timm makes no augmentation of 'foo'"),
    "means of other channels": ("{odd} {tiny} --mean 0.5 0.4", "mean: expected one number or 3"),
    "a block that is not there": ("x {synthetic} --at 9", "at names block 9, the model has 4"),
    "too large a batch": ("x {synthetic} -b 100", "48 pictures make no batch of 100"),
    "yaml that is none": ("x {synthetic} -c {tmp}/bad.yaml", "bad.yaml: no yaml: while parsing"),
    "a run that is not there": ("--resume {tmp}/nothing", "there is no run in .*nothing"),
    "a folder that is no run": ("--resume {tmp}/empty", r"no run in .*empty \(no recipe.yaml\)"),
    "weights that are not there": ("{odd} {tiny} --initial-checkpoint x", "there is no file x"),
    "weights that are none": (
        "{odd} {tiny} --initial-checkpoint {tmp}/file",
        "file was not read, and nothing in it was executed",
    ),
    "a teacher that is not there": ("{odd} {tiny} --teacher x.pt", "teacher: there is no file x"),
    "a teacher of no name": ("{odd} {tiny} --teacher nobody", "timm knows no model 'nobody'"),
    "a teacher of other classes": (
        "{odd} {tiny} --teacher deit_tiny_patch16_224",  # said before its weights are fetched
        "knows 1000 classes, and the data have 2; .*--dense-epochs",
    ),
    "a metric of other data": ("x {synthetic} --eval-metric map", "map is of images with several"),
    "a metric that says nothing": ("x {synthetic} --eval-metric top5", "of 5 classes is always 1"),
    "a GPU that is not there": ("x {synthetic} --device cuda:7", "torch sees no GPU here"),
    "channels that digits have not": (
        "digits -c digits --in-chans 3",
        "in_chans: images of these data have 1, got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(
    what: str, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("photos", "empty", "loose", "one/train/cat", "one/val/cat"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("loose", "one/train/cat", "one/val/cat"):
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "bad.yaml").write_text("lr: [1\n")
    words, said = WRONG[what]
    tiny = " ".join(TINY) + " --bad-share 0.2"
    line = words.format(tmp=tmp_path, odd=odd, tiny=tiny, synthetic=" ".join(SYNTHETIC))
    given = ["train", *line.split()]
    if "--output" not in line and "--resume" not in line:
        given += ["--output", str(tmp_path / "runs"), "--experiment", "run"]
    before = files(tmp_path)
    assert re.search(said, refused(capsys, *given)), what
    assert files(tmp_path) == before, "nothing was written"


def test_more_unreadable_pictures_than_allowed_are_no_dead_end(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(odd), *TINY, "--epochs", "1", "--output", str(tmp_path)]
    words += ["--experiment", "run"]
    assert main([*words, "--bad-share", "0"]) == 2
    assert re.search(
        r"1 of \d+ pictures cannot be read, and at most 0 % may be .*--bad-share",
        capsys.readouterr().err,
    )
    assert main(words) == 0, "the same command, after the cause was removed"


def test_a_run_that_is_there_and_one_that_ended_before_it_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment", "run"]
    run = tmp_path / "run"

    class Fault(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Fault

    for again in (words, ["train", "--resume", str(run)]):
        with monkeypatch.context() as patch, pytest.raises(Fault):
            patch.setattr("spot_vit.runs.phase_run.evaluate", fail)
            main(words)
        assert len(records(run)) == 6 and not (run / "resume.pt").exists()
        assert main(again) == 0
        assert [r["step"] for r in records(run)] == list(range(1, 13))
        assert "there is a run in" in refused(capsys, *words)
        for path in run.iterdir():
            path.unlink()


def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment", "run"]
    run = tmp_path / "run"
    first = begun(*SPOT, *words, "--epochs", "1000")
    try:
        wait_for(first, lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 1)
        (run / "resume.pt").unlink(missing_ok=True)
        (run / "resume-previous.pt").unlink(missing_ok=True)
        assert main(["train", "--resume", str(run)]) == 2
        assert "another process is training in" in capsys.readouterr().err
        count = len(records(run))
        wait_for(first, lambda: len(records(run)) > count + 3)
    finally:
        first.terminate()
        said = first.communicate(timeout=60)[0]
    assert first.returncode == 143 and "Traceback" not in said
    assert [r["step"] for r in records(run)] == list(range(1, len(records(run)) + 1))


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment", "run"]
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    early = {"metrics.jsonl", "recipe.yaml"}
    for limit, most in ((100, early), (400_000, early), (1_000_000, None)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert main(words) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert re.search(r"/run/\S+ cannot be written: File too large", said)
        found = files(tmp_path / "run")
        assert most is None or set(found) <= most
        assert "resume.pt" not in found and not any(name.startswith(".") for name in found)
    assert main(words) == 0, "the same command, now that there is room"
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "words_of_it"),
    [
        ("spot_vit.runs.data.open_data", "before a step was made; nothing had begun"),
        ("spot_vit.runs.build.dense_model", "before a step was made; nothing had begun"),
        ("spot_vit.training.step.TrainStep.__call__", "behind step 1, and saved; go on with"),
        ("spot_vit.runs.phase_run.evaluate", "behind step 6, and saved; go on with"),
        ("spot_vit.runs.folder.save_torch", ""),  # which a second SIGINT ends at once
    ],
)
def test_a_signal_at_any_time(
    where: str,
    words_of_it: str,
    by: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment", "run"]
    before = pkgutil.resolve_name(where)

    def signalled(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), by)
        if "Step" not in where and "save" not in where:
            time.sleep(30)  # as a large data set or model would take
        return before(*given, **named)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(where, signalled)
        assert main(words) == 128 + by
    assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    run = tmp_path / "run"
    assert words_of_it in said, said
    assert ("saved" in words_of_it) <= (run / "resume.pt").exists()
    again = ["train", "--resume", str(run)] if (run / "resume.pt").exists() else words
    assert main(again) == 0
    assert [r["step"] for r in records(run)] == list(range(1, 13))
    assert not any(name.startswith(".") for name in files(run))


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_trains_stops_and_goes_on(tmp_path: Path) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--experiment"]
    whole = python(*TORCHRUN, *SPOT, *words, "whole", "--epochs", "8")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("2 processes") == 1, "one of them speaks"
    expected = [(r["step"], r["loss"]) for r in records(tmp_path / "whole")]
    assert len(expected) == 8 * 3, "48 images, 8 in each of two processes"
    run = tmp_path / "run"
    process = begun(*TORCHRUN, *SPOT, *words, "run", "--epochs", "8")
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 4)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert "and saved; go on with: spot train --resume" in said
    assert 4 < len(records(run)) < 24
    again = python(*TORCHRUN, *SPOT, "train", "--resume", str(run))
    assert again.returncode == 0, again.stderr
    assert [(r["step"], r["loss"]) for r in records(run)] == expected
    tops = [r["top1"] * 23 for r in records(run, "epoch")]
    assert all(top == pytest.approx(round(top), abs=1e-6) for top in tops), "23 images, each once"


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["-m", "spot_vit.cli.main", "train", "x", *SYNTHETIC]
    done = python(*words, "--output", str(tmp_path), "--experiment", "run")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "run") and len(records(tmp_path / "run")) in (6, 12)


def test_faults_of_one_process_end_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path / "file"), "--experiment", "run"]
    done = python(*TORCHRUN, *SPOT, *words)
    assert done.returncode != 0
    assert "spot train: " in done.stderr and "is a file; name another" in done.stderr
    assert "[rank" not in done.stderr, "no traceback of ours"
