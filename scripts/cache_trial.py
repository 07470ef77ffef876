"""Do caches give more quality for the same computation? One command, from nothing to the answer.

    python scripts/cache_trial.py [experiment=cache_trial] [out=runs/cache_trial] [models=[dit,lingen]] [seeds=256]
        [variants=core|all] [checkpoints="{dit: DIR, lingen: DIR}"] [dry_run=true] [docs=docs/cache.md] ...

Renders a captioned world, makes shards, autoencoder and latents, and trains a DiT and a LinGen on them (or takes
``checkpoints``); looks whether their videos show what their captions ask; fits every cache on seeds of its own; samples
all variants, at matched FLOPs, with controls; and writes out/report. Says how long it will take before it samples
(``dry_run``: and stops). The same command goes on where it was interrupted. docs/cache.md says what is compared.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from lingen.compose import compose, parse
from lingen.errors import UserError, run_main
from lingen.files import write_file
from lingen.output import make_folder, writing
from lingen.trial.settings import TrialWords
from scripts.demo import ROOT, run, run_together

if TYPE_CHECKING:
    from lingen.trial.run import Trial

BEGIN, END = "<!-- trial: begin -->", "<!-- trial: end -->"


def prepare(words: TrialWords, out: Path) -> None:
    """Clips, shards, autoencoder, latents: what the trainings share."""
    clips, shards, autoencoder, latents = (
        out / "clips",
        out / "shards",
        out / "autoencoder.safetensors",
        out / "latents",
    )
    experiment = (f"experiment={words.experiment}", *shlex.split(words.overrides), f"autoencoder.path={autoencoder}")
    latent = compose(["name=trial", *experiment]).autoencoder
    if not (shards / "index.json").exists():
        if not clips.exists():
            world = (f"clips={words.clips}", f"images={words.images}", f"backgrounds=[{','.join(words.backgrounds)}]")
            run("-m", "data.synthetic", f"out={clips}", *world, "size=64", "frames=17", "fps=8")
        shutil.rmtree(shards, ignore_errors=True)  # without an index: a trial that was stopped here
        run("scripts/make_shards.py", f"input={clips}", f"output={shards}")
    if not autoencoder.exists():
        ratios = (f"channels={latent.channels}", f"time={latent.time}", f"space={latent.space}")
        run("scripts/fit_autoencoder.py", f"data={shards}", f"out={autoencoder}", *ratios)
    if not (latents / "index.json").exists():
        run("scripts/precompute.py", f"data={shards}", f"out={latents}", *experiment)


def trained(words: TrialWords, out: Path) -> dict[str, str]:
    """The checkpoint of each model; those that nobody gave are trained, side by side."""
    missing = [model for model in words.models if model not in words.checkpoints]
    if missing:
        prepare(words, out)
        shared = (
            f"experiment={words.experiment}",
            f"runs_dir={out.parent}",
            f"data.path={out / 'latents'}",
            f"autoencoder.path={out / 'autoencoder.safetensors'}",
            *shlex.split(words.overrides),
        )
        run_together(
            {model: ("train.py", f"model={model}", f"name={out.name}/train/{model}", *shared) for model in missing}
        )
    return {model: words.checkpoints.get(model) or str(out / "train" / model) for model in words.models}


def sample(model: str, checkpoint: str, words: TrialWords, threads: int) -> Trial | UserError | None:
    """One model's trial, in a process of its own; an error is handed over to be said once."""
    import torch

    from lingen.trial.run import run_model

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    sys.stdout = Prefixed(model)
    try:
        return run_model(model, checkpoint, words)
    except UserError as error:
        print(f"stopped: {error}")  # the other model goes on, and main says it again
        return error
    finally:
        sys.stdout = sys.__stdout__


class Prefixed:
    """Standard output with a model's name before each line."""

    encoding = "utf-8"

    def __init__(self, model: str) -> None:
        self._name, self._line = model, ""

    def write(self, words: str) -> int:
        """Whole lines go out."""
        *lines, self._line = (self._line + words).split("\n")
        for line in lines:
            print(f"{self._name:>7} | {line}", file=sys.__stdout__, flush=True)
        return len(words)

    def flush(self) -> None:
        """Of the real one."""
        sys.__stdout__.flush()  # type: ignore[union-attr]

    def isatty(self) -> bool:
        """Two bars on one terminal would write over each other."""
        return False


def sample_all(words: TrialWords, checkpoints: dict[str, str]) -> list[Trial]:
    """All models, side by side: models this small use half of the cores twice better than all of them once.

    Raises:
        UserError: what one of them ended with.
    """
    threads = max(1, (os.cpu_count() or 1) // len(checkpoints))
    if len(checkpoints) == 1:
        ended = [sample(model, path, words, threads) for model, path in checkpoints.items()]
    else:
        with ProcessPoolExecutor(len(checkpoints), get_context("spawn")) as pool:
            jobs = [pool.submit(sample, model, path, words, threads) for model, path in checkpoints.items()]
            ended = [job.result() for job in jobs]
    for one in ended:
        if isinstance(one, UserError):
            raise one
    return [one for one in ended if one is not None and not isinstance(one, UserError)]


def write_report(trials: list[Trial], words: TrialWords) -> None:
    """out/report: README.md, and two figures a model."""
    from lingen.trial.figures import figures
    from lingen.trial.report import Reading, markdown

    readings = [Reading(trial) for trial in trials]
    folder = Path(words.out) / "report"
    make_folder(folder, words.out)
    pictures = {name: content for read in readings for name, content in figures(read).items()}
    with writing(words.out):
        for name, content in pictures.items():
            write_file(folder / name, content)
        write_file(folder / "README.md", f"# Cache trial\n\n{markdown(readings, '.')}".encode())
    print(folder / "README.md")
    if words.docs is not None:
        page = Path(words.docs)
        beside = page.with_suffix("")  # docs/cache.md -> docs/cache
        make_folder(beside, words.docs, "docs")
        with writing(words.docs, "docs"):
            for name, content in pictures.items():
                write_file(beside / name, content)
            write_file(page, filled(page.read_text(), markdown(readings, beside.name), words.docs).encode())
        print(page)


def filled(page: str, report: str, name: str) -> str:
    """A page with what lies between its marks replaced.

    Raises:
        UserError: it has not both marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"docs={name} has no lines '{BEGIN}' and '{END}' for the report to go between")
    return f"{before}{BEGIN}\n\n{report}\n{END}{after}"


def main(given: list[str]) -> None:
    """Train, sample, report.

    Raises:
        UserError: the words cannot be used, or what a step of the trial refuses.
    """
    words = parse(TrialWords, given)
    if words.docs is not None:
        with writing(words.docs, "docs"):
            filled(Path(words.docs).read_text(), "", words.docs)
    os.chdir(ROOT)  # where the commands run; paths are relative to it
    out = Path(words.out)
    make_folder(out, words.out)
    trials = sample_all(words, trained(words, out))
    if trials:
        write_report(trials, words)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
