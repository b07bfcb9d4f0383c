"""The history of a pass and the op `token_evidence` say the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ops.cases.token_evidence import statistics
from spot_vit.config.spot import SpotConfig
from spot_vit.nn.evidence import EvidenceHistory
from support.comparison import assert_close
from support.data import random_index
from torch import Tensor

import spot_ext

TOKENS = (40, 28, 17)  # before the first cut, behind each
BLOCKS = (0, 0, 1, 1)  # cuts before each; the last one comes behind all


def _drive(history: EvidenceHistory, dtype: torch.dtype) -> dict[str, Any]:
    """Blocks and decisions of one pass, in a history; and as lists."""
    stats: list[Tensor] = []
    cuts: list[Tensor] = []
    for block, before in enumerate((*BLOCKS, 2)):
        for k in range(len(cuts), before):
            cuts.append(random_index(f"{k}", 3, TOKENS[k], TOKENS[k + 1], "shuffled"))
            history.decided(cuts[-1])
        if block == len(BLOCKS):
            break
        history.decided(None)  # keeps all
        stats.append(statistics(f"{block}", 3, 1, TOKENS[before], 6, dtype, "cpu"))
        history.update(stats[-1][:, 1:], TOKENS[before])
    counts = [TOKENS[before] for before in BLOCKS]
    return {"stats": stats, "counts": counts, "followed": [*BLOCKS], "cuts": cuts}


@pytest.mark.parametrize(
    ("scaling", "heads"), [*itertools.product(("n", "log1p", "raw"), ("concat", "mean"))]
)
@pytest.mark.parametrize(
    "features",
    [("cls", "rowcol", "moments"), ("cls",), ("rowcol", "moments"), ("moments",)],
    ids="+".join,
)
def test_evidence_is_that_of_a_history(features: tuple[str, ...], scaling: str, heads: str) -> None:
    config = SpotConfig(keep=0.7, features=features, scaling=scaling, heads=heads)
    moments = "moments" in features
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        history = EvidenceHistory(config)
        lists = _drive(history, dtype)
        with spot_ext.definitions():
            expected = history.features()
        if not moments:  # the history has forgotten the others
            lists |= {name: lists[name][-1:] for name in ("stats", "counts", "followed")}
        made = spot_ext.token_evidence(
            **lists, scaling=scaling, mean_heads=heads == "mean", moments=moments,
            latest=(0 if "cls" in features else 2, 6 if "rowcol" in features else 2),
        )  # fmt: skip
        assert expected is not None and expected.shape[:2] == (3, TOKENS[-1])
        assert_close(made, expected, tolerance)
