"""Mutation testing of selection, schedules and budgets: which changes of the code no test notices.

    python tools/release/mutants.py                  # all files; those of measure/ take longest
    python tools/release/mutants.py training/schedules.py --every 3

Each mutant is the file with one comparison, operator, constant or rounding changed. It is imported
in a fork of this process, where nothing of `spot_vit` has been, and runs the tests of its file up
to the first that fails; what ends in no time limit, or takes all memory, is noticed too. Ends
with 1 below 80 %.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.machinery
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python/spot_vit"
TESTS = {
    "config/spot.py": ["tests/config/test_spot.py"],
    "config/sparsifiner.py": ["tests/config/test_sparsifiner.py"],
    "measure/budget.py": ["tests/measure/test_budget.py"],
    "measure/staircase.py": ["tests/measure/test_staircase.py"],
    "nn/decide.py": ["tests/nn/test_decide.py"],
    "training/keep_sampling.py": ["tests/training/test_keep_sampling.py"],
    "training/ratios.py": ["tests/training/test_objectives.py"],
    "training/schedules.py": ["tests/training/test_schedules.py"],
}
"""Files, and the tests that are to notice a change of them."""

ENOUGH = 0.8
SECONDS = 120  # for the tests of a mutant
BYTES = 8 << 30  # of memory for them

_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any"}


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """A node with one thing changed, in each way there is."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[place] = _SWAPPED[type(operator)]()
            yield other
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPPED:
        other = copy.deepcopy(node)
        other.op = _SWAPPED[type(node.op)]()
        yield other
    elif isinstance(node, ast.UnaryOp):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield ast.Name(_NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield ast.Attribute(copy.deepcopy(node.value), _NAMES[node.attr], node.ctx)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Parent, field, position and node of everything that runs: no annotations, no messages."""
    for field, held in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(held, ast.JoinedStr):
            continue
        for position, child in enumerate(held) if isinstance(held, list) else [(None, held)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Raise):
                continue
            yield node, field, position, child
            yield from places(child)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was changed, and the whole text of each mutant."""
    tree = ast.parse(source)
    for parent, field, position, node in places(tree):
        for other in changed(node):
            words = f"{ast.unparse(node)}  ->  {ast.unparse(other)}"
            _put(parent, field, position, other)
            yield getattr(node, "lineno", 0), words, ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, position, node)


def _put(parent: ast.AST, field: str, position: int | None, node: ast.AST) -> None:
    if position is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[position] = node


def noticed(file: str, text: str) -> bool:
    """Whether a test fails, or does not end, where the file has this text."""
    child = os.fork()
    if child == 0:
        _run(file, text)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run(file: str, text: str) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    before = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        if Path(self.path) == PACKAGE / file:
            return compile(text, self.path, "exec")
        return before(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    try:
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *TESTS[file]]))
    except BaseException:
        status = 1
    os._exit(status)


def main() -> int:
    """Prints what nobody noticed, and the share that was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--every", type=int, default=1, help="take every so many mutants")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "python"), str(ROOT), str(ROOT / "tests")]
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis
    import pytest
    import timm
    import torch

    print(f"torch {torch.__version__}, timm {timm.__version__}, pytest {pytest.__version__}, "
          f"hypothesis {hypothesis.__version__}")  # fmt: skip
    killed = total = 0
    for file in given.files:
        source = (PACKAGE / file).read_text()
        if noticed(file, source):
            print(f"{file}: its tests fail without a change, see pytest {' '.join(TESTS[file])}")
            return 2
        chosen = [*mutants(source)][:: given.every]
        alive = [(line, words) for line, words, text in chosen if not noticed(file, text)]
        killed, total = killed + len(chosen) - len(alive), total + len(chosen)
        print(f"{file}: {len(chosen) - len(alive)} of {len(chosen)}", flush=True)
        for line, words in alive:
            print(f"  line {line}: {words}", flush=True)
    share = killed / max(total, 1)
    print(f"{killed} of {total} mutants were noticed: {share:.0%}")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
