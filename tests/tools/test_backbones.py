"""timm architectures: which convert, and that nothing changes where nothing is cut."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from support.slow import most_slow

from tools.docs.backbones import (
    LARGEST,
    PAGE,
    RESULTS,
    ROOT,
    TOLERANCE,
    architectures,
    numbers,
    page,
    series,
    structure,
)

# One or more of every family, pooling, position embedding and block, the small ones.
SMALL = [
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_medium_patch16_224",
    "eva02_tiny_patch14_224",
    "eva02_small_patch14_224",
    "eva02_base_patch16_clip_224",
    "flexivit_small",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_map",
    "naflexvit_base_patch16_siglip",
    "naflexvit_base_patch16_par_gap",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "vitamin_small_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_rope_224",
    "vit_little_patch16_reg1_gap_256",
    "vit_medium_patch16_gap_240",
    "vit_medium_patch16_reg4_gap_256",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_wee_patch16_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_patch32_224",
    "vit_small_r26_s32_224",
    "vit_small_plus_patch16_dinov3",
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_xsmall_patch16_clip_224",
]


@pytest.mark.parametrize("name", most_slow(SMALL, 12))
def test_architecture(name: str):
    assert numbers(name) <= TOLERANCE


def test_page_tells_what_was_run():
    text, results = (ROOT / PAGE).read_text(), json.loads((ROOT / RESULTS).read_text())
    converts = text.partition("## They are refused")[0].replace("\n", " ").replace(",", " ")
    names = set(converts.split())
    assert names >= set(SMALL) and names >= set(results)
    assert len(results) >= 265 and max(results.values()) <= TOLERANCE


def test_series_follow_from_names():
    told = {name: series(name) for name in SMALL}
    assert told["vit_small_patch14_dinov2"] == "DINOv2"
    assert told["eva02_base_patch16_clip_224"] == told["vit_base_patch32_clip_224"] == "CLIP"
    assert told["vit_tiny_r_s16_p8_224"] == "ViT on a convolutional stem"
    assert told["vit_wee_patch16_reg1_gap_256"] == told["vit_tiny_patch16_224"] == "ViT"


@pytest.mark.parametrize(
    "name",
    ["resnet18", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "vit_relpos_small_patch16_224"],
)
def test_others_are_refused_with_a_reason(name: str):
    found = structure(name)
    assert found.reason is not None and found.family in found.reason
    assert found.reason.replace("|", "") in (ROOT / PAGE).read_text()


def test_what_we_register_is_not_timms():
    import_module("spot_vit.models.digits_vit")
    names = architectures()
    assert "vit_tiny_patch16_224" in names
    assert not [x for x in names if x.startswith(("digits_vit", "lvvit", "sparsifiner", "spot_"))]


@pytest.mark.slow
def test_every_architecture():
    """The page is what the whole of timm says today; every architecture that fits is run."""
    found = [structure(name) for name in architectures()]
    results = {}
    for s in found:
        if s.reason is None and 4 * s.parameters < LARGEST:
            results[s.name] = numbers(s.name)
            assert results[s.name] <= TOLERANCE, s.name
    recorded = json.loads((ROOT / RESULTS).read_text())
    assert set(results) == set(recorded)
    assert page(found, recorded) == (ROOT / PAGE).read_text()
