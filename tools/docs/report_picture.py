"""Draws docs/report.png: the life of a patch on a page of `spot report`, as Chromium shows it.

    spot train digits --output runs --experiment digits
    python tools/docs/report_picture.py runs/digits digits --image 3 --patch 3,6

Needs Playwright's Python package and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from spot_vit.config.report import ReportSettings  # noqa: E402
from spot_vit.report.make import make_report  # noqa: E402

WIDTH = 1240  # of the window, in CSS pixels; the picture has half as many again


def shoot(page: Path, image: int, patch: tuple[int, int], grid: tuple[int, int], to: Path) -> None:
    """Opens a page, chooses a patch (row, column) of an image's card, and stores the card."""
    browsers = filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome")))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=next(browsers), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.5)
        window.goto(page.resolve().as_uri())
        card = window.locator(f"#image-{image}")
        square = card.locator("svg.stage").first
        square.scroll_into_view_if_needed()
        box = square.bounding_box()
        assert box is not None
        y, x = ((at + 0.5) / of for at, of in zip(patch, grid, strict=True))
        square.click(position={"x": x * box["width"], "y": y * box["height"]})
        card.locator(".attention svg").wait_for()
        window.mouse.move(0, 0)
        card.screenshot(path=to)
        browser.close()


def main() -> None:
    """The page of a model and pictures, and its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--image", type=int, default=0, help="which of them")
    parser.add_argument("--patch", default="0,0", help="row and column, from 0")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/report.png")
    args = parser.parse_args()
    row, column = (int(number) for number in args.patch.split(","))
    with tempfile.TemporaryDirectory() as folder:
        page, data = Path(folder) / "page.html", Path(folder) / "trace.json"
        make_report(
            ReportSettings(
                checkpoint=args.checkpoint, images=tuple(args.images), rounds=0,
                output=str(page), trace=str(data),
            )
        )  # fmt: skip
        from spot_vit import Trace

        shoot(page, args.image, (row, column), Trace.load(data).model.grid, args.output)
    with Image.open(args.output) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
