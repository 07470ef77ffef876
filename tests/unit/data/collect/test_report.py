"""report.html: it needs nothing else, says what the counts say, and shows the samples."""

from __future__ import annotations

import base64
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
from PIL import Image

from data.collect.report import SHOWN, histogram
from tests.unit.data.collect.conftest import Make


def test_the_page(folder: Path, make: Make) -> None:
    (folder / "clip-01.mp4").write_bytes(b"")
    (folder / "clip-02.txt").write_text("<script>alert('&')</script> كلب")
    (folder / "clip-03.txt").write_text("x" * 500)
    out = make(folder, max_bad_share=0.5, max_caption=400)
    page = (out / "report.html").read_text()
    assert "<script" not in page and "<script>alert('&')</script> كلب" in unescape(page)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)\w""", page) and "http" not in page
    assert re.search(r"<td>empty file</td><td class=\"number\">1</td>\s*<td class=\"number\">8\.3%</td>", page)
    assert "clip-03.mp4 (500 characters)" in page and "share bad" in page
    sheets = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", page)
    assert len(sheets) == 10
    with Image.open(io.BytesIO(base64.b64decode(sheets[0]))) as image:
        assert image.size == (3 * 108, 108)
    for title in ("Duration", "Size", "Rate", "Caption length"):
        assert f"<h3>{title}</h3>" in page
    assert page == (make(folder, "again", max_bad_share=0.5, max_caption=400) / "report.html").read_text().replace(
        "again: ", "out: "
    )


def test_a_few_of_many_are_shown(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(SHOWN + 5):
        Image.fromarray(np.full((16, 400 if n else 16, 3), n, np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("c" * (n + 1))
    page = (make(folder) / "report.html").read_text()
    assert page.count("data:image/jpeg") == SHOWN
    assert "<h3>Duration</h3>" not in page  # there are no videos


def test_histograms() -> None:
    linear = histogram("t", "n", np.array([1.0, 2.0, 2.0, 3.0]))
    assert linear and [bar.height for bar in linear.bars if bar.height] == [0.5, 1.0, 0.5]
    assert "median 2, from 1 to 3" in linear.note and linear.ticks[0] == (0.0, "1") and linear.ticks[-1] == (1.0, "3")
    wide = histogram("t", "n", np.array([1.0, 10.0, 100.0, 1000.0]))
    assert wide and "logarithmic" in wide.note
    assert [round(bar.left, 3) for bar in wide.bars if bar.height] == [0.0, 0.333, 0.667, 0.958]
    alone = histogram("t", "n", np.array([5, 5]))
    assert alone and sum(bar.height for bar in alone.bars) == 1.0
    assert histogram("t", "n", np.array([])) is None
