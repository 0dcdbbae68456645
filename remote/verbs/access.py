"""The verbs that open a way into a box: tunnel, shell, exec, chat."""

from __future__ import annotations

import socket
import subprocess
import sys

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box
from remote.output import Sayer
from remote.runs.deployed import find_deployment, our_root
from remote.ssh import commands
from remote.verbs.base import DRY_RUN, HOST, HOSTS, JSON, VerbContext, hosts_of, on_each, one_host, to_json, verb
from remote.verbs.tunnel import State, forbidden, open_tunnel

OPENSSH_FAILED = 255  # its exit code where the command's is not known; it has said why
EXEC_S = 3600.0  # the longest that a command of `fab exec` may take


@verb(
    host=HOST,
    port="the port on the box, e.g. 6006",
    local_port="the port on this machine (default: the same)",
    dry_run=DRY_RUN,
)
def tunnel(c: Context, host: str = "", port: int = 0, local_port: int = 0, dry_run: bool = False) -> int:
    """Forward a port of the box to this machine's loopback until Ctrl-C (TensorBoard, Jupyter).

    It says whether the way is open, forbidden by the box, or leads to a port where nobody listens.

    fab tunnel --host gpu-box --port 6006
    """
    local = local_port or port
    if not all(0 < number < 65536 for number in (port, local)):
        raise ToolkitError("which port of the box?", hint="e.g. --port 6006")
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        argv, asking = (
            connection.stream(forward=[f"127.0.0.1:{local}:127.0.0.1:{port}"], asks=asks) for asks in (False, True)
        )
    if dry_run:
        say.command("here", argv)
        return ExitCode.OK
    try:
        socket.create_server(("127.0.0.1", local)).close()
    except OSError as error:
        why, hint = error.strerror or str(error), "choose another port of this machine with --local-port"
        raise ToolkitError(f"cannot listen on 127.0.0.1:{local}", why=why, hint=hint) from None
    name, opened = connection.box.name, open_tunnel(argv, asking if sys.stdin.isatty() else None, local)

    def tell(state: State) -> None:
        if state == "forbidden":
            raise forbidden(name)
        leads = f"127.0.0.1:{local} leads to port {port} of {name} until Ctrl-C"
        nobody = f"nobody listens on port {port} of {name} yet; it opens as soon as something does"
        say(
            {
                "open": f"open: {leads}",
                "nobody listens": f"{leads}, but {nobody}",
                "failed": f"{leads}, but {name} cannot connect to it: {opened.last_words()}",
            }[state]
        )

    try:
        code = 0
        if opened.state:
            tell(opened.state)
            code = opened.watch(tell, opened.state)
        why = opened.last_words()
    finally:
        opened.close()
    raise ToolkitError(
        f"the tunnel to `{name}` ended",
        why=why or f"ssh ended with exit code {code}",
        hint="the same command opens it again",
        exit_code=ExitCode.UNREACHABLE,
    )


@verb(host=HOST, dry_run=DRY_RUN)
def shell(c: Context, host: str = "", dry_run: bool = False) -> int:
    """Open a shell on the box, in our folder. Agent forwarding is off.

    fab shell --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        root, is_there = our_root(connection, context.providers)
        if not is_there:
            say("nothing is deployed here: this is the home folder")
        argv = connection.stream(commands.shell(root if is_there else ""), tty=True)
        if dry_run:
            say.command("here", argv)
            return ExitCode.OK
        return subprocess.run(argv, check=False).returncode


@verb(
    host=HOST,
    run="the run (default: the one whose model is the newest)",
    compare="let two models answer, e.g. step1,step3",
    once="answer this and end; only the answer is on standard output",
    system="what the model shall be",
    dry_run=DRY_RUN,
)
def chat(
    c: Context, host: str = "", run: str = "", compare: str = "", once: str | None = None, system: str = "",
    dry_run: bool = False,
) -> int:  # fmt: skip
    """Talk to a run's model, on the box. While a run trains there, it keeps its memory.

    fab chat --host gpu-box --run demo
    fab chat --host gpu-box --run demo --once "What colour is snow?"
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    flags = {"compare": compare or None, "once": once, "system": system or None}
    # A value that begins with a dash is none of its flags.
    words = [*([run] if run else []), *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
    with context.connection(context.box(one_host(c, host)), say) as connection:
        deployed = find_deployment(connection, context.providers)
        # A terminal there puts both outputs into one, and does not hear that a pipe has ended.
        argv = connection.stream(deployed.supervisor("chat", *words), tty=once is None and sys.stdin.isatty())
        if dry_run:
            say.command("here", argv)
            return ExitCode.OK
        code = subprocess.run(argv, stdin=None if once is None else subprocess.DEVNULL, check=False).returncode
        return ExitCode.UNREACHABLE if code == OPENSSH_FAILED else code


@verb(host=HOSTS, command="the command to run on the box, quoted", json_=JSON, dry_run=DRY_RUN)
def exec(c: Context, host: str = "", command: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Run one command on the box and end with its exit code. Several boxes: --host a,b

    fab exec --host gpu-box --command nvidia-smi
    """
    if not command.strip():
        raise ToolkitError("which command?", hint="--command 'nvidia-smi'")
    context, names = VerbContext.open(dry_run=dry_run), hosts_of(c, host)

    def run_on_box(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            answer = connection.change(["sh", "-c", command], timeout_s=EXEC_S, check=False)
        if json_:
            output = {"out": answer.out, "err": answer.err, "seconds": answer.seconds}
            say.data(to_json({"host": box.name, "exit": answer.code, **output}))
            return answer.code
        text = answer.out.rstrip("\n")
        if len(names) > 1:
            title = f"== {box.name}" + (f", exit code {answer.code}" if answer.code else "")
            text = f"{title}\n{text}" if text else title
        if text:
            say.data(text)
        if answer.err.strip():
            say(answer.err.rstrip("\n"))
        return answer.code

    return on_each(context, names, run_on_box, Sayer(), as_json=json_)
