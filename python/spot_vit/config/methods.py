"""The table of methods: one row for each way to score and remove tokens."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to score and remove tokens.

    Attributes:
        name: as `SpotConfig.method` has it.
        label: as tables print it.
        source: where it is published.
        evidence: what its predictor sees, a subset of `FEATURES`; empty where nothing is learned.
            Then training cuts as inference does.
        chooses_evidence: whether `SpotConfig.features` narrows the evidence down.
        cuts_inside: whether a stage cuts inside its block, between attention and MLP, by the class
            token's attention there.
        by_chance: whether chance scores the tokens.
        fuses: whether its published form leaves a token in place of those a stage removes.
    """

    name: str
    label: str
    source: str
    evidence: tuple[str, ...] = ()
    chooses_evidence: bool = False
    cuts_inside: bool = False
    by_chance: bool = False
    fuses: bool = False


STATISTICS = ("cls", "rowcol", "moments")
FEATURES = ("embed", *STATISTICS)
"""Kinds of evidence: the embedding, and groups of attention statistics."""

METHODS = {
    method.name: method
    for method in (
        Method("spot", "SPOT", "arXiv 2511.10488", FEATURES, chooses_evidence=True),
        Method("dynamicvit", "DynamicViT", "arXiv 2106.02034", ("embed",)),
        Method("evit", "EViT", "arXiv 2202.07800", cuts_inside=True, fuses=True),
        Method("random", "random", "the baseline below all of them", by_chance=True),
    )
}
