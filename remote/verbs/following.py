"""What `fab logs` and `fab train` do with a run that is watched, and what they say at its end.

What draws it takes a while to import, so `fab logs` imports this file while ssh logs in.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace

from jobs.errors import ExitCode, ToolkitError
from remote.output import Sayer
from remote.runs import frames, views, watch
from remote.runs.deployed import NOT_DEPLOYED, not_deployed, open_stream
from remote.ssh.connection import BoxConnection
from remote.ssh.login import BY_A_PERSON
from remote.verbs.base import VerbContext


def follow_run(
    context: VerbContext,
    connection: BoxConnection,
    at: views.WatchedRun,
    view: views.View,
    *,
    once: bool = False,
    limits: frames.StreamTimeouts = watch.LIMITS,
    lines: int = 0,
) -> watch.Watched:
    return watch.follow(
        open_stream(connection, context.providers),
        view,
        at,
        once=once,
        refused=refused(connection),
        limits=limits,
        lines=lines,
    )


def refused(connection: BoxConnection) -> Callable[[int, str], ToolkitError | None]:
    """Make a function that recognises an end of the connection after which retrying is useless.

    It returns the error to raise, from ssh's exit code and last words, or None.
    """

    box = connection.box

    def judge(code: int, last_words: str) -> ToolkitError | None:
        key_changed = "Host key verification failed" in last_words or "HOST IDENTIFICATION HAS CHANGED" in last_words
        if code == NOT_DEPLOYED:
            return not_deployed(box)
        if code == 255 and key_changed:
            what = f"`{box.name}` shows another host key"
            hint = (
                f"if the box was set up again, `fab trust --host {box.name} --replace`; "
                "if not, do not continue: somebody may be intercepting the connection"
            )
        elif code == 255 and "Permission denied" in last_words and connection.was_asked:
            what = f"the connection to `{box.name}` broke, and only you can log in there"
            hint = f"the job is not affected; to watch it again: fab logs --follow --host {shlex.quote(box.name)}"
        elif code == 255 and "Permission denied" in last_words:
            what, host = f"`{box.name}` refuses your key", shlex.quote(box.name)
            hint = f"fab doctor --host {host} says which keys were offered"
            methods = re.findall(r"Permission denied \(([^)]*)\)", last_words)
            if {*",".join(methods).split(",")} & {*BY_A_PERSON}:  # with which `fab trust` could log in
                hint = f"fab trust --host {host}"
        else:
            return None
        return ToolkitError(what, why=last_words.strip(), hint=hint, exit_code=ExitCode.UNREACHABLE)

    return judge


def code_of(watched: watch.Watched, context: VerbContext, connection: BoxConnection, run: str, say: Sayer) -> int:
    """Say what to do next, and return the job's own exit code if its end was seen."""
    if not watched.done:
        return ExitCode.INTERRUPTED if watched.stopped and not watched.job else ExitCode.OK
    code = watched.exit if watched.exit is not None else int(ExitCode.LOST)
    host = shlex.quote(connection.box.name)
    if code == ExitCode.OK:
        say(f"bring the results home: fab fetch --host {host} --run {shlex.quote(run)}")
        if watched.last is None or watched.last.get("step") != 2:  # the reward model answers nothing
            say(f"talk to it: fab chat --host {host} --run {shlex.quote(run)}")
    elif watched.last is None:
        say("the job ended before it could train; its output:")
        at = views.WatchedRun(connection.box.name, run)
        follow_run(context, connection, at, views.RawLog(sys.stderr, "output"), once=True)
    elif code in (ExitCode.PREEMPTED, ExitCode.LOST):
        say("the same command resumes it")
    return code


def show(
    context: VerbContext,
    connection: BoxConnection,
    at: views.WatchedRun,
    view: views.View,
    say: Sayer,
    *,
    follow: bool,
    raw: bool,
    lines: int,
) -> int:
    """Show a run as `fab logs` does, and return the exit code. Its flags have the same names."""
    # If the box never answers, the connection is not broken: the address may be wrong.
    limits = replace(watch.LIMITS, first_tries=2)
    watched = follow_run(context, connection, at, view, once=not follow, limits=limits, lines=lines)
    if raw and not watched.offset and not watched.stopped:  # the job ended before there was a log
        follow_run(context, connection, at, views.RawLog(sys.stdout, "output"), once=True)
    run = at.run or (watched.job.words.get("run", "") if watched.job else "")
    return code_of(watched, context, connection, run, say) if follow else ExitCode.OK
