"""The GPU check and its status page, as far as they work without a GPU."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import SLICES
from ops.cases.base import Unread

from tools.gpu import gpu_check, gpu_sample, gpu_status, ptxas_report
from tools.gpu.cuda_sources import ROOT, cuda_ops, source_hash

ENV = dict(os.environ)


def row(ratio: float | None) -> dict[str, Any]:
    return {"other": "topk", "ratio": ratio, "at_least": None, "held": None}


RESULTS: dict[str, Any] = {
    "date": "2030-01-02T03:04:05+00:00",
    "machine": {
        "gpu": "Some GPU", "capability": "9.0", "driver": "1.2", "torch": "9.9", "cuda": "13.0",
    },
    "parts": {"build": {"status": "passed", "seconds": 40.0}, "test": {"status": "out of time"}},
    "ops": {
        "compact": {
            "source": "abc",
            "test": {"status": "passed", "passed": 12, "failed": 0, "skipped": 0},
            "memcheck": {"memcheck": "passed", "racecheck": "out of time"},
            "bench": {
                "status": "passed",
                "cases": [
                    {
                        "case": "select",
                        "times": {"spot": {"median_ms": 0.5}, "topk": {"median_ms": 1.0}},
                        "rows": [row(2.0), row(None)],
                    }
                ],
            },
        }
    },
}  # fmt: skip


def test_summary_says_what_ran_and_what_ran_out_of_time() -> None:
    text = gpu_check.summary(RESULTS)
    assert "Some GPU (capability 9.0), driver 1.2, torch 9.9, CUDA 13.0" in text
    assert "| test | out of time |  |" in text
    assert "- tests: passed (12 passed, 0 failed, 0 skipped)" in text
    assert "- racecheck: out of time" in text
    assert "| select | 0.5 | topk | 1 | 2.00 |" in text
    assert "| select | 0.5 | topk | 1 | contended |" in text


def test_a_part_is_as_good_as_its_worst_op() -> None:
    def status(*of_ops: str) -> str:
        ops = {str(i): {"test": {"status": each}} for i, each in enumerate(of_ops)}
        return gpu_check.part_status("test", ops)

    assert status("passed", "passed") == "passed"
    assert status("passed", "out of time") == "out of time"
    assert status("out of time", "failed", "passed") == "failed"
    checks = {"compact": {"memcheck": {"memcheck": "passed", "racecheck": "not run: no tool"}}}
    assert gpu_check.part_status("memcheck", checks) == "not run"


def test_counts_tests_of_a_run_that_was_killed() -> None:
    log = """\
tests/ops/generic/test_values.py::test_a[cuda-2, 3 PASSED by] PASSED               [  1%]
tests/ops/compact/test_rows.py::test_b FAILED                                    [  2%]
tests/ops/compact/test_rows.py::test_c SKIPPED (no GPU)                          [  3%]
[gw1] [  4%] PASSED tests/ops/compact/test_rows.py::test_d
[gw0] [  5%] ERROR tests/ops/compact/test_rows.py::test_e
tests/ops/compact/test_rows.py::test_f 
FAILED tests/ops/compact/test_rows.py::test_b - it says so once more
SKIPPED [1] tests/ops/generic/test_values.py:41: no GPU
"""
    assert gpu_check.count_tests(log) == {"passed": 2, "failed": 2, "skipped": 1}


def test_marks_select_the_own_tests_and_the_generic_ones() -> None:
    command = [
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
        "-m", "cuda and relevance", "tests/ops/relevance", "tests/ops/compact",
        "tests/ops/generic/test_flops.py", "tests/ops/generic/test_values.py",
    ]  # fmt: skip
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    chosen = [line.split("::")[1] for line in listed.splitlines() if "::" in line]
    assert "test_nan_stays_in_its_image[cuda-keep]" in chosen
    for op in ("token_relevance", "token_relevance_backward"):
        assert f"test_values[cuda-{op}-plain-float32]" in chosen
    assert not any("compact" in name or "cpu" in name for name in chosen)


def test_a_command_and_its_children_end_with_its_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_check.run([sys.executable, "-c", "print('said')"], log, 30, ENV) == "passed"
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], log, 30, ENV) == "failed"
    started = time.monotonic()
    assert gpu_check.run(["sh", "-c", "sleep 60; true"], log, 0.3, ENV) == "out of time"
    assert time.monotonic() - started < 10
    assert gpu_check.run(["true"], log, 0, ENV) == "out of time"
    assert "said" in log.read_text() and "killed" in log.read_text()


def test_budget_ends_with_the_part_or_the_whole() -> None:
    now = [0.0]
    budget = gpu_check.Budget(100, lambda: now[0])
    budget.start(30)
    assert budget.left() == 30
    now[0] = 90
    assert budget.left() == 0
    budget.start(30)
    assert budget.left() == 10
    assert gpu_check.TOTAL < 9 * 60


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "machine", lambda: RESULTS["machine"])


@pytest.mark.usefixtures("pretend_gpu")
def test_nothing_runs_on_a_failed_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "build", lambda *_: "failed")
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 1
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["results.json", "summary.md"]
    text = (tmp_path / "out/summary.md").read_text()
    assert "| build | failed |" in text and "| test | not run |" in text


@pytest.mark.usefixtures("pretend_gpu")
def test_parts_and_ops_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(
        gpu_check, "memcheck", lambda op, *_: seen.append(op) or {"memcheck": "passed"}
    )
    arguments = ["memcheck", "--ops", "compact", "--output", str(tmp_path)]
    assert gpu_check.main(arguments) == 0 and seen == ["compact"]


@pytest.mark.usefixtures("pretend_gpu")
def test_an_op_with_failed_tests_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "test", lambda *_: {"status": "failed"})
    monkeypatch.setattr(gpu_check, "bench", lambda *_: pytest.fail("timed"))
    assert gpu_check.main(["test", "bench", "--output", str(tmp_path)]) == 1
    assert "| bench | not run |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("wrong", [["nonsense"], ["--ops", "nonsense"]])
def test_unknown_names_are_refused(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_check.main([*wrong, "--output", str(tmp_path)])
    assert refused.value.code == 2


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "nothing was checked" in said and ("GPU" in said or "CPU-only" in said)
    assert not (tmp_path / "out").exists()


def test_missing_names_the_first_thing_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only" in str(gpu_check.missing())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in str(gpu_check.missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    assert "nvcc" in str(gpu_check.missing())


def test_long_logs_keep_their_end(tmp_path: Path) -> None:
    log = tmp_path / "test.log"
    log.write_bytes(b"x" * (3 << 20) + b"end")
    gpu_check.trim(log)
    assert log.stat().st_size < (1 << 20) + 100 and log.read_bytes().endswith(b"xend")


def test_source_hash_follows_what_the_kernel_includes(tmp_path: Path) -> None:
    for folder in ("csrc/cuda", "csrc/common"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert cuda_ops(tmp_path) == cuda_ops() and "compact" in cuda_ops()
    before = source_hash("compact", tmp_path)
    assert before == source_hash("compact")
    for name in ("cuda/compact.cu", "cuda/block.cuh", "cuda/device.h", "common/check.h"):
        path = tmp_path / "csrc" / name
        kept = path.read_text()
        path.write_text(kept + "//\n")
        assert source_hash("compact", tmp_path) != before, name
        path.write_text(kept)
    assert source_hash("compact", tmp_path) == before


def test_status_page_knows_the_newest_pass_and_later_changes() -> None:
    older, failed = copy.deepcopy(RESULTS), copy.deepcopy(RESULTS)
    older["date"], older["machine"]["gpu"] = "2029-01-01T00:00:00+00:00", "Old GPU"
    failed["date"], failed["ops"]["compact"]["test"]["status"] = "2031-01-01", "failed"
    results = [failed, RESULTS, older]
    fresh = gpu_status.page(results, None, {"compact": "abc", "varlen": "def"})
    assert (
        "| compact | 2030-01-02 | Some GPU | driver 1.2, torch 9.9, CUDA 13.0 | 12 passed" in fresh
    )
    assert "| memcheck passed, racecheck out of time | no |" in fresh
    assert "| varlen | never run |" in fresh
    assert "| **yes** |" in gpu_status.page(results, None, {"compact": "other"})


def test_committed_status_page_is_up_to_date() -> None:
    assert (ROOT / gpu_status.PAGE).read_text() == gpu_status.generate(), (
        "run python tools/gpu/gpu_status.py (and python tools/gpu/ptxas_report.py where nvcc is)"
    )


def test_reads_what_ptxas_prints() -> None:
    text = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 16 bytes stack frame, 1096 bytes smem
ptxas info    : Compile time = 1.0 ms
"""
    (kernel,) = ptxas_report.parse(text)
    assert kernel == {
        "symbol": "_Z1fPf", "registers": 30, "stack": 16, "spill_stores": 8, "spill_loads": 4,
        "shared": 1096,
    }  # fmt: skip
    mangled = "_ZN4spot12_GLOBAL__N_110row_kernelI5uint4Lb0EEEvNS0_7RowCopyE"
    assert ptxas_report.readable(mangled) == "row_kernel<uint4, false>"


def test_the_page_has_the_most_of_each_op() -> None:
    none = {"spill_stores": 0, "spill_loads": 0}
    kernels: list[dict[str, Any]] = [
        {"symbol": "a", "registers": 30, "shared": 9, **none},
        {"symbol": "b", "registers": 20, "shared": 0, "spill_stores": 8, "spill_loads": 4},
    ]
    most = ptxas_report.most(kernels)
    assert most == {"registers": 30, "spilled_bytes": 12, "shared_bytes": 9}
    less = {"registers": 28, "spilled_bytes": 0, "shared_bytes": 16}
    ops = {"compact": {"source": "abc", "sm_80": most, "sm_90a": less}}
    report = {"date": "2030-01-02", "compiler": "CUDA 1.2", "archs": ["sm_80", "sm_90a"]}
    text = gpu_status.page([], report | {"ops": ops}, {"compact": "abc"})
    assert "CUDA 1.2 reported on 2030-01-02" in text
    assert text.endswith("| compact | 30 | 12 | 28 | 0 | 16 | no |\n")


def test_sample_has_every_op_with_a_kernel() -> None:
    """Backward ops too; and each of them calls what its file registers."""
    defined = {"packed_linear", "token_evidence"}  # whose definitions run there
    assert sorted(set(SLICES) - defined) == cuda_ops()
    for name in cuda_ops():
        ops = SLICES[name]
        kernels = (ROOT / f"csrc/cuda/{name}.cu").read_text()
        assert {op.name for op in ops} == set(re.findall(r'm\.impl\("(\w+)"', kernels))
        assert all(len(op.gpu) >= 4 for op in ops)
        assert any(op.unread for op in ops) or name in ("attention_stats", "relevance")


def test_sample_starts_as_a_script() -> None:
    """With nothing but the package on its path, as the check calls it."""
    code = "import runpy; runpy.run_path('tools/gpu/gpu_sample.py')"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", cuda_ops())
def test_sample_finds_nothing_wrong_on_the_cpu(name: str) -> None:
    for op in SLICES[name]:
        assert list(gpu_sample.sampled(op, "cpu", (torch.float32,))) == []


def test_sample_finds_what_is_wrong() -> None:
    (compact,) = (op for op in SLICES["compact"] if op.name == "compact_tokens")
    shifted = dataclasses.replace(compact, reference=lambda *args: compact.reference(*args) + 1)
    found = list(gpu_sample.sampled(shifted, "cpu", (torch.float32,)))
    assert len(found) == len(compact.gpu) and "bytes differ" in found[0]
    refused = Unread("anything", lambda device: compact.gpu[0].args(device, torch.float32),
                     lambda *outputs: False)  # fmt: skip
    never = dataclasses.replace(compact, unread=(refused,))
    assert list(gpu_sample.unread(never, "cpu")) == ["compact_tokens, anything"]
