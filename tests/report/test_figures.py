"""Charts as figures: the page's colours, nothing cut off, and which files there are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from spot_vit.report import charts
from spot_vit.report.charts import Chart, Circle, Group, Mark, Rect
from spot_vit.report.figures import (
    COLOURS,
    SIZES,
    WIDTHS,
    accuracy_figure,
    colour_of,
    drawn,
    framed,
    set_figure,
    write_figures,
)
from spot_vit.report.stages import viridis
from support.traces import AT, random_trace

ROWS = [
    {"title": title, "keep": keep, "top1": 80 + keep + k, "error": 0.3 if keep < 1 else None}
    for k, title in enumerate(("a", "b", "c", "d", "e"))
    for keep in (0.5, 0.7, 1.0)
]
LONG = (
    "runs/$x$/a_name_"
    + "of_a_model_" * 20
    + " that is long, keep 0.7 and much more that follows it"
)


def every_chart() -> list[Chart]:
    found = [charts.accuracy_chart(ROWS)]
    for keep in (0.7, 0.25):
        trace = random_trace(grid=(14, 14), keep=keep)
        found += [one.chart for one in charts.set_charts(trace)]
    return found


def flat(marks: tuple[Mark, ...], group: str = "") -> Iterator[tuple[Mark, str]]:
    for mark in marks:
        if isinstance(mark, Group):
            yield from flat(mark.marks, mark.kind)
        else:
            yield mark, group


def page_style(word: str, properties: str) -> str | None:
    """What the page's style sheet says of a class word in its light theme."""
    text = (resources.files("spot_vit") / "report" / "template" / "page.css").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w+)", text[: text.index("@media")]))
    wanted = {f".{word}", f".chart .{word}", f".{word}.cut"} if word else {".chart text"}
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", text):
        if wanted & {one.strip() for one in re.sub(r"/\*.*?\*/", "", selectors).split(",")}:
            found = re.search(rf"(?<![\w-])(?:{properties}): (?:var\(--([\w-]+)\)|([\w.#]+))", body)
            if found:
                return light[found[1]] if found[1] else found[2].removesuffix("px")
    return None


def test_colours_widths_and_sizes_are_the_pages() -> None:
    for word, colour in COLOURS.items():
        if word != "heading":  # which only figures have
            assert to_hex(page_style(word, "fill|stroke")) == to_hex(colour), word
    for word, width in WIDTHS.items():
        assert float(page_style(word, "stroke-width")) == width
    assert float(page_style("sum", "font-size")) == SIZES["sum"]
    assert float(page_style("", "font-size")) == 10.5


def test_every_class_word_of_a_chart_has_a_colour() -> None:
    used = set()
    for chart in every_chart():
        for mark, group in flat(chart.marks):
            used |= {*mark.kind.split(), *group.split()} or {""}
            assert colour_of(mark, group)
    assert used - {"series", "line", "error", "mean"} == set(COLOURS) - {"heading"}
    with pytest.raises(KeyError, match="unheard"):
        colour_of(Rect(0, 0, 1, 1, "unheard"))


def figures_of_all(title: str) -> list[Figure]:
    found = [accuracy_figure([{**row, "title": f"{row['title']} {title}"} for row in ROWS])]
    for keep in (0.7, 0.25):
        trace = random_trace(grid=(14, 14), keep=keep)
        found += [set_figure(one, title) for one in charts.set_charts(trace)]
    return found


@pytest.mark.parametrize("title", ["run, keep 0.7", LONG, "$a$ and $b"])
def test_nothing_is_cut_off_and_no_text_is_a_formula(title: str) -> None:
    for figure in figures_of_all(title):
        renderer = FigureCanvasAgg(figure).get_renderer()
        width, height = figure.bbox.width, figure.bbox.height
        texts = [text for axes in figure.axes for text in axes.texts]
        assert len(texts) > 4
        for text in texts:
            box = text.get_window_extent(renderer)
            assert box.x0 > 4 and box.x1 < width - 4, text.get_text()
            assert box.y0 > 4 and box.y1 < height - 4, text.get_text()
            assert not text._preprocess_math(text.get_text())[1]
        for patch in figure.axes[0].patches:
            box = patch.get_window_extent(renderer)
            assert box.x0 > 0 and box.x1 < width and box.y0 > 0 and box.y1 < height


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_marks_are_drawn_where_the_chart_says() -> None:
    marks = (
        Rect(10, 20, 30, 10, "sparse"),
        Rect(60, 20, 30, 10, fill="#123456"),
        Group("series series-1", (Circle(20, 70, 6), charts.Path(((40, 70), (90, 70)), "line"))),
        Rect(64, 22, 4, 6, "left", rounding=1),
    )
    figure = drawn(Chart(100, 90, "", "layers", marks))
    figure.set_dpi(72)
    shown = pixels(figure)
    assert shown.shape == (90, 100, 3)
    for (x, y), colour in {
        (25, 25): COLOURS["sparse"], (12, 22): COLOURS["sparse"], (85, 25): "#123456",
        (66, 25): COLOURS["left"], (20, 70): COLOURS["series-1"], (5, 25): "#ffffff",
        (50, 25): "#ffffff", (25, 35): "#ffffff",
    }.items():  # fmt: skip
        assert to_hex(shown[y, x] / 255) == colour, (x, y)
    assert to_hex(shown[69:71, 60].min(axis=0) / 255) == COLOURS["series-1"]


def test_keep_maps_have_the_share_of_each_patch_and_a_scale() -> None:
    share = np.random.default_rng(0).random((4, 6))
    one = charts.Captioned("keep", "keep-1", "before block 3", "%", charts.keep_map(share, ""))
    figure = set_figure(one, "run")
    figure.set_dpi(72)
    shown = pixels(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [
        "Share of images that keep each patch, before block 3", "run", "0 %", "50 %", "100 %",
    ]  # fmt: skip
    side = 330 / 6
    top = shown.shape[0] - 18 - 4 * side
    for r in range(4):
        for c in range(6):
            found = shown[int(top + (r + 0.5) * side), int(18 + (c + 0.5) * side)]
            assert to_hex(found / 255) == viridis(share[r, c])
    scale = shown[int(top) + 2 : -20, 18 + 330 + 19]
    assert np.abs(scale[0] - np.array([0xFD, 0xE7, 0x25])).max() < 16
    assert np.abs(scale[-1] - np.array([0x44, 0x01, 0x54])).max() < 16


def test_legends_name_what_is_drawn() -> None:
    one = next(one for one in charts.set_charts(random_trace()) if one.group == "scores")
    texts = [text.get_text() for text in set_figure(one, "run").axes[0].texts]
    assert texts[0] == "Scores before block 3: log-odds of keeping"
    assert texts[2:5] == ["patches that stayed", "that left", "cuts"]
    texts = [text.get_text() for text in accuracy_figure(ROWS).axes[0].texts]
    assert [title for title in texts if title in "abcde"] == list("abcde")
    assert any("errors" in text for text in texts)
    plain = accuracy_figure([{"title": "a", "keep": 0.5, "top1": 80.0}])
    assert not any("errors" in text.get_text() for text in plain.axes[0].texts)


def test_frame_breaks_lines_and_cuts_words() -> None:
    chart = Chart(120, 10, "", "layers", ())
    words = [mark.text for mark in framed(chart, "one two three four five six", "w" * 99).marks]
    assert len(words) > 2 and " ".join(words[:-1]) == "one two three four five six"
    assert re.fullmatch("w{5,20}…", words[-1])
    legend = [("sparse", "a b"), ("dense", "c " * 99), ("left", "")]
    shown = framed(chart, "", legend=legend).marks
    assert [mark.kind for mark in shown[::2]] == ["sparse", "dense", "left"]
    assert shown[1].text == "a b" and re.fullmatch("(c ){5,30}c?…", shown[3].text)
    assert shown[1].x == shown[3].x and shown[1].y < shown[3].y


def test_files(tmp_path: Path) -> None:
    traces: list[Any] = [("a", random_trace(images=2)), ("b", random_trace(timed=False, images=2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_figures(tmp_path / "new" / "figures", traces, ROWS)
    stages = range(1, len(AT) + 1)
    names = {"accuracy"}
    for k in (1, 2):
        names |= {f"model{k}-image{i}" for i in (1, 2)} | {f"model{k}-keep-{s}" for s in stages}
        names |= {f"model{k}-scores-{s}" for s in stages} | {f"model{k}-tokens", f"model{k}-gmacs"}
    names.add("model1-ms")
    assert {path.name for path in written} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    assert len(written) == 2 * len(names) and all(path.is_file() for path in written)
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 150
        else:
            assert "<svg" in path.read_text()


def test_no_scores_no_results_no_images(tmp_path: Path) -> None:
    bare = random_trace(scores=False, timed=False, images=1)
    names = {path.stem for path in write_figures(tmp_path, [("a", bare)])}
    assert not any("scores" in name or name == "accuracy" for name in names)
    bare.images.clear()
    names = {path.stem for path in write_figures(tmp_path, [("a", bare)])}
    assert names == {"model1-tokens", "model1-gmacs"}
