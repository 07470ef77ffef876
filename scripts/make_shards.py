"""Turn captioned videos and images into WebDataset shards with an index.

    python scripts/make_shards.py input=DIR output=DIR [manifest=FILE] [samples_per_shard=256] [max_bad_share=0.05]
        [workers=N] [scenes=true] [window_seconds=10] [min_side=256] [min_seconds=2] [min_luma=16] [min_motion=1] ...

The input is a folder of files, each with a caption beside it (NAME.txt, or NAME.json with "caption"); a manifest (.csv,
.jsonl or .parquet: path, caption and, for a part of a video, start and end in seconds); or a folder of .tar shards that
other tools wrote, which are indexed where they lie (shards=rewrite copies them). docs/data.md explains all words.

What cannot be used is skipped, named in OUTPUT/rejected.jsonl, counted in OUTPUT/report.json and shown in
OUTPUT/report.html. The input is never changed. The same command goes on where it was stopped.
"""

from __future__ import annotations

import sys

from data.collect.run import collect
from data.collect.words import Words
from lingen.compose import parse
from lingen.errors import EXIT_STOPPED, run_main


def main(words: list[str]) -> int:
    """Write the shards; the last line on stdout says what was written.

    Raises:
        UserError: no input, an output that is in use or cannot be written, a bad manifest, or more bad samples than
            ``max_bad_share``.
    """
    try:
        print(collect(parse(Words, words)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
