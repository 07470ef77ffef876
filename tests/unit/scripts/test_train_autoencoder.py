"""The command itself; tests/integration/test_train_autoencoder.py has what it does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import lingen.compose
import train
from scripts import train_autoencoder

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("module", ["train", "scripts.train_autoencoder"])
def test_a_signal_that_comes_during_the_imports_only_asks(
    module: str, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing slow is imported with the command, and the handlers are there before the configuration is composed."""
    slow = "[name for name in ('torch', 'pydantic', 'hydra') if name in sys.modules]"
    code = f"import json, sys, {module}; print(json.dumps({slow}))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []

    def compose(*words: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        raise ProcessLookupError("it lived on")

    monkeypatch.setattr(lingen.compose, "compose_run", compose)
    monkeypatch.setattr(sys, "argv", [module, "name=a"])
    with pytest.raises(ProcessLookupError):
        {"train": train, "scripts.train_autoencoder": train_autoencoder}[module].main()
