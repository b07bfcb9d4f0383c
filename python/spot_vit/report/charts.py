"""Charts of a set of images, as inline SVG whose colours a style sheet decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from spot_vit.report.record import Array, LayerCost, TraceData
from spot_vit.report.stages import stage_title, viridis

BINS = 32


def keep_map(share: Array, title: str) -> Markup:
    """A grid of squares, coloured by a share.

    Args:
        share: float [rows, columns], between 0 and 1.
        title: what a reader who does not see it is told.
    """
    rows, columns = share.shape
    squares = Markup("").join(
        Markup('<rect x="{}" y="{}" width="1.02" height="1.02" fill="{}"/>').format(
            c, r, viridis(float(share[r, c]))
        )
        for r in range(rows)
        for c in range(columns)
    )
    return _svg(columns, rows, title, squares, "keep-map")


def mean_keep(trace: TraceData) -> list[tuple[str, Array]]:
    """Share of the images that keep each patch [rows, columns], by stage."""
    rows, columns = trace.model.grid
    found = []
    for k, stage in enumerate(trace.images[0].stages if trace.images else []):
        count = np.zeros(rows * columns)
        for image in trace.images:
            positions = image.stages[k].position[image.stages[k].kept]
            count[positions[positions < rows * columns]] += 1
        found.append((stage_title(stage), (count / len(trace.images)).reshape(rows, columns)))
    return found


# ---- layers --------------------------------------------------------------------------------------


def layer_chart(
    sparse: Sequence[LayerCost], dense: Sequence[LayerCost], field: str, unit: str
) -> Markup | None:
    """Layers from top to bottom, dense behind sparse; None where the cost was not measured.

    Costs that add up stand one behind the other, as in a waterfall, so that its foot is the
    model's; tokens each begin at zero.

    Args:
        sparse: layers of the model.
        dense: the same layers where nothing is removed.
        field: of `LayerCost`.
        unit: of it.
    """
    pairs = [(layer, full) for layer, full in zip(sparse, dense, strict=True)]
    values = [[getattr(layer, field) for layer in pair] for pair in pairs]
    if not values or any(one is None for pair in values for one in pair):
        return None
    adds = field != "tokens"
    sums = [sum(pair[side] for pair in values) for side in (0, 1)]
    scale = 214 / max(sums[1], sums[0]) if adds else 214 / max(max(pair) for pair in values)
    marks, at = [], [0.0, 0.0]
    for k, (pair, (layer, _)) in enumerate(zip(values, pairs, strict=True)):
        y = 18 * k
        name = layer.name.removeprefix("blocks.")
        marks.append(_text(30, y + 12, name, "end"))
        for side, kind, top, height in ((1, "dense", y + 1, 15), (0, "sparse", y + 4, 9)):
            width = max(pair[side] * scale, 0.5 * adds)
            bar = '<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="1.5"/>'
            marks.append(Markup(bar).format(kind, 36 + at[side] * scale, top, width, height))
            at[side] += pair[side] * adds
        shown = f"{pair[0]:.0f}" if pair[0] and not adds else ""
        marks.append(_text(36 + pair[0] * scale - 4, y + 12, shown, "end", "inside"))
    foot = 18 * len(pairs) + 14
    if adds:
        digits = 2 if sums[1] < 10 else 1
        told = f"{sums[0]:.{digits}f} of {sums[1]:.{digits}f} {unit}"
        marks.append(_text(36 + sums[0] * scale, foot, told, "end", "sum"))
    else:
        last = max(k for k, pair in enumerate(values) if pair[1])
        told = f"{values[last][0]:.0f} of {values[last][1]:.0f} {unit} in the last block"
    return _svg(256, foot + 6, f"{unit} by layer: {told}", Markup("").join(marks), "layers")


# ---- scores --------------------------------------------------------------------------------------


def score_chart(trace: TraceData, k: int) -> Markup | None:
    """Scores of one stage over all images: those that stayed on those that left, and the cuts.

    None where nothing scored the tokens. Scores that are not finite are left out.
    """
    stages = [image.stages[k] for image in trace.images]
    if any(stage.score is None for stage in stages):
        return None
    scores = [stage.score for stage in stages if stage.score is not None]
    every, kept = np.concatenate(scores), np.concatenate([stage.kept for stage in stages])
    finite = np.isfinite(every)
    every, kept = every[finite], kept[finite]
    if not len(every):
        return None
    low, high = (float(x) for x in np.quantile(every, [0.002, 0.998]))
    high = max(high, low + 1e-9)
    edges = np.linspace(low, high, BINS + 1)
    clipped = every.clip(low, high)
    left, stayed = (np.histogram(clipped[mask], edges)[0] for mask in (~kept, kept))
    scale, step = 84 / max(int((left + stayed).max()), 1), 300 / BINS
    bar = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
    marks = []
    for i, (gone, stay) in enumerate(zip(left * scale, stayed * scale, strict=True)):
        for kind, top, height in (("stayed", 90 - stay, stay), ("left", 90 - stay - gone, gone)):
            if height:
                marks.append(Markup(bar).format(kind, i * step + 0.5, top, step - 1, height))
    cuts = [stage.cut for stage in stages if stage.cut is not None and math.isfinite(stage.cut)]
    for cut in cuts:
        x = 300 * (min(max(cut, low), high) - low) / (high - low)
        marks.append(Markup('<path class="cut" d="M{:.1f} 92v8"/>').format(x))
    told = "no cut"
    if cuts:
        x = 300 * (min(max(float(np.mean(cuts)), low), high) - low) / (high - low)
        told = f"mean cut {_number(float(np.mean(cuts)))}"
        marks.append(Markup('<path class="mean cut" d="M{:.1f} 2v98"/>').format(x))
        anchor = "start" if x < 150 else "end"
        marks.append(_text(x + (5 if x < 150 else -5), 12, told, anchor))
    marks += [_text(0, 113, _number(low), "start"), _text(300, 113, _number(high), "end")]
    title = f"{int(kept.sum())} of {len(kept)} scores are kept; {told}"
    return _svg(300, 118, title, Markup("").join(marks), "scores")


# ---- accuracy ------------------------------------------------------------------------------------


def accuracy_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy against keep, one line a title, with bars of the errors that are given.

    Args:
        rows: "title", "keep" and "top1" of each, "error" if known; accuracies in percent.
    """
    width, height = 420, 190
    spread = [(row["top1"], row.get("error") or 0.0) for row in rows]
    low, high = min(a - e for a, e in spread), max(a + e for a, e in spread)
    pad = max(0.12 * (high - low), 0.2)
    low, high = low - pad, min(high + pad, 100.0) if high <= 100 else high + pad
    keeps = [float(row["keep"]) for row in rows]
    first, last = min(keeps), max(max(keeps), min(keeps) + 1e-6)

    def x_of(keep: float) -> float:
        return 52 + (width - 72) * (keep - first) / (last - first)

    def y_of(top1: float) -> float:
        return 10 + (height - 40) * (high - top1) / (high - low)

    marks = []
    for level in _levels(low, high):
        marks.append(Markup('<path class="rule" d="M46 {:.1f}H{}"/>').format(y_of(level), width))
        marks.append(_text(40, y_of(level) + 4, f"{level:g}", "end"))
    for keep in sorted(set(keeps)):
        marks.append(_text(x_of(keep), height - 14, f"{keep:.2g}", "middle"))
    for k, title in enumerate(titles_of(rows)):
        line = sorted((row for row in rows if str(row["title"]) == title), key=lambda r: r["keep"])
        places = [(x_of(row["keep"]), y_of(row["top1"])) for row in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        inside = [Markup('<path class="line" d="{}"/>').format(path)]
        for row, (x, y) in zip(line, places, strict=True):
            if row.get("error"):
                top, foot = y_of(row["top1"] + row["error"]), y_of(row["top1"] - row["error"])
                inside.append(
                    Markup('<path class="error" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, top, foot)
                )
            told = f"{title}: keep {row['keep']:g}, {row['top1']:.2f} %"
            inside.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(
                    x, y, told
                )
            )
        group = Markup('<g class="series series-{}">{}</g>')
        marks.append(group.format(k % 4, Markup("").join(inside)))
    marks.append(_text(width, height - 1, "share of patches kept", "end"))
    return _svg(width, height + 2, "Accuracy against keep", Markup("").join(marks), "accuracy")


def titles_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of rows, each once."""
    return list(dict.fromkeys(str(row["title"]) for row in rows))


def _levels(low: float, high: float) -> list[float]:
    """A few round numbers between two."""
    step = 10.0 ** math.floor(math.log10(high - low))
    while (high - low) / step < 3:
        step /= 2
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    """A number of three digits, with a real minus."""
    return f"{value:.3g}".replace("-", "\u2212")


def _svg(width: float, height: float, title: str, inside: Markup, kind: str) -> Markup:
    frame = '<svg class="chart {}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>'
    return Markup(frame).format(kind, width, height, title, inside)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    if not text:
        return Markup("")
    mark = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(mark).format(kind, x, y, anchor, text)
