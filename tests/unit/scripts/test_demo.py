"""What the demo's commands run in."""

from __future__ import annotations

import pytest

from scripts.demo import environment


def test_the_cores_are_shared_out_where_nobody_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(3)["OMP_NUM_THREADS"] == "3" and "OMP_NUM_THREADS" not in environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment(3)["OMP_NUM_THREADS"] == "1"
