"""``python scripts/bench.py`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_last_line_is_json() -> None:
    done = bench("scan", "tokens=[64]", "attention_tokens=[64]", "width=32", "head_dim=32", "rounds=1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == "scan" and result["tokens"] == [64]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scam"], "'scam' is no benchmark; did you mean 'scan'?"),
        (["scan", "attention_tokens=[5]"], "attention_tokens=[5] must be among tokens="),
    ],
)
def test_bad_words_exit_with_2_and_one_line(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout
