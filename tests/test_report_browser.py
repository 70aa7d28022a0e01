"""The report page in headless Chromium: painted light and dark, no sideways scrolling on a phone, a toggle and tooltips that work."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlkernels.report import build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def example() -> dict[str, Any]:
    """Invented measurements of an invented machine."""
    return json.loads((Path(__file__).parent / "data" / "results_example.json").read_text())


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium; every message to the console fails the test."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr, result.stderr
    return result


def test_a_browser_paints_it_light_and_dark(example: dict[str, Any], tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    page = build(example, tmp_path / "index.html")
    brightness = {}
    for theme in ("light", "dark"):
        shot = tmp_path / f"{theme}.png"
        browse(tmp_path, f"--screenshot={shot}", "--window-size=1280,3000", f"{page.as_uri()}#{theme}")
        pixels = (image.imread(shot)[..., :3] * 255).astype("uint32")
        colours = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        assert np.unique(colours).size > 100
        brightness[theme] = float(pixels.mean())
        ink = (pixels != pixels[5, 5]).any(axis=-1)
        assert all(band.mean() > 0.01 for band in (ink[:800], ink[800:1600], ink[1600:2400])), theme
    assert brightness["light"] > 200
    assert brightness["dark"] < 80


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(example: dict[str, Any], width: int, tmp_path: Path) -> None:
    example["machine"]["compiler"] = "x" * 300
    example["machine"]["cpu"] = "Example " + "long" * 40
    page = build(example, tmp_path / "index.html").read_text(encoding="utf-8")
    measure = """
      const page = frame.contentDocument.documentElement, tables = [...page.querySelectorAll(".scroll")];
      document.title = JSON.stringify({scroll: page.scrollWidth, inner: frame.contentWindow.innerWidth,
        tables: tables.length, focusable: tables.filter((t) => t.tabIndex === 0).length,
        button: page.querySelector("#theme").hidden, plots: page.querySelectorAll("svg.plot").length,
        least: Math.min(...[...page.querySelectorAll("svg.plot")].map((p) => p.getBoundingClientRect().width))});"""
    frame = f'<iframe id="frame" style="border:0;width:{width}px;height:2000px" srcdoc="{html.escape(page)}"></iframe>'
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title></title>{frame}<script>onload = () => {{{measure}}};</script>", encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, "--dump-dom", wrapper.as_uri()).stdout)
    assert title, "the wrapper did not run"
    found = json.loads(html.unescape(title[1]))
    assert found["inner"] == width
    assert found["scroll"] <= found["inner"]
    assert found["tables"] == found["focusable"] > 5
    assert found["button"] is False
    assert found["plots"] > 5
    assert found["least"] > 200


def test_the_toggle_and_the_tooltip_work(example: dict[str, Any], tmp_path: Path) -> None:
    page = build(example, tmp_path / "index.html")
    act = """<script>
      const before = document.documentElement.dataset.theme;
      document.getElementById("theme").click();
      const mark = document.querySelector("svg.plot .mark.ours"), box = mark.getBoundingClientRect();
      mark.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: box.x + 2, clientY: box.y + 2}));
      document.body.dataset.found = [before, document.documentElement.dataset.theme, document.getElementById("tip").hidden].join();
    </script>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", act + "</body>"), encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", f"{page.as_uri()}#light").stdout
    assert 'data-found="light,dark,false"' in dom
    assert re.search(r'<div id="tip"[^>]*>linear ', dom)
