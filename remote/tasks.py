"""The verbs of `fab`. Each is thin: it reads flags, asks or changes a box through `Line`, and shows what came of it.

Data goes to standard output, everything else to standard error. A verb ends with one of the exit codes of jobs/errors.py.
"""

from __future__ import annotations

import functools
import json
import os
import secrets as tokens
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fabric import Connection, task
from fabric.main import program
from invoke import Collection, Context, Exit

from env.settings import Limits, Provider, Settings
from jobs.errors import ExitCode, ToolkitError, system_error
from jobs.spec import NAME, Job, load_job, settings_of_deployment, steps_of
from jobs.words import duration, size, visible
from remote import inventory
from remote.deploy import deployment as deploying
from remote.deploy import lock
from remote.deploy.sync import checkout_tree, send_whole
from remote.inventory import Box
from remote.output import Sayer
from remote.results import purge as purging
from remote.results import run_contents as results
from remote.results import stop_card as stopping
from remote.results import transfer as fetching
from remote.runs import listing, watch
from remote.runs import start as training
from remote.runs.deployed import NOT_DEPLOYED, Deployed, check, not_deployed, our_root, there, where
from remote.runs.inputs import job_on_box, pack
from remote.ssh import host_keys as trusting
from remote.ssh.connection import Line
from remote.survey import probe_cache as known
from remote.survey.doctor import Diagnosis, Link, diagnose
from remote.survey.facts import clock_offset, provider_of

CHECKOUT = Path(__file__).parents[1]

DEFAULT_JOB = "opt-1.3b"  # as rlhf-train's

HOST = "a name in boxes.yaml, or anything that ssh understands"
HOSTS = f"{HOST}; several with commas"
JSON = "for programs: JSON on standard output"
EXEC_S = 3600.0  # the longest that a command of `fab exec` may take
DRY_RUN = "show the commands that would change something, and run none of them"


# --- what every verb has ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Desk:
    """What the verbs work with."""

    settings: Settings
    boxes: Mapping[str, Box]
    providers: Mapping[str, Provider] = field(default_factory=Provider.load_all)
    dry_run: bool = False

    @classmethod
    def open(cls, *, dry_run: bool = False) -> Desk:
        settings = Settings.from_environ(os.environ)
        return cls(settings, inventory.load_boxes(settings.boxes), dry_run=dry_run)

    def line(self, box: Box, say: Sayer) -> Line:
        return Line(box, self.settings.state, say=say, dry_run=self.dry_run)

    def box(self, name: str) -> Box:
        return inventory.find(name, self.boxes)

    def secrets(self, box: Box) -> dict[str, str]:
        """Those that the box's entry names, from the environment, else from secrets/ in the checkout."""
        found = {}
        for name in box.secrets:
            file = CHECKOUT / "secrets" / name
            value = os.environ.get(name) or (file.read_text(encoding="utf-8").strip() if file.is_file() else "")
            if value:
                found[name] = value
        return found


def hosts_of(c: Context, host: str) -> list[str]:
    """`--host a,b`, or Fabric's own `-H a,b`. Raises ToolkitError: none, or one twice."""
    if host and isinstance(c, Connection):
        raise ToolkitError("the box is named twice", why=f"by --host {host} and by -H {program.args.hosts.value}", hint="leave out one of them")
    named = program.args.hosts.value if isinstance(c, Connection) else host
    names = [name.strip() for name in (named or "").split(",") if name.strip()]
    if not names:
        raise ToolkitError("which box?", hint="--host NAME, a name of boxes.yaml or anything that ssh understands")
    if len({*names}) < len(names):
        raise ToolkitError(f"a box is named twice: {', '.join(names)}")
    return names


def one_host(c: Context, host: str) -> str:
    names = hosts_of(c, host)
    if len(names) > 1:
        raise ToolkitError(f"this takes one box, not {len(names)}", why=", ".join(names), hint="one call for each")
    return names[0]


def verb(*, iterable: Sequence[str] = (), **texts: str) -> Callable[[Callable[..., ExitCode | int | None]], Any]:
    """A task whose errors are shown as they are, and whose exit code is one of ours. The default of an iterable flag is None: any other
    takes the place of its kind. With `-H a,b` Fabric calls it once for each host:
    the first call takes all of them, as with `--host a,b`.
    """

    def decorate(body: Callable[..., ExitCode | int | None]) -> Any:
        @functools.wraps(body)
        def run(c: Context, *arguments: Any, **flags: Any) -> None:
            if isinstance(c, Connection) and c.original_host != Connection(program.args.hosts.value.split(",")[0]).original_host:
                return
            try:
                code = body(c, *arguments, **flags)
            except ToolkitError as error:
                if flags.get("json_"):
                    Sayer().data(to_json(error_as_json(error)))
                Sayer()(error)
                code = error.code
            except BrokenPipeError:
                code = ExitCode.OK
            except OSError as error:
                Sayer()(system_error(error, ExitCode.INTERNAL))
                code = ExitCode.INTERNAL
            except KeyboardInterrupt:
                Sayer()("\nstopped by Ctrl-C" if sys.stderr.isatty() else "stopped by Ctrl-C")  # the terminal has shown a ^C
                code = ExitCode.INTERRUPTED
            if code:
                raise Exit(code=int(code))

        help_of = {name.removesuffix("_"): text for name, text in texts.items()}
        return task(auto_shortflags=False, iterable=list(iterable), help=help_of)(run)

    return decorate


# --- one box or several -----------------------------------------------------------------------------------------------


def _drop(text: object) -> None:
    """Says nothing."""


def on_each(desk: Desk, names: Sequence[str], work: Callable[[Box, Sayer], int], say: Sayer, *, as_json: bool = False) -> int:
    """In parallel; the failure of one box hides nothing of another's. The exit code of the first that has one, in the order of the names.

    as_json: a box that fails has its line of JSON, too.
    """
    if len(names) == 1:
        return work(desk.box(names[0]), say)

    def guarded(name: str) -> int:
        mine = say.of(name)
        try:
            return work(desk.box(name), mine)
        except ToolkitError as error:
            failed = error
        except OSError as error:
            failed = system_error(error, ExitCode.INTERNAL)
        if as_json:
            say.data(to_json({"host": name, **error_as_json(failed)}))
        mine(failed)
        return failed.code

    with ThreadPoolExecutor(len(names)) as pool:
        codes = list(pool.map(guarded, names))
    return next((code for code in codes if code), 0)


def error_as_json(error: ToolkitError) -> dict[str, Any]:
    return {"error": error.what, "why": error.why, "hint": error.hint, "exit": int(error.code)}


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- getting to know a box --------------------------------------------------------------------------------------------


@verb(
    name="what you will call it: small letters, digits and dashes",
    command="what the rental page shows, quoted: 'ssh -p 41022 root@host'",
    provider="a file of env/providers: autodl, vast, runpod, lambda, generic (default: found out)",
    price="per hour, for what `fab logs` and `fab ps` say of cost",
    currency="a sign or a word, e.g. ¥ or EUR",
    data_folder="the folder on the box that outlives a stop (default: the provider's)",
    mirror="a file of env/mirrors, e.g. cn (default: measured)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def add(
    c: Context, name: str, command: str, provider: str = "", price: str = "", currency: str = "", data_folder: str = "", mirror: str = "",
    json_: bool = False, dry_run: bool = False,
) -> None:  # fmt: skip
    """Write a box into boxes.yaml, from what the rental page shows.

    fab add gpu-box 'ssh -p 41022 root@connect.example.com' --price 1.98 --currency ¥
    """
    settings = Settings.from_environ(os.environ)
    if price and not _is_number(price):
        raise ToolkitError(f"--price {price} is not a number", hint="per hour, e.g. --price 1.98")
    more = {
        "provider": provider or None, "price_per_hour": float(price) if price else None, "currency": currency or None,
        "data_folder": data_folder or None, "mirror": mirror or None,
    }  # fmt: skip
    added = inventory.add_box(settings.boxes, name, command, dry_run=dry_run, **more)
    say = Sayer()
    if json_:
        say.data(to_json(added.box.model_dump(mode="json", exclude_defaults=True)))
    else:
        say.data(added.text.rstrip())
        say(f"{'would be added to' if dry_run else 'added to'} {settings.boxes}" + ("" if dry_run else f"; next: fab trust --host {name}"))


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


@verb(
    host=HOST,
    replace="take the key that the box shows now for the right one",
    host_key="SHA256:..., if the rental page shows it",
    key="the .pub file of your key (default: the first that ssh would use)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def trust(c: Context, host: str = "", replace: bool = False, host_key: str = "", key: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Show the box's host key and keep it, and put your public key there; asks for the box's password once, if it must.

    fab trust --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        trusted = trusting.trust(line, replace=replace, host_key=host_key)
        if not json_:
            say.data(str(trusted))
        installed = trusting.install_key(line, Path(key).expanduser() if key else None)
    if json_:
        say.data(to_json({"host": line.box.name, "host_key": trusted.key.fingerprint, "status": trusted.status, "your_key": installed.status}))
    else:
        say.data(str(installed))


@verb(
    host=HOSTS,
    job="the job that it is to run: a name of jobs/ or a YAML file",
    set_="change a field of the job; repeatable",
    json_=JSON,
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def doctor(c: Context, host: str = "", job: str = "", set_: list[str] | None = None, json_: bool = False, dry_run: bool = False) -> int:
    """Is this box fit for this job? A line a check, one round trip, and nothing is changed. Before money is spent.

    fab doctor --host gpu-box --job opt-1.3b
    """
    desk, names = Desk.open(dry_run=dry_run), hosts_of(c, host)
    wanted = load_job(job, set_ or []) if job or set_ else None
    limits = Limits.load()

    def examine(box: Box, say: Sayer) -> int:
        with desk.line(box, say) as line:
            link = line.link
            diagnosis = _examined(desk, line, link, wanted, limits)
        if json_:
            say.data(to_json({"host": box.name, **diagnosis.as_json()}))
        else:
            say.data("\n".join([*([f"== {box.name}"] if len(names) > 1 else []), *diagnosis.lines()]))
        return ExitCode.OK if diagnosis.fit else ExitCode.UNFIT if link.reached else ExitCode.UNREACHABLE

    return on_each(desk, names, examine, Sayer(), as_json=json_)


def _examined(desk: Desk, line: Line, link: Link, job: Job | None, limits: Limits) -> Diagnosis:
    box, facts, offset = line.box, None, None
    if link.reached:
        seen = known.probe_again(line, box, desk.providers, desk.settings.state)
        facts, offset = seen.facts, clock_offset(seen.facts, seen.sent, seen.received)
    provider = provider_of(facts, desk.providers, box.provider)
    prefer = "mirror" if box.mirror not in ("", "default") else ""
    return diagnose(facts, job, limits, provider, link, offset=offset, data_folder=box.data_folder, prefer_route=prefer)


# --- getting it ready -------------------------------------------------------------------------------------------------


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def deploy(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Code and environment onto the box, ready to run. Again with nothing changed: seconds. Several boxes: --host a,b

    fab deploy --host gpu-box
    """
    desk, limits = Desk.open(dry_run=dry_run), Limits.load()

    def one(box: Box, say: Sayer) -> int:
        with desk.line(box, say) as line:
            hear, now = (_drop, _drop) if json_ else (say, say.now)
            done = deploying.deploy(line, CHECKOUT, box, limits=limits, providers=desk.providers, state=desk.settings.state, say=hear, now=now)
        if json_:
            say.data(to_json({"host": box.name, **done.as_json()}))
        else:
            what = ("would be deployed" if dry_run else "deployed") if done.changed else "nothing to do: all is there"
            say.data(f"{box.name}: {what}, in {done.seconds:.1f} s ({done.plan.runtime}, code {done.plan.code}, {done.plan.root})")
        return ExitCode.OK

    return on_each(desk, hosts_of(c, host), one, Sayer(), as_json=json_)


@verb(host=HOST, json_=JSON, dry_run=DRY_RUN)
def unlock(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Take away the lock of a deploy that is dead, and say whose it was.

    fab unlock --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        root = our_root(line, desk.providers)[0]
        owner = lock.holder(line, root) if dry_run else None
        owner = lock.unlock(line, root) or owner
    if json_:
        say.data(to_json({"host": line.box.name, "lock": str(owner) if owner else None}))
    else:
        say.data(f"{'would be' if dry_run else ''} taken from {owner}".lstrip() if owner else "nobody has it: nothing to do")


# --- training ---------------------------------------------------------------------------------------------------------


@verb(
    host=HOST,
    job=f"a name of jobs/ or a YAML file (default: {DEFAULT_JOB})",
    step="1, 2, 3, several with commas, or all (default)",
    set_="change a field of the job: --set ppo.kl_coef=0.05; repeatable",
    run="the run's name (default: the job's)",
    from_="take over the steps of this run whose settings are the same",
    redo="do the steps again that are complete",
    deployment_type="single_gpu or single_node",
    detach="start it and come back at once",
    wait="plain lines until it has ended; Ctrl-C apart, the exit code is the job's own",
    json_="the events as they come, for programs; with --detach, what was started",
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def train(
    c: Context, host: str = "", job: str = DEFAULT_JOB, step: str = "all", set_: list[str] | None = None, run: str = "", from_: str = "",
    redo: bool = False, deployment_type: str = "", detach: bool = False, wait: bool = False, json_: bool = False, dry_run: bool = False,
) -> int:  # fmt: skip
    """Start a job on the box, where it goes on without you, and follow it. Ctrl-C stops the watching, not the job.

    fab train --host gpu-box --job opt-1.3b --step all
    """
    if detach and wait:
        raise ToolkitError("--detach and --wait are opposites", hint="leave out one of them")
    steps = steps_of([step])
    wanted = load_job(job, [*(settings_of_deployment(deployment_type) if deployment_type else []), *(set_ or [])])
    name = run or wanted.name
    for named in filter(None, (name, from_)):
        if not NAME.fullmatch(named):
            raise ToolkitError(f"`{named}` cannot name a run", hint="use letters, digits, dots, dashes and underscores, 64 at most")
    luggage = pack(wanted, Path.cwd(), CHECKOUT)
    desk = Desk.open(dry_run=dry_run)
    box = desk.box(one_host(c, host))
    secrets = desk.secrets(box)
    say = Sayer(secrets.values())
    with desk.line(box, say) as line:
        deployed = where(line, desk.providers)
        if deployed.slot:
            say(f"{box.name} has run `{deployed.slot}` in its slot")
        _warn_of_other_code(deployed, say)
        for each in luggage:
            if each.tree.key not in deployed.inputs:
                say(f"sending `{each.name}`: {each.tree}")
                send_whole(line, each.tree, each.folder(deployed.root))
        arguments = ("--step", ",".join(map(str, steps)), *(("--from", from_) if from_ else ()), *(("--redo",) if redo else ()))
        request = training.Request(tokens.token_hex(8), name, arguments, job_on_box(wanted, luggage, deployed.root), wanted.checkpoint.grace_s)
        training.start(line, deployed, request, secrets, say)
        if dry_run:
            return ExitCode.OK
        say(f"run `{name}` was started on {box.name}; it goes on without this line")
        if detach:
            say(f"watch it: fab logs --follow --host {shlex.quote(box.name)} --run {shlex.quote(name)}")
            if json_:
                say.data(to_json({"host": box.name, "run": name, "request": request.id, "state": "started"}))
            return ExitCode.OK
        at = watch.Where(box.name, name, box.price_per_hour, box.currency, tuple(steps))
        watched = _follow(desk, line, at, watch.view_of(at, as_json=json_, live=not wait))
    return _code_of(watched, desk, line, name, say)


def _warn_of_other_code(deployed: Deployed, say: Sayer) -> None:
    here = checkout_tree(CHECKOUT).key
    if deployed.code != here:
        say.warning(f"the box has the code of its last deploy ({deployed.code}), which is not this checkout's ({here}): `fab deploy` brings it")


def _follow(desk: Desk, line: Line, at: watch.Where, view: watch.View, *, once: bool = False, limits: watch.Limits = watch.LIMITS) -> watch.Watched:
    line.close()  # watching has a connection of its own
    return watch.follow(training.open_stream(line, desk.providers), view, at, once=once, refused=_refused(line.box), limits=limits)


def _refused(box: Box) -> Callable[[int, str], ToolkitError | None]:
    """Whether there is no use in trying again: by what the box said, or by what ssh says of its key."""

    def judge(code: int, said: str) -> ToolkitError | None:
        if code == NOT_DEPLOYED:
            return not_deployed(box)
        if code == 255 and ("Host key verification failed" in said or "HOST IDENTIFICATION HAS CHANGED" in said):
            hint = f"if the box was made anew, `fab trust --host {box.name} --replace`; else do not go on: somebody is in between"
            return ToolkitError(f"`{box.name}` shows another host key", why=said.strip(), hint=hint, code=ExitCode.UNREACHABLE)
        if code == 255 and "Permission denied" in said:
            return ToolkitError(f"`{box.name}` refuses your key", why=said.strip(), hint=f"fab trust --host {box.name}", code=ExitCode.UNREACHABLE)
        return None

    return judge


def _code_of(watched: watch.Watched, desk: Desk, line: Line, run: str, say: Sayer) -> int:
    """The job's own code if its end was seen, and where its results are."""
    if not watched.done:
        return ExitCode.INTERRUPTED if watched.stopped and not watched.job else ExitCode.OK
    code = watched.exit if watched.exit is not None else int(ExitCode.LOST)
    host = shlex.quote(line.box.name)
    if code == ExitCode.OK:
        say(f"take it home: fab fetch --host {host} --run {shlex.quote(run)}")
    elif watched.last is None:
        say("it ended before it could train; what it said:")
        _follow(desk, line, watch.Where(line.box.name, run), watch.RawLog(sys.stderr, "output"), once=True)
    elif code in (ExitCode.PREEMPTED, ExitCode.LOST):
        say("the same command goes on with it")
    return code


@verb(
    host=HOST,
    run="which run (default: the one that runs, else the last)",
    follow="until the job has ended, through every break of the line; Ctrl-C stops the watching alone",
    raw="everything that the ranks and their libraries print, byte for byte",
    since="only what is newer: 90s, 10m, 2h, 1d, or a time such as 2025-01-05T12:00:00Z",
    json_="the event lines, byte for byte",
    dry_run=DRY_RUN,
)
def logs(
    c: Context, host: str = "", run: str = "", follow: bool = False, raw: bool = False, since: str = "", json_: bool = False, dry_run: bool = False
) -> int:
    """What a run has done, and with --follow what it does: a live view on a terminal, lines on a pipe.

    fab logs --follow --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    box = desk.box(one_host(c, host))
    if run and not NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    at = watch.Where(box.name, run, box.price_per_hour, box.currency)
    view = watch.view_of(at, as_json=json_, raw=raw, live=follow, since=watch.parse_since(since) if since else None)
    with desk.line(box, say) as line:
        if dry_run:
            say.command("here", line.stream(there(box, desk.providers, "follow", run or "-", view.file, "0")))
            return ExitCode.OK
        # A box that never answered is no line that broke: its address may be a wrong one.
        watched = _follow(desk, line, at, view, once=not follow, limits=replace(watch.LIMITS, first_tries=2))
        if raw and not watched.offset and not watched.stopped:  # it ended before there was a log
            _follow(desk, line, at, watch.RawLog(sys.stdout, "output"), once=True)
        run = run or (watched.job.words.get("run", "") if watched.job else "")
    return _code_of(watched, desk, line, run, say) if follow else ExitCode.OK


def _listed(desk: Desk, line: Line) -> listing.Listing:
    answer = line.ask(there(line.box, desk.providers, "list"), check=False)
    check(line.box, answer)
    return listing.parse(answer.out)


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def ps(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """The runs of a box: state, where they are, time and cost. Several boxes: --host a,b

    fab ps --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    rows: dict[str, list[tuple[str, ...]]] = {}

    def one(box: Box, say: Sayer) -> int:
        with desk.line(box, say) as line:
            found = _listed(desk, line)
        now = found.clock or 0.0
        if json_:
            say.data(to_json(listing.as_json(box.name, found, now, box.price_per_hour, box.currency)))
        rows[box.name] = listing.rows(box.name, found, now, box.price_per_hour, box.currency)
        return ExitCode.OK

    names = hosts_of(c, host)
    code = on_each(desk, names, one, say, as_json=json_)
    table = [row for name in names for row in rows.get(name, [])]
    if not json_ and rows:
        say.data("\n".join(listing.columns([listing.HEAD, *table])) if table else f"no run on {', '.join(rows)}")
    return code


@verb(host=HOSTS, run="which run (default: the one that runs, else the last)", json_=JSON, dry_run=DRY_RUN)
def status(c: Context, host: str = "", run: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """One run and its box in full: state, last event, cost, cards, disk. Several boxes: --host a,b

    fab status --host gpu-box
    """
    desk, names = Desk.open(dry_run=dry_run), hosts_of(c, host)

    def one(box: Box, say: Sayer) -> int:
        with desk.line(box, say) as line:
            found = _listed(desk, line)
        chosen = found.run(run) if run else found.newest()
        if run and chosen is None:
            known_runs = ", ".join(each.name for each in found.runs) or "none"
            raise ToolkitError(f"there is no run `{run}` on `{box.name}`", why=f"it has: {known_runs}")
        now = found.clock or 0.0
        if json_:
            whole = listing.as_json(box.name, found, now, box.price_per_hour, box.currency)
            say.data(to_json({**whole, "runs": [each for each in whole["runs"] if chosen and each["name"] == chosen.name]}))
        else:
            facts = [("box", box.name), *listing.box_facts(found), *(listing.card(chosen, now, box.price_per_hour, box.currency) if chosen else [])]
            say.data("\n".join(listing.columns([("", ""), *facts])).strip("\n"))
        return ExitCode.OK

    return on_each(desk, names, one, Sayer(), as_json=json_)


@verb(
    host=HOST,
    run="which run (default: the one that runs)",
    grace="seconds for a checkpoint before it is killed (default: the job's own)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def cancel(c: Context, host: str = "", run: str = "", grace: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """End a job: it may write a checkpoint, then it is killed; and prove that nothing of it is left on the cards.

    fab cancel --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    if grace and not _is_number(grace):
        raise ToolkitError(f"--grace {grace} is not a number of seconds")
    with desk.line(desk.box(one_host(c, host)), say) as line:
        ended = training.cancel(line, desk.providers, run or "-", grace or "-", say)
    if dry_run:
        return ExitCode.OK
    if json_:
        fields = {"how": ended.how, "exit": ended.exit, "left": list(ended.left), "gpu_held": list(ended.gpu_held), "proven": ended.is_proven}
        say.data(to_json({"host": line.box.name, **fields}))
    else:
        say.data(ended.text())
    return ExitCode.OK if ended.is_proven else ExitCode.UNCERTAIN


# --- taking it home ---------------------------------------------------------------------------------------------------


@verb(
    host=HOST,
    run="which run (default: the one that runs, else the last)",
    checkpoints="the newest complete checkpoint of each step, too",
    to="the folder for it (default: runs/BOX/RUN)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def fetch(c: Context, host: str = "", run: str = "", checkpoints: bool = False, to: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Bring models and events home, also while it trains: complete ones only, verified by hash; a broken call goes on where it was.

    fab fetch --host gpu-box --run opt-1.3b
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        deployed = where(line, desk.providers)
        name = run or _newest(desk, line)
        if not NAME.fullmatch(name):
            raise ToolkitError(f"`{name}` cannot name a run")
        target = Path(to).expanduser() if to else desk.settings.runs / line.box.name / name
        shown = Shown(say)
        what = fetching.What(checkpoints=checkpoints)
        fetched = fetching.fetch(line, deployed.root, name, target, state=desk.settings.state, what=what, progress=shown)
    if json_:
        say.data(to_json({"host": line.box.name, **asdict(fetched), "folder": str(fetched.folder)}))
        return
    for path in fetched.would:
        say.data(f"would fetch {path}")
    for path in fetched.placed:
        say.data(str(fetched.folder / path))
    for reason in fetched.left:
        say(reason)
    if not dry_run:
        came = f"{size(fetched.moved_bytes)} in {duration(fetched.seconds)}" if fetched.placed else "nothing new"
        say(f"{came}; {size(fetched.total_bytes)} of run `{name}` are here, verified: {fetched.folder}")


class Shown:
    """How far a transfer is: a line that is drawn over on a terminal, now and then one elsewhere."""

    def __init__(self, say: Sayer) -> None:
        self._say, self._is_drawn, self._at = say, sys.stderr.isatty(), 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        is_last, now = done >= total, time.monotonic()
        if not is_last and now - self._at < (0.2 if self._is_drawn else 30.0):
            return
        self._at = now
        share = f"{100 * done // total:3d} %" if total else ""
        if self._is_drawn:
            sys.stderr.write(f"\r\x1b[2K{'' if is_last else f'{share}  {size(done)} of {size(total)}  {visible(what)[:60]}'}")
            sys.stderr.flush()
        elif not is_last:
            self._say(f"{share}  {size(done)} of {size(total)}  {what}")


def _newest(desk: Desk, line: Line) -> str:
    newest = _listed(desk, line).newest()
    if newest is None:
        raise ToolkitError(f"there is no run on `{line.box.name}`", hint=f"fab train --host {line.box.name}")
    return newest.name


# --- ways in ----------------------------------------------------------------------------------------------------------


@verb(host=HOST, port="the port on the box, e.g. 6006", local_port="the port here (default: the same)", dry_run=DRY_RUN)
def tunnel(c: Context, host: str = "", port: int = 0, local_port: int = 0, dry_run: bool = False) -> int:
    """A port of the box on this machine's loopback, for as long as this runs: TensorBoard, Jupyter.

    fab tunnel --host gpu-box --port 6006
    """
    here = local_port or port
    if not all(0 < each < 65536 for each in (port, here)):
        raise ToolkitError("which port of the box?", hint="e.g. --port 6006")
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        argv = line.stream(forward=[f"127.0.0.1:{here}:127.0.0.1:{port}"])
    if dry_run:
        say.command("here", argv)
        return ExitCode.OK
    try:
        socket.create_server(("127.0.0.1", here)).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ToolkitError(f"cannot listen at 127.0.0.1:{here}", why=why, hint="--local-port takes another port here") from None
    say(f"127.0.0.1:{here} is port {port} of {line.box.name} until Ctrl-C")
    code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        hint = "the same command opens it again"
        raise ToolkitError(f"the tunnel to `{line.box.name}` ended", why=f"ssh ended with exit code {code}", hint=hint, code=ExitCode.UNREACHABLE)
    return ExitCode.OK


@verb(host=HOST, dry_run=DRY_RUN)
def shell(c: Context, host: str = "", dry_run: bool = False) -> int:
    """A shell on the box, in our folder there. Agent forwarding is off.

    fab shell --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        argv = line.stream(there(line.box, desk.providers, "shell"), tty=True)
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
    desk, names = Desk.open(dry_run=dry_run), hosts_of(c, host)

    def one(box: Box, say: Sayer) -> int:
        with desk.line(box, say) as line:
            answer = line.do(["sh", "-c", command], timeout_s=EXEC_S, check=False)
        if json_:
            say.data(to_json({"host": box.name, "exit": answer.code, "out": answer.out, "err": answer.err, "seconds": answer.seconds}))
            return answer.code
        text = answer.out.rstrip("\n")
        if len(names) > 1:
            text = "\n".join([f"== {box.name}" + (f", exit code {answer.code}" if answer.code else ""), *([text] if text else [])])
        if text:
            say.data(text)
        if answer.err.strip():
            say(answer.err.rstrip("\n"))
        return answer.code

    return on_each(desk, names, one, Sayer(), as_json=json_)


# --- leaving it -------------------------------------------------------------------------------------------------------


@verb(host=HOST, yes="even though something is not fetched", json_=JSON, dry_run=DRY_RUN)
def purge(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Leave nothing of ours on the box, and prove it.

    fab purge --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        root, _ = our_root(line, desk.providers)
        purged = purging.purge(line, root, results.recall(desk.settings.state, line.box.name), yes=yes)
    if not dry_run:
        known.file_of(desk.settings.state, line.box.name).unlink(missing_ok=True)  # what was remembered of it holds no more
    if json_:
        say.data(to_json({"host": line.box.name, "root": root, **asdict(purged)}))
    else:
        for each in (*(f"would remove {each}" for each in purged.would), *(f"removed {each}" for each in purged.removed), *purged.proofs):
            say.data(str(each))
        for note in purged.notes:
            say(note)


@verb(host=HOST, yes="even though something is not fetched, or a job runs", json_=JSON, dry_run=DRY_RUN)
def stop(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Say what stopping means at this provider, for the meter and for the data; then stop the box, where that can be done from inside.

    fab stop --host gpu-box
    """
    desk, say = Desk.open(dry_run=dry_run), Sayer()
    with desk.line(desk.box(one_host(c, host)), say) as line:
        card = _stop_card(desk, line)
        if json_:
            say.data(to_json(card.as_json()))
        else:
            say.data("\n".join(listing.columns([("", ""), *card.lines()])).strip("\n"))
        stopped = stopping.stop(line, card, yes=yes)
    if not dry_run:
        say("the line went down with the box" if stopped.broke else f"asked it to stop{f': {stopped.said}' if stopped.said else ''}")


def _stop_card(desk: Desk, line: Line) -> stopping.StopCard:
    box, state = line.box, desk.settings.state
    facts = (known.recall(state, box.name) or known.probe(line, box, desk.providers)).facts
    root, is_there = our_root(line, desk.providers)
    found = results.look(line, root) if is_there else results.Results("")
    return stopping.card_of(
        box.name,
        provider_of(facts, desk.providers, box.provider),
        found,
        results.recall(state, box.name),
        home=facts.home,
        now=time.time(),
        price_per_hour=box.price_per_hour,
        currency=box.currency,
    )


VERBS = (add, trust, doctor, deploy, unlock, train, logs, ps, status, cancel, fetch, tunnel, shell, exec, purge, stop)
ns = Collection(*VERBS)
