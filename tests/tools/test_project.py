"""Files around the code: they say the same, and where they point there is something."""

from __future__ import annotations

import os
import re

from support.package import ROOT


def test_the_build_backend_is_where_pyproject_says() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    backend = re.search(r'build-backend = "(.*)"', text)
    folder = re.search(r'backend-path = \["(.*)"\]', text)
    assert backend and folder
    assert (ROOT / folder[1] / f"{backend[1]}.py").is_file()


def test_linters_have_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    pins = re.findall(r'"(ruff|mypy|clang-format)==[\d.]+"', text)
    assert pins == ["ruff", "mypy", "clang-format"]
    for name in (".pre-commit-config.yaml", ".ci/run", ".github/workflows/ci.yml"):
        text = (ROOT / name).read_text()
        found = re.findall(r"(?m)(?:ruff|mypy|clang-format)\S*==|^ *rev:", text)
        assert not found, f"{name} has versions of its own: {found}"


def test_the_workflow_runs_what_contributors_run() -> None:
    assert "run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
