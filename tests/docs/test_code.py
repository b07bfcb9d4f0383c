"""Examples and the Python in the pages run; what pages type in a shell is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.cli.main import parser
from spot_vit.measure import budget
from spot_vit.utils.modes import unwrap
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

    def milliseconds(model: Any, images: Any) -> float:
        return 40.0 * unwrap(model).spot_config.keep

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(budget, "median_latency", milliseconds)
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
    if path.stem in ("sparsifiner", "checkpoints"):  # small, and what they ask for
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **a: create(name, **SMALL, **a))
        images = torch.randn(2, 3, 64, 64)
        teacher = timm.create_model("deit_small_patch16_224")
        world |= {"loader": [(images, torch.tensor([1, 2]))], "images": images, "teacher": teacher}
        Path("path/to").mkdir(parents=True)
        torch.save(random_state("deit", stages=3), "path/to/weights.pth")
    run(path, world)


@pytest.mark.parametrize("path", pages("bash"))
def test_shell(path: Path) -> None:
    """Commands of ours parse, and files that are run are there."""
    for line in "\n".join(blocks(path, "bash")).splitlines():
        for command in line.partition("  #")[0].split("&&"):
            words = shlex.split(command, comments=True)
            if words[:1] == ["spot"]:
                parser().parse_args(words[1:])
            script = next((word for word in words if word.endswith(".py")), None)
            if words[:1] == ["python"] and script:
                assert (ROOT / script).exists(), command


def test_the_shell_test_refuses_what_is_not_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for wrong in ("spot demo --compare", "python tools/nothing.py --run"):
        page.write_text(f"```bash\n{wrong}\n```\n")
        with pytest.raises((SystemExit, AssertionError)):
            test_shell(page)
