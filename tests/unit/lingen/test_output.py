from __future__ import annotations

from pathlib import Path

import pytest

from lingen.errors import UserError
from lingen.output import make_folder, writing


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    make_folder(folder, "here")
    assert list(folder.iterdir()) == []
    (folder / "mine").write_text("kept")
    make_folder(folder, "here")
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_folder_that_takes_no_files_is_named() -> None:
    with pytest.raises(UserError, match=r"^out=/proc/x\.json cannot be written: "):
        make_folder(Path("/proc"), "/proc/x.json")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("No space left on device")])
def test_what_the_disk_refuses_is_told_in_its_words(error: OSError) -> None:
    with pytest.raises(UserError, match=r"^out=o cannot be written: No space left on device$"), writing("o"):
        raise error


def test_other_errors_are_not_the_disk_s() -> None:
    with pytest.raises(ValueError, match="mine"), writing("o"):
        raise ValueError("mine")
