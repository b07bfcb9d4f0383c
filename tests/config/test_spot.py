from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spot_vit import SparsifinerConfig, SpotConfig
from spot_vit.config.spot import FEATURES, NOISE, TRAIN_DECISIONS, exact

configs = st.builds(
    SpotConfig,
    keep=st.sampled_from([1.0, 0.7, 0.655, (0.9, 0.5, 0.1)]),
    at=st.sampled_from([None, (3, 6, 9), [1, 2, 3]]),
    features=st.lists(st.sampled_from(FEATURES), min_size=1, unique=True),
    history=st.sampled_from(["all", "since_last", 1, 4]),
    heads=st.sampled_from(["concat", "mean"]),
    d_remap=st.sampled_from([None, 64]),
    scaling=st.sampled_from(["log1p", "n", "raw"]),
    detach_stats=st.booleans(),
    train_decision=st.sampled_from(["gumbel", "topk"]),
    tau=st.sampled_from([1.0, 0.5]),
    noise=st.sampled_from([None, 0, 0.0, 0.25, 2.0]),
)


@given(configs)
def test_json_round_trip(config: SpotConfig):
    assert SpotConfig.from_json(config.to_json()) == config
    assert hash(SpotConfig.from_json(config.to_json())) == hash(config)


def test_counts_are_exact_where_floats_are_not():
    assert int(100 * 0.7**2) == 48  # what binary floats give
    ratio = SpotConfig(keep=0.7).ratios(2)[1]
    assert 100 * ratio.numerator // ratio.denominator == 49


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.7, [137, 96, 67]), (0.5, [98, 49, 24]), (1.0, [196, 196, 196])]
)
def test_published_schedule_at_196_tokens(keep: float, expected: list[int]):
    ratios = SpotConfig(keep=keep).ratios(3)
    assert [196 * r.numerator // r.denominator for r in ratios] == expected


@given(st.decimals(min_value="0.01", max_value=1, places=2))
def test_exact_is_the_written_decimal(value):
    assert exact(float(value)) == Fraction(value)


def test_default_places_are_quarters():
    assert SpotConfig().decision_blocks(12) == (3, 6, 9)
    assert SpotConfig().decision_blocks(16) == (4, 8, 12)
    assert SpotConfig().decision_blocks(2) == (1,)
    with pytest.raises(ValueError, match=r"of one block .* name at=\[0\]"):
        SpotConfig().decision_blocks(1)
    assert SpotConfig(at=[0], features=["embed"]).decision_blocks(1) == (0,)
    with pytest.raises(ValueError, match="block 12, the model has 12"):
        SpotConfig(at=(12,)).decision_blocks(12)


def test_feature_columns():
    assert SpotConfig().num_features(6) == 108
    assert SpotConfig(features=("embed",)).num_features(6) == 0
    assert SpotConfig(features=("embed", "cls"), heads="mean").num_features(6) == 2
    assert SpotConfig(features=("rowcol", "moments")).num_features(3) == 3 * 16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": 1.5}, "keep must be in"),
        ({"keep": True}, "keep must be in"),
        ({"keep": (0.5, 0.7)}, "must not rise"),
        ({"keep": (0.5, 0.4), "at": (1, 2, 3)}, "keep names 2 stages, at names 3"),
        ({"at": (0, 3)}, "no block comes before it"),
        ({"at": (3, 3)}, "ascend"),
        ({"at": (-1, 3)}, "ascend"),
        ({"at": ()}, "non-empty"),
        ({"at": (1.5,)}, "block indices"),
        ({"features": ()}, "non-empty"),
        ({"features": "cls"}, "non-empty list"),
        ({"features": ("pixels",)}, r"features must be a non-empty list, each one of \['embed'"),
        ({"history": 0}, "history must be"),
        ({"history": "some"}, "history must be"),
        ({"at": 3}, r"list of block indices .*, got 3; for one: \[3\]"),
        ({"at": "3"}, "list of block indices .*, got '3'"),
        ({"d_remap": 7}, "even"),
        ({"d_remap": 64.0}, "even int from 2 to 16384, or None, got 64.0"),
        ({"d_remap": "64"}, "even int"),
        ({"detach_stats": 1}, "detach_stats must be true or false, got 1"),
        ({"tau": 0.0}, "tau must be a number above 0"),
        ({"tau": "1"}, "tau must be a number above 0 .*, got '1'"),
        ({"tau": float("inf")}, "tau must be a number above 0"),
        ({"noise": -0.1}, "noise must be a number from 0 .*, or None, got -0.1"),
        ({"noise": float("nan")}, "noise must be"),
        ({"noise": float("inf")}, "noise must be"),
        ({"noise": True}, "noise must be"),
        ({"noise": "0.5"}, "noise must be"),
        ({"train_decision": "maybe"}, "train_decision must be one of"),
        ({"detach_stats": "no"}, "detach_stats must be true or false, got 'no'"),
        ({"tau": 1e308}, "tau must be a number above 0 and at most"),
        ({"noise": 1e308}, "noise must be a number from 0"),
        ({"history": 2**80}, "history must be"),
        ({"history": True}, "history must be"),
        ({"d_remap": 1e308}, "even int"),
        ({"d_remap": 10**308}, "even int"),
        ({"d_remap": 2**15}, "even int from 2 to 16384"),
        ({"features": ("cls", "cls")}, "features must be .* none twice"),
        ({"at": b"x"}, "at must be .*, got b'x'"),
        ({"at": [2**80]}, "at must be"),
        ({"keep": ()}, "keep must be in"),
        ({"keep": 1e-300}, "keep must be in"),
        ({"method": None}, "method must be one of .*, got None"),
        ({"method": "evti"}, "got 'evti'; did you mean 'evit'"),
        ({"soft": False}, "soft must be one of .* or None, got False"),
    ],
)
def test_wrong_fields_say_what_was_expected(fields: dict, words: str):
    with pytest.raises(ValueError, match=words):
        SpotConfig(**fields)


def test_block_0_is_fine_without_statistics():
    assert SpotConfig(at=(0, 2), features=("embed",)).decision_blocks(4) == (0, 2)


def test_unknown_field_is_named():
    with pytest.raises(TypeError, match="kep"):
        SpotConfig().replace(kep=0.5)
    with pytest.raises(TypeError, match="kep"):
        SpotConfig.from_dict({"kep": 0.5})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble])
def test_numbers_of_numpy_are_the_decimals_they_print(kind: Any) -> None:
    config = SpotConfig(keep=kind("0.7"), at=[np.int64(3), np.int32(6)])
    assert config == SpotConfig(keep=0.7, at=(3, 6))
    assert type(config.keep) is float and type(config.at[0]) is int
    assert SpotConfig.from_json(config.to_json()) == config
    assert SpotConfig(keep=[kind("0.7"), 0.5], at=[1, 2]).keep == (0.7, 0.5)
    assert SparsifinerConfig(keep_rate=kind("0.3"), blocks=[np.int64(1)]).keep_rate == 0.3
    whole = SpotConfig(history=np.int64(3), d_remap=np.int32(64), detach_stats=np.bool_(True))
    assert whole == SpotConfig(history=3, d_remap=64, detach_stats=True)
    assert SpotConfig.from_json(whole.to_json()) == whole
    assert SpotConfig(keep=np.array([0.9, 0.5]), at=np.array([1, 2])).keep == (0.9, 0.5)
    for wrong in (np.bool_(True), np.float32("nan"), "0.7"):
        with pytest.raises(ValueError, match="keep must be in"):
            SpotConfig(keep=wrong)


def test_noise_has_a_default_for_each_decision_and_old_files_load() -> None:
    assert SpotConfig().noise_scale == NOISE["gumbel"] == 1  # published
    assert SpotConfig(train_decision="topk").noise_scale == NOISE["topk"]
    for decision in TRAIN_DECISIONS:
        for noise in (0, 0.0, 0.3, np.float32(0.3)):
            assert SpotConfig(train_decision=decision, noise=noise).noise_scale == pytest.approx(
                noise
            )
    old = SpotConfig(keep=0.6, tau=0.5).to_dict()
    del old["noise"]
    assert SpotConfig.from_dict(old) == SpotConfig(keep=0.6, tau=0.5)
    text = SpotConfig(noise=np.float32("0.3"), tau=np.float64(0.5)).to_json()
    assert SpotConfig.from_json(text) == SpotConfig(noise=0.3, tau=0.5)


def test_the_defaults_are_those_that_are_documented() -> None:
    assert SpotConfig().to_dict() == {
        "method": "spot", "keep": 0.7, "at": None, "features": list(FEATURES), "history": "all",
        "heads": "concat", "d_remap": None, "scaling": "log1p", "detach_stats": False,
        "soft": None, "train_decision": "gumbel", "tau": 1.0, "noise": None,
    }  # fmt: skip


def test_what_follows_from_the_fields() -> None:
    fuses = {(m, s): SpotConfig(method=m, soft=s).fuses for m in ("spot", "evit")
             for s in (None, "none", "fuse")}  # fmt: skip
    assert [*fuses.values()] == [False, False, True, True, False, True]
    assert SpotConfig(keep=(0.5, 0.25)).ratios(2) == (Fraction(1, 2), Fraction(1, 4))
    with pytest.raises(ValueError, match="keep names 2 stages, the model has 3"):
        SpotConfig(keep=(0.5, 0.25)).ratios(3)
    assert SpotConfig(keep=0.5).keep_ratios() == [] and SpotConfig(
        keep=0.5, at=(1, 2)
    ).keep_ratios() == [0.5, 0.25]
    assert SpotConfig().noise_scale == NOISE["gumbel"] == 1.0
    assert SpotConfig(train_decision="topk").noise_scale == NOISE["topk"] == 0.5
    assert SpotConfig(noise=0.0).noise_scale == 0
    assert SpotConfig(method="evit").cuts_inside and not SpotConfig().cuts_inside
    assert [SpotConfig(method=m).learned for m in ("spot", "dynamicvit", "evit", "random")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert SpotConfig().uses_statistics and not SpotConfig(features=["embed"]).uses_statistics
    assert SpotConfig(features=("moments", "embed")).evidence == ("embed", "moments")
    assert SpotConfig(keep=1e-6).keep == 1e-6 and SpotConfig(tau=1e6, noise=1e6).tau == 1e6
    for d_remap in (2, 2**14):
        assert SpotConfig(d_remap=d_remap).d_remap == d_remap
    assert SpotConfig(history=1).history == 1 and SpotConfig(at=[1, 2]).decision_blocks(3) == (1, 2)
    assert SpotConfig(keep=(0.5, 0.5)).keep == (0.5, 0.5)  # a stage may remove nothing
    for name in ("tau", "noise"):
        with pytest.raises(ValueError, match=rf"{name} must be a number .*1e\+06.*1000000.5"):
            SpotConfig(**{name: 1_000_000.5})
