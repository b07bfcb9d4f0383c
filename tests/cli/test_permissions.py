"""Every command as an ordinary user who may not read or write something: one line and status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spot_vit
import timm
import torch
from support.commands import TINY
from support.runs import ROOT, SMALL, folder_of_pictures

NOBODY = 65534

AS_USER = """
import contextlib, ctypes, io, json, os, sys
if os.getuid() == 0:  # root reads and writes everything, but for these two capabilities
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        assert libc.prctl(24, capability, 0, 0, 0) == 0
    if "again" not in sys.argv:
        os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], *sys.argv[1:], "again"])
from spot_vit.cli.main import main
found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(words)
    except BaseException as error:
        status, said = repr(error), io.StringIO(repr(error))
    found.append([status, said.getvalue()])
print(json.dumps(found))
"""


def closed(path: Path) -> Path:
    """The file or folder, of somebody else and for nobody else."""
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o700 if path.is_dir() else 0o600)
    else:
        os.chmod(path, 0)
    return path


def test_what_may_not_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    model = spot_vit.sparsify(timm.create_model("deit_tiny_patch16_224", **SMALL, num_classes=3))
    good, own = tmp_path / "good.safetensors", tmp_path / "own"
    spot_vit.save(good, model)
    weights, plain = tmp_path / "closed.safetensors", tmp_path / "closed.pth"
    spot_vit.save(weights, model)
    torch.save(model.state_dict(), plain)
    pictures = folder_of_pictures(tmp_path / "pictures")
    one_class = folder_of_pictures(tmp_path / "one_class")
    outside, no_data, run = tmp_path / "outside", tmp_path / "no_data", tmp_path / "run"
    names, text, picture = (
        tmp_path / "names.txt",
        tmp_path / "text.json",
        pictures / "train/class1/003.png",
    )
    text.write_text("{}"), names.write_text("class0\nclass1\nclass2\n")
    for folder in (outside, no_data, run):
        folder.mkdir()
    (run / "recipe.yaml").write_text("lr: 0.1\n")
    for path in (weights, plain, names, text, no_data, run, outside):
        closed(path)
    closed(one_class / "train/class2"), closed(one_class / "validation/class2")
    closed(picture)
    base = ["train", str(pictures), *TINY, "--output", str(own)]
    wanted: dict[str, tuple[list[str], Path]] = {
        "train, output": ([*base, "--output", str(outside)], outside),
        "train, data": (["train", str(no_data), *base[2:]], no_data),
        "train, a class": (["train", str(one_class), *base[2:]], one_class / "train/class2"),
        "train, a picture": ([*base, "--bad-share", "0", "--experiment", "x"], picture),
        "train, weights": ([*base, "--initial-checkpoint", str(plain)], plain),
        "train, teacher": ([*base, "--teacher", str(weights)], weights),
        "train, recipe": ([*base, "--config", str(text)], text),
        "train, classes": ([*base, "--class-map", str(names)], names),
        "train, run": (["train", "--resume", str(run)], run),
        "eval, weights": (["eval", str(weights), str(pictures)], weights),
        "eval, weights of a name": (
            ["eval", str(plain), str(pictures), "--model", "deit_tiny_patch16_224"], plain,
        ),
        "eval, data": (["eval", str(good), str(no_data)], no_data),
        "eval, a class": (["eval", str(good), str(one_class)], one_class / "validation/class2"),
        "eval, output": (
            ["eval", str(good), str(pictures), "--output", str(outside / "x.json")], outside,
        ),
        "export, weights": (["export", str(weights), "-o", str(own / "x.onnx")], weights),
        "export, output": (["export", str(good), "-o", str(outside / "x.onnx")], outside),
        "bench, weights": (["bench", str(weights), "-o", str(own / "x.json")], weights),
        "bench, output": (["bench", str(good), "-o", str(outside / "x.json")], outside),
        "report, weights": (["report", str(weights), "digits"], weights),
        "report, a picture": (["report", str(good), str(picture)], picture),
        "report, results": (
            ["report", str(good), "digits", "--results", str(text), "--num-samples", "1",
             "--rounds", "0", "--output", str(own / "x.html")],
            text,
        ),
        "show, a picture": (["show", str(picture), "--model", str(good)], picture),
        "demo, output": (["demo", "--output", str(outside)], outside),
    }  # fmt: skip
    words = json.dumps([words for words, _ in wanted.values()])
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, (_, path)), (status, said) in zip(
        wanted.items(), json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        last = said.strip().splitlines()[-1] if said.strip() else ""
        assert status == 2, (name, status, said)
        assert str(path) in last and "ermission" in last and "Traceback" not in said, (name, said)


def test_the_net_below_all_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spot_vit.cli import info, main

    def refuses(arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(info, "run", refuses)
    assert main.main(["info"]) == 2
    assert capsys.readouterr().err == (
        "spot: /some/file: Permission denied; change its permissions\n"
    )
