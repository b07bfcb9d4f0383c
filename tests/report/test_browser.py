"""The page of a report in a real browser: mouse, keyboard, width, accessibility, speed.

Needs Playwright's Python package and a Chromium of the system; without them these tests say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spot_vit.report.page import render
from support.traces import random_trace

sync_api = pytest.importorskip("playwright.sync_api", reason="the page: no playwright here")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="the page: no Chromium here")

HOSTILE = ["<script>alert(1)</script>", "\u202egnp.exe", "long" * 2500]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page that was opened from a file, and what it complained about or asked for."""

    def __init__(self, browser: Any, text: str, folder: Path, **options: Any) -> None:
        self.path = folder / "report.html"
        self.path.write_text(text, encoding="utf-8")
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.path.as_uri())

    def card(self, number: int) -> Any:
        return self.page.locator(f"#image-{number}")

    def click_patch(self, number: int, tile: int, r: int, c: int, grid: tuple[int, int]) -> None:
        """Clicks a patch of a card's tile, wherever that is."""
        square = self.card(number).locator("svg.stage").nth(tile)
        square.scroll_into_view_if_needed()
        box = square.bounding_box()
        x, y = (c + 0.5) / grid[1] * box["width"], (r + 0.5) / grid[0] * box["height"]
        square.click(position={"x": x, "y": y})

    def end(self) -> None:
        """Nothing went wrong, and nothing but the file was read."""
        self.context.close()
        assert self.said == []
        asked = [url for url in self.requests if not url.startswith("data:")]
        assert asked == [self.path.as_uri()]


def shown(value: float) -> str:
    """A number as the page writes it."""
    return f"{float(f'{value:.3g}'):g}".replace("-", "\u2212")


def expected_life(trace: Any, image: Any, r: int, c: int) -> list[list[str]]:
    """Words that each stage must say of a patch."""
    patch = r * trace.model.grid[1] + c
    said = []
    for stage in image.stages:
        (found,) = np.nonzero(stage.position == patch)
        if not len(found):
            said.append(["It had left."])
            continue
        i = int(found[0])
        fused = "\u2295 fused" if stage.weight is not None else "\u2715 leaves"
        words = [
            "\u2713 stays" if stage.kept[i] else fused,
            f"log-odds of staying {shown(stage.score[i])}",
            f"rank {stage.rank[i] + 1} of {len(stage.position)}, {stage.kept.sum()} stay",
            f"cut at {shown(stage.cut)}",
            f"{trace.model.classes[stage.vote[i]]}, {shown(100 * stage.vote_share[i])} %",
        ]
        words += [shown(effect[i]) for effect in stage.effect.values()]
        if stage.weight is not None and not stage.kept[i]:
            words.append(f"with {shown(100 * stage.weight[i] / stage.weight.sum())} %")
        said.append(words)
    return said


def assert_life(opened: Opened, trace: Any, number: int, r: int, c: int) -> None:
    panel = opened.card(number).locator(".life")
    assert f"Life of patch (row {r + 1}, column {c + 1})" in panel.inner_text()
    told = panel.locator(".decision")
    expected = expected_life(trace, trace.images[number], r, c)
    assert told.count() == len(expected)
    for k, words in enumerate(expected):
        text = " ".join(told.nth(k).inner_text().split())
        for word in words:
            assert word in text, text


def leaves_at(trace: Any, number: int, k: int) -> tuple[int, int]:
    """A patch that leaves at a stage, or stays to the end behind the last."""
    stages = trace.images[number].stages
    gone = stages[k].position[~stages[k].kept] if k < len(stages) else None
    patch = stages[-1].position[stages[-1].kept][-1] if gone is None else gone[-1]
    return divmod(int(patch), trace.model.grid[1])


@pytest.mark.parametrize("fuses", [False, True])
def test_click_shows_the_life_of_a_patch(browser: Any, tmp_path: Path, fuses: bool) -> None:
    trace = random_trace(images=2, fuses=fuses)
    opened = Opened(browser, render([("a", trace)]), tmp_path)
    for number, tile, stage in ((0, 0, 0), (1, 2, 1), (1, 3, 3)):
        r, c = leaves_at(trace, number, stage)
        opened.click_patch(number, tile, r, c, trace.model.grid)
        assert_life(opened, trace, number, r, c)
        marks = opened.card(number).locator("svg.stage .chosen")
        places = [(int(m.get_attribute("y")), int(m.get_attribute("x"))) for m in marks.all()]
        assert places == [(r, c)] * 4  # in every tile
    opened.card(1).get_by_role("button", name="Close").click()
    assert not opened.card(1).locator(".life").is_visible()
    assert opened.card(0).locator(".life").is_visible()
    opened.end()


def test_keyboard_reaches_every_patch(browser: Any, tmp_path: Path) -> None:
    trace = random_trace(images=2)
    opened = Opened(browser, render([("a", trace)]), tmp_path)
    page, first = opened.page, opened.page.locator(".card").first
    number = int(first.get_attribute("data-image"))
    for _ in range(20):  # from the top of the page, by Tab alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('svg.stage')"):
            break
    page.keyboard.press("Tab")  # to the first stage
    grid = first.locator("svg.stage").nth(1)
    assert grid.evaluate("e => e === document.activeElement")
    r, c = leaves_at(trace, number, 2)
    assert r and c  # so that steps count
    for key, times in (("ArrowUp", 2), ("ArrowDown", r), ("ArrowRight", c)):
        for _ in range(times):
            page.keyboard.press(key)
    cell = page.locator(f"[id='{grid.get_attribute('aria-activedescendant')}']")
    assert cell.get_attribute("aria-label").startswith(f"row {r + 1}, column {c + 1}, before block")
    page.keyboard.press("Enter")
    assert_life(opened, trace, number, r, c)
    assert f"row {r + 1}, column {c + 1}" in first.locator(".said").inner_text()
    assert cell.get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # no further
    page.keyboard.press(" ")
    assert_life(opened, trace, number, r, trace.model.grid[1] - 1)
    page.keyboard.press("Escape")
    assert not first.locator(".life").is_visible()
    opened.end()


def test_attention_of_a_patch(browser: Any, tmp_path: Path) -> None:
    trace = random_trace(images=1, sparse=True)
    opened = Opened(browser, render([("a", trace)]), tmp_path)
    r, c = leaves_at(trace, 0, 3)
    opened.click_patch(0, 0, r, c, trace.model.grid)
    panel = opened.card(0).locator(".attention")
    block = next(b for b in trace.images[0].blocks if b.block == 3)
    me = block.front + int(np.flatnonzero(block.position == r * trace.model.grid[1] + c)[0])
    panel.locator("svg").wait_for()
    block_choice, head_choice, direction = opened.card(0).locator(".controls select").all()
    block_choice.select_option("3")
    for head in (-1, 2):
        head_choice.select_option(str(head))
        for incoming in (0, 1):
            direction.select_option(str(incoming))
            opened.page.wait_for_timeout(50)
            maps = block.attention.astype(float)[None if head < 0 else head].reshape(
                -1, *block.attention.shape[1:]
            )
            weights = maps.mean(axis=0)
            weights = weights[:, me] if incoming else weights[me]
            seen = weights[block.front :]
            assert panel.locator(".named").count() == int((seen > 0).sum())
            text = panel.inner_text()
            if incoming:
                count = int((seen > 0).sum())
                assert f"{count} of {len(seen)} patches here see it (outlined)." in text
            else:
                mine, mask = me - block.front, slice(None) if head < 0 else [head]
                held = shown(100 * np.mean([float(f"{x:.3g}") for x in block.held[mine, mask]]))
                named = shown(block.named[mine, mask].mean())
                assert f"It sees {named} of {len(seen)} patches here" in text
                assert f"hold {held} % of its dense attention" in text
            said = next(line for line in text.split("class token")[1].split("\n") if "%" in line)
            percent = float(said.replace("\u2248", "").replace("%", ""))
            assert percent == pytest.approx(100 * weights[0], rel=0.15, abs=0.5)
    opened.end()


def test_filter_and_budgets(browser: Any, tmp_path: Path) -> None:
    first, second = random_trace(seed=1), random_trace(seed=2, keep=0.5)
    opened = Opened(browser, render([("keep 0.7", first), ("keep 0.5", second)]), tmp_path)
    page = opened.page
    wrong = {
        k: sum(int(image.logits.argmax()) != image.label for image in trace.images)
        for k, trace in enumerate((first, second))
    }
    page.get_by_text("wrong", exact=True).first.click()
    assert page.locator(".card:visible").count() == wrong[0]
    page.get_by_text("all", exact=True).click()
    assert page.locator(".card:visible").count() == 3
    r, c = leaves_at(second, 0, 0)
    opened.click_patch(0, 0, r, c, first.model.grid)
    assert_life(opened, first, 0, r, c)
    page.get_by_label("Budget").focus()
    page.keyboard.press("ArrowRight")
    assert_life(opened, second, 0, r, c)
    assert page.locator("#budget-title").inner_text() == "keep 0.5"
    assert page.locator(".side:visible").count() == 3
    opened.end()


def test_models_side_by_side_with_other_grids(browser: Any, tmp_path: Path) -> None:
    one, other = random_trace(seed=1), random_trace(seed=2, grid=(8, 10), patch=8)
    other.images[0].dense_logits += 1
    opened = Opened(browser, render([("one", one), ("<b>other</b>", other)]), tmp_path)
    opened.click_patch(0, 1, 1, 2, one.model.grid)
    assert opened.card(0).locator(".lives > section").count() == 2
    places = opened.card(0).locator("svg.stage .chosen")
    found = [(m.get_attribute("y"), m.get_attribute("x")) for m in places.all()]
    assert found == [("1", "2")] * 4 + [("3", "5")] * 4  # the middle of the same place
    assert opened.card(0).get_by_text("<b>other</b>").count() == 2
    opened.end()


@pytest.mark.parametrize(
    "options",
    [
        {"viewport": {"width": 400, "height": 800}},
        {"viewport": {"width": 640, "height": 400}, "device_scale_factor": 2},  # 1280 at 200 %
    ],
    ids=["phone", "zoomed"],
)
def test_body_never_scrolls_sideways(browser: Any, tmp_path: Path, options: dict) -> None:
    trace = random_trace(grid=(14, 14), names=HOSTILE, classes=HOSTILE)
    trace.model.name = HOSTILE[2]
    rows = [{"title": HOSTILE[2], "keep": keep, "top1": 80 + keep} for keep in (0.5, 0.7)]
    text = render([(HOSTILE[2], trace)], command=HOSTILE[2], accuracy=rows)
    opened = Opened(browser, text, tmp_path, **options)
    opened.click_patch(0, 0, 5, 5, trace.model.grid)
    for details in opened.page.locator("summary:visible").all():
        details.click()
    opened.card(0).locator(".life").wait_for()
    wide = opened.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    assert (
        opened.page.evaluate("document.querySelectorAll('.card script:not(.life-data)').length")
        == 0
    )
    opened.end()


@pytest.mark.parametrize(
    ("mode", "scheme"),
    [("one", "light"), ("one", "dark"), ("budgets", "light"), ("models", "light")],
)
def test_axe_finds_no_serious_fault(browser: Any, tmp_path: Path, mode: str, scheme: str) -> None:
    package = pytest.importorskip("axe_core_python", reason="the page: no axe-core here")
    script = (Path(package.__file__).parent / "axe.min.js").read_text()
    traces = [(f"model {k}", random_trace(fuses=True, sparse=True, seed=k)) for k in (1, 2)]
    traces = traces[:1] if mode == "one" else traces
    traces[-1][1].images[0].dense_logits += mode == "models"
    rows = [{"title": "<a>", "keep": k, "top1": 80 + k, "error": 0.3} for k in (0.5, 0.7)]
    options = {"color_scheme": scheme, "bypass_csp": True}  # the policy would refuse axe too
    opened = Opened(browser, render(traces, accuracy=rows, command="spot"), tmp_path, **options)
    r, c = leaves_at(traces[0][1], 0, 3)
    opened.click_patch(0, 1, r, c, traces[0][1].model.grid)
    opened.card(0).locator(".attention svg").first.wait_for()
    for details in opened.page.locator("summary:visible").all():
        details.click()
    opened.page.evaluate(script)
    found = opened.page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    serious = [
        (fault["id"], [node["html"][:200] for node in fault["nodes"][:3]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert serious == []
    opened.end()


def test_opens_at_once(browser: Any, tmp_path: Path) -> None:
    """16 images at 224 px."""
    trace = random_trace(images=16, grid=(14, 14), heads=6)
    opened = Opened(browser, render([("a", trace)]), tmp_path)
    times = []
    for _ in range(3):
        opened.page.reload()
        times.append(
            opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventStart")
        )
    assert 0 < min(times) < 1000
    opened.requests = opened.requests[:1]
    opened.end()


def test_a_notebook_shows_the_page_in_a_frame(browser: Any, tmp_path: Path) -> None:
    trace = random_trace(images=2)
    text = "<!doctype html><title>notebook</title>" + trace._repr_html_()
    opened = Opened(browser, text, tmp_path)
    frame = opened.page.frame_locator("iframe")
    r, c = leaves_at(trace, 1, 3)
    grid = frame.locator("#image-1 svg.stage").first
    box = grid.bounding_box()
    rows, columns = trace.model.grid
    grid.click(
        position={"x": (c + 0.5) / columns * box["width"], "y": (r + 0.5) / rows * box["height"]}
    )
    title = f"Life of patch (row {r + 1}, column {c + 1})"
    assert title in frame.locator("#image-1 .life").inner_text()
    frame.locator("#image-1 .attention svg").wait_for()  # its picture could be read
    opened.requests = [url for url in opened.requests if url != "about:srcdoc"]
    opened.end()
