"""Draws docs/pictures/hub_*.png: finished runs, published to a hub of a moment, as its catalogue page shows them.

    loramux train --to runs/moa && loramux train --set method.name=multilora --to runs/multilora
    python docs/make_hub_pictures.py runs/moa runs/multilora

Needs Chromium.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).with_name("pictures")
LORAMUX = [sys.executable, "-m", "loramux.cli"]
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main(runs: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        hub = subprocess.Popen([*LORAMUX, "hub", "serve", "--root", folder, "--port", port])
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(int(port))
            names = [f"mia/eight-tasks-{run.name}" for run in runs]
            for run, name in zip(runs, names, strict=True):
                command = [*LORAMUX, "publish", str(run), name, "--licence", "apache-2.0", "--endpoint", url]
                subprocess.run(command, check=True, env={**os.environ, "HF_TOKEN": "any"})
            draw(url, names)
        finally:
            hub.terminate()
            hub.wait()


def wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)


def draw(url: str, names: list[str]) -> None:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{url}/{names[0]}")
        keep(page, "hub_adapter")
        page.goto(f"{url}/_compare?one={names[0]}&two={names[-1]}")
        keep(page, "hub_compared")
        browser.close()


def keep(page: Page, name: str) -> None:
    page.wait_for_selector("svg")
    page.wait_for_selector("#results a")
    page.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]] or sys.exit(__doc__))
