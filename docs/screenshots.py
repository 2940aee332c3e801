"""Make the documentation's pictures of a report: `python docs/screenshots.py FOLDER`.

Needs Chromium, and playwright from the dependency group `browser`:
`uv run --group browser python docs/screenshots.py`.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, FloatRect, sync_playwright

IMAGES = Path(__file__).parent / "images"
HEIGHTS = {360: 1400, 768: 1500, 1400: 1500}  # by width: what a page in the documentation can take
ANSWER_WIDTH = 1000  # of the picture that the README shows: the headline and the figure under it
COLOURS = 256  # of the picture's own palette: flat colours and text need no more
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Open the report at each width and keep what is seen, and its answer as `comparison.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what regrad compare wrote")
    parser.add_argument("--out", type=Path, default=IMAGES, help="where the pictures go")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--whole", action="store_true", help="the whole page, however long")
    wanted = parser.parse_args()
    browser = find_browser()
    page = wanted.folder.absolute() / "report.html"
    if browser is None or not page.is_file():
        sys.exit(
            f"needs one of {', '.join(BROWSERS)}"
            if page.is_file()
            else f"no report.html in {wanted.folder}"
        )
    with sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width, height in HEIGHTS.items():
            tab = chromium.new_page(
                viewport={"width": width, "height": height}, color_scheme=wanted.theme
            )
            tab.goto(page.as_uri())
            shrink(tab.screenshot(full_page=wanted.whole), wanted.out / f"report-{width}.png")
            tab.close()
        shrink(answer(chromium, page, wanted.theme), wanted.out / "comparison.png")
        chromium.close()


def find_browser() -> str | None:
    """Return the path of an installed browser, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def answer(chromium: Browser, page: Path, theme: Literal["light", "dark"]) -> bytes:
    """Return a picture of the first thing on the page: what was found, and the figure of it."""
    tab = chromium.new_page(
        viewport={"width": ANSWER_WIDTH, "height": 900}, color_scheme=theme, device_scale_factor=2
    )
    tab.goto(page.as_uri())
    tab.evaluate("() => { document.querySelector('nav').hidden = true; }")
    bottom = tab.locator("#differences figure").evaluate("it => it.getBoundingClientRect().bottom")
    clip = {"x": 0, "y": 0, "width": ANSWER_WIDTH, "height": bottom + 12}
    picture: bytes = tab.screenshot(full_page=True, clip=FloatRect(**clip))
    tab.close()
    return picture


def shrink(picture: bytes, path: Path) -> None:
    """Write a picture with few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)


if __name__ == "__main__":
    main()
