"""What the package shows: names, versions, dependencies and types."""

from __future__ import annotations

import importlib.metadata
import re

from support.package import FOLDER, ROOT, SOURCE

import spot_ext
from spot_ext import _C, _library

PUBLIC = {
    "__version__",
    "attention_stats",
    "attention_stats_reference",
    "compact_tokens",
    "compact_tokens_reference",
    "connectivity",
    "connectivity_reference",
    "definitions",
    "fuse_tokens",
    "fuse_tokens_reference",
    "library_path",
    "pack_linear",
    "pack_linear_reference",
    "packed_linear",
    "packed_linear_reference",
    "predict_connectivity",
    "predict_connectivity_reference",
    "scatter_tokens",
    "scatter_tokens_reference",
    "select_tokens",
    "select_tokens_reference",
    "sparse_attention",
    "sparse_attention_reference",
    "token_evidence",
    "token_evidence_reference",
    "token_relevance",
    "token_relevance_reference",
}


def test_public_names() -> None:
    assert set(spot_ext.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(spot_ext, name) is not None
    functions = {name for name in dir(spot_ext) if callable(getattr(spot_ext, name))}
    assert functions - {"attention_stats"} <= PUBLIC
    for name in PUBLIC - {"__version__"}:
        assert getattr(spot_ext, name).__doc__


def test_one_version_everywhere() -> None:
    versions = {
        spot_ext.__version__,
        _C.build_info()["version"],
        importlib.metadata.version(_library.DISTRIBUTION),
        re.search(r'__version__ = "(.*)"', (ROOT / "spot_ext" / "_version.py").read_text())[1],
    }
    assert len(versions) == 1, versions


def test_the_distribution_depends_on_torch_alone() -> None:
    requires = importlib.metadata.requires(_library.DISTRIBUTION) or []
    plain = [line for line in requires if "extra ==" not in line]
    assert [re.split(r"[^\w-]", line)[0] for line in plain] == ["torch"]
    assert "2.11" in plain[0]


def test_type_information_is_installed() -> None:
    assert (FOLDER / "py.typed").exists() and (FOLDER / "_C.pyi").exists()
    stub = (SOURCE / "_C.pyi").read_text()
    for name in ("build_info", "isa", "isas", "set_isa"):
        assert f"def {name}(" in stub and getattr(_C, name).__doc__
    for key in _C.build_info():
        assert f"{key}:" in stub
