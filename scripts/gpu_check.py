"""All that is worth measuring on a GPU, in one command of minutes: ``make gpu-check``, or

    python scripts/gpu_check.py out=runs/gpu_check minutes=8.5

Numerics of every kernel in bf16 against fp64; latency of the 4B pair at 17, 34 and 68 s of 512p, wide and square; the
ablation; memory predicted and measured; a profile of one block. Needs one 80 GB GPU and the packages below, no network,
and no installation of this project. Each part is a process of its own: one that fails or is cut off takes nothing with
it, and those that find no time left are skipped. Leaves gpu_check.json and gpu_check.md in ``out``. Exit code 1 where
something failed, 2 where it cannot begin. ``small=true`` tries all of it on a tiny model, also without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # it need not be installed

from lingen.errors import UserError, run_main  # noqa: E402

if TYPE_CHECKING:
    from lingen.bench.gpu_parts import Part

PACKAGES = {  # what is imported, and the package that brings it
    "torch": "torch", "triton": "triton", "numpy": "numpy", "yaml": "pyyaml", "pydantic": "pydantic",
    "hydra": "hydra-core", "rich": "rich", "matplotlib": "matplotlib", "psutil": "psutil",
}  # fmt: skip
WORTH_STARTING_S = 20  # a part begins only where so much time is left


def main() -> int:
    """Run the parts one after the other; what is found so far is written after each."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{sys.executable} lacks {', '.join(missing)}; take another with CHECK_PYTHON=...")
    import torch

    from lingen.bench.gpu_parts import PARTS, CheckWords
    from lingen.bench.gpu_report import render
    from lingen.compose import parse
    from lingen.output import make_folder, writing

    words = parse(CheckWords, sys.argv[1:])
    if not words.small and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here, and there is nothing to check; small=true tries the check itself")
    out = Path(words.out)
    make_folder(out, out)
    deadline = time.monotonic() + 60 * words.minutes
    date, command = datetime.now(UTC).isoformat(timespec="seconds"), ["python", "scripts/gpu_check.py", *sys.argv[1:]]
    result: dict[str, Any] = {"date": date, "command": " ".join(command), "environment": {}, "parts": []}
    for part in PARTS:
        done = run_part(part, deadline, "small" if words.small else "full")
        result["environment"] |= done.pop("environment")
        result["parts"].append(done)
        with writing(out):
            (out / "gpu_check.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
            (out / "gpu_check.md").write_text(render(result), encoding="utf-8")
    print(f"\n{render(result)}\n{out / 'gpu_check.json'}\n{out / 'gpu_check.md'}")
    return int(any(part["status"] == "failed" for part in result["parts"]))


def run_part(part: Part, deadline: float, how: str) -> dict[str, Any]:
    """A part's name, status ("done", "failed", "cut off", "skipped"), seconds, findings, and a note on the status."""
    left = deadline - time.monotonic()
    done: dict[str, Any] = {"name": part.name, "status": "skipped", "seconds": 0.0, "note": "", "findings": []}
    if left < WORTH_STARTING_S:
        return done | {"note": "no time was left", "environment": {}}
    print(f"\n== {part.name}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        findings, errors = Path(folder) / "findings.jsonl", Path(folder) / "stderr"
        code = run_process([part.name, str(findings), how], errors, min(part.limit, left))
        lines = read_lines(findings)
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    done["seconds"] = round(time.monotonic() - began, 1)
    environment: dict[str, Any] = next((line.pop("environment") for line in lines if "environment" in line), {})
    done["findings"] = [line for line in lines if line]
    bad = [line for line in done["findings"] if "error" in line or line.get("ok") is False]
    if code is None:
        done |= {"status": "cut off", "note": f"after {done['seconds']:.0f} s"}
    elif code or bad:
        why = f"exit code {code}: {said[-1] if said else 'it said nothing'}" if code else f"{len(bad)} findings"
        done |= {"status": "failed", "note": why[:300]}
    else:
        done["status"] = "done"
    return done | {"environment": environment}


def run_process(words: list[str], errors: Path, seconds: float) -> int | None:
    """The exit code of a part's process; None where it had to be ended, with all that it started."""
    with errors.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "lingen.bench.gpu_parts", *words],
            cwd=ROOT,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The findings that were written whole."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one has no end yet
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    run_main(main)
