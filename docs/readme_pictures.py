"""Make the pictures of the README as a reader sees it: `python docs/readme_pictures.py`.

The page is drawn with the measures of a repository's front page. Badges come from a network and
are shown by their words. Needs Chromium, and playwright from the dependency group `browser`.
"""

import sys
import tempfile
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright
from screenshots import IMAGES, find_browser, shrink

ROOT = Path(__file__).parent.parent
HEIGHTS = {360: 1400, 1400: 1500}
END_OF_THE_RECORDING = 8000  # ms after which it shows the result
STYLE = """
body { margin: 0 auto; max-width: 1012px; padding: 24px; box-sizing: border-box;
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2328; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; }
img { max-width: 100%; }
pre { background: #f6f8fa; padding: 16px; overflow: auto; border-radius: 6px; }
code { font: 85%/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.added { color: #116329; background: #dafbe1; }
table { display: block; overflow: auto; border-collapse: collapse; }
td, th { border: 1px solid #d1d9e0; padding: 6px 13px; }
a { color: #0969da; }
"""


def highlight(code: str, language: str, _: str) -> str:
    """Return a block of code with the added lines of a difference in green; else nothing."""
    if language != "diff":
        return ""
    return "\n".join(
        f'<span class="added">{escape(line)}</span>' if line.startswith("+") else escape(line)
        for line in code.splitlines()
    )


def page() -> str:
    """Return the README as a page."""
    options = {"html": True, "highlight": highlight}
    markdown = MarkdownIt("commonmark", options).enable("table")
    body = markdown.render((ROOT / "README.md").read_text(encoding="utf-8"))
    return f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{STYLE}</style>{body}'


def main() -> None:
    """Draw the README at each width."""
    browser = find_browser()
    if browser is None:
        sys.exit("needs Chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tool:
        path = Path(folder, "README.html")
        path.write_text(page(), encoding="utf-8")
        chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width, height in HEIGHTS.items():
            tab = chromium.new_page(viewport={"width": width, "height": height})
            tab.goto(path.as_uri(), wait_until="domcontentloaded")
            tab.wait_for_timeout(END_OF_THE_RECORDING)
            shrink(tab.screenshot(), IMAGES / f"readme-{width}.png")
            tab.close()
        chromium.close()


if __name__ == "__main__":
    main()
