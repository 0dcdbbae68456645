"""`python -m rlhf_train` (script `rlhf-train`) runs the three steps, or does what its verb says.

Without a verb it trains. The flags of that include those of DeepSpeed-Chat.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports, which take a second: 75 is "preempted"
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

import argparse
import atexit
import gc
import json
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from env.settings import Cards, Limits, Settings
from jobs import fitness
from jobs.errors import TO_RESUME, ExitCode, ToolkitError, system_error, together
from jobs.events import read_events
from jobs.flavours import refuse_flavour, way_to
from jobs.formatting import encodable, plural, visible
from jobs.run_dir import RUN_NAME, RunDir
from jobs.spec import DEPLOYMENT_TYPES, Job, load_job, settings_of_deployment, steps_of
from jobs.steps import STEPS
from jobs.views import console
from jobs.views.report.report_file import file_of_several, write_page
from jobs.views.report.run_page import Price, names_of, read_run
from jobs.yaml12 import dump_yaml
from rlhf_train import completion, local_runs
from rlhf_train.after.chat import at_least_zero
from rlhf_train.ranks.processes import SpareRanks, likely_rank_environment
from rlhf_train.steps.rule import load_rule
from rlhf_train.trackers.processes import refuse_missing

if TYPE_CHECKING:  # these import torch, which takes seconds
    from rlhf_train.plan.estimate import Estimate
    from rlhf_train.plan.placement import Placement

VERSION = "0.1.0"  # as in pyproject.toml, which is not on a box
EXAMPLES = """examples:
  rlhf-train --job demo --step all                         all three steps, small, on CPU
  rlhf-train --step 3 --set ppo.kl_coef=0.05 --run kl05 --from opt-1.3b
  rlhf-train --job opt-1.3b --step 1 2 --deployment-type single_node --dry-run
  rlhf-train --job opt-1.3b-lora --dry-run --gpu rtx-4090  would it fit on two of these, and how long would it take?
  rlhf-train --job opt-1.3b --measure                      a few updates of each step: how long, how much memory?
  rlhf-train --job opt-1.3b --download                     only fetch its models and data, also without a GPU
  rlhf-train report demo                                   did it work? writes runs/demo/report.html
  rlhf-train status                                        all runs: state, and how far they are
  rlhf-train logs --follow                                 the newest run, as its own terminal shows it
  rlhf-train chat demo                                     talk to its model
The same command resumes a run that stopped; steps that are complete are skipped."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "rlhf-train",
        usage=f"%(prog)s [flags]    trains\n       %(prog)s {'|'.join(VERBS)} ...    --help says how",
        description="SFT, reward model and PPO as one run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--step", nargs="+", default=["all"], metavar="1|2|3|all", help="steps to do, in order (default: all)"
    )
    p.add_argument(
        "--job", default="opt-1.3b", metavar="NAME|FILE", help="a job of jobs/ or a YAML file (default: opt-1.3b)"
    )
    p.add_argument("--set", action="append", default=[], metavar="a.b=v", help="change a field of the job; repeatable")
    p.add_argument("--run", metavar="NAME", help="the run's name (default: the job's)")
    p.add_argument(
        "--from", dest="source", metavar="RUN", help="take over the steps of RUN whose settings are the same"
    )
    p.add_argument(
        "--redo", action="store_true", help="do the steps again that are complete (one that was stopped resumes)"
    )
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="where run folders are kept (default: runs)")
    p.add_argument("--deployment-type", choices=DEPLOYMENT_TYPES, help="one GPU, or all of this machine")
    p.add_argument(
        "--actor-model",
        metavar="MODEL",
        help="actor.model, or without step 1 actor.sft_model; also 1.3b for facebook/opt-1.3b",
    )
    p.add_argument(
        "--reward-model",
        metavar="MODEL",
        help="critic.model, or without step 2 critic.reward_model; also 350m for facebook/opt-350m",
    )
    p.add_argument("--actor-zero-stage", metavar="0-3", help="hardware.actor_zero_stage")
    p.add_argument("--reward-zero-stage", metavar="0-3", help="hardware.critic_zero_stage")
    p.add_argument(
        "--download",
        action="store_true",
        help="only fetch the models and data sets that the steps need, verified; needs no GPU",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what it takes; ends with 3 if it cannot fit"
    )
    p.add_argument(
        "--measure",
        action="store_true",
        help="a dry run, then a few updates of each step in a folder that is removed: seconds and memory as measured",
    )
    p.add_argument("--gpu", metavar="NAME", help="with --dry-run: on such a card of env/cards.toml, e.g. rtx-4090")
    p.add_argument("--verbose", action="store_true", help="with --dry-run: show the whole job, as it was read")
    p.add_argument("--quiet", action="store_true", help="only warnings, errors, and the table at the end")
    p.add_argument("--version", action="version", version=f"rlhf-box {VERSION}", help="say it, and end")
    return p


def models_of(args: argparse.Namespace) -> dict[int, str]:
    """Return the models of --actor-model and --reward-model, by the step that trains them."""
    flags = {1: args.actor_model, 2: args.reward_model}
    is_size = re.compile(r"[0-9.]+[mb]").fullmatch
    return {step: f"facebook/opt-{value}" if is_size(value) else value for step, value in flags.items() if value}


def settings_of(args: argparse.Namespace, own: Collection[int] = ()) -> list[str]:
    """Return DeepSpeed-Chat's flags as settings of job fields, then those of --set, which win.

    own: the steps whose places the models of the flags take.
    """
    settings = settings_of_deployment(args.deployment_type) if args.deployment_type else []
    for step, name in models_of(args).items():
        start, result = (("actor.model", "actor.sft_model"), ("critic.model", "critic.reward_model"))[step - 1]
        # Quoted: it is a name, whatever it looks like.
        settings.append(f"{result if step in own else start}={json.dumps(name, ensure_ascii=False)}")
    for field, value in (
        ("hardware.actor_zero_stage", args.actor_zero_stage),
        ("hardware.critic_zero_stage", args.reward_zero_stage),
    ):
        if value:
            settings.append(f"{field}={value}")
    return settings + args.set


def run_named(name: str, folder: Path) -> RunDir:
    if not RUN_NAME.fullmatch(name):
        raise ToolkitError(
            f"`{name}` cannot name a run", hint="use letters, digits, dots, dashes and underscores, 64 at most"
        )
    return RunDir(folder / name)


def say(text: str) -> None:
    screen = console.console_on(sys.stderr)
    screen.print(encodable(visible(text), screen.encoding))


def refuse_if_unfit(findings: Sequence[fitness.Finding], *, only_say: bool = False) -> None:
    """Raise ToolkitError with a line for each reason why the machine is unfit.

    only_say: show all findings and raise nothing.
    """
    for finding in findings:
        if only_say or finding.level == "warning":
            say(f"{finding.level}: {finding}")
    error = fitness.error_of(findings)
    if error and not only_say:
        raise error


def refuse_launchers(environ: Mapping[str, str]) -> None:
    """Raise ToolkitError if this is one of several processes that a launcher has started.

    RANK, WORLD_SIZE or SLURM_* alone may be left over in the shell of a cluster: they are ignored.
    """
    several = {
        "torchrun or accelerate": "LOCAL_RANK" in environ and _number(environ, "WORLD_SIZE") > 1,
        "mpirun": _number(environ, "OMPI_COMM_WORLD_SIZE") > 1,
        "srun": _number(environ, "SLURM_STEP_NUM_TASKS") > 1,
    }
    for launcher, is_one in several.items():
        if is_one:
            raise ToolkitError(
                f"{launcher} has started this program several times",
                why="it starts its ranks itself, and each of these would train the same run",
                hint="start `rlhf-train` once on a machine, by itself; hardware.ranks says how many GPUs it uses",
            )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def wanted_job(args: argparse.Namespace, settings: Settings) -> tuple[Job, list[int], RunDir, RunDir | None]:
    """Return what is asked for: the job, its steps, its run, and the run to take steps from.

    Raises ToolkitError: the job is wrong, or this stack does not run it.
    """
    steps = steps_of(args.step)
    job = load_job(args.job, settings_of(args))
    folder = args.output_dir or settings.runs
    run = run_named(job.name if args.run is None else args.run, folder)
    source = None if args.source is None else run_named(args.source, folder)
    if own := completion.own_steps(models_of(args), steps, [each for each in (run, source) if each]):
        job = load_job(args.job, settings_of(args, own))
    refuse_flavour(job, settings.flavour, "this stack", way_to)
    return job, steps, run, source


def download(args: argparse.Namespace) -> ExitCode:
    """Fetch what the steps need from the hub, and end. Nothing here imports torch."""
    refuse_launchers(os.environ)
    settings = Settings.from_environ(os.environ)
    job, steps, _, _ = wanted_job(args, settings)
    from rlhf_train.data.downloads import DownloadScreen, describe, downloads_of, fetch_all

    def leave(number: int, _frame: object) -> None:
        """End immediately: the threads that download would be waited for."""
        with suppress(OSError):
            os.write(2, b"\nstopped: the same command resumes\n")
        os._exit(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED)

    downloads = downloads_of(job, steps)
    if args.dry_run:
        for line in describe(downloads):
            print(visible(line))
        return ExitCode.OK
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        fetch_all(downloads, DownloadScreen(sys.stderr), settings.flavour)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ExitCode.OK


def dry_run(
    args: argparse.Namespace,
    job: Job,
    run: RunDir,
    wanted: Sequence[int],
    todo: Sequence[int],
    cache: Path,
    measure_it: Callable[[Placement, Estimate], ExitCode],
) -> ExitCode:
    """Say what would be done and what it takes, on this machine or on the card of --gpu.

    measure_it: called with --measure, unless this machine is unfit. It says the exit code then.
    """
    from rlhf_train.plan.estimate import check_all, describe, named_card, target_of
    from rlhf_train.plan.machine import facts_of
    from rlhf_train.plan.placement import Machine, place  # this imports torch

    cards = Cards.load()
    if args.gpu is None:
        machine, limits = Machine.look(gpus=job.hardware.device != "cpu"), Limits.load()
        facts = facts_of(job, run, cache, machine, os.environ)
        findings = fitness.judge(facts, limits)
        refuse_if_unfit(findings, only_say=True)
        is_fit, no_peer_access, placed = fitness.error_of(findings) is None, fitness.no_peer_access(facts, limits), job
    else:
        machine, target = named_card(args.gpu, 1 if job.hardware.ranks == "auto" else job.hardware.ranks, cards)
        device = job.hardware.model_copy(update={"device": "cuda"})
        is_fit, no_peer_access, placed = True, "", job.model_copy(update={"hardware": device})
    try:
        placement = place(placed, machine, no_peer_access)
    except ToolkitError as error:
        raise together([error, *check_all(job, run, todo).mistakes]) from None
    if args.gpu is None:
        target = target_of(machine, placement, cards)
    else:
        placement = replace(placement, device_reason=f"--gpu {args.gpu}")
    text, fits, made = describe(job, run, wanted, todo, placement, target)
    out = console.console_on(sys.stdout)
    if args.verbose:
        text = f"{dump_yaml(job.dump()).rstrip()}\n\n{text}"
    out.print(encodable(visible(text), out.encoding))
    if args.measure and is_fit and todo:
        return measure_it(placement, made)
    return ExitCode.OK if fits and is_fit else ExitCode.UNFIT


def train(args: argparse.Namespace, spares: SpareRanks) -> ExitCode:
    refuse_launchers(os.environ)
    if args.gpu is not None and args.measure:
        raise ToolkitError(
            "--measure and --gpu exclude each other", why="this machine is measured", hint="leave one out"
        )
    if args.gpu is not None and not args.dry_run:
        raise ToolkitError("--gpu is for --dry-run", hint="hardware.device and hardware.ranks say where a job runs")
    settings = Settings.from_environ(os.environ)
    job, wanted, run, source = wanted_job(args, settings)
    for step in sorted({*wanted} & {*job.own_models}) if not args.quiet else ():
        say(f"step {step} ({STEPS[step].title}) is left out: {job.own_models[step]} takes its place")
    wanted = [step for step in wanted if step not in job.own_models]
    load_rule(job.ppo.rule)
    refuse_missing(job.track, settings.flavour)
    begun = time.time()

    def leave(_number: int, _frame: object) -> None:
        """End immediately: an exception could be lost in a module that is being imported."""
        spares.end()
        os._exit(ExitCode.CANCELLED if run.cancelled.exists() else ExitCode.PREEMPTED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)  # until launch.py has something to stop

    def look() -> tuple[list[int], list[int]]:
        """Return (steps to take over, steps to do)."""
        taken = completion.steps_to_take_over(job, source, run) if source else []
        return taken, completion.steps_to_do(job, run, wanted, redo=args.redo, taken=taken)

    taken, todo = look()
    if args.dry_run or args.measure:

        def measure_it(placement: Placement, made: Estimate) -> ExitCode:
            from rlhf_train.measure import measure

            earlier = [n for n in STEPS if n not in {*todo, *taken, *job.own_models} and completion.is_complete(run, n)]
            sources = {run: earlier, **({source: taken} if source else {})}
            say(f"measuring: a few updates of {plural(len(todo), 'steps')}, in a folder that is removed")
            text, code = measure(job, run, todo, sources, placement, made, settings.cache, spares)
            out = console.console_on(sys.stdout)
            out.print(encodable(visible(text), out.encoding))
            return code

        return dry_run(args, job, run, wanted, todo, settings.cache, measure_it)
    if todo:
        # They import while this process imports and looks at the machine.
        spares.start(likely_rank_environment(job, os.environ))
    if todo or taken:
        if sys.stderr.isatty() and not args.quiet:  # a person waits for what takes some seconds
            say(f"run {run.name}: importing PyTorch, and looking at this machine")
        from rlhf_train.plan.machine import facts_of
        from rlhf_train.plan.placement import Machine, place  # this imports torch

        machine, limits = Machine.look(gpus=job.hardware.device != "cpu"), Limits.load()
        facts = facts_of(job, run, settings.cache, machine, os.environ)
        if todo:
            refuse_if_unfit(fitness.judge(facts, limits))
        placement = place(job, machine, fitness.no_peer_access(facts, limits))
    for step in sorted({*wanted} - {*todo, *taken}) if not args.quiet else ():
        say(f"step {step} ({STEPS[step].title}) is complete: {run.step(step).model}")
    if todo or taken or completion.leftovers(run):
        from rlhf_train.launch import launch, locked

        with locked(run) as lock:
            with suppress(FileNotFoundError):
                if run.cancelled.stat().st_mtime < begun:  # an earlier call was cancelled, not this one
                    run.cancelled.unlink()
            for folder in completion.leftovers(run):
                shutil.rmtree(folder, ignore_errors=True)
            taken, todo = look()  # again: another process may have ended here while torch was imported
            completion.begin_run(run)
            if source:
                completion.take_over(source, run, taken)
                taken_steps = ", ".join(f"step {step}" for step in taken)
                if not args.quiet:
                    say(f"from run {source.name}: {taken_steps or 'nothing more to take over'}")
            if args.redo:
                completion.begin_redo(run, todo)
            code = (
                launch(job, run, todo, placement, settings.cache, lock, spares, quiet=args.quiet)
                if todo
                else ExitCode.OK
            )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the exit code is decided
        if code != ExitCode.OK:
            left = completion.left_to_redo(run)
            step = next(step for step in todo if not completion.is_complete(run, step) or step in left)
            update = completion.update_to_resume_from(run, step)
            place_in_step = f"update {update}" if update else "the start"
            say(f"stopped: the same command resumes in {run.path}, from {place_in_step} of step {step}")
            return code
    console.print_report(read_events(run.events)[0])
    can_talk = completion.is_complete(run, 1) or completion.is_complete(run, 3)
    is_on_box = "RLHF_REQUEST" in os.environ  # whose name here only `fab train` knows
    if can_talk and not args.quiet and not is_on_box:
        say(f"talk to it: {chat_command(run, settings.runs, os.environ)}")
    return ExitCode.OK


def chat_command(run: RunDir, default_runs: Path, environ: Mapping[str, str]) -> str:
    """Return the command that talks to a run's model, as it is called where the run was."""
    if "RLHF_HOST_RUNS" in environ:  # in the container
        return f"docker compose run --rm chat {run.name}"
    beside = Path(sys.executable).with_name("rlhf-train")  # of .venv, which is seldom in PATH
    if shutil.which("rlhf-train"):
        program = ["rlhf-train"]
    elif beside.exists():
        program = [str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)]
    else:
        program = ["python", "-m", "rlhf_train"]
    words = [*program, "chat", run.name]
    return shlex.join(words if run.path.parent == default_runs else [*words, "--output-dir", str(run.path.parent)])


def report_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "rlhf-train report",
        description="Write a page that says whether a run worked, or that compares several runs.",
        allow_abbrev=False,
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's name, or its folder, with a slash")
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="where run folders are kept (default: runs)")
    p.add_argument("--output", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")
    p.add_argument(
        "--price", type=at_least_zero, metavar="AMOUNT", help="of an hour of the machine, to say what the run cost"
    )
    return p


def report(argv: Sequence[str]) -> int:
    """Write the report of the runs that are named, and print its path."""
    args = report_parser().parse_args(argv)
    folder = args.output_dir or Settings.from_environ(os.environ).runs
    runs = [local_runs.run_at(name, folder) for name in args.runs]
    names = names_of(runs)
    pages = [read_run(run, name=name, price=Price(args.price)) for run, name in zip(runs, names, strict=True)]
    path = args.output or (runs[0].report if len(runs) == 1 else folder / file_of_several(names))
    try:
        write_page(pages, path)
    except OSError as error:
        raise system_error(error, ExitCode.UNFIT, "make room, or name another place with --output") from None
    console.console_on(sys.stdout).print(visible(path))
    return ExitCode.OK


def chat(argv: Sequence[str]) -> int:
    """Talk to a model."""
    from rlhf_train.after.chat import chat as talk

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing resumes
    return talk(argv, Settings.from_environ(os.environ).runs)


def status(argv: Sequence[str]) -> int:
    return local_runs.status(argv, Settings.from_environ(os.environ).runs)


def logs(argv: Sequence[str]) -> int:
    return local_runs.logs(argv, Settings.from_environ(os.environ).runs)


VERBS = {"chat": chat, "report": report, "status": status, "logs": logs}


def main(argv: Sequence[str] | None = None, spares: SpareRanks | None = None) -> int:
    """Do what `argv` says, and return the exit code.

    spares: of a caller that trains more than one run, and ends them.
    """
    if argv is None:
        # What is imported stays until the end: looking through it again and again, and once more
        # at the end, took 0.7 of the 2.4 CPU seconds of a process that imports PyTorch.
        gc.set_threshold(50_000, 20, 100)
        atexit.register(gc.freeze)
    before = signal.getsignal(signal.SIGTERM)
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] in VERBS:
            return VERBS[words[0]](words[1:])
        if words and not words[0].startswith("-"):
            raise ToolkitError(
                f"there is no verb `{words[0]}`",
                why=f"the verbs are {', '.join(VERBS)}; without one it trains",
                hint="rlhf-train --job NAME trains; rlhf-train --help",
            )
        args = parser().parse_args(words)
        if args.download:
            return download(args)
        with nullcontext(spares) if spares else SpareRanks(os.environ) as ranks:
            return train(args, ranks)
    except ToolkitError as error:
        console.print_error(error)
        return error.exit_code
    except KeyboardInterrupt:  # before there was anything to stop
        return ExitCode.INTERRUPTED
    except OSError as error:
        hint = "make room or mend the path" if words and words[0] in VERBS else TO_RESUME  # a verb resumes nothing
        console.print_error(system_error(error, ExitCode.UNFIT, hint))
        return ExitCode.UNFIT
    finally:
        if threading.current_thread() is threading.main_thread():
            # From a shell: ignored until the process is gone, which takes torch a moment.
            signal.signal(signal.SIGTERM, before if argv is not None else signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
