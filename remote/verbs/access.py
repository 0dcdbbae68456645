"""Ways into a box: tunnel, shell, exec."""

from __future__ import annotations

import socket
import subprocess

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box
from remote.output import Sayer
from remote.runs.deployed import dispatch
from remote.verbs.base import DRY_RUN, HOST, HOSTS, JSON, VerbContext, hosts_of, on_each, one_host, to_json, verb

EXEC_S = 3600.0  # the longest that a command of `fab exec` may take


@verb(host=HOST, port="the port on the box, e.g. 6006", local_port="the port here (default: the same)", dry_run=DRY_RUN)
def tunnel(c: Context, host: str = "", port: int = 0, local_port: int = 0, dry_run: bool = False) -> int:
    """A port of the box on this machine's loopback, for as long as this runs: TensorBoard, Jupyter.

    fab tunnel --host gpu-box --port 6006
    """
    here = local_port or port
    if not all(0 < each < 65536 for each in (port, here)):
        raise ToolkitError("which port of the box?", hint="e.g. --port 6006")
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        argv = connection.stream(forward=[f"127.0.0.1:{here}:127.0.0.1:{port}"])
    if dry_run:
        say.command("here", argv)
        return ExitCode.OK
    try:
        socket.create_server(("127.0.0.1", here)).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ToolkitError(
            f"cannot listen at 127.0.0.1:{here}", why=why, hint="--local-port takes another port here"
        ) from None
    say(f"127.0.0.1:{here} is port {port} of {connection.box.name} until Ctrl-C")
    code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        hint = "the same command opens it again"
        raise ToolkitError(
            f"the tunnel to `{connection.box.name}` ended",
            why=f"ssh ended with exit code {code}",
            hint=hint,
            exit_code=ExitCode.UNREACHABLE,
        )
    return ExitCode.OK


@verb(host=HOST, dry_run=DRY_RUN)
def shell(c: Context, host: str = "", dry_run: bool = False) -> int:
    """A shell on the box, in our folder there. Agent forwarding is off.

    fab shell --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        argv = connection.stream(dispatch(connection.box, desk.providers, "shell"), tty=True)
    if dry_run:
        say.command("here", argv)
        return ExitCode.OK
    return subprocess.run(argv, check=False).returncode


@verb(host=HOSTS, command="what to run there, quoted", json_=JSON, dry_run=DRY_RUN)
def exec(c: Context, host: str = "", command: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Run one command on the box and end with its exit code. Several boxes: --host a,b

    fab exec --host gpu-box --command nvidia-smi
    """
    if not command.strip():
        raise ToolkitError("which command?", hint="--command 'nvidia-smi'")
    desk, names = VerbContext.open(dry_run=dry_run), hosts_of(c, host)

    def run_on_box(box: Box, say: Sayer) -> int:
        with desk.connection(box, say) as connection:
            answer = connection.change(["sh", "-c", command], timeout_s=EXEC_S, check=False)
        if json_:
            say.data(
                to_json(
                    {
                        "host": box.name,
                        "exit": answer.code,
                        "out": answer.out,
                        "err": answer.err,
                        "seconds": answer.seconds,
                    }
                )
            )
            return answer.code
        text = answer.out.rstrip("\n")
        if len(names) > 1:
            text = "\n".join(
                [f"== {box.name}" + (f", exit code {answer.code}" if answer.code else ""), *([text] if text else [])]
            )
        if text:
            say.data(text)
        if answer.err.strip():
            say(answer.err.rstrip("\n"))
        return answer.code

    return on_each(desk, names, run_on_box, Sayer(), as_json=json_)
