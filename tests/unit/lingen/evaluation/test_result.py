"""What is measured on runs whose truth is known, and what the script writes."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from lingen.errors import UserError
from lingen.evaluation.folder import Asked, read_runs
from lingen.evaluation.metrics import Lpips, psnr
from lingen.evaluation.page import chosen
from lingen.evaluation.plot import series
from lingen.evaluation.result import as_json, measure
from lingen.evaluation.tables import details, overview

from .conftest import Make, clip
from .test_metrics import lpips_weights

evaluate = importlib.import_module("scripts.evaluate")


@pytest.fixture
def folders(make_run: Make) -> list[str]:
    """Uncached, fast (noisy, at half the cost), and a reference."""
    made = [
        make_run("uncached", noise=2, count=6, flops=4 * 10**12, seconds=4.0),
        make_run("fast", noise=12, count=6, flops=2 * 10**12, seconds=1.0, curve="policy"),
        make_run("reference", count=6, flops=40 * 10**12, seconds=40.0),
    ]
    return [str(path) for path in made]


def test_every_metric_against_its_run(folders: list[str], tmp_path: Path) -> None:
    save_file(lpips_weights(0), tmp_path / "lpips.safetensors")
    runs = read_runs(folders)
    lpips = Lpips(str(tmp_path / "lpips.safetensors"))
    result = measure(runs, baseline="uncached", reference="reference", lpips=lpips, progress=False)
    base, fast, many = result.runs
    assert {"psnr", "ssim", "lpips"}.isdisjoint(base.values) and "psnr_reference" in base.values
    assert "psnr" in many.values and "psnr_reference" not in many.values
    expected = [psnr(runs[1].pixels(n), runs[0].pixels(n)) for n in range(6)]
    assert fast.values["psnr"].tolist() == expected and fast.summaries["psnr"].mean.value == pytest.approx(
        np.mean(expected)
    )
    assert fast.summaries["psnr"].worst == min(expected)
    assert fast.values["lpips"].min() > 0 and base.summaries["attributes"].mean.value == 1
    assert fast.gains["psnr_reference"].value == pytest.approx(
        np.mean(fast.values["psnr_reference"] - base.values["psnr_reference"])
    )
    assert fast.gains["psnr_reference"].value < -5 and "psnr" not in fast.gains
    assert fast.savings["flops"].value == pytest.approx(24.015 / 12.015)
    assert fast.savings["denoise_seconds"].value == 4 and fast.savings["seconds"].value == 3
    assert fast.savings["peak_memory"].value == 1 and base.savings == {} == base.gains
    assert list(series(result)) == ["uncached", "policy"]


def test_captions_that_name_nothing_have_no_values(make_run: Make) -> None:
    videos = [Asked(prompt=clip(n)[1] if n else "two dogs", seed=n) for n in range(4)]
    runs = read_runs([str(make_run(name, videos=videos, noise=noise)) for name, noise in (("a", 0), ("b", 60))])
    result = measure(runs, baseline="a", progress=False)
    assert np.isnan(result.runs[1].values["colour"]).tolist() == [True, False, False, False]
    assert result.runs[1].summaries["colour"].count == 3 and result.runs[1].gains["colour"].value <= 0
    plain = read_runs([str(make_run("c", videos=[Asked(prompt="two dogs", seed=0)]))])
    assert "colour" not in measure(plain, baseline="c", progress=False).keys


def test_intervals_are_of_what_was_measured(make_run: Make) -> None:
    """Equal videos have an SSIM of exactly 1; VBench may leave out a video of one run alone."""
    runs = read_runs([str(make_run(name)) for name in "ab"])
    count = len(runs[0].file.videos)
    partial = np.arange(count, dtype=np.float64)
    partial[1] = np.nan
    scores = {"a": {"x": partial}, "b": {"x": np.arange(count) + 1.0}}
    result = measure(runs, baseline="a", vbench=scores, progress=False)
    other = result.runs[1]
    assert (other.summaries["ssim"].mean.low, other.summaries["ssim"].mean.high) == (1, 1)
    assert other.summaries["attributes"].mean.low != other.summaries["attributes"].mean.value
    assert other.gains["vbench.x"].value == 1 and other.summaries["vbench.x"].count == count
    json.dumps(as_json(result), allow_nan=False)


def test_doubts_are_said(make_run: Make) -> None:
    a = make_run("a", machine="H100", settings={"weights": "x"})
    b = make_run("b", machine="CPU", settings={"weights": "y"})
    record = json.loads((b / "00000.json").read_text())
    (b / "00000.json").write_text(json.dumps(record | {"batch": 2, "peak_memory": None}))
    result = measure(read_runs([str(a), str(b)]), baseline="a", progress=False)
    said = " ".join(result.warnings)
    assert (
        "different machines" in said and "batch sizes" in said and "different weights" in said and "4 different" in said
    )
    assert "peak_memory" in result.runs[0].values and "peak_memory" not in result.runs[1].values


def test_names_of_runs_that_are_not_there(folders: list[str]) -> None:
    runs = read_runs(folders)
    with pytest.raises(UserError, match="baseline=uncachd is none of the runs; did you mean 'uncached'"):
        measure(runs, baseline="uncachd")
    with pytest.raises(UserError, match="reference=many is none of the runs"):
        measure(runs, baseline="fast", reference="many")


def test_tables_in_every_form(folders: list[str]) -> None:
    result = measure(read_runs(folders), baseline="uncached", reference="reference", progress=False)
    quality, cost = overview(result)
    assert cost.rows[1][:2] == ["fast", "2T (2.00x)"] and quality.rows[0][1] == "-"
    table = details(result, "psnr_reference")
    assert table.title == "PSNR (dB) to reference, higher is better" and table.headers[-1] == "this - uncached"
    assert re.fullmatch(r"-\d+\.\d\d \(-\d+\.\d\d to -\d+\.\d\d\)", table.rows[1][-1])
    assert len(table.rows) == 2  # the reference has no distance to itself


def test_the_worst_videos_are_shown_first(folders: list[str]) -> None:
    result = measure(read_runs(folders), baseline="uncached", progress=False)
    mean = np.mean([one.values["psnr"] for one in result.runs[1:]], axis=0)
    found = chosen(result, 4)
    assert [n for n, why in found if why] == np.argsort(mean)[:2].tolist() and len({n for n, _ in found}) == 4
    assert len(chosen(result, 50)) == 6 and chosen(result, 0) == []


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]


def test_the_script_writes_everything(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    evaluate.main([f"runs=[{','.join(folders)}]", f"out={out}", "reference=reference", "shown=2", "side=16"])
    names = ["evaluate.csv", "evaluate.json", "evaluate.md", "index.html", "quality.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    printed = capsys.readouterr().out
    assert "2T (2.00x)" in printed and "warning: 6 different prompts" in printed and str(out / "index.html") in printed
    tree = json.loads((out / "evaluate.json").read_text())
    assert tree["runs"]["fast"]["baseline_over_this"]["flops"]["value"] == pytest.approx(24.015 / 12.015)
    assert len(tree["runs"]["fast"]["values"]["psnr"]) == 6 and tree["baseline"] == "uncached"
    rows = list(csv.DictReader(io.StringIO((out / "evaluate.csv").read_text())))
    (row,) = [row for row in rows if (row["run"], row["metric"]) == ("fast", "psnr")]
    assert float(row["mean"]) == pytest.approx(np.mean(tree["runs"]["fast"]["values"]["psnr"])) and row["videos"] == "6"
    text = (out / "index.html").read_text()
    page = Page(text)
    assert page.tags.count("video") == 6 and page.tags.count("img") == 1
    assert all(link.startswith(("data:video/mp4;base64,", "data:image/png;base64,")) for link in page.links)
    bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "http" not in bare and "url(" not in bare and "@import" not in bare
    with Image.open(out / "quality.png") as image:
        assert image.width == 1600
    assert "| fast | 2T (2.00x) |" in (out / "evaluate.md").read_text()


def test_the_same_runs_give_the_same_files(folders: list[str], tmp_path: Path) -> None:
    words = [f"runs=[{','.join(folders[:2])}]", "shown=0"]
    for name in ("a", "b"):
        evaluate.main([*words, f"out={tmp_path / name}"])
    assert "<script>" not in (tmp_path / "a" / "index.html").read_text()  # no videos, no player
    for file in ("evaluate.json", "evaluate.csv", "quality.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_prompts_are_escaped(make_run: Make, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = make_run("a", videos=[Asked(prompt=evil, seed=0)])
    evaluate.main([f"runs=[{folder}]", f"out={tmp_path / 'out'}"])
    text = (tmp_path / "out" / "index.html").read_text()
    assert Page(text).tags.count("script") == 1 and "&lt;script&gt;alert(1)" in text
