"""scripts/compare.py from the command line to the three files."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[4]


def fabricate(folder: Path, *, stages: tuple[str, ...] = ("image", "video"), validated: bool = True) -> Path:
    """A small run: losses fall by 1/(1 + samples) in each stage."""
    lines, samples = [], 0
    for number, stage in enumerate(stages):
        for i in range(11):
            axes = {
                "step": samples,
                "samples": samples,
                "tokens": 4 * samples,
                "flops": 1e9 * samples,
                "hours": samples / 1e3,
            }
            loss = 1.0 + number + 1 / (1 + i)
            record = {**axes, "step": samples, "stage": stage, "loss": loss}
            if i:
                lines.append({"kind": "train", "bucket": "1x64x64", **record})
            else:
                lines.append({"kind": "transfer", "from": stages[number - 1] if number else None, **record})
            if validated and not i % 2:
                at = {0: "start", 10: "end"}.get(i, "interval")
                lines.append(
                    {
                        "kind": "validation",
                        "at": at,
                        "bucket_loss": {"1x64x64": loss},
                        "bin_loss": [loss, loss],
                        **record,
                    }
                )
            samples += 10 if i < 10 else 0
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")
    return int(exit_.value.code or 0)


class Page(HTMLParser):
    """Every attribute value and tag of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_three_files_and_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = fabricate(tmp_path / "a"), fabricate(tmp_path / "b"), tmp_path / "deep" / "report"
    assert run(monkeypatch, f"runs=[{a},{b}]", f"out={out}", "labels=[One,Two]") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [str(out / name) for name in ("loss_curves.png", "report.html", "compare.json")]
    assert any(re.search(r"video: Two +\+1\.9091", line) for line in printed)  # from 1 + 1/11 to 3
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "loss_curves.png", "report.html"]
    with Image.open(out / "loss_curves.png") as image:
        assert image.size == (1600, 1000)
    assert [r["label"] for r in json.loads((out / "compare.json").read_text())["runs"]] == ["One", "Two"]
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 6
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    without_images = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "http" not in without_images and "url(" not in without_images and "@import" not in without_images


def test_text_of_run_folders_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<script>alert(1)</script>"
    a = fabricate(tmp_path / "x<b>&'quoted", stages=("image", evil, "$\\frac{1$"))
    out = tmp_path / "out"
    assert run(monkeypatch, f'runs=["{a}"]', f"out={out}", "axes=[flops]", "log=true") == 0
    text = (out / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "x&lt;b&gt;&amp;" in text


def test_runs_without_validation_and_of_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = fabricate(tmp_path / "a", stages=("image",), validated=False)
    out = tmp_path / "out"
    assert run(monkeypatch, f"runs=[{a}]", f"out={out}") == 0
    assert json.loads((out / "compare.json").read_text())["transfers"] == []
    assert Page((out / "report.html").read_text()).tags.count("img") == 2  # the curves, and training on the other axes


def test_warnings_are_on_the_page_and_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = fabricate(tmp_path / "a"), fabricate(tmp_path / "b", stages=("image", "other")), tmp_path / "out"
    assert run(monkeypatch, f"runs=[{a},{b}]", f"out={out}") == 0
    warning = "went through different stages: image, video against image, other"
    assert warning in (out / "report.html").read_text()
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[nowhere]", "out=o"], "nowhere is not a folder"),
        (["out=o"], "runs is not set"),
        (["runs=[a]", "out=o", "smoothing=0"], "smoothing=0"),
        (["runs=[a]", "out=o", "axes=[steps]"], "axes.0=steps"),
        (["runs=[a]", "out=o", "axes=[hours,hours]"], "names an axis twice"),
        (["runs=[a]", "out=o", "label=[x]"], "did you mean 'labels'?"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_out_that_is_a_file_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, out = fabricate(tmp_path / "a"), tmp_path / "out"
    out.write_text("mine")
    assert run(monkeypatch, f"runs=[{a}]", f"out={out}") == 2
    assert out.read_text() == "mine"


def test_the_script_runs_as_a_command(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/compare.py", "runs=[nowhere]", f"out={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: runs: nowhere is not a folder; give run folders such as runs/NAME\n"
