"""Files that are either complete or not there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from spot_vit.utils.files import atomic_write, save_json


def test_json_is_written_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    save_json(path, {"top1": 0.5, "kept": [1, 2]})
    assert json.loads(path.read_text()) == {"top1": 0.5, "kept": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        save_json(path, {"top1": math.nan})
    assert json.loads(path.read_text())["top1"] == 0.5
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
