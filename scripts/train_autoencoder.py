"""Train our own autoencoder: ``python scripts/train_autoencoder.py name=NAME data.path=DIR key=value ...``.

The loop is train.py's: rerunning the same command resumes, ``dry_run=true`` prints the plan, signals save and end with
code 75. Each finished stage leaves runs/NAME/export/STAGE, which is an ``autoencoder.path`` for ``autoencoder=tae``.
"""

from __future__ import annotations

import sys

from lingen.dist import StopSignal
from lingen.errors import run_main

PRIMARY = "train_autoencoder"
USAGE = """usage: python scripts/train_autoencoder.py name=NAME data.path=DIR [group=choice ...] [key=value ...]

  name=demo/tae               the run's folder below runs_dir
  curriculum=tae_demo         the ordered stages; or stage=NAME init_from=CHECKPOINT for one of them
  dry_run=true                print the plan, allocate nothing
  losses.kl=1e-6              any key of lingen/tae_config.py and lingen/config.py

groups:"""


def usage() -> str:
    """The usage, with the choices of every group that it may be given."""
    from lingen.compose import groups

    return "\n".join([USAGE, *(f"  {group}" for group in groups(PRIMARY))])


def main() -> int:
    """Compose, validate, hand over."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(usage())
        return 0
    stop = StopSignal()  # first of all: what follows takes seconds to import, in which a signal would kill
    from lingen.compose import compose_run
    from lingen.tae_config import TaeRunConfig

    config = compose_run(TaeRunConfig, PRIMARY, words)
    from lingen.loop import dry_run, train

    return dry_run(config) if config.dry_run else train(config, stop)


if __name__ == "__main__":
    run_main(main)
