"""The page's charts as figures of their own, and what is kept of each image: PNG and SVG files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path

from spot_vit.evaluation.drawing import kept_figure, save_figure
from spot_vit.report import charts
from spot_vit.report.charts import Captioned, Chart, Group, Mark, Rect, Text
from spot_vit.report.show import kept_of
from spot_vit.report.stages import viridis
from spot_vit.report.views import Titled

ENDINGS = ("png", "svg")

INK, SOFT, ACCENT, CUT = "#1d2126", "#59626c", "#0067a8", "#a63c00"
COLOURS = {
    "": SOFT, "sum": INK, "inside": "#fff", "heading": INK,
    "dense": "#c9ced3", "sparse": ACCENT, "stayed": ACCENT, "left": "#b9bfc5",
    "cut": CUT, "rule": "#e2e4e6",
    "series-0": "#0072b2", "series-1": "#d55e00", "series-2": "#009e73", "series-3": "#a34f86",
}  # fmt: skip
"""By class word, those of the page in its light theme; "" is of text without one."""

WIDTHS = {"mean": 1.6, "line": 2.0, "error": 1.6}
"""Of lines, in points, by class word; others have 1."""

SIZES = {"heading": 11.5, "sum": 11.5}
"""Of text, in points, by class word; other text has 10.5."""

BOLD = ("heading", "sum", "inside")

MARGIN = 18.0
MAP_WIDTH = 330.0
"""Of a keep map, whose own units are patches; all else in points."""


def write_figures(
    folder: Path, traces: Sequence[Titled], accuracy: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Writes every image with its stages, and every chart of the page, as PNG and SVG.

    Files are called after the place of the trace and image or stage, all from 1:
    ``model1-image1``, ``model1-keep-1``, ``model1-tokens``, ``model1-gmacs``, ``model1-ms``,
    ``model1-scores-1``; and ``accuracy``. What a trace does not know has no file.

    Args:
        folder: for the files; made where it is missing.
        traces: each with its title.
        accuracy: rows of the chart of accuracy against keep.

    Returns:
        The files.

    Raises:
        UserError: a file cannot be written.
    """
    written = []
    for k, (title, trace) in enumerate(traces):
        for i, image in enumerate(trace.images):
            if image.stages:
                figure = kept_figure([kept_of(image, trace.model)])
                written += _saved(figure, folder, f"model{k + 1}-image{i + 1}")
        for one in charts.set_charts(trace):
            written += _saved(set_figure(one, title), folder, f"model{k + 1}-{one.name}")
    if accuracy:
        written += _saved(accuracy_figure(accuracy), folder, "accuracy")
    return written


def _saved(figure: Figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{ending}" for ending in ENDINGS]
    for path in paths:
        save_figure(figure, path)
    return paths


# ---- what stands around a chart ------------------------------------------------------------------


def set_figure(one: Captioned, title: str) -> Figure:
    """A chart of all images of a trace, with a heading, the trace's title and a legend."""
    if one.group == "keep":
        heading = f"Share of images that keep each patch, {one.caption}"
        return drawn(framed(_with_scale(one.chart), heading, title))
    if one.group == "scores":
        heading = f"Scores {one.caption}: {one.unit}"
        legend = [("stayed", "patches that stayed"), ("left", "that left"), ("cut", "cuts")]
        return drawn(framed(one.chart, heading, title, legend))
    adds = one.name != "tokens"
    heading = f"{one.caption} layer by layer, added up ({one.unit})" if adds else "Tokens by layer"
    legend = [("sparse", "sparse"), ("dense", "dense")]
    return drawn(framed(one.chart, heading, title, legend))


def accuracy_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against keep, with a heading and a legend."""
    note = "Bars: errors of the difference to the dense model"
    legend = [
        (f"series-{k % charts.SERIES}", title) for k, title in enumerate(charts.titles_of(rows))
    ]
    heading = "Top-1 accuracy (%) against keep"
    errors = any(row.get("error") for row in rows)
    return drawn(framed(charts.accuracy_chart(rows), heading, note if errors else "", legend))


def framed(
    chart: Chart, heading: str, note: str = "", legend: Sequence[tuple[str, str]] = ()
) -> Chart:
    """A chart in points, with a margin around it and words above it, none of which is cut off.

    Args:
        chart: in points.
        heading: what it shows, with the unit.
        note: a softer line below.
        legend: class words of colours, and what they stand for.
    """
    marks: list[Mark] = []
    y = MARGIN - 4
    for kind, text in (("heading", heading), ("", note)):
        for line in _lines(text, kind, chart.width):
            y += 1.4 * _size(kind)
            marks.append(Text(MARGIN, y, line, "start", kind))
        y += 2
    x = MARGIN
    for k, (word, text) in enumerate(legend):
        shown = _cut(" ".join(text.split()), "", chart.width - 18)
        end = x + 14 + _width(shown, "")
        if k and end > MARGIN + chart.width:
            x, end = MARGIN, MARGIN + end - x
        if x == MARGIN:
            y += 17
        marks += [_swatch(word, x, y), Text(x + 14, y, shown, "start")]
        x = end + 16
    y += 12
    marks += [_moved(mark, MARGIN, y) for mark in chart.marks]
    return Chart(
        chart.width + 2 * MARGIN, y + chart.height + MARGIN, chart.title, chart.kind, tuple(marks)
    )


def _swatch(word: str, x: float, y: float) -> Mark:
    """A sign of nine points on the line of a text: as the chart has it."""
    if word == "cut":
        return charts.Path(((x + 4.5, y - 8.5), (x + 4.5, y + 0.5)), word)
    if word.startswith("series"):
        return Group(word, (charts.Circle(x + 4.5, y - 4, 4),))
    return Rect(x, y - 8.5, 9, 9, word, rounding=2)


def _with_scale(chart: Chart) -> Chart:
    """A keep map in points, with what its colours mean to its right."""
    scale = MAP_WIDTH / chart.width
    height, x = chart.height * scale, MAP_WIDTH + 14
    marks: list[Mark] = [_moved(mark, 0, 0, scale) for mark in chart.marks]
    for k in range(64):  # each to the foot, so that there is no seam
        y = height * k / 64
        marks.append(Rect(x, y, 10, height - y, fill=viridis(1 - (k + 0.5) / 64)))
    for share, y in ((0, height), (50, height / 2 + 4), (100, 8)):
        marks.append(Text(x + 15, y, f"{share} %", "start"))
    width = x + 15 + _width("100 %", "")
    return Chart(width, height, chart.title, chart.kind, tuple(marks))


def _moved(mark: Mark, x: float, y: float, scale: float = 1.0) -> Mark:
    if isinstance(mark, Group):
        return Group(mark.kind, tuple(_moved(one, x, y, scale) for one in mark.marks))
    if isinstance(mark, charts.Path):
        return replace(mark, points=tuple((x + scale * a, y + scale * b) for a, b in mark.points))
    place: dict[str, Any] = {"x": x + scale * mark.x, "y": y + scale * mark.y}
    if isinstance(mark, Rect):
        place |= {"width": scale * mark.width, "height": scale * mark.height}
    return replace(mark, **place)


# ---- text ----------------------------------------------------------------------------------------


def _size(kind: str) -> float:
    return SIZES.get(kind, 10.5)


def _font(kind: str) -> FontProperties:
    return FontProperties(
        family="DejaVu Sans", size=_size(kind), weight="bold" if kind in BOLD else "normal"
    )


def _plain(text: str) -> str:
    """A text whose dollars begin no formula."""
    return text.replace("$", r"\$")


def _width(text: str, kind: str) -> float:
    """Of a text, in points."""
    return float(text_to_path.get_text_width_height_descent(text, _font(kind), False)[0])


def _cut(text: str, kind: str, width: float) -> str:
    """A text that fits: the end is left out where it does not."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # halves of pairs cannot be drawn
    if _width(text, kind) <= width:
        return text

    def with_so_many(characters: int) -> float:
        return _width(f"{text[:characters]}…", kind)

    return f"{text[: bisect_right(range(1, len(text)), width, key=with_so_many)]}…"


def _lines(text: str, kind: str, width: float) -> list[str]:
    """A text broken between words, so that it fits."""
    lines: list[str] = []
    for word in text.split():
        word = _cut(word, kind, width)
        if lines and _width(f"{lines[-1]} {word}", kind) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


# ---- drawing -------------------------------------------------------------------------------------


def drawn(chart: Chart) -> Figure:
    """A chart whose units are points as a figure of its size."""
    figure = Figure(figsize=(chart.width / 72, chart.height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, chart.width), ylim=(chart.height, 0))
    axes.set_axis_off()
    for k, mark in enumerate(chart.marks):
        _draw(axes, mark, "", k, chart.kind)
    return figure


def colour_of(mark: Mark, group: str = "") -> str:
    """Colour of a mark, by its class words, else by those of the group that it is in.

    Raises:
        KeyError: `COLOURS` has none of the words.
    """
    if isinstance(mark, Rect) and mark.fill:
        return mark.fill
    words = [*mark.kind.split(), *group.split()] or [""]
    for word in words:
        if word in COLOURS:
            return COLOURS[word]
    raise KeyError(f"no colour for {words}")


def _draw(axes: Any, mark: Mark, group: str, order: int, chart: str) -> None:
    if isinstance(mark, Group):
        for one in mark.marks:
            _draw(axes, one, mark.kind, order, chart)
        return
    colour = colour_of(mark, group)
    filled: dict[str, Any] = {
        "facecolor": colour, "linewidth": 0, "clip_on": False, "zorder": order,
    }  # fmt: skip
    if isinstance(mark, Text):
        anchor = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        shown = axes.text(
            mark.x, mark.y, _plain(mark.text), color=colour, font=_font(mark.kind), ha=anchor,
            va="baseline", zorder=order,
        )  # fmt: skip
        if chart == "scores":  # where it may stand on bars
            shown.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    elif isinstance(mark, charts.Path):
        width = next((WIDTHS[word] for word in mark.kind.split() if word in WIDTHS), 1.0)
        axes.add_patch(
            PathPatch(
                Outline(mark.points), fill=False, edgecolor=colour, linewidth=width, clip_on=False,
                zorder=order,
            )
        )  # fmt: skip
    elif isinstance(mark, charts.Circle):
        axes.add_patch(Circle((mark.x, mark.y), mark.radius, **filled))
    elif mark.rounding:
        radius = min(mark.rounding, mark.width / 2, mark.height / 2)
        style = f"round,pad=0,rounding_size={radius}"
        place = (mark.x, mark.y)
        axes.add_patch(FancyBboxPatch(place, mark.width, mark.height, style, **filled))
    else:
        place, smooth = (mark.x, mark.y), chart != "keep-map"
        axes.add_patch(Rectangle(place, mark.width, mark.height, antialiased=smooth, **filled))
