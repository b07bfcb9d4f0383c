"""The learning curve of a run, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spot_vit.runs.folder import RunFolder
from spot_vit.utils.files import atomic_write

_POINTS = 400  # of the loss: more than a picture of this width can show


def save_curve(folder: RunFolder) -> Path | None:
    """Draws the losses and accuracies of metrics.jsonl into the run's folder.

    Returns:
        The picture; None where matplotlib is not installed, or nothing was written yet.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
    except ImportError:
        return None
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not steps:
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(record["step"], record["loss"]) for record in steps if record["loss"] is not None]
    width = max(-(-len(losses) // _POINTS), 1)
    groups = [losses[i : i + width] for i in range(0, len(losses), width)]
    left.plot(
        [group[-1][0] for group in groups],
        [sum(loss for _, loss in group) / len(group) for group in groups],
        linewidth=1.2,
        label="training",
    )
    _line(left, epochs, "val_loss", "validation", 1)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    names = (("top1", "top-1"), ("ema_top1", "top-1, moving average"), ("map", "mAP"))
    for number, (name, label) in enumerate(names):
        _line(right, epochs, name, label, number)
    right.set(xlabel="step", ylabel="validation")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    begun = ""
    for record in records:
        if record["phase"] != begun:
            begun = record["phase"]
            for axes in (left, right):
                axes.axvline(record["step"], color="0.8", linewidth=0.8, zorder=0)
            left.annotate(
                begun,
                (record["step"], 1.0),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color="0.4",
            )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    with atomic_write(folder.curve) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return folder.curve


def _line(axes: Any, records: list[dict[str, Any]], name: str, label: str, colour: int) -> None:
    """Draws a figure of each epoch; every phase is a line of its own, as its model is."""
    shown = [record for record in records if record.get(name) is not None]
    for phase in dict.fromkeys(record["phase"] for record in shown):
        points = [(r["step"], r[name]) for r in shown if r["phase"] == phase]
        style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "color": f"C{colour}"}
        axes.plot(*zip(*points, strict=True), label=label, **style)
        label = "_"  # matplotlib's word for a line that the legend leaves out
