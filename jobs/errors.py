"""One error type with three parts, and the only list of exit codes."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """The meaning of a command's exit status, on the laptop and on the box (DESIGN section 4)."""

    OK = 0
    INTERNAL = 1  # our fault; also Fabric's own parse errors
    USAGE = 2  # the job file or the command line
    UNFIT = 3  # the box cannot run this job
    TRAINING = 4  # training failed
    BUSY = 5  # another process holds the lock
    UNCERTAIN = 6
    LOST = 7
    UNREACHABLE = 8
    PREEMPTED = 75  # the same command resumes
    INTERRUPTED = 130  # Ctrl-C in the foreground
    CANCELLED = 143


class ToolkitError(Exception):
    """An error that says what happened, why, and what to do next; printed without a traceback.

    `what`, `why`, `hint` and `exit_code` have the same names in the error event, in `--json` and in
    a rank's last words.
    """

    parts: Sequence[ToolkitError] = ()  # of an error that `together` made

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        hint: str = "",
        exit_code: ExitCode = ExitCode.USAGE,
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.hint = what, why.strip(), hint.strip()
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.why:
            lines.append(_indented("why", self.why))
        if self.hint:
            lines += ["", _indented("hint", self.hint, margin="")]
        return "\n".join(lines)


def together(mistakes: Sequence[ToolkitError]) -> ToolkitError:
    """Make one error of several; of one alone, itself. What is said twice is said once."""
    several = list({str(part): part for mistake in mistakes for part in mistake.parts or (mistake,)}.values())
    if len(several) == 1:
        return several[0]
    lines = []
    for number, mistake in enumerate(several, start=1):
        said = [*mistake.why.splitlines(), *mistake.hint.splitlines()]
        lines += [f"{number}. {mistake.what}", *(f"   {line}" for line in said)]
    codes = {mistake.exit_code for mistake in several}
    error = ToolkitError(
        f"{len(several)} mistakes",
        why="\n".join(lines),
        hint="mend them all; nothing was begun",
        exit_code=codes.pop() if len(codes) == 1 else ExitCode.USAGE,
    )
    error.parts = several
    return error


TO_RESUME = "make room or mend the path, then the same command resumes"


def system_error(error: OSError, exit_code: ExitCode, hint: str = TO_RESUME) -> ToolkitError:
    """Make the error for a system call that failed: no space, no permission, not a folder."""
    if error.errno == errno.ENOSPC:
        what = f"the disk is full: {error.filename}" if error.filename else "the disk is full"
    else:
        what = f"cannot use {error.filename or 'a file of the run'}"
    return ToolkitError(
        what,
        why=error.strerror or str(error),
        hint=hint,
        exit_code=exit_code,
    )


def error_of_text(text: str, exit_code: ExitCode) -> ToolkitError | None:
    """Read back an error from the text that it is printed as; None if there is none.

    What stands before it is skipped. The exit code is not part of the text.
    """
    form = r"^error: (.*?)(?:\n  why: (.*?))?(?:\n\nhint: (.*?))?\s*\Z"
    found = re.search(form, text, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    what, why, hint = (part or "" for part in found.groups())
    why, hint = re.sub(r"\n {7}", "\n", why), re.sub(r"\n {6}", "\n", hint)
    return ToolkitError(what, why=why, hint=hint, exit_code=exit_code)


def _indented(label: str, text: str, margin: str = "  ") -> str:
    first, *rest = text.splitlines()
    return "\n".join([f"{margin}{label}: {first}", *(f"{margin}{' ' * len(label)}  {line}" for line in rest)])
