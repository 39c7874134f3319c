"""A real browser without a screen: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: No sandbox, as tests run as root in containers; and no word to anybody outside.
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def executable() -> str | None:
    """Path of the browser: $CHROMIUM, or one on the PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium, of the Playwright API."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable(), args=list(_ARGUMENTS))
        try:
            yield started
        finally:
            started.close()


def opened(started: Any, path: Path, said: list[str], **options: Any) -> Any:
    """A page with its charts drawn; `said` gets every console message, error and request over a network."""
    tab = started.new_context(**options).new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    tab.goto(path.as_uri())
    # Not wait_for_function, which needs eval: the page's policy forbids it.
    tab.wait_for_selector("html[data-charted]")
    return tab
