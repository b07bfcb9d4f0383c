"""What importing costs and brings along: nothing that a user of the operators does not need."""

from __future__ import annotations

import subprocess
import sys

from support.package import ROOT


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_operators_brings_no_package_of_others() -> None:
    found = run(
        "import sys, torch; before = set(sys.modules); import spot_ext;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert found.split() == ["spot_ext"], found


def test_flops_are_counted_whichever_is_imported_first() -> None:
    count = (
        "x = torch.randn(1, 5, 2, 4);"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: spot_ext.attention_stats(x, x, x)\n"
        "print(counter.get_total_flops())"
    )
    early = run(f"import torch, torch.utils.flop_counter, spot_ext; {count}")
    late = run(f"import torch, spot_ext; {count}")
    assert early == late and int(late) > 0


def test_an_import_hook_runs_once_behind_the_module_and_leaves(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "later.py").write_text("x = 1\n")
    out = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from spot_ext._after_import import *;"
        "before = list(sys.meta_path);"
        "after_import('later', lambda module: print('first', module.x));"
        "after_import('later', lambda module: print('second', module.x));"
        "import later, importlib; importlib.reload(later);"
        "print(sys.meta_path == before);"
        "after_import('later', lambda module: print('at once'))"
    )
    assert out.split("\n") == ["first 1", "second 1", "True", "at once", ""], out
