from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from env.settings import Provider
from jobs.errors import ExitCode, ToolkitError
from remote.results.run_contents import FetchedRun, FetchedStep, FinishedStep, NewestCheckpoint, Results, Run
from remote.results.stop_card import StopCard, card_of, fate_of, may_stop, stop, stop_command
from remote.scripts import script

if TYPE_CHECKING:
    from tests.remote.conftest import Sshd

KNOWN = Provider.load_all()
A, B = "a" * 64, "b" * 64
NOW = 1_764_000_000.0  # 2025-11-24
SAFE = {"tiny": FetchedRun("", 0, 10, {1: FetchedStep(A, B)})}
TINY = Run("tiny", 10, {1: FinishedStep(A, 2_000_000_000)})


def card(
    provider: str = "autodl",
    root: str = "",
    *,
    running: str | None = None,
    runs: tuple[Run, ...] = (TINY,),
    fetched: Any = SAFE,
) -> StopCard:
    root = root or {"autodl": "/root/autodl-tmp/rlhf-box"}.get(provider, "/root/rlhf-box")
    return card_of(
        "box",
        KNOWN[provider],
        Results(root, True, running, runs),
        fetched,
        home="/root",
        now=NOW,
        price_per_hour=1.98,
        currency="¥",
    )


def refusal(shown: StopCard, *, yes: bool = False) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        may_stop(shown, yes=yes)
    return caught.value


def test_a_card_says_all_that_matters() -> None:
    rows = card(runs=(TINY, Run("other", 5, {}, {2: NewestCheckpoint(40, A, 14_000_000_000)})), fetched=SAFE).lines()
    text = [f"{label}: {said}" for label, said in rows]
    assert text == [
        "box: box, AutoDL",
        "meter: stops (¥1.98/h)",
        "disk: costs nothing while the box is stopped; "
        "an enlargement of the data disk costs money each day, stopped or not",
        "folder: /root/autodl-tmp: kept, for 15 days; when the box is given back: lost (not part of a saved image, "
        "nor of a move to another host)",
        "folder: /root/autodl-fs: kept; when the box is given back: kept",
        "folder: /: kept, for 15 days; when the box is given back: lost",
        "our folder: /root/autodl-tmp/rlhf-box survives a stop",
        "deadline: the data is deleted after 15 days, about 2025-12-09; an empty account stops the box, too",
        "start again: it starts again only if its host has a free card then",
        "running: no job",
        "not fetched: run `other`: the checkpoint of step 2, update 40, 14 GB",
        "not fetched: run `other`: its events and its log, 5 bytes",
    ]
    assert json.loads(json.dumps(card(running="tiny").as_json()))["running"] == "tiny"


@pytest.mark.parametrize(
    ("provider", "root", "fate", "meter"),
    [
        ("runpod", "/workspace/rlhf-box", "kept", "stops"),
        ("runpod", "/root/rlhf-box", "lost", "stops"),
        ("runpod", "/workspaces/rlhf-box", "lost", "stops"),  # not in /workspace
        ("vast", "/workspace/rlhf-box", "kept", "stops"),
        ("lambda", "/lambda/nfs/mine/rlhf-box", "kept", "KEEPS RUNNING"),
        ("generic", "/root/rlhf-box", "unknown", "not known"),
        ("generic", "/data/rlhf-box", "unknown", "not known"),
    ],
)
def test_which_folder_survives(provider: str, root: str, fate: str, meter: str) -> None:
    shown = card(provider, root)
    rows = dict(shown.lines())
    assert shown.root_fate == fate and rows["meter"].startswith(meter)
    assert {"kept": "survives a stop", "lost": "LOST", "unknown": "may not survive"}[fate] in rows["our folder"]
    assert fate_of("", shown.folders) == "unknown"


def test_nothing_is_stopped_while_something_would_be_lost() -> None:
    may_stop(card())
    error = refusal(card(fetched={}))
    assert error.exit_code == ExitCode.UNFIT and error.why == "2 GB, named above"
    assert error.hint == "fab fetch --host box --run tiny\nor --yes to stop the box anyway"
    error = refusal(card(running="tiny"))
    assert error.exit_code == ExitCode.BUSY and "fab cancel --host box --run tiny" in error.hint
    may_stop(card(running="tiny", fetched={}), yes=True)
    hint = refusal(card(running="$(touch pwned);x")).hint
    assert hint.startswith("fab cancel --host box --run '$(touch pwned);x' saves a checkpoint")


def test_a_box_whose_meter_goes_on_is_not_shut_down() -> None:
    for shown in (card("lambda"), replace(card("lambda"), command=("shutdown", "now"))):
        with pytest.raises(ToolkitError) as caught:
            stop_command(shown)
        assert (
            caught.value.exit_code == ExitCode.UNFIT
            and "does not stop its meter" in caught.value.what
            and "Terminate" in caught.value.hint
        )
    with pytest.raises(ToolkitError, match="cannot stop itself") as caught:
        stop_command(card("generic"))
    assert "page where the box was rented" in caught.value.hint


@pytest.mark.parametrize("provider", ["autodl", "vast", "runpod"])
def test_a_key_is_in_no_argument(provider: str) -> None:
    argv = stop_command(card(provider))
    stop_facts = KNOWN[provider].stop
    assert argv == ["sh", "-s", "--", "stop", "/proc/1/environ", *stop_facts.variables, "--", *stop_facts.command]


def test_variables_of_the_first_process(tmp_path: Path) -> None:
    environ, key = tmp_path / "environ", "a key; $(x)\nwith lines\n"
    environ.write_bytes(b"\0".join([b"OTHER=MY_KEY=no", f"MY_KEY={key}".encode(), b"MY_ID=7"]) + b"\0")
    command = ["sh", "-c", 'printf "%s|%s|%s|%s" "$MY_KEY" "$MY_ID" "${OTHER-none}" "$1"', "sh", "-- a b"]
    words = ["sh", "-s", "--", "stop", str(environ), "MY_KEY", "MY_ID", "MISSING", "--", *command]
    answer = subprocess.run(
        words, input=script("results.sh"), capture_output=True, env={"PATH": os.environ["PATH"]}, check=True
    )
    assert answer.stdout.decode() == f"\nbegin\n{key}|7|none|-- a b"
    words[5] = "x;touch pwned"
    assert (
        subprocess.run(words, input=script("results.sh"), capture_output=True, cwd=tmp_path, check=False).returncode
        == 2
    )


def own(command: list[str], variables: tuple[str, ...] = ()) -> StopCard:
    return replace(card(), command=tuple(command), variables=variables)


def test_stop_runs_the_command_in_the_box(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "a b"
    with sshd.connection(tmp_path / "state") as connection:
        assert (
            stop(connection, own(["sh", "-c", 'echo "$1" >"$1"; echo going down', "sh", str(file)])).said
            == "going down"
        )
        assert file.exists()
        with pytest.raises(ToolkitError, match="was not stopped") as caught:
            stop(connection, own(["sh", "-c", "echo no such client; exit 127"]))
        assert "exit code 127: no such client" in caught.value.why and "关机" in caught.value.hint
        file.unlink()
        with pytest.raises(ToolkitError, match="nowhere else"):
            stop(connection, replace(own(["touch", str(file)]), unfetched=card(fetched={}).unfetched))
    with sshd.connection(tmp_path / "state", dry_run=True) as connection:
        stop(connection, own(["touch", str(file)]))
    assert not file.exists()


def test_a_box_that_goes_down_takes_the_line_with_it(
    own_sshd: Sshd, tmp_path: Path, wait_for: Callable[[Path], None]
) -> None:
    down = tmp_path / "down"

    def go_down() -> None:
        wait_for(down)
        own_sshd.stop()

    thread = threading.Thread(target=go_down)
    thread.start()
    with own_sshd.connection(tmp_path / "state") as connection:
        stopped = stop(connection, own(["sh", "-c", 'touch "$1"; sleep 30', "sh", str(down)]))
    thread.join()
    assert stopped.broke
    with (
        own_sshd.connection(tmp_path / "state") as connection,
        pytest.raises(ToolkitError) as caught,
    ):  # it was down before
        stop(connection, own(["true"]))
    assert caught.value.exit_code == ExitCode.UNREACHABLE


@pytest.fixture
def wait_for() -> Callable[[Path], None]:
    def wait(path: Path) -> None:
        until = time.monotonic() + 20
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.02)

    return wait
