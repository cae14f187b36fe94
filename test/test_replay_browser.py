"""The report in a real browser, as wide as a desktop's window and as a phone: headless Chromium."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from replay_bags import moving_frames, run_replay, write_bag

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Scroll bars are hidden, as a phone's are: they would take their width from the page.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
FLAGS += ("--hide-scrollbars",)
# Measures the page in a frame of a given width and leaves what it found in its own document.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>probe</title>
<iframe id="page" style="border: 0; width: %(width)dpx; height: 900px"></iframe><pre id="found"></pre>
<script>
const page = document.getElementById("page");
page.onload = () => {
  const inner = page.contentDocument, width = page.clientWidth;
  const images = [...inner.images];
  const outside = [...inner.body.querySelectorAll("*")].filter(
    item => !item.closest(".wide > *") && item.getBoundingClientRect().right > width + 1);
  const style = item => page.contentWindow.getComputedStyle(item);
  const pictures = inner.querySelector(".pictures");
  document.getElementById("found").textContent = JSON.stringify({
    width: inner.documentElement.clientWidth,
    scroll_width: inner.documentElement.scrollWidth,
    images: images.length,
    missing: images.filter(image => !image.complete || image.naturalWidth === 0).map(image => image.alt),
    narrow: images.filter(image => image.getBoundingClientRect().width < 100).map(image => image.alt),
    outside: outside.map(item => item.tagName + ": " + item.textContent.trim().slice(0, 40)),
    font: parseFloat(style(inner.body).fontSize),
    columns: pictures && style(pictures).gridTemplateColumns.split(" ").length,
  });
};
page.src = %(page)s;
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A replay with everything in it, served on this machine; yields its directory and address."""
    folder = tmp_path_factory.mktemp("browser")
    # A long name without a break, as recordings have, is what runs out of a narrow window.
    bag = folder / "rosbag2_2024_05_17-14_03_22_field_test_with_the_wide_angle_camera"
    write_bag(bag, moving_frames(9, 3, -2))
    arguments = ["--estimator", "dis", "--compare", "farneback", "--report", folder / "single"]
    assert run_replay(bag, *arguments) == 0
    shutil.copytree(bag, folder / "bags" / "one")
    shutil.copytree(bag, folder / "bags" / "two")
    assert run_replay(folder / "bags", "--estimator", "dis", "--report", folder / "many") == 0
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def look(browser: str, address: str, profile: Path) -> tuple[str, list[str]]:
    """A page's document once it is loaded, and what the browser said on its console."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=10000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("page", ["single/report.html", "many/index.html"])
def test_the_report_can_be_read(browser, site, tmp_path, page, width):
    folder, address = site
    (folder / "probe.html").write_text(PROBE % {"width": width, "page": json.dumps(page)})
    document, console = look(browser, f"{address}/probe.html", tmp_path)
    assert console == []
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)[1]))
    assert found["width"] == width and found["scroll_width"] <= width
    assert found["outside"] == []
    assert found["missing"] == [] and found["font"] >= 14
    if page == "single/report.html":
        # Three worst and three typical pairs of each method, of several pictures each, and the plots.
        assert found["images"] > 30 and found["narrow"] == []
        assert (found["columns"] == 1) == (width == 390)


def test_the_console_is_listened_to(browser, site, tmp_path):
    folder, address = site
    (folder / "wrong.html").write_text("<title>x</title><script>undefinedName.call()</script>")
    _, console = look(browser, f"{address}/wrong.html", tmp_path)
    assert any("undefinedName" in line for line in console)
