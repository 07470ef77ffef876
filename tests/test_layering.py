"""The shape of the code: who may import whom, how long a file and a function may be, and what no file may mention.

A module imports from its own row or from rows above it. A new module gets a row here, or this test names it.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# fmt: off
ROWS = (
    ("lingen.errors", "lingen.files", "lingen.adacache_config", "lingen.autoencoder_config", "lingen.cache_config",
     "lingen.config", "lingen.model_config", "lingen.operation_config", "lingen.reuse_config", "lingen.stage_config",
     "lingen.tae_config", "lingen.text_config", "lingen.compose"),
    ("lingen.agreement", "lingen.curriculum", "lingen.dist", "lingen.guard", "lingen.lease", "lingen.output",
     "lingen.runfolder", "lingen.watchdog"),
    ("data", "lingen.kernels"),
    ("lingen.models",),
    ("lingen.autoencoders", "lingen.text"),
    ("lingen.flow",),
    ("lingen.engine", "lingen.engines", "lingen.ema"),
    ("lingen.checkpoint", "lingen.manifest", "lingen.saver", "lingen.shardfiles", "lingen.export", "lingen.metrics",
     "lingen.sinks"),
    ("lingen.sampling",),
    ("lingen.begin", "lingen.diffusion", "lingen.lineage", "lingen.latents", "lingen.run", "lingen.records",
     "lingen.loop", "lingen.memory", "lingen.pipeline", "lingen.pipeline_folder", "lingen.pipeline_output",
     "lingen.plan", "lingen.sampling_memory", "lingen.sampling_plan", "lingen.step", "lingen.tae_export",
     "lingen.tae_task", "lingen.task", "lingen.tasks", "lingen.validation"),
    ("lingen.bench", "lingen.calibration", "lingen.cluster", "lingen.comparison", "lingen.evaluation",
     "lingen.preview"),
    ("lingen.trial",),
    ("scripts", "slurm.launch", "train"),
)
# Rooms that see less than the rows above them.
ONLY = {
    "data": ("lingen.errors", "lingen.files", "lingen.autoencoder_config", "lingen.config", "lingen.model_config",
             "lingen.operation_config", "lingen.stage_config", "lingen.text_config", "lingen.compose", "data"),
    "lingen.kernels": ("lingen.kernels",),
    "lingen.models": ("lingen.errors", "lingen.config", "lingen.model_config", "lingen.text_config", "lingen.kernels",
                      "lingen.models"),
}
# fmt: on
FILE_LINES = 350
FUNCTION_LINES = 60
# Machine paths, package registries and trackers; written in pieces, so that this file does not mention them itself.
FORBIDDEN = re.compile(
    r"/wo"
    r"rk/|/tm"
    r"p/v\b|/ro"
    r"ot/|/ho"
    r"me/\w|py"
    r"pi\.org|python"
    r"hosted\.org|npm"
    r"js\.|\bissue"
    r"s? #?\d",
    re.IGNORECASE,
)

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("lingen", "data", "scripts", "slurm", "train")


def python_files(*folders: str) -> list[Path]:
    """The files below ``folders``, train.py and slurm/launch.py."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*files, *ROOT.glob("train.py"), *ROOT.glob("slurm/*.py")]


def module_name(path: Path) -> str:
    """lingen/models/__init__.py -> lingen.models"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of ours, wherever it stands; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        origin = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
        for name in (f"{origin}{alias.name}" for alias in node.names):
            if name.startswith(".") or name.split(".")[0] in ROOMS:
                yield node.lineno, name


def below(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def row_of(name: str) -> int | None:
    return next((i for i, row in enumerate(ROWS) if any(below(name, room) for room in row)), None)


def import_problems(module: str, source: str) -> list[str]:
    """What ``module`` imports though it may not, as 'LINE: why'."""
    row = row_of(module)
    if row is None:
        return (
            []
            if module == "lingen" and not list(imports(source))
            else [f"1: {module} has no row in {Path(__file__).name}"]
        )
    problems = []
    for line, name in imports(source):
        target = row_of(name)
        allowed = next((only for room, only in ONLY.items() if below(module, room)), None)
        if name.startswith("."):
            problems.append(f"{line}: {module} imports {name}; write the absolute name")
        elif target is None:
            problems.append(f"{line}: {module} imports {name}, which has no row in {Path(__file__).name}")
        elif target > row:
            problems.append(f"{line}: {module} (row {row}) imports {name} (row {target}): upward")
        elif allowed and not any(below(name, room) for room in allowed):
            problems.append(f"{line}: {module} imports {name}; it may import only {', '.join(allowed)}")
    return problems


def long_functions(source: str) -> list[str]:
    return [
        f"{node.lineno}: {node.name} has {length} lines, more than {FUNCTION_LINES}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]


def forbidden_words(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [f"{i}: mentions '{found[0]}'" for i, line in lines if (found := FORBIDDEN.search(line))]


def report(problems: dict[Path, list[str]]) -> list[str]:
    """One 'FILE:LINE: why' for each problem."""
    return [f"{path.relative_to(ROOT)}:{problem}" for path, found in problems.items() for problem in found]


def test_no_module_imports_upward() -> None:
    files = python_files("lingen", "data", "scripts")
    assert not report({path: import_problems(module_name(path), path.read_text()) for path in files})


def test_rows_name_modules_that_exist() -> None:
    known = {module_name(path) for path in python_files("lingen", "data", "scripts")}
    assert {room for row in ROWS for room in row} <= known


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files("lingen", "data", "scripts", "tests")}
    assert not report({path: [f"{n}: more than {FILE_LINES} lines"] for path, n in lengths.items() if n > FILE_LINES})


def test_functions_are_short() -> None:
    assert not report({path: long_functions(path.read_text()) for path in python_files("lingen", "data", "scripts")})


def test_no_tracked_text_mentions_a_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    problems = {}
    for path in (ROOT / name for name in listed.split("\0") if name):
        try:
            problems[path] = forbidden_words(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # a picture, a file that was just deleted
    assert problems
    assert not report(problems)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        (
            "lingen.flow",
            "from lingen.loop import run",
            "1: lingen.flow (row 5) imports lingen.loop.run (row 9): upward",
        ),
        (
            "lingen.flow",
            "def f():\n    from lingen import loop",
            "2: lingen.flow (row 5) imports lingen.loop (row 9): upward",
        ),
        (
            "lingen.models.block",
            "import data.batch",
            "1: lingen.models.block imports data.batch; it may import only lingen.e",
        ),
        (
            "data.shards",
            "from lingen.dist import Dist",
            "1: data.shards imports lingen.dist.Dist; it may import only lingen",
        ),
        ("lingen.flow", "from . import dist", "1: lingen.flow imports ..dist; write the absolute name"),
        ("lingen.flow", "import lingen.new", "1: lingen.flow imports lingen.new, which has no row in test_layering.py"),
        ("lingen.new", "", "1: lingen.new has no row in test_layering.py"),
        ("lingen.loop", "import torch\nfrom lingen.flow import shift\nfrom data.batch import Batch", None),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, expected: str | None) -> None:
    problems = import_problems(module, source)
    assert len(problems) == (expected is not None)
    assert expected is None or problems[0].startswith(expected)


def test_a_long_function_and_a_forbidden_word_are_found() -> None:
    body = "    pass\n" * FUNCTION_LINES
    assert long_functions(f"x = 1\ndef f():\n{body}") == ["2: f has 61 lines, more than 60"]
    word = "/wo" + "rk/"
    assert forbidden_words(f"fine\ncd {word}main") == [f"2: mentions '{word}'"]
    assert not forbidden_words("a framework/model, the network/head, an issue, runs/demo")
