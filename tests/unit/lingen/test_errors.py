"""How a script ends."""

from __future__ import annotations

import pytest

from lingen.errors import run_main


@pytest.mark.parametrize(("rank", "said"), [(None, "stopped\n"), ("0", "stopped\n"), ("1", "")])
def test_ctrl_c_ends_in_one_line_of_the_first_rank(
    rank: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_main(interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == said
