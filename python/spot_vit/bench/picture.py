"""A benchmark as a picture: latency against tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spot_vit.config.bench import RUNTIMES
from spot_vit.utils.files import atomic_write

_MARKERS = "osD^vP"


def save_picture(result: Mapping[str, Any], path: str | Path) -> Path | None:
    """Draws milliseconds over tokens, a panel per batch size, a line per runtime.

    Args:
        result: of `bench`.
        path: of the PNG file.

    Returns:
        The file; None where matplotlib is not installed, or no row knows its tokens.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    batches = result["batches"]
    if all(row["tokens"] is None for batch in batches for row in batch["rows"]):
        return None
    figure = Figure(figsize=(1.2 + 4.2 * len(batches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        rows = [row for row in batch["rows"] if row["tokens"] is not None]
        for number, runtime in enumerate(RUNTIMES):
            own = [row for row in rows if row["runtime"] == runtime and row["peer"] is None]
            _line(axes, own, runtime, number)
        for number, peer in enumerate(dict.fromkeys(filter(None, (r["peer"] for r in rows)))):
            own = [row for row in rows if row["peer"] == peer]
            _line(axes, own, peer, len(RUNTIMES) + number)
        busy = " (busy machine)" if batch["contended"] else ""
        axes.set(
            title=f"batch {batch['batch']}{busy}",
            xlabel="tokens in a block, on average",
            ylabel="milliseconds, median and p10 to p90",
        )
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    figure.axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    image = "x".join(map(str, result["model"]["image"][1:]))
    threads = result["machine"]["threads"]
    figure.suptitle(
        f"{result['model']['name']}, {image} pixels, {result['settings']['dtype']}, "
        f"{threads} thread{'s' * (threads > 1)}",
        fontsize=10,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return Path(path)


def _line(axes: Any, rows: list[dict[str, Any]], label: str, number: int) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["tokens"])
    middle = [row["median_ms"] for row in rows]
    below = [row["median_ms"] - row["p10_ms"] for row in rows]
    above = [row["p90_ms"] - row["median_ms"] for row in rows]
    axes.errorbar(
        [row["tokens"] for row in rows],
        middle,
        yerr=[below, above],
        label=label,
        color=f"C{number}",
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.2,
        capsize=2,
        elinewidth=0.8,
    )
