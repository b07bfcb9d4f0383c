"""The configuration of Sparsifiner attention."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from spot_vit.config.sparsifiner import SparsifinerConfig


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep_rate": 0}, "keep_rate must be in"),
        ({"keep_rate": True}, "keep_rate must be in"),
        ({"keep_rate": float("nan")}, "keep_rate must be in"),
        ({"reduce_n": 0}, "reduce_n must be a whole number of 1 or more"),
        ({"reduce_c": 1.5}, "reduce_c must be a whole number of 1 or more"),
        ({"coef_topk": 0}, "coef_topk must be a whole number of 1 or more"),
        ({"coef_threshold": 0.05}, "set coef_topk=None"),
        ({"basis_threshold": -1.0}, "basis_threshold must be a number of 0"),
        ({"basis_threshold": ".02"}, "basis_threshold must be a number of 0 or more, got '.02'"),
        ({"basis_threshold": None}, "basis_threshold must be a number of 0"),
        ({"share_inout_proj": 1}, "share_inout_proj must be true or false, got 1"),
        ({"project": "yes"}, "project must be true or false, or None, got 'yes'"),
        ({"project": False}, "project=False needs reduce_c=1, got reduce_c=2"),
        ({"removed_as_zeros": None}, "removed_as_zeros must be true or false, got None"),
        ({"keep_rate": "0.2"}, "keep_rate must be in"),
        ({"mask_threshold": float("nan")}, "mask_threshold must be a number of 0"),
        ({"scale": "sqrt"}, "scale must be one of"),
        ({"mask": "best"}, "mask must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"blocks": []}, "non-empty"),
        ({"blocks": [2, 1]}, "ascend"),
        ({"blocks": [1.0]}, "block indices"),
        ({"blocks": 3}, r"list of block indices .*, got 3; for one: \[3\]"),
        ({"reduce_n": 2**80}, "reduce_n must be a whole number"),
        ({"mask_threshold": float("inf")}, "mask_threshold must be a number of 0"),
        ({"basis_threshold": float("inf")}, "basis_threshold must be a number of 0"),
        ({"blocks": [2**80]}, "blocks must be a non-empty list"),
        ({"blocks": "3"}, "non-empty list of block indices .*, got '3'"),
    ],
)
def test_configurations_are_checked(wrong: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        SparsifinerConfig().replace(**wrong)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as said:
        SparsifinerConfig(keep_rate=2, reduce_n=0, project=False, coef_threshold=0.1, mask="topp")
    lines = str(said.value).splitlines()
    assert lines[0] == "SparsifinerConfig: 5 problems"
    named = ("keep_rate", "reduce_n", "mask", "project=False", "coef_threshold")
    assert all(any(line.strip().startswith(name) for line in lines) for name in named)
    assert "did you mean 'topk'?" in str(said.value)


def test_numbers_of_numpy_are_plain_numbers() -> None:
    config = SparsifinerConfig(
        keep_rate=np.float32("0.3"), reduce_n=np.int64(4), reduce_c=np.int32(1), coef_topk=None,
        share_inout_proj=np.bool_(True), coef_threshold=np.float16("0.05"),
        basis_threshold=np.float32("0.02"), mask_threshold=np.float64(1e-3),
        removed_as_zeros=np.bool_(True), blocks=np.array([1, 3]),
    )  # fmt: skip
    assert config == SparsifinerConfig(
        keep_rate=0.3, reduce_n=4, reduce_c=1, coef_topk=None, share_inout_proj=True,
        coef_threshold=0.05, basis_threshold=0.02, mask_threshold=1e-3, removed_as_zeros=True,
        blocks=(1, 3),
    )  # fmt: skip
    assert SparsifinerConfig.from_json(config.to_json()) == config
    assert SparsifinerConfig(blocks=range(1, 3)).blocks == (1, 2)
    with pytest.raises(ValueError, match="keep_rate must be in"):
        SparsifinerConfig(keep_rate=np.bool_(True))


def test_configurations_go_through_json():
    config = SparsifinerConfig(
        keep_rate=0.1, reduce_n=4, reduce_c=1, share_inout_proj=True, scale="channels",
        coef_topk=None, coef_threshold=0.05, basis_threshold=0.0, mask="threshold",
        mask_threshold=0.5, removed_as_zeros=True, blocks=[1, 4], backend="dense",
    )  # fmt: skip
    assert config.blocks == (1, 4)
    assert SparsifinerConfig.from_json(config.to_json()) == config
    assert SparsifinerConfig.from_dict(json.loads(config.to_json())) == config
    assert SparsifinerConfig.from_json("{}") == SparsifinerConfig()
    with pytest.raises(TypeError, match=r"SparsifinerConfig has no \['rate'\]"):
        SparsifinerConfig.from_dict({"rate": 1})


def test_the_defaults_are_those_of_the_public_code() -> None:
    assert SparsifinerConfig().to_dict() == {
        "keep_rate": 0.25, "reduce_n": 6, "reduce_c": 2, "project": None,
        "share_inout_proj": False, "scale": "heads", "coef_topk": 8, "coef_threshold": None,
        "basis_threshold": 0.02, "mask": "topk", "mask_threshold": 1e-4,
        "removed_as_zeros": False, "blocks": None, "backend": "auto",
    }  # fmt: skip


def test_projections_and_blocks() -> None:
    assert SparsifinerConfig(reduce_c=2).projects and not SparsifinerConfig(reduce_c=1).projects
    assert SparsifinerConfig(reduce_c=1, project=True).projects
    assert not SparsifinerConfig(reduce_c=1, project=False).projects
    with pytest.raises(ValueError, match="project=False needs reduce_c=1, got reduce_c=2"):
        SparsifinerConfig(reduce_c=2, project=False)
    assert SparsifinerConfig().sparse_blocks(3) == (0, 1, 2)
    assert SparsifinerConfig(blocks=[0, 2]).sparse_blocks(3) == (0, 2)
    for blocks, last in (([3], 3), ([0, 4], 4)):
        with pytest.raises(ValueError, match=f"blocks names block {last}, the model has 3"):
            SparsifinerConfig(blocks=blocks).sparse_blocks(3)
    for name in ("reduce_n", "reduce_c", "coef_topk"):
        assert getattr(SparsifinerConfig(**{name: 1}), name) == 1
        with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more"):
            SparsifinerConfig(**{name: 0})
    for name in ("basis_threshold", "mask_threshold"):
        assert getattr(SparsifinerConfig(**{name: 0.0}), name) == 0
    assert SparsifinerConfig(coef_topk=None, coef_threshold=0.0).coef_threshold == 0
    with pytest.raises(ValueError, match="coef_threshold takes the place of coef_topk"):
        SparsifinerConfig(coef_threshold=0.0)
