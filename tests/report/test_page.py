"""The page of a report as text; `test_browser.py` looks at it in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from spot_vit.report.charts import accuracy_chart, keep_map, layer_chart, svg
from spot_vit.report.encode import (
    LEVELS,
    attention_uri,
    packed_statistics,
    picture_uri,
    script_json,
    squares_path,
)
from spot_vit.report.page import render
from spot_vit.report.stages import viridis
from spot_vit.report.trace import Trace
from support.traces import AT, random_trace

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</script><b>&amp;",
    "\u202egnp.exe\u2066\u2028\u2029",
    "long" * 2500,
    "half of a pair \ud800",
]


def life(page: str) -> list:
    """Data of each card, in the page's order."""
    return [json.loads(text) for text in re.findall(r'class="life-data">(.*?)</script>', page)]


def test_names_and_labels_are_text() -> None:
    count = len(HOSTILE)
    trace = random_trace(images=count, names=HOSTILE, classes=HOSTILE)
    trace.model.name, trace.notes = HOSTILE[0], [HOSTILE[1]]
    trace.model.conversions = {HOSTILE[2]: {HOSTILE[0]: HOSTILE[1]}}
    rows = [{"title": HOSTILE[0], "keep": 0.5, "top1": 80.0}]
    page = render([(HOSTILE[0], trace)], command=HOSTILE[2], accuracy=rows)
    assert page.count("<script") == 2 + count and page.count("</script") == 2 + count
    assert "<img" not in page and "<b>&amp;amp;" not in page
    for name in HOSTILE:
        shown = html.escape(name.encode(errors="replace").decode(), quote=False)
        assert shown.replace('"', "&#34;").replace("'", "&#39;") in page
    page.encode()  # halves of pairs cannot be written
    for data in re.findall(r'application/json"[^>]*>(.*?)</script>', page):
        assert not set(data) & set("<>&\u2028\u2029\u202e")
        json.loads(data)


def test_json_says_the_same_after_escaping() -> None:
    value = {"a": [*HOSTILE, 1.5, None]}
    assert json.loads(script_json(value)) == value


def test_loads_nothing() -> None:
    page = render([("a", random_trace())])
    # The one name of a host is SVG's namespace, which the script gives elements and nobody loads.
    assert re.findall(r"\w+://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) <= {"data:", "#pict", "#left"}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "url(" not in page and "@import" not in page


@pytest.mark.parametrize("kind", [{}, {"fuses": True}, {"scores": False}, {"sparse": True}])
@pytest.mark.parametrize("labels", [True, False])
def test_same_page_from_a_file(tmp_path: Path, kind: dict, labels: bool) -> None:
    trace = random_trace(labels=labels, timed=labels, **kind)
    trace.save(tmp_path / "trace.json")
    page = render([("a", trace)], command="spot report")
    assert page == render([("a", Trace.load(tmp_path / "trace.json"))], command="spot report")
    assert "None" not in page and "nan" not in re.sub(r"base64,[^\"]*", "", page)


def test_every_image_and_stage() -> None:
    trace = random_trace(images=5, fuses=True)
    page = render([("a", trace)])
    assert page.count("<article") == 5
    assert page.count('role="grid"') == 5 * (1 + len(AT))
    for at in AT:
        assert page.count(f"<b>before block {at}</b>") == 5
    order = [int(number) for number in re.findall(r'data-image="(\d)"', page)]
    for number, (found,) in zip(order, life(page), strict=True):
        image = trace.images[number]
        for told, stage in zip(found["stages"], image.stages, strict=True):
            assert told["position"] == stage.position.tolist()
            assert [one == "1" for one in told["kept"]] == stage.kept.tolist()
            assert told["score"] == [float(f"{score:.3g}") for score in stage.score]
            assert told["rank"] == stage.rank.tolist()
            assert sum(told["share"]) == pytest.approx(100, abs=0.5)
            assert told["vote"] == stage.vote.tolist()
        assert [block["block"] for block in found["blocks"]] == list(range(12))
        assert [b["block"] for b in found["blocks"] if "attention" in b] == [*AT, 11]


def test_what_pruning_broke_comes_first() -> None:
    trace = random_trace(images=4)
    right = np.eye(3, dtype=np.float32)
    for image, dense, sparse in zip(trace.images, (0, 1, 0, 0), (0, 0, 1, 2), strict=True):
        image.label, image.dense_logits, image.logits = 0, right[dense], right[sparse]
    page = render([("a", trace)])
    assert re.findall(r'data-image="(\d)"', page) == ["2", "3", "1", "0"]
    first, second = page.index("Dense right, sparse wrong"), page.index("Dense wrong, sparse right")
    assert first < page.index('data-image="2"') < second < page.index('data-image="1"')
    assert re.findall(r"✓ right|✕ wrong", page) == [
        "✓ right", "✕ wrong", "✓ right", "✕ wrong", "✕ wrong", "✓ right", "✓ right", "✓ right",
    ]  # fmt: skip


def test_budgets_of_a_model_and_different_models() -> None:
    pair = [("keep 0.7", random_trace(seed=1)), ("keep 0.5", random_trace(seed=2, keep=0.5))]
    page = render(pair)
    assert 'data-mode="budgets"' in page and 'id="budget"' in page
    pair[1][1].images[0].dense_logits += 1
    page = render(pair)
    assert 'data-mode="models"' in page and 'id="budget"' not in page
    assert page.count('<section class="side"') == 2 * 3
    assert all(len(found) == 2 for found in life(page))


def test_pictures_that_models_share_are_there_once() -> None:
    one, other = random_trace(seed=1), random_trace(seed=1)
    other.images[0].dense_logits += 1
    other.images[1].picture = 255 - other.images[1].picture
    page = render([("a", one), ("b", other)])
    assert page.count('<image id="picture') == 3 + 1


def test_refuses_other_images_and_too_many() -> None:
    trace = random_trace()
    with pytest.raises(ValueError, match="1 to 4, got 0"):
        render([])
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        render([("a", trace)] * 5)
    with pytest.raises(ValueError, match="same images in the same order"):
        render([("a", trace), ("b", random_trace(images=2))])


def test_model_that_loses_no_patch() -> None:
    trace = random_trace(sparse=True)
    trace.model.keep = []
    for image in trace.images:
        image.stages.clear()
        image.blocks = [block for block in image.blocks if block.block < AT[0]]
    page = render([("a", trace)])
    assert page.count('role="grid"') == 3 and "none leaves" in page


def test_numbers_that_are_not_finite_and_no_images() -> None:
    trace = random_trace()
    trace.images[0].stages[0].score[2] = np.nan
    trace.images[0].stages[1].score[:] = np.inf
    trace.images[0].stages[1].cut = np.inf
    trace.images[0].logits[0] = np.nan
    assert render([("a", trace)]).count("<article") == 3
    trace.images.clear()
    assert "<article" not in render([("a", trace)])


def test_size_of_a_usual_report() -> None:
    """16 photographs at 224 px, as a small DeiT sees them."""
    trace = random_trace(images=16, grid=(14, 14), heads=6, classes=[f"c{i}" for i in range(1000)])
    coarse = [np.array(Image.fromarray(image.picture).resize((40, 40))) for image in trace.images]
    for image, small in zip(trace.images, coarse, strict=True):
        image.picture = np.array(
            Image.fromarray(small).resize((224, 224), Image.Resampling.BICUBIC)
        )
    size = len(render([("a", trace)]).encode())
    assert 1e6 < size < 5e6


ONE = {"title": "a", "keep": 0.5, "top1": 80.0}

# ---- pictures and arrays -------------------------------------------------------------------------


def decoded(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_pictures() -> None:
    draw = np.random.default_rng(0)
    small = draw.integers(0, 256, (28, 30, 3)).astype(np.uint8)
    assert np.array_equal(decoded(picture_uri(small)), small)
    smooth = draw.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    large = np.array(Image.fromarray(smooth).resize((160, 120), Image.Resampling.BICUBIC))
    assert np.abs(decoded(picture_uri(large)).astype(int) - large).mean() < 3
    assert len(picture_uri(large)) < large.size / 10


def test_attention_pixels() -> None:
    block = random_trace(sparse=True, seed=3).images[0].blocks[3]
    uri, largest = attention_uri(block.attention)
    n = block.attention.shape[1]
    pixels = decoded(uri)[..., 0].reshape(n, -1, n).transpose(1, 0, 2)
    assert np.array_equal(pixels > 0, block.attention > 0)
    back = np.array(largest)[:, None, None] * (pixels / LEVELS) ** 2
    step = 2 * np.sqrt(np.array(largest)[:, None, None] * block.attention) / LEVELS
    assert (np.abs(back - block.attention) <= step / 2 + 2e-3).all()


def test_statistics_bytes() -> None:
    statistics = random_trace().images[0].blocks[0].statistics
    statistics[:, 1, 2] = 0.5  # a constant has no spread
    packed, low, high = packed_statistics(statistics)
    n, heads, count = statistics.shape
    share = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(count, heads, n) / 255
    low, high = (np.array(x).reshape(count, heads, 1) for x in (low, high))
    back = (low + (high - low) * share**2).transpose(2, 1, 0)
    np.testing.assert_allclose(back, statistics, atol=0.02 * statistics.max() / 2)


def test_paths_cover_their_squares() -> None:
    mask = np.random.default_rng(5).random((6, 9)) < 0.5
    covered = np.zeros_like(mask)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", squares_path(mask)):
        covered[int(y), int(x) : int(x) + int(width)] = True
    assert np.array_equal(covered, mask)
    assert squares_path(np.zeros((2, 2), bool)) == ""


def test_accuracy_chart_draws_errors_where_they_are() -> None:
    rows = [
        {"title": "<a>", "keep": 0.5, "top1": 80.0, "error": 1.0},
        {"title": "<a>", "keep": 0.7, "top1": 82.0, "error": None},
        {"title": "b", "keep": 0.7, "top1": 81.0},
    ]
    chart = svg(accuracy_chart(rows))
    assert chart.count("<circle") == 3 and chart.count('class="error"') == 1
    assert chart.count('class="series') == 2 and "&lt;a&gt;" in chart and "<a>" not in chart


def test_accuracy_chart_has_round_levels_and_labels_that_do_not_overlap() -> None:
    def texts(keeps: list[float], low: float, high: float) -> list[str]:
        tops = np.linspace(low, high, len(keeps))
        rows = [{"title": "a", "keep": k, "top1": t} for k, t in zip(keeps, tops, strict=True)]
        return re.findall(r"<text[^>]*>([^<]*)</text>", svg(accuracy_chart(rows)))

    assert texts([0.5, 0.7, 0.9], 80.1, 80.85)[:-1] == [
        "80", "80.2", "80.4", "80.6", "80.8", "81", "0.5", "0.7", "0.9",
    ]  # fmt: skip
    assert texts([0.3, 0.98, 0.99, 1.0], 60, 88)[-3:-1] == ["0.3", "1"]
    (place,) = re.findall(r'cx="([\d.]+)"', svg(accuracy_chart([{**ONE, "keep": 0.7}])))
    assert 180 < float(place) < 260


def test_keep_map_and_layers_as_the_page_has_them() -> None:
    share = np.random.default_rng(4).random((2, 3))
    shown = svg(keep_map(share, "<title>"))
    assert shown.startswith('<svg class="chart keep-map" viewBox="0 0 3 2" role="img"')
    assert 'aria-label="&lt;title&gt;"' in shown
    square = r'<rect x="(\d)" y="(\d)" width="1.02" height="1.02" fill="(#\w+)"/>'
    assert re.findall(square, shown) == [
        (str(c), str(r), viridis(share[r, c])) for r in range(2) for c in range(3)
    ]
    model = random_trace(grid=(14, 14), keep=0.25).model
    tokens = svg(layer_chart(model.layers, model.dense_layers, "tokens", "tokens"))
    told = re.findall(r'class="(inside|sum)" x="([\d.]+)" [^>]*anchor="(\w+)">(\d+)<', tokens)
    assert [one[3] for one in told] == [str(layer.tokens) for layer in model.layers if layer.tokens]
    assert {one[0]: one[2] for one in told} == {"inside": "end", "sum": "start"}
    assert told[-1][0] == "sum"  # where the bar is shorter than its number
    gmacs = svg(layer_chart(model.layers, model.dense_layers, "gmacs", "GMACs"))
    assert float(re.search(r'class="sum" x="([\d.]+)"', gmacs)[1]) > 100
