"""At start, every rank says what it is about to run; one that would run something else is named, before it trains.

A node with an older checkout, another environment or a stale copy of the data or the autoencoder makes a run that no
one can repeat.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingen.config import RunConfig
from lingen.dist import Dist
from lingen.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("train.py", "scripts/train_autoencoder.py", "lingen/**/*.py", "data/**/*.py")
PACKAGES = ("torch", "deepspeed", "numpy")
MISSING = "missing"
NAMED = 4  # so many ranks, and so many differences, are named; the others are counted
Table = dict[str, str]  # what is compared: its name and its value


def refuse_disagreement(config: RunConfig, index_fingerprint: str, frozen: Mapping[str, str], dist: Dist) -> None:
    """Return where all ranks have the same code, configuration, data index and frozen networks. Collective.

    ``frozen``: their fingerprints, by the part of the configuration that they are of, such as "autoencoder".

    Digests are compared first; only where they differ do rank 0 and the first of the others show what is behind.

    Raises:
        UserError: some rank differs from rank 0; on all ranks, with those ranks, their hosts and what differs.
    """
    tables = dist.together(lambda: tables_of(config, index_fingerprint, frozen))
    digests = {kind: hashlib.sha256(json.dumps(table).encode()).hexdigest() for kind, table in tables.items()}
    everyone = dist.gather({"host": socket.gethostname(), **digests})
    others = {kind: [rank for rank, one in enumerate(everyone) if one[kind] != everyone[0][kind]] for kind in tables}
    others = {kind: ranks for kind, ranks in others.items() if ranks}
    if not others:
        return
    shown = dist.gather({kind: tables[kind] for kind, ranks in others.items() if dist.rank in (0, ranks[0])})
    first = f"rank 0 ({everyone[0]['host']})"
    problems = []
    for kind, ranks in others.items():
        who = listed([f"rank {rank} ({everyone[rank]['host']})" for rank in ranks], "ranks")
        what = listed(differences(shown[0][kind], shown[ranks[0]][kind]), "differences")
        problems.append(f"{who}: another {kind} than {first}: {what}")
    raise UserError(f"{'; '.join(problems)}; start all ranks from one checkout, environment, data and frozen networks")


def tables_of(config: RunConfig, index_fingerprint: str, frozen: Mapping[str, str]) -> dict[str, Table]:
    """What this rank is about to run, by kind.

    Raises:
        OSError: a source file cannot be read.
    """
    return {
        "code": code(),
        "configuration": flat(config.model_dump(mode="json")),
        "data index": {"the fingerprint of data.path": index_fingerprint[:12]},
    } | {what: {f"the fingerprint of {what}.path": found[:12]} for what, found in frozen.items()}


def code() -> Table:
    """The digest of each source file, and the versions of what it runs on."""
    found = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    paths = [path for path in found if not path.name.startswith(".")]  # an editor's, such as Emacs' lock, a dead link
    files = {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES} | files


def version(package: str) -> str:
    """The installed version of ``package``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def flat(tree: Mapping[str, Any], above: str = "") -> Table:
    """The values of nested sections by their dotted keys, as JSON."""
    table: Table = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            table |= flat(value, f"{above}{key}.")
        else:
            table[above + key] = json.dumps(value)
    return table


def differences(there: Table, here: Table) -> list[str]:
    """Each key whose value in ``here`` is not that in ``there``, with both."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    found = [f"{key} is {here.get(key, MISSING)}, not {there.get(key, MISSING)}" for key in keys]
    return found or ["the order of its keys"]


def listed(parts: list[str], what: str) -> str:
    """The first of ``parts``, and how many more there are."""
    more = f" and {len(parts) - NAMED} more {what}" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more
