"""Charts of a set of images as plain data: the page shows them (`svg`), figures draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from spot_vit.report.record import Array, LayerCost, TraceData
from spot_vit.report.stages import stage_title, viridis

BINS = 32
SERIES = 4  # colours of lines, which come again

LAYER_COSTS = (
    ("Tokens", "tokens", "tokens"),
    ("Multiply-accumulates", "gmacs", "GMACs"),
    ("Time", "ms", "ms"),
)
"""Captions, fields of `LayerCost` and units of the charts of layers."""

SCORES = {"log-odds": "log-odds of keeping", "attention": "attention of the class token"}
"""What a `StageTrace.scored` is, in words."""


# ---- what a chart is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rect:
    """A rectangle; `kind` are class words that name its colour, or `fill` is its colour."""

    x: float
    y: float
    width: float
    height: float
    kind: str = ""
    fill: str = ""
    rounding: float = 0.0


@dataclass(frozen=True)
class Text:
    """A line of text from, around or to `x`: `anchor` is "start", "middle" or "end"."""

    x: float
    y: float
    text: str
    anchor: str
    kind: str = ""


@dataclass(frozen=True)
class Path:
    """A line through points (x, y)."""

    points: tuple[tuple[float, float], ...]
    kind: str


@dataclass(frozen=True)
class Circle:
    """A dot; `title` is shown where the pointer rests on it."""

    x: float
    y: float
    radius: float
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Group:
    """Marks that share a colour, which `kind` names."""

    kind: str
    marks: tuple[Mark, ...]


Mark = Rect | Text | Path | Circle | Group


@dataclass(frozen=True)
class Chart:
    """A chart as marks in a frame of its own units, y downwards.

    Attributes:
        width: of the frame.
        height: of the frame.
        title: what a reader who does not see it is told.
        kind: "keep-map", "layers", "scores" or "accuracy".
        marks: the later, the further in front.
    """

    width: float
    height: float
    title: str
    kind: str
    marks: tuple[Mark, ...]


def svg(chart: Chart) -> Markup:
    """A chart as inline SVG, whose colours a style sheet decides by class words."""
    frame = '<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    size = _short(chart.width), _short(chart.height)
    return Markup(frame).format(chart.kind, *size, chart.title, _joined(chart.marks))


def _joined(marks: Sequence[Mark]) -> Markup:
    return Markup("").join(_element(mark) for mark in marks)


def _element(mark: Mark) -> Markup:
    named = Markup(' class="{}"').format(mark.kind) if mark.kind else ""
    if isinstance(mark, Group):
        return Markup("<g{}>{}</g>").format(named, _joined(mark.marks))
    if isinstance(mark, Path):
        points = "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in mark.points)
        return Markup('<path{} d="{}"/>').format(named, points)
    x, y = _short(mark.x), _short(mark.y)
    if isinstance(mark, Text):
        shown = '<text{} x="{}" y="{}" text-anchor="{}">{}</text>'
        return Markup(shown).format(named, x, y, mark.anchor, mark.text)
    if isinstance(mark, Circle):
        title = Markup("<title>{}</title>").format(mark.title) if mark.title else ""
        shown = '<circle{} cx="{}" cy="{}" r="{}">{}</circle>'
        return Markup(shown).format(named, x, y, _short(mark.radius), title)
    fill = Markup(' fill="{}"').format(mark.fill) if mark.fill else ""
    rounding = Markup(' rx="{}"').format(_short(mark.rounding)) if mark.rounding else ""
    shown = '<rect{} x="{}" y="{}" width="{}" height="{}"{}{}/>'
    return Markup(shown).format(
        named, x, y, _short(mark.width), _short(mark.height), rounding, fill
    )


def _short(value: float) -> str:
    """A hundredth of a unit is enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ---- the charts of a trace -----------------------------------------------------------------------


@dataclass(frozen=True)
class Captioned:
    """A chart of all images of a trace.

    Attributes:
        group: "keep", "layers" or "scores".
        name: within a trace, and of its file: "keep-1", "tokens", "scores-1".
        caption: under which it stands among its group.
        unit: of what it shows.
        chart: itself.
    """

    group: str
    name: str
    caption: str
    unit: str
    chart: Chart


def set_charts(trace: TraceData) -> list[Captioned]:
    """Every chart of all images of a trace; those of which nothing is known are left out."""
    model, found = trace.model, []
    maps = mean_keep(trace)
    for k, (place, share) in enumerate(maps):
        title = f"share of images that keep each patch, {place}"
        found.append(Captioned("keep", f"keep-{k + 1}", place, "%", keep_map(share, title)))
    for caption, field, unit in LAYER_COSTS:
        if chart := layer_chart(model.layers, model.dense_layers, field, unit):
            found.append(Captioned("layers", field, caption, unit, chart))
    for k, (place, _) in enumerate(maps):
        if chart := score_chart(trace, k):
            scored = trace.images[0].stages[k].scored or ""
            unit = SCORES.get(scored, scored)
            found.append(Captioned("scores", f"scores-{k + 1}", place, unit, chart))
    return found


# ---- keep ----------------------------------------------------------------------------------------


def keep_map(share: Array, title: str) -> Chart:
    """A grid of squares, coloured by a share.

    Args:
        share: float [rows, columns], between 0 and 1.
        title: what a reader who does not see it is told.
    """
    rows, columns = share.shape
    squares = tuple(
        Rect(c, r, 1.02, 1.02, fill=viridis(float(share[r, c])))  # which leave no seam
        for r in range(rows)
        for c in range(columns)
    )
    return Chart(columns, rows, title, "keep-map", squares)


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
) -> Chart | None:
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
    marks: list[Mark] = []
    at = [0.0, 0.0]
    for k, (pair, (layer, _)) in enumerate(zip(values, pairs, strict=True)):
        y = 18 * k
        name = layer.name.removeprefix("blocks.")
        marks.append(Text(30, y + 12, name, "end"))
        for side, kind, top, height in ((1, "dense", y + 1, 15), (0, "sparse", y + 4, 9)):
            width = max(pair[side] * scale, 0.5 * adds)
            marks.append(Rect(36 + at[side] * scale, top, width, height, kind, rounding=1.5))
            at[side] += pair[side] * adds
        if pair[0] and not adds:
            marks.append(_count(pair[0], 36 + pair[0] * scale, y + 12))
    foot = 18 * len(pairs) + 14
    if adds:
        digits = 2 if sums[1] < 10 else 1
        told = f"{sums[0]:.{digits}f} of {sums[1]:.{digits}f} {unit}"
        end = max(36 + sums[0] * scale, 7.8 * len(told))  # or it would begin left of the frame
        marks.append(Text(end, foot, told, "end", "sum"))
    else:
        last = max(k for k, pair in enumerate(values) if pair[1])
        told = f"{values[last][0]:.0f} of {values[last][1]:.0f} {unit} in the last block"
    return Chart(256, foot + 6, f"{unit} by layer: {told}", "layers", tuple(marks))


def _count(value: float, end: float, y: float) -> Text:
    """A number inside the end of its bar, which begins at 36; beside it where it is too short."""
    shown = f"{value:.0f}"
    if end - 36 < 8 * len(shown) + 6:
        return Text(end + 4, y, shown, "start", "sum")
    return Text(end - 4, y, shown, "end", "inside")


# ---- scores --------------------------------------------------------------------------------------


def score_chart(trace: TraceData, k: int) -> Chart | None:
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
    scale, step = 76 / max(int((left + stayed).max()), 1), 300 / BINS
    marks: list[Mark] = []
    for i, (gone, stay) in enumerate(zip(left * scale, stayed * scale, strict=True)):
        for kind, top, height in (("stayed", 90 - stay, stay), ("left", 90 - stay - gone, gone)):
            if height:
                marks.append(Rect(i * step + 0.5, top, step - 1, height, kind))

    def x_of(cut: float) -> float:
        return 300 * (min(max(cut, low), high) - low) / (high - low)

    cuts = [stage.cut for stage in stages if stage.cut is not None and math.isfinite(stage.cut)]
    marks += [Path(((x_of(cut), 92), (x_of(cut), 100)), "cut") for cut in cuts]
    told = "no cut"
    if cuts:
        mean = float(np.mean(cuts))
        x, told = x_of(mean), f"mean cut {_number(mean)}"
        marks.append(Path(((x, 2), (x, 100)), "mean cut"))
        aside = (5, "start") if x < 150 else (-5, "end")
        marks.append(Text(x + aside[0], 12, told, aside[1]))
    marks += [Text(0, 113, _number(low), "start"), Text(300, 113, _number(high), "end")]
    title = f"{int(kept.sum())} of {len(kept)} scores are kept; {told}"
    return Chart(300, 118, title, "scores", tuple(marks))


# ---- accuracy ------------------------------------------------------------------------------------


def accuracy_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
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
    first, last = min(keeps), max(keeps)
    if first == last:  # then in the middle
        first, last = first - 0.1, last + 0.1

    def x_of(keep: float) -> float:
        return 52 + (width - 72) * (keep - first) / (last - first)

    def y_of(top1: float) -> float:
        return 10 + (height - 40) * (high - top1) / (high - low)

    marks: list[Mark] = []
    for level in _levels(low, high):
        marks.append(Path(((46, y_of(level)), (width, y_of(level))), "rule"))
        marks.append(Text(40, y_of(level) + 4, f"{level:g}", "end"))
    marks += [
        Text(x_of(keep), height - 14, f"{keep:.2g}", "middle") for keep in _apart(keeps, x_of)
    ]
    for k, title in enumerate(titles_of(rows)):
        line = sorted((row for row in rows if str(row["title"]) == title), key=lambda r: r["keep"])
        places = [(x_of(row["keep"]), y_of(row["top1"])) for row in line]
        inside: list[Mark] = [Path(tuple(places), "line")]
        for row, (x, y) in zip(line, places, strict=True):
            if row.get("error"):
                top, foot = y_of(row["top1"] + row["error"]), y_of(row["top1"] - row["error"])
                inside.append(Path(((x, top), (x, foot)), "error"))
            told = f"{title}: keep {row['keep']:g}, {row['top1']:.2f} %"
            inside.append(Circle(x, y, 4, told))
        marks.append(Group(f"series series-{k % SERIES}", tuple(inside)))
    marks.append(Text(width, height - 1, "keep: share of patches that each stage keeps", "end"))
    return Chart(width, height + 2, "Accuracy against keep", "accuracy", tuple(marks))


def _apart(keeps: Sequence[float], x_of: Callable[[float], float]) -> list[float]:
    """Those of the values whose labels do not overlap, the largest among them."""
    found: list[float] = []
    for keep in sorted(set(keeps), reverse=True):
        if not found or x_of(found[-1]) - x_of(keep) >= 28:
            found.append(keep)
    return found[::-1]


def titles_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of rows, each once."""
    return list(dict.fromkeys(str(row["title"]) for row in rows))


def _levels(low: float, high: float) -> list[float]:
    """Three or more round numbers between two."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(part * power for part in (1, 0.5, 0.2) if high - low >= 3 * part * power)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    """A number of three digits, with a real minus."""
    return f"{value:.3g}".replace("-", "\u2212")
