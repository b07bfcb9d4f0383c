"""Versions that are needed against those that are installed."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from spot_vit.utils import requirements as module
from spot_vit.utils.requirements import Requirement, requirements, timm_trouble

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("wanted", "fitting", "others"),
    [
        (">=1.0.30,<2", ("1.0.30", "1.0.31", "1.1", "1.0.30.dev0"), ("1.0.29", "0.9.16", "2.0.1")),
        (">=2.11", ("2.11.0+cu128", "2.14.1", "3"), ("2.9.1", "2.10", "1.13")),
        ("==2.1", ("2.1.0",), ("2.1.1", "2")),
        ("", ("0.1",), ()),
    ],
)
def test_versions_are_compared_by_their_numbers(
    wanted: str, fitting: tuple[str, ...], others: tuple[str, ...]
) -> None:
    for found in fitting:
        need = Requirement("timm", wanted, found)
        assert need.met and str(need) == f"timm{wanted}, found {found}"
    for found in others:
        need = Requirement("timm", wanted, found)
        assert not need.met
        assert f"is needed, found {found}: pip install --upgrade 'timm{wanted}'" in str(need)
    assert "is not installed: pip install" in str(Requirement("timm", wanted, None))


def test_the_project_says_what_is_needed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    needs = {need.name: need for need in requirements()}
    assert set(needs) == {"torch", "timm"} and all(need.met for need in needs.values())
    for need in needs.values():
        assert f'"{need.name}{need.wanted}"' in text
        assert need.found == metadata.version(need.name)


def test_an_old_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: str) -> ImportError:
        with pytest.raises(ImportError) as caught:
            exec(words)
        return caught.value

    part = fails("from timm.layers import not_in_this_version")
    assert timm_trouble(part) is None  # this timm fits: the cause is another
    assert timm_trouble(fails("import not_there")) is None
    absent = timm_trouble(ModuleNotFoundError("No module named 'timm'", name="timm"))
    assert absent == "spot_vit needs timm; install it with: pip install 'spot-vit[models]'"
    monkeypatch.setattr(module, "_installed", lambda name: "0.9.16")
    words = timm_trouble(part)
    assert words is not None and re.search(r"timm>=1.*<2 is needed, found 0\.9\.16: pip", words)
    assert timm_trouble(fails("import timm.not_there")) == words
