"""A trace as files: nothing is lost, and what is damaged is told."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.test_tracing import METHODS, model_of, pictures
from spot_vit import UserError
from spot_vit.report import record
from spot_vit.report.trace import Trace
from spot_vit.report.tracing import trace
from support.traces import random_trace

PAGE = Path(__file__).resolve().parents[2] / "docs/report.md"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", METHODS)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    found = trace(model_of(name), pictures(), [1, 2], rounds=1)
    found.save(tmp_path / "run.json")
    again = Trace.load(tmp_path / "run.json")
    assert isinstance(again.model.grid, tuple)
    again.model.conversions = found.model.conversions  # tuples are lists in JSON
    assert same(again, found)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "run.json").read_bytes()


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    trace(model_of("spot"), pictures(1), attention=()).save(path)
    text = path.read_text()
    path.write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(UserError, match=r"no trace of schema 1 \(it says 99\)"):
        Trace.load(path)
    for damaged in ("[]", "{", json.dumps({"schema": 1}), text[: len(text) // 2]):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json is"):
            Trace.load(path)
    path.write_text(text)
    arrays = path.with_suffix(".npz")
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Trace.load(path)
    arrays.unlink()
    with pytest.raises(UserError, match=r"run\.npz is missing"):
        Trace.load(path)


def test_the_page_documents_every_field() -> None:
    text = PAGE.read_text()
    for kind in ("Trace", "ModelTrace", "LayerCost", "ImageTrace", "StageTrace", "BlockTrace"):
        section = re.search(rf"^### `{kind}`\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, kind
        documented = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
        fields = dataclasses.fields(Trace if kind == "Trace" else getattr(record, kind))
        assert documented == [field.name for field in fields], kind


def test_a_notebook_shows_the_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spot_vit.report.trace.IN_NOTEBOOK", 2)
    short, long = random_trace(images=2)._repr_html_(), random_trace(images=3)._repr_html_()
    assert "images; all of them" not in short
    assert "The first 2 of 3 images; all of them" in long
    assert long.count("&lt;article") == 2 and long.count("<iframe") == 1
    assert "<script" not in long and 'sandbox="allow-scripts"' in long
