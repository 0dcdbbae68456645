"""Send a run's numbers to the trackers of its job, and never harm the run.

Each tracker has a process, sender.py. Its library takes seconds to import and to connect, may hang
or crash, and starts processes of its own: training waits for none of that.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from jobs.errors import ExitCode, ToolkitError
from jobs.events import RawEvent
from jobs.run_dir import RunDir
from rlhf_train.trackers import sender

CHECKOUT = Path(__file__).parents[2]
POLL_S = 0.05
LEAST_FREE = 2**16  # bytes of a disk; with less, files of a tracker lack numbers, and it says nothing of that
SAID_S = 2.0  # of waiting for a tracker at the end, until that is said


def refuse_missing(track: Sequence[str], flavour: str = "") -> None:
    """Raise ToolkitError (usage) if a tracker of the job is not installed.

    flavour: of this stack, if it is one: its locked packages are not to be replaced. trackio asks
    for a newer huggingface_hub than the transformers of cu118 takes.
    """
    missing = [name for name in track if not _is_installed(name)]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        there = ", ".join(name for name in track if name not in missing)
        raise ToolkitError(
            f"the job's field `track` names {' and '.join(missing)}, which this Python has not",
            why=f"flavour {flavour} is made without it"
            if flavour
            else f"trackers are optional: {sys.executable} finds no package of that name",
            hint=f"--set 'track=[{there}]'" if flavour else f"{install}, or --set 'track=[{there}]'",
            exit_code=ExitCode.USAGE,
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name has no origin: wandb makes one


def environment_of(run: RunDir, environ: Mapping[str, str]) -> dict[str, str]:
    """Return a tracker's variables: the user's, and what we choose where the user does not."""
    ours = {
        "WANDB_PROJECT": sender.PROJECT,
        "WANDB_DIR": str(run.path.resolve()),  # it makes `wandb` in there
        "WANDB_INIT_TIMEOUT": "20",  # seconds; a network that is away is noticed while the run lasts
        # Numbers and the job are sent, and nothing else of this machine.
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_X_DISABLE_META": "true",
        "WANDB_X_DISABLE_STATS": "true",
        "WANDB_X_SAVE_REQUIREMENTS": "false",
    }
    paths = [str(CHECKOUT), environ.get("PYTHONPATH")]
    python = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**ours, **environ, **python}


def folder_of(name: str, environ: Mapping[str, str]) -> Path:
    """Return the folder in which a tracker keeps what it gets, by its own variables."""
    if name == "wandb":
        return Path(environ.get("WANDB_DIR") or ".")
    return Path(environ.get("TRACKIO_DIR") or environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < LEAST_FREE
    except OSError:  # it is not there yet
        return False


class Trackers:
    """The trackers' processes, fed by the run's event file.

    They start at the first update, when no rank imports any more. What goes wrong with one of them
    is said once, by `warn`.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: RunDir,
        environ: Mapping[str, str],
        log: IO[bytes],
        warn: Callable[[str], object],
    ) -> None:
        self._names, self._run, self._environ, self._log, self._warn = names, run, environ, log, warn
        self._offset = run.events.stat().st_size if run.events.exists() else 0  # earlier events were sent
        self._deadline = math.inf
        self._senders: list[_Sender] | None = None

    def feed(self, event: RawEvent) -> None:
        if event["kind"] == "metrics" and self._senders is None:
            self._senders = [*filter(None, map(self._start, self._names))]

    def renew(self) -> None:
        """Say what went wrong since the last call."""
        for each in self._senders or ():
            each.look(self._warn)

    def end_before(self, deadline: float) -> None:
        """Let `close` wait no longer than until then, by the monotonic clock."""
        self._deadline = deadline

    def close(self, is_hurried: Callable[[], bool], tell: Callable[[str], object]) -> None:
        """Wait until all that is left is sent, not for too long, and end the processes."""
        senders, begun, is_said = self._senders or [], time.monotonic(), False
        for each in senders:
            each.ask_to_end()
        while left := [each for each in senders if each.process.poll() is None]:
            now = time.monotonic()
            if now > min(begun + sender.LAST_S, self._deadline) or is_hurried():
                break
            if now > begun + SAID_S and not is_said:
                tell(f"sending the last numbers to {' and '.join(each.name for each in left)}")
                is_said = True
            time.sleep(POLL_S)
        self.renew()  # what a process has said of itself comes first
        for each in left:
            each.kill(self._warn)
        self._senders = []

    def _start(self, name: str) -> _Sender | None:
        try:
            return _Sender(name, self._run, self._offset, environment_of(self._run, self._environ), self._log)
        except OSError as error:  # no process or no memory is left
            self._warn(f"{name} gets no numbers: {error}")
            return None


class _Sender:
    """One tracker's process."""

    def __init__(self, name: str, run: RunDir, offset: int, environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.name, self._text, self._is_told = name, b"", False
        self._is_asked = False
        self._folder = folder_of(name, environment)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_train.trackers.sender", name, str(run.path), str(offset)],
            stdin=subprocess.PIPE,  # closes when this process ends
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the launcher alone; and no terminal is asked for a key
        )
        os.set_blocking(self._stdout.fileno(), False)

    @property
    def _stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def look(self, warn: Callable[[str], object]) -> None:
        """Say once what went wrong, if something did."""
        if self._is_told:
            return
        code = self.process.poll()  # before the pipe is read: a process writes before it ends
        self._text += self._stdout.read() or b""
        line, newline, _ = self._text.decode(errors="replace").partition("\n")
        if newline:
            self._say(line, warn)
        elif is_full(self._folder):
            self._say(f"{self.name}: the disk of {self._folder} is full, so numbers are missing there", warn)
        elif code is not None and (code or not self._is_asked):
            self._say(f"{self.name}: its process ended with {code}", warn)

    def ask_to_end(self) -> None:
        self._is_asked = True
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def kill(self, warn: Callable[[str], object]) -> None:
        """End the process; what it has started ends with it."""
        self.process.kill()
        self.process.wait()
        self._say(f"{self.name}: not all of the last numbers could be sent in time", warn)

    def _say(self, text: str, warn: Callable[[str], object]) -> None:
        if not self._is_told:
            warn(f"{text} (the run does not need it; more in train.log)")
        self._is_told = True
