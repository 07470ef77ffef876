"""A Slurm for the drills, and a word about it where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Slurm, why_not

missing: list[str] = []  # why the drills under Slurm were skipped


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running two-node cluster. Without one the test is skipped, or fails where LINGEN_REQUIRE_SLURM is set."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("LINGEN_REQUIRE_SLURM"):
            pytest.fail(f"LINGEN_REQUIRE_SLURM is set, but {reason}")
        missing.append(reason)
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skipped drill is not a passed one."""
    if missing:
        terminalreporter.write_line(f"NOT TESTED under Slurm: {missing[0]}", yellow=True, bold=True)
