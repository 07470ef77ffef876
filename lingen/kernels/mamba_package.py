"""mamba-ssm's modules without its package's ``__init__``, which loads a CUDA extension and every model it has."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "mamba_ssm"


@contextmanager
def bare_mamba_package() -> Iterator[None]:
    """Inside, ``import mamba_ssm.x.y`` runs x and y alone; afterwards ``import mamba_ssm`` is what it always was.

    Raises:
        ModuleNotFoundError: mamba-ssm is not installed.
    """
    if NAME in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{NAME}'", name=NAME)
    sys.modules[NAME] = importlib.util.module_from_spec(spec)  # not executed: it only says where its modules lie
    try:
        yield
    finally:
        del sys.modules[NAME]
