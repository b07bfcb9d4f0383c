"""The roofline: every operator belongs to one part, and counts are those of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spot_vit
import timm
import torch
from spot_vit.models import fast as fast_module

from benchmarks import roofline

NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_module, "fastest", lambda *_: ("own", 1.5))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_parts_have_all_products_of_the_model(keep: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model(NAME, depth=4, img_size=64).eval()
    if keep < 1:
        spot_vit.sparsify(model, keep=keep, at=[1, 2]).eval()
    spot_vit.fast(model)
    parts = roofline.parts_of(model, torch.randn(1, 3, 64, 64), passes=2)
    expected = spot_vit.count_flops(model, (3, 64, 64)).total
    counted = 1e9 * sum(part.gmacs for part in parts.values())
    assert counted == pytest.approx(
        expected, rel=0.02
    )  # predictors multiply the shared half for each token
    assert (parts["predictors"].gmacs > 0) is (keep < 1)
    assert (parts["evidence"].ms > 0) is (keep < 1)
    assert all(parts[name].ms > 0 for name in ("linear layers", "norms", "patches"))
    assert roofline.FastTokenRelevance.forward.__name__ == "forward"  # what was wrapped is not now


@pytest.mark.slow
def test_it_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", NAME, "--keep", "0.5", "--batch", "1", "--rounds", "1"]
    threads = torch.get_num_threads()
    assert roofline.main([*options, "--output", str(tmp_path / "roof.json")]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "roof.json").read_text())["cases"]
    assert f"batch 1: {case['pass_ms']:.1f} ms" in printed
    assert "| calls, Python |" in printed and "| predictors |" in printed
