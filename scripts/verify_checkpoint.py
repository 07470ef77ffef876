"""Say whether a checkpoint is whole: python scripts/verify_checkpoint.py runs/NAME/checkpoints/STAGE/step_00000123"""

from __future__ import annotations

import sys
from pathlib import Path

from lingen.errors import UserError, run_main
from lingen.manifest import problem_with


def main() -> int:
    """Exit 0 where every file is there with its sha256 and the pieces cover every parameter, else 1 with the reason."""
    if len(sys.argv) != 2:
        raise UserError(f"give the folder of one checkpoint, not {len(sys.argv) - 1} words")
    folder = Path(sys.argv[1])
    try:
        problem = problem_with(folder)
    except UserError as error:
        problem = str(error)
    print(f"{folder}: {problem or 'whole'}")
    return 1 if problem else 0


if __name__ == "__main__":
    run_main(main)
