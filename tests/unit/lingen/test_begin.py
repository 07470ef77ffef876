"""Where a run begins, on ranks that do not find the same on their disks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen import begin
from lingen.compose import compose
from lingen.errors import UserError
from tests.unit.lingen.test_agreement import HERE, WORDS, Meeting, ThreadDist


def test_what_one_rank_refuses_all_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        if HERE.number == 1:
            raise UserError("another stage is further")

    monkeypatch.setattr(begin, "refuse_cutting_off", refuse)
    config, meeting, messages = compose([*WORDS, f"runs_dir={tmp_path}"]), Meeting(2), ["none", "none"]

    def run(rank: int) -> None:
        HERE.meeting, HERE.number = meeting, rank
        dist = ThreadDist(rank, 2, 0, torch.device("cpu"))
        try:
            begin.find_start(config, None, dist)  # type: ignore[arg-type]
        except UserError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert messages == ["another stage is further"] * 2
