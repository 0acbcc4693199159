"""A headless Chromium, where one is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the network, nor what a first start asks it for.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
# What a person would see of a page, as its title.
LOOK = """
<script>
addEventListener("load", () => {
  const root = document.documentElement;
  document.title = JSON.stringify({
    title: document.title,
    pictures: Object.fromEntries([...document.images].map((i) => [i.alt, [i.naturalWidth, i.clientWidth]])),
    width: root.scrollWidth,
    window: root.clientWidth,
  });
});
</script>
"""


def look_at(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Open a page in a window of that width.

    Returns:
        its `title`; `pictures`: name -> (width in the file, width on the page); `width` of its content, and the
        `window`'s; `screenshot`: a PNG of the window.
    """
    watched = folder / "watched.html"
    watched.write_text(page.read_text(encoding="utf-8") + LOOK, encoding="utf-8")
    dom = _run(width, folder, "--virtual-time-budget=5000", "--dump-dom", watched.as_uri())
    found: dict[str, Any] = json.loads(dom.split("<title>", 1)[1].split("</title>", 1)[0].replace("&amp;", "&"))
    screenshot = folder / f"{width}.png"
    _run(width, folder, f"--screenshot={screenshot}", page.as_uri())
    return found | {"screenshot": screenshot}


def _run(width: int, folder: Path, *arguments: str) -> str:
    assert PROGRAM is not None
    command = [PROGRAM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
