"""The page of what a stage feeds the model: the loader's own samples, their films, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import probe
from data.pipeline import StageLoader
from data.shards import Record, load_index, write_shards
from lingen.autoencoders import load_autoencoder
from lingen.compose import compose
from lingen.errors import UserError
from lingen.preview.collect import view_stage
from lingen.preview.page import as_webp
from scripts.preview_data import main
from tests.conftest import World

VIDEO = ["debug=smoke", "stage=demo_video"]
PICTURE = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")


def milliseconds(film: Image.Image) -> int:
    """How long a film is; WebP joins frames that are equal."""
    total = 0
    for frame in range(getattr(film, "n_frames", 1)):
        film.seek(frame)
        film.load()
        total += film.info.get("duration", 0)
    return total


def test_the_page_shows_what_the_loader_gives(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pages" / "page.html"
    main([f"data={world.shards}", f"out={out}", f"autoencoder.path={world.autoencoder}", "samples=3", *VIDEO])
    page = out.read_text()
    assert "6 samples of 1 stages" in capsys.readouterr().out
    text = PICTURE.sub("", page)
    assert not re.search(r"(src|href)=\"(?!data:|\")", text) and "http" not in text  # it needs no other file
    films = [Image.open(io.BytesIO(base64.b64decode(film))) for film in PICTURE.findall(page)]
    assert [milliseconds(film) for film in films] == [17 * 125] * 6 + [0] * 6  # beside each its reconstruction
    assert all(film.size == (64, 64) for film in films)
    assert len(re.findall(r"<span>reconstructed, \d\d\.\d dB", page)) == 6
    config = compose(["name=n", *world.words, *VIDEO])
    (stage,) = config.stages.values()
    seen: dict[str, list[str]] = {}
    index = load_index(world.shards)
    loader = StageLoader(index, stage, config.data, seed=config.seed, rank=0, world=1, grad_accumulation=1)
    for (batch,) in loader:
        seen.setdefault(str(batch.bucket), []).extend(batch.keys)
        if len(seen) == 2:
            break
    shown = re.findall(r"<small>((?:clip|image)-\d+)</small>", page)
    assert shown == seen["17x64x64"][:3] + seen["1x64x64"][:3]
    assert all(index.caption[index.key.index(key)] in page for key in shown)


def test_reconstructions_are_the_autoencoders_own(world: World) -> None:
    config = compose(["name=n", *world.words, *VIDEO])
    (stage,) = config.stages.values()
    autoencoder = load_autoencoder(config.autoencoder, "cpu")
    view = view_stage(config, stage, load_index(world.shards), autoencoder, torch.device("cpu"), samples=2)
    video, image = view.buckets
    assert (video.train + video.held_out, image.train + image.held_out, view.none) == (64, 64, {})
    assert video.latents == (3, 8, 8) and video.tokens == 48 and video.steps == 0.75
    for sample in video.samples + image.samples:
        assert sample.fed is not None and sample.decoded is not None and sample.psnr is not None
        error = (sample.fed.double() - sample.decoded.double()).square().mean()
        assert sample.psnr == pytest.approx(float(10 * torch.log10(255**2 / error)), abs=0.1)


def test_the_page_counts_each_bucket_and_what_is_in_none(world: World, tmp_path: Path) -> None:
    words = [f"data={world.shards}", f"out={tmp_path / 'page.html'}", "samples=1", "data.holdout_share=0", *VIDEO]
    main([*words, "stage.buckets=[{frames: 17, height: 64, width: 64, batch_size: 8}]"])
    page = (tmp_path / "page.html").read_text()
    assert "<td>0</td><td>64</td>" in page and "In no bucket: 64 images, and no bucket has one frame." in page
    two = "{frames: 9, height: 64, width: 64, batch_size: 8}, {frames: 17, height: 64, width: 64, batch_size: 8}"
    with pytest.raises(UserError, match=r"bucket 9x64x64 is empty: .* nearer to 17x64x64 \(64\)"):
        main([*words, f"stage.buckets=[{two}]"])


def test_a_caption_cannot_become_html_and_no_autoencoder_is_needed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(stream, "png")
    media = stream.getvalue()
    evil = "<script>alert('&')</script>"
    records = [Record(f"image-{n}", evil, media, "png", probe(media), ("txt", b"c")) for n in range(4)]
    write_shards(records, tmp_path / "shards")
    words = [f"data={tmp_path / 'shards'}", f"out={tmp_path / 'page.html'}", "stage=demo_image", "debug=smoke"]
    main([*words, "samples=2", "data.holdout_share=0"])
    page = (tmp_path / "page.html").read_text()
    assert len(PICTURE.findall(page)) == 2 and "<script" not in page and "&lt;script&gt;alert" in page
    assert " dB" not in PICTURE.sub("", page)
    with pytest.raises(UserError, match="unknown key 'smaples'"):
        main([*words, "smaples=2"])


def test_large_clips_are_made_smaller() -> None:
    pixels = torch.zeros(3, 2, 50, 100, dtype=torch.uint8)
    pixels[:, 1] = 255
    film = Image.open(io.BytesIO(base64.b64decode(as_webp(pixels, 4.0, 40))))
    assert film.size == (40, 20) and film.n_frames == 2  # type: ignore[attr-defined]
    film.seek(1)
    film.load()
    assert film.info["duration"] == 250 and np.asarray(film.convert("L")).min() > 250
