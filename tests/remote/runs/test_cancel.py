"""What the box says of a cancel, and what a person gets to read. Expected texts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from env.settings import Provider
from jobs.errors import ExitCode, ToolkitError
from remote.runs.cancel import Cancelled, cancel

if TYPE_CHECKING:
    from tests.remote.conftest import Sshd


def cancelled(sshd: Sshd, folder: Path, run: str, said: str, *, held: str = "held") -> tuple[Cancelled, list[str]]:
    """Cancel on a box whose supervisor says these lines."""
    root = folder / "data" / "rlhf-box"
    supervisor = root / "code" / "0123456789abcdef" / "remote/on_box/supervisor.sh"
    supervisor.parent.mkdir(parents=True)
    supervisor.write_text(f"cat <<'END'\n{said}END\n")
    (root / ".rlhf-box").touch()
    (root / "deployed").write_text("code 0123456789abcdef\n")
    (root / "slot").mkdir()
    (root / "slot" / "run").write_text(f"{held}\n")
    words: list[str] = []
    with sshd.connection(folder / "state", box=sshd.box(data_folder=str(folder / "data"))) as connection:
        return cancel(connection, Provider.load_all(), run, "-", words.append), words


def test_it_names_its_run(sshd: Sshd, tmp_path: Path) -> None:
    ended, said = cancelled(sshd, tmp_path, "-", "term\nkill\nended 137\nfree\n")
    assert said[-2:] == ["asked the job of run `held` to end", "the grace is over: killing the job of run `held`"]
    assert ended.text() == (
        "run `held`: killed, since it did not end by itself, exit code 137\n"
        "nothing of it is left: none of its processes runs or holds GPU memory"
    )


def test_a_run_that_is_not_the_running_one_is_named_too(sshd: Sshd, tmp_path: Path) -> None:
    ended, _ = cancelled(sshd, tmp_path, "mine", "not_running\n")
    assert (ended.run, ended.text().splitlines()[0]) == ("mine", "run `mine`: no job of it is running")


@pytest.mark.parametrize(
    ("said", "code", "what"),
    [
        ("elsewhere host-2\n", ExitCode.BUSY, "run `held` is not cancelled: it runs on host-2, not on `gpu-box`"),
        ("unheard host-2 1000\n", ExitCode.UNCERTAIN, "run `held` is not cancelled: it ran on host-2, and whether"),
    ],
)
def test_a_job_of_another_host_is_never_said_to_be_gone(
    sshd: Sshd, tmp_path: Path, said: str, code: ExitCode, what: str
) -> None:
    with pytest.raises(ToolkitError) as caught:
        cancelled(sshd, tmp_path, "-", said)
    assert caught.value.what.startswith(what) and caught.value.exit_code == code
    assert "nothing of it is left" not in str(caught.value)


@pytest.mark.parametrize("said", ["elsewhere host-2\n", "unheard host-2 1000\n"])
def test_a_name_that_the_box_sends_is_quoted_in_a_command(sshd: Sshd, tmp_path: Path, said: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        cancelled(sshd, tmp_path, "-", said, held="$(pwned);x")
    assert caught.value.hint.startswith("fab cancel --run '$(pwned);x' --host THE-BOX, with")
