"""Structure of the Python code: packages by rank, and no circle of imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = {  # a file imports from its own package or from a lower rank
    "utils": 1, "config": 1, "data": 2, "nn": 2, "measure": 3, "models": 4, "evaluation": 4,
    "training": 5, "export": 5, "runs": 6, "bench": 7, "demos": 7,
    "report": 8, "cli": 9,
}  # fmt: skip
TREES = {"spot_vit": ROOT / "python", "spot_ext": ROOT, "benchmarks": ROOT, "tools": ROOT}


def modules(name: str) -> dict[str, Path]:
    """Files of a tree by their dotted name."""
    root = TREES[name]
    paths = sorted((root / name).rglob("*.py"))
    dotted = (path.relative_to(root).with_suffix("").as_posix() for path in paths)
    return {
        d.replace("/", ".").removesuffix(".__init__"): p for d, p in zip(dotted, paths, strict=True)
    }


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def edges(name: str) -> dict[str, set[str]]:
    """What each file of a tree imports of the same tree."""
    files = modules(name)
    names = {file: imported(path) for file, path in files.items()}
    return {
        file: {n if n in files else n.rpartition(".")[0] for n in found if n.split(".")[0] == name}
        for file, found in names.items()
    }


@pytest.mark.parametrize("name", TREES)
def test_no_circle_of_imports(name: str) -> None:
    graph = {file: there - {file} for file, there in edges(name).items() if file != name}
    assert len(graph) > 5
    TopologicalSorter(graph).prepare()


def test_packages_import_from_lower_ranks_only() -> None:
    inside = {file: there for file, there in edges("spot_vit").items() if file.count(".") > 1}
    assert {file.split(".")[1] for file in inside} == set(RANKS)
    for file, there in inside.items():
        own = file.split(".")[1]
        for other in there:
            assert other != "spot_vit", f"{file} imports the whole package"
            package = other.split(".")[1]
            assert package == own or RANKS[package] < RANKS[own], f"{file} imports {other}"


def test_what_stays_apart() -> None:
    for file, path in modules("spot_vit").items():
        if file.startswith("spot_vit.config"):
            assert "torch" not in {name.split(".")[0] for name in imported(path)}, file
    for path in modules("spot_ext").values():
        assert "spot_vit" not in {name.split(".")[0] for name in imported(path)}, path
