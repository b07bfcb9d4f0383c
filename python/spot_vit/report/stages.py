"""What each stage of a model is called on the page, and its colour."""

from __future__ import annotations

from spot_vit.report.record import StageTrace

VIRIDIS = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
)  # fmt: skip
"""Ten colours of equal steps, which the colour-blind can tell apart, and greys too."""


def viridis(share: float) -> str:
    """Colour of a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    ends = [[int(VIRIDIS[k][at : at + 2], 16) for at in (1, 3, 5)] for k in (low, low + 1)]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def stage_colours(count: int) -> list[str]:
    """A colour for each stage: the later, the lighter."""
    return [viridis(0.12 + 0.62 * k / max(count - 1, 1)) for k in range(count)]


def stage_title(stage: StageTrace) -> str:
    """Where a decision was taken."""
    return f"{'in' if stage.inside else 'before'} block {stage.block}"
