"""Examples and the Python in the pages run; what pages type in a shell is there."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.cli import bench as bench_command
from spot_vit.cli import eval as eval_command
from spot_vit.cli import export as export_command
from spot_vit.cli import train as train_command
from spot_vit.cli.main import parser
from spot_vit.config.recipe_files import shipped
from spot_vit.measure import budget
from support.published import random_state

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def pages(language: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(ROOT).with_suffix("")))
        for path in PAGES
        if blocks(path, language)
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    run = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "False" not in run.stdout


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What pages take for granted: weights to download, a model, data, a machine of known speed."""
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        return create(name, **arguments)

    def latencies(at: Any, ratios: list[float], images: Any) -> list[list[float]]:
        return [[40.0 * ratio] for ratio in ratios]

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(budget, "latencies", latencies)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {
        "__name__": "page",
        "spot_vit": spot_vit,
        "model": create("deit_small_patch16_224"),
    }


def run(path: Path, names: dict[str, Any]) -> None:
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", pages("python"))
def test_page(path: Path, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other, in one namespace."""
    if path.stem == "export":
        pytest.importorskip("onnxruntime", reason="needs the extra export")
    if path.stem in ("sparsifiner", "checkpoints", "export"):  # small, and what they ask for
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **a: create(name, **{**SMALL, **a}))
        images = torch.randn(2, 3, 64, 64)
        teacher = timm.create_model("deit_small_patch16_224")
        world |= {"loader": [(images, torch.tensor([1, 2]))], "images": images, "teacher": teacher}
        Path("path/to").mkdir(parents=True)
        torch.save(random_state("deit", stages=3), "path/to/weights.pth")
    if path.stem == "training":  # the run that its commands made
        trained = spot_vit.sparsify(timm.create_model("deit_tiny_patch16_224", num_classes=37))
        spot_vit.save("runs/photos/best.safetensors", trained, classes=[f"{c}" for c in range(37)])
    run(path, world)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell's text; lines that end in a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.partition("  #")[0].split("&&"):
            yield shlex.split(command, comments=True)


def check(arguments: argparse.Namespace) -> None:
    """Builds the settings of a parsed command, which says all that is wrong with them."""
    if arguments.run is train_command.run:
        train_command.recipe_of(arguments)
    elif arguments.run is eval_command.run:
        eval_command.settings_of(arguments)
    elif arguments.run is export_command.run:
        export_command.settings_of(arguments)
    elif arguments.run is bench_command.run:
        bench_command.settings_of(arguments)


@pytest.mark.parametrize("path", pages("bash"))
def test_shell(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of ours, under a launcher too, have nothing wrong; files that are run are there."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(path, "yaml"):  # its first line names the file
        Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
    for words in commands("\n".join(blocks(path, "bash"))):
        if "spot" in words:
            check(parser().parse_args(words[words.index("spot") + 1 :]))
        script = next((word for word in words if word.endswith(".py")), None)
        if words[:1] == ["python"] and script:
            assert (ROOT / script).exists(), words


@pytest.mark.parametrize(
    "wrong",
    [
        "spot demo --compare",
        "spot train photos --keeep 0.5",
        "torchrun --no-python --nproc-per-node 2 spot train photos --method spott",
        "spot train photos --config nothing.yaml",
        "spot eval --keep 0.5 \\\n  --severities 9",
        "python tools/nothing.py --run",
    ],
)
def test_the_shell_test_refuses_what_is_not_there(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{wrong}\n```\n")
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        test_shell(page, tmp_path, monkeypatch)


def test_flags_that_the_pages_on_training_name() -> None:
    """Whatever flag stands in their text is one; every recipe is in the table of its page."""
    known = {"--no-python", "--shutdown-timeout", "--signal", "--cpu"}  # of launchers
    train = parser()._subparsers._group_actions[0].choices["train"]  # type: ignore[union-attr, index]
    known |= set(train._option_string_actions)
    for name in ("training", "recipes", "cluster"):
        text = re.sub(r"```.*?```", "", (ROOT / f"docs/{name}.md").read_text(), flags=re.DOTALL)
        code = " ".join(re.findall(r"`([^`\n]+)`", text))
        named = set(re.findall(r"--[a-z][a-z-]*[a-z]\b(?!-…)", code))
        assert len(named) > 3 and named <= known, f"{name}: {named - known}"
    recipes = (ROOT / "docs/recipes.md").read_text()
    assert set(re.findall(r"^\| `(\w[\w-]*)` \|", recipes, re.MULTILINE)) == set(shipped())


def test_the_job_for_slurm(tmp_path: Path) -> None:
    """The script trains anew once, is queued again when it was told to stop, and goes on."""
    (script,) = (b for b in blocks(ROOT / "docs/cluster.md", "bash") if b.startswith("#!"))
    script = script.replace("/shared/runs", str(tmp_path / "runs"))
    stand_ins = {
        "scontrol": 'if [ $1 = requeue ]; then echo "$@" >> queue; else echo node0; echo node1; fi',
        "srun": "for SLURM_PROCID in 0 1; do export SLURM_PROCID SLURM_LOCALID=0 SLURM_NTASKS=2; "
        '"$@"; status=$?; done; exit $status',
        "spot": 'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK, $MASTER_ADDR: $@" >> calls; exit 143',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "runs/spot-deit-s"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for start in (0, 1):
        subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=True)
        calls = (tmp_path / "calls").read_text().splitlines()[2 * start :]
        assert [call.split(": ")[0] for call in calls] == [f"{r} of 2, 0, node0" for r in (0, 1)]
        words = calls[0].split(": ")[1].split()
        recipe = train_command.recipe_of(parser().parse_args(words))
        assert (recipe.resume == str(folder)) == bool(start)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("epochs: 2\n")
    assert (tmp_path / "queue").read_text() == "requeue 7\nrequeue 7\n"
