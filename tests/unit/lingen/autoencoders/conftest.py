"""Each class of VAE is made and saved once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vaes import save


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a class's random instance."""
    root = tmp_path_factory.mktemp("vaes")
    return lambda name: root / name if (root / name).exists() else save(root, name)
