"""Make the documentation's pictures of a report: `python docs/screenshots.py FOLDER`.

Needs Chromium, and playwright from the dependency group `browser`:
`uv run --group browser python docs/screenshots.py`.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
HEIGHTS = {360: 1400, 768: 1500, 1400: 1500}  # by width: what a page in the documentation can take
COLOURS = 128  # of the picture's own palette: flat colours and text need no more
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Open the report at each width and keep what is seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what regrad compare wrote")
    parser.add_argument("--out", type=Path, default=IMAGES, help="where the pictures go")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--whole", action="store_true", help="the whole page, however long")
    wanted = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
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
        chromium.close()


def shrink(picture: bytes, path: Path) -> None:
    """Write a picture with few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)


if __name__ == "__main__":
    main()
