"""Train a model through one stage or a curriculum: ``python train.py name=NAME key=value ...``.

The route to ``optimizer.step()``: train.py -> lingen/loop.py -> lingen/step.py -> lingen/engine.py.
Rerunning the same command resumes. ``dry_run=true`` prints the plan and starts nothing.
"""

from __future__ import annotations

import sys

from lingen.dist import StopSignal
from lingen.errors import run_main

USAGE = """usage: python train.py name=NAME [group=choice ...] [key=value ...]

  name=demo/lingen            the run's folder below runs_dir
  curriculum=demo             the ordered stages; or stage=NAME init_from=CHECKPOINT for one of them
  dry_run=true                print the plan, allocate nothing
  stages.NAME.lr=1e-4         any key of lingen/config.py

groups:"""


def usage() -> str:
    """The usage, with the choices of every group that it may be given."""
    from lingen.compose import groups

    return "\n".join([USAGE, *(f"  {group}" for group in groups("config"))])


def main() -> int:
    """Compose, validate, hand over."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(usage())
        return 0
    stop = StopSignal()  # first of all: what follows takes seconds to import, in which a signal would kill
    from lingen.compose import compose

    config = compose(words)
    from lingen.loop import dry_run, train

    return dry_run(config) if config.dry_run else train(config, stop)


if __name__ == "__main__":
    run_main(main)
