"""Encode clips once, before training: shards in, shards of latents out.

    python scripts/precompute.py data=SHARDS out=LATENTS stage=NAME|curriculum=NAME autoencoder=... [text=...]
        [windows=1] [dtype=fp16] [text_states=true] [workers=N] [batch_size=4] [samples_per_shard=256]

All other words are a run's (train.py): the stages say which buckets are encoded, at which rate. A training reads the
latents with data.path=LATENTS and the same words. The same command goes on where it was stopped; more processes, here
(workers=N) or under torchrun or srun, make the same files sooner. docs/data.md, Latents, says what is written.
"""

from __future__ import annotations

import os
import sys

from lingen.compose import HELP, compose, parse
from lingen.dist import find_place
from lingen.errors import EXIT_STOPPED, run_main
from lingen.latents.make import Words, precompute


def main(words: list[str]) -> int:
    """Write the latents; the last line on stdout says what was written."""
    own = [word for word in words if word in HELP or word.partition("=")[0] in Words.model_fields]
    asked = parse(Words, own)
    config = compose(["name=precompute", *(word for word in words if word not in own), f"data.path={asked.data}"])
    try:
        print(precompute(asked, config, find_place(os.environ)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
