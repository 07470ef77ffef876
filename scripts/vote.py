"""Blind votes between two runs: python scripts/vote.py runs=[A,B] out=votes.jsonl

Opens a page on this machine (127.0.0.1) that shows each pair of videos side by side, on sides that are drawn by
seed=N, and appends every vote to the file. Ctrl-C ends it and prints how often each run was preferred; the same command
goes on. show=true prints that alone. Further keys: labels=[A,B], port=N (0: any), question="Which video is better?".
For people elsewhere, forward the port: ssh -L PORT:127.0.0.1:PORT HOST.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from lingen.compose import parse
from lingen.errors import UserError, run_main
from lingen.evaluation.folder import read_runs
from lingen.evaluation.vote_server import VoteServer
from lingen.evaluation.votes import VoteFile, as_table, pairs, tally


class Words(BaseModel):
    """The script's words."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    runs: Annotated[list[str], Field(min_length=2, max_length=2)]
    out: str  # the votes
    labels: list[str] | None = None
    seed: NonNegativeInt = 0  # of the order and the sides
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    question: str = "Which video is better?"
    show: bool = False


def main(given: list[str]) -> None:
    """Serve until Ctrl-C, then print the win rates.

    Raises:
        UserError: the words, the runs or the file of votes cannot be used.
    """
    words = parse(Words, given)
    runs = read_runs(words.runs, words.labels)
    if words.show and not Path(words.out).exists():
        raise UserError(f"out={words.out} does not exist; there are no votes to show")
    votes = VoteFile(Path(words.out), runs, seed=words.seed, shown=words.show)
    if not words.show:
        server = VoteServer(pairs(runs, words.seed), votes, port=words.port, question=words.question)
        for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
            signal.signal(ending, signal.default_int_handler)
        print(f"vote at {server.url}\nCtrl-C ends it; votes are in {words.out}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()  # as was said, it ends the voting; behind the terminal's ^C
        finally:
            server.server_close()
    print(as_table(tally(votes.votes, [run.name for run in runs])).as_text())
    votes.close()


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
