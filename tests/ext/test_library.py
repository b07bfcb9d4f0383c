"""Loading the libraries: once, whatever is in the way, and what is said when it fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.package import FOLDER, LIBRARIES, SOURCE, python

import spot_ext
from spot_ext import _library


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A folder with a copy of the package's Python files, and no libraries."""
    target = tmp_path / "copy" / "spot_ext"
    target.mkdir(parents=True)
    for path in SOURCE.glob("*.py"):
        shutil.copy(path, target)
    yield target


CALLS = {
    "select_tokens": "s.select_tokens(torch.rand(2, 5), 2)",
    "compact_tokens": "s.compact_tokens(torch.rand(2, 6, 3), index)",
    "scatter_tokens": "s.scatter_tokens(torch.rand(2, 3, 3), index, 5)",
    "fuse_tokens": "s.fuse_tokens(torch.rand(2, 6, 3), torch.rand(2, 5), index)",
    "attention_stats": "s.attention_stats(*[torch.rand(2, 6, 2, 4)] * 3)",
    "connectivity": "s.connectivity(torch.rand(2, 2, 5, 3), torch.rand(3, 6), 4)",
    "predict_connectivity": "s.predict_connectivity(torch.rand(2, 5, 2, 4), "
    "torch.rand(2, 6, 2, 4), *[torch.rand(6, 3)] * 2, 4)",
    "pack_linear": "s.pack_linear(torch.rand(5, 3))",
    "packed_linear": "s.packed_linear(torch.rand(2, 3), torch.rand(1, 3, 32), 5)",
    "sparse_attention": "s.sparse_attention(*[torch.rand(2, 6, 2, 4)] * 3, "
    "torch.arange(6, dtype=torch.int32).expand(2, 2, 5, 6))",
    "token_evidence": "s.token_evidence([torch.rand(2, 6, 2, 6)], [5], [0], [index])",
    "token_relevance": "s.token_relevance(None, torch.rand(2, 5, 3), *[None] * 5, "
    "*map(torch.rand, [(4, 3), 4, (3, 4), 3, (2, 3), 2]))",
}
TRY_ALL = f"""
import torch
index = torch.tensor([[0, 3], [4, 2]])
def try_all(s):
    for name, call in {CALLS!r}.items():
        try:
            eval(call, dict(torch=torch, index=index, s=s))
            print(name, "works")
        except Exception as error:
            print(name, type(error).__name__, str(error).replace(chr(10), " | "))
"""


def test_a_copy_loaded_before_is_refused_by_name(tmp_path: Path) -> None:
    for name in LIBRARIES:
        shutil.copy(FOLDER / name, tmp_path)
    other = tmp_path / _library.OPS
    done = python(
        f"{TRY_ALL}\ntorch.ops.load_library({str(other)!r})\n"
        "import spot_ext\ntry_all(spot_ext)\n"
        "print(torch.ops.spot.select_tokens(torch.rand(2, 5), 2).shape)"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(CALLS) + 1 and lines[-1] == "torch.Size([2, 2])"
    for line in lines[:-1]:
        assert "ImportError" in line and "another copy" in line and str(other) in line
        assert str(FOLDER / _library.OPS) in line and "what to run" in line


def test_a_copy_imported_after_is_refused_by_name(package: Path) -> None:
    for name in LIBRARIES:
        shutil.copy(FOLDER / name, package)
    done = python(
        f"""{TRY_ALL}
import sys
import spot_ext as first
for name in [m for m in sys.modules if m.split(".")[0] == "spot_ext"]:
    del sys.modules[name]
sys.path.insert(0, {str(package.parent)!r})
import spot_ext as second
assert second.__file__ != first.__file__
try_all(second)
try_all(first)
"""
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(CALLS)
    for line in lines[: len(CALLS)]:
        assert "ImportError" in line and "another copy" in line
        # Torch notes where links lead to.
        assert str((FOLDER / _library.OPS).resolve()) in line and str(package) in line
    assert all(line.endswith("works") for line in lines[len(CALLS) :])


def test_a_copy_under_another_file_name_is_refused(tmp_path: Path) -> None:
    shutil.copy(FOLDER / _library.OPS, tmp_path / "libother.so")
    done = python(
        f"{TRY_ALL}\ntorch.ops.load_library({str(tmp_path / 'libother.so')!r})\n"
        "import spot_ext\ntry_all(spot_ext)"
    )
    for line in done.stdout.splitlines():
        assert "ImportError" in line and f"not named {_library.OPS}" in line


def test_the_same_file_under_a_link_is_not_a_second_copy(tmp_path: Path) -> None:
    (tmp_path / _library.OPS).symlink_to(FOLDER / _library.OPS)
    done = python(
        f"{TRY_ALL}\ntorch.ops.load_library({str(tmp_path / _library.OPS)!r})\n"
        "import spot_ext\ntry_all(spot_ext)"
    )
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["works"] * len(CALLS)


NO_DISTRIBUTION = """
import importlib.metadata
real = importlib.metadata.distribution
def distribution(name):
    if name == "spot-vit":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
"""


def _broken(package: Path, then: str = "") -> list[str]:
    code = (
        f"{NO_DISTRIBUTION}\n{TRY_ALL}\nimport spot_ext\ntry_all(spot_ext)\n"
        "print(spot_ext.select_tokens_reference(torch.tensor([[1.0, 3.0, 2.0]]), 1).item())\n"
    )
    lines = python(code + then, package.parent).stdout.splitlines()
    assert lines[len(CALLS)] == "1"  # the references need no library
    return lines


def test_definitions_need_no_library(package: Path) -> None:
    done = python(
        f"{NO_DISTRIBUTION}\n{TRY_ALL}\nimport spot_ext\n"
        "with spot_ext.definitions():\n    try_all(spot_ext)",
        package.parent,
    )
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["works"] * len(CALLS)


def test_without_libraries_every_function_says_what_to_run(package: Path) -> None:
    ask = "try:\n    spot_ext.library_path()\nexcept ImportError as error:\n    print(error)\n"
    lines = _broken(package, f"{ask}from spot_ext import info\nassert info.main([]) == 1")
    assert "was not found" in lines[len(CALLS) + 1] and str(package) in lines[len(CALLS) + 2]
    for name, line in zip(CALLS, lines, strict=False):
        assert line.startswith(f"{name} ImportError") and "was not found" in line
        assert str(package) in line and "what to run: pip install ." in line
    report = "\n".join(lines)
    assert "NOT LOADED" in report and "was not found" in report


def _unloadable(kind: str, package: Path) -> None:
    target = package / _library.OPS
    if kind == "garbage":
        target.write_bytes(b"not a library")
    elif kind == "truncated":
        target.write_bytes((FOLDER / _library.OPS).read_bytes()[:20000])
    else:  # as with a torch that lacks a symbol
        source = package.parent / "needs.cpp"
        source.write_text(
            'extern "C" int aoti_torch_of_the_future(); int x = aoti_torch_of_the_future();'
        )
        compiler = shutil.which("c++") or shutil.which("g++")
        assert compiler
        subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)


@pytest.mark.parametrize("kind", ["garbage", "truncated", "symbol"])
def test_a_library_that_does_not_load_says_built_for_found_and_what_to_run(
    kind: str, package: Path
) -> None:
    _unloadable(kind, package)
    lines = _broken(package)
    for name, line in zip(CALLS, lines, strict=False):
        assert line.startswith(f"{name} ImportError"), line
        for words in (
            "does not load",
            str(package / _library.OPS),
            "built for: torch 2.11",
            f"found: torch {torch.__version__}",
            "loader says",
            "what to run",
        ):
            assert words in line, line
        reason = {
            "garbage": "invalid ELF header|file too short",
            "truncated": "truncated",
            "symbol": "aoti_torch_of_the_future",
        }[kind]
        assert re.search(reason, line), line


@pytest.mark.parametrize("kind", ["missing", "garbage"])
def test_without_cuda_kernels_the_cpu_ones_work(kind: str, package: Path) -> None:
    shutil.copy(FOLDER / _library.OPS, package)
    if kind == "garbage":
        (package / _library.CUDA_OPS).write_bytes(b"not a library")
    done = python(
        f"{NO_DISTRIBUTION}\n{TRY_ALL}\nimport spot_ext\ntry_all(spot_ext)\n"
        "from spot_ext import _library\n"
        "try:\n    _library.require('cuda')\nexcept ImportError as error:\n    print(error)",
        package.parent,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[: len(CALLS)]] == ["works"] * len(CALLS)
    words = "\n".join(lines[len(CALLS) :])
    assert "SPOT has no CUDA kernels here" in words and "spot_ext.info" in words
    if torch.version.cuda is None:
        assert "CPU-only build" in words
    else:
        assert ("without CUDA kernels" if kind == "missing" else "does not load") in words


class _Halves(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        index = spot_ext.select_tokens(scores, scores.shape[1] // 2)
        return spot_ext.compact_tokens(tokens, index)


def test_an_exported_program_runs_with_the_library_alone(tmp_path: Path) -> None:
    """`library_path` is what a process without the package loads; without it, torch refuses."""
    path = spot_ext.library_path()
    assert path == str(FOLDER / _library.OPS)
    inputs = torch.rand(2, 7, 3), torch.rand(2, 6)
    exported = torch.export.export(_Halves(), inputs)
    torch.export.save(exported, tmp_path / "model.pt2")
    torch.save((inputs, _Halves()(*inputs)), tmp_path / "data.pt")
    code = f"""
        import sys
        import torch
        if LOADED:
            torch.ops.load_library({path!r})
        model = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
        inputs, expected = torch.load({str(tmp_path / "data.pt")!r})
        assert torch.equal(model(*inputs), expected)
        assert "spot_ext" not in sys.modules
    """
    python(code.replace("LOADED", "True"))
    refused = python(code.replace("LOADED", "False"), check=False)
    assert refused.returncode and "spot" in refused.stderr


def test_importing_twice_registers_once_and_keeps_working() -> None:
    python(
        """
        import gc, sys, torch, warnings
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        import spot_ext
        for _ in range(2):
            for name in [m for m in sys.modules if m.split(".")[0] == "spot_ext"]:
                if name != "spot_ext._C":
                    del sys.modules[name]
            del spot_ext
            gc.collect()
            import spot_ext
            gc.collect()
        import importlib
        importlib.reload(spot_ext)
        gc.collect()
        from torch.utils.flop_counter import FlopCounterMode
        index = torch.tensor([[0, 3], [4, 2]])
        x = torch.rand(2, 6, 3, requires_grad=True)
        w = torch.rand(2, 5)
        spot_ext.compact_tokens(x, index).sum().backward()
        assert x.grad.sum() == 18
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            assert spot_ext.fuse_tokens(x, w, index).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            spot_ext.fuse_tokens(x, w, index)
        assert counter.get_total_flops() == 36
        call = torch.compile(spot_ext.compact_tokens, fullgraph=True, backend="aot_eager")
        assert call(x, index).shape == (2, 3, 3)
        assert spot_ext.attention_stats(*[torch.rand(2, 6, 2, 4)] * 3)[1].shape == (2, 6, 2, 6)
        """
    )


def test_import_is_light() -> None:
    """Processor time over torch's own import, the best of three; and nothing else comes along."""
    done = python(
        """
        import sys, time
        import torch
        before = set(sys.modules)
        start = time.process_time()
        import spot_ext
        print(time.process_time() - start)
        names = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"timm", "torchvision", "PIL", "matplotlib", "sklearn", "spot_vit"}
        assert not names & heavy, names
        assert "torch._dynamo" not in set(sys.modules) - before
        assert "torch._inductor" not in set(sys.modules) - before
        """
    )
    times = [float(done.stdout)]
    while min(times) >= 0.5 and len(times) < 3:
        times.append(
            float(
                python(
                    "import torch, time\nt = time.process_time()\nimport spot_ext\n"
                    "print(time.process_time() - t)"
                ).stdout
            )
        )
    assert min(times) < 0.5, f"{min(times):.2f} s"


def test_workers_of_a_data_loader() -> None:
    python(
        """
        import torch, spot_ext
        tokens, index = torch.rand(64, 197, 32), torch.arange(100).expand(64, 100)
        expected = spot_ext.compact_tokens(tokens, index)  # threads of the parent are up
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                part = slice(16 * i, 16 * i + 16)
                return spot_ext.compact_tokens(tokens[part], index[part])
        loader = torch.utils.data.DataLoader(
            Data(), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        assert torch.equal(torch.cat(list(loader)), expected)
        """
    )
