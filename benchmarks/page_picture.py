"""A picture of the live page of a server, by a browser without a screen.

    loramux serve runs/first &
    python benchmarks/page_picture.py http://127.0.0.1:8000 --prompt "Mia hid the red cup in the garden." \
        --to docs/pictures/serve_page.png

It takes playwright (`pip install 'loramux[dev]'`) and a Chromium: CHROMIUM names it, /usr/bin/chromium is tried.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return shutil.which(os.environ.get("CHROMIUM", "/usr/bin/chromium"))


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """A page in a browser of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(QUIET))
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        page.goto(url)
        yield page
        browser.close()


def compare(page: Page, prompt: str, models: list[str]) -> None:
    """Ask several models at once, and wait for all their answers."""
    page.wait_for_selector("#models input")
    for box in page.query_selector_all("#models input"):
        box.set_checked(box.get_attribute("value") in models if models else box.is_checked())
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector("#send:not([disabled])", timeout=60_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model", action="append", default=[], help="may be repeated (default: what is ticked)")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    with opened(options.url) as page:
        compare(page, options.prompt, options.model)
        page.wait_for_timeout(2500)  # the next look at the load
        page.screenshot(path=options.to)


if __name__ == "__main__":
    main()
