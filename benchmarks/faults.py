"""This program kills training runs at random moments, resumes them, and checks the results.

`python benchmarks/faults.py` prints a table: what was hit, how often, how often the run resumed,
how many updates had to be done again, and whether the weights and the curve are, bit for bit, those
of the unbroken run. The exit code is 1 if anything failed.

A run's state is read from the memory that its ranks share with their launcher
(rlhf_train/ranks/heartbeat.py). We open it too, and read it once more when the ranks are dead. A
kill is counted where it hit, not where it was aimed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from rich import box
from rich.table import Table
from safetensors.torch import load_file

from jobs.errors import ExitCode
from jobs.events import RawEvent, effective, read_events
from jobs.formatting import plural
from jobs.run_dir import RunDir
from jobs.views.console import console_on
from rlhf_train.ranks.heartbeat import SLOT_BYTES, read_sign

CHECKOUT = Path(__file__).resolve().parents[1]
POLL_S = 0.001
TABLE_WIDTH = 120  # also in a pipe
HANG_S = 300.0  # runs take half a minute, so a run that has not ended by then hangs

WORDS = ["red", "blue", "tall", "small", "cat", "dog", "tree", "house", "runs", "sings"]
OPT = {
    "model_type": "opt",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 512,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 96,
    "init_std": 0.05,
}
UPDATES = {1: 100, 2: 70, 3: 76}  # 19 rollouts in step 3
EVERY_UPDATES = 10

# What a run may be doing, in the order in which a step does it.
BETWEEN, STARTING, UPDATE, ROLLOUT, SAVE, ENDING = (
    "between two steps",
    "starting a step",
    "in an update",
    "in a rollout",
    "in a save",
    "measuring, writing the model",
)
ORDER = {BETWEEN: 0, STARTING: 1, UPDATE: 2, ROLLOUT: 2, SAVE: 2, ENDING: 3}
# A kill comes up to so much later.
LATER_S = {BETWEEN: 4.0, STARTING: 1.5, UPDATE: 0.15, ROLLOUT: 0.3, SAVE: 0.05, ENDING: 0.6}
KILLED, ASKED = "SIGKILL", "SIGTERM"

# Fields of an event that may differ between two runs that learn the same.
NOT_LEARNED = {
    "time",
    "seq",
    "elapsed_s",
    "tokens_per_s",
    "rollout_s",
    "score_s",
    "train_s",
    "seconds",
    "held_up_s",
    "path",
    "model",
    "gpu_peak_bytes",
}


# --- the job ---


def write_rows(folder: Path) -> Path:
    """Write a data set: repeat the words of the prompt (chosen), or say others (rejected)."""
    generator = random.Random(0)

    def words() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 6)))

    folder.mkdir(parents=True)
    for name, count in (("train", 3000), ("test", 64)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                wanted, other = words(), words() + " no"
                row = {"prompt": f"\n\nHuman: {wanted}\n\nAssistant:", "chosen": f" {wanted}", "rejected": f" {other}"}
                file.write(json.dumps(row) + "\n")
    return folder


def job_of(data: Path, seed: int, ranks: int, zero_stage: int) -> dict[str, Any]:
    """Make a job that saves every ten updates.

    Step 3 makes four updates from a rollout, so that kills and saves also fall between two of them.
    """
    return {
        "name": "faults",
        "seed": seed,
        "actor": {"model": {"config": OPT}, "tokenizer_vocabulary": 320},
        "critic": {"model": "actor"},
        "data": {
            "datasets": [str(data)],
            "split": [1, 1, 1],
            "max_prompt_tokens": 64,
            "max_response_tokens": 16,
            "eval_rows": 64,
        },
        "sft": {
            "global_batch": 16,
            "learning_rate": 2e-3,
            "epochs": 10,
            "max_updates": UPDATES[1],
            "warmup_updates": 5,
        },
        "reward": {"global_batch": 16, "learning_rate": 1e-3, "epochs": 10, "max_updates": UPDATES[2]},
        "ppo": {
            "rollout_batch": 32,
            "global_batch": 16,
            "ppo_epochs": 2,
            "epochs": 10,
            "max_updates": UPDATES[3],
            "actor_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "kl_target": 2.0,
            "ema_decay": 0.9,
        },
        "hardware": {
            "ranks": ranks,
            "device": "cpu",
            "precision": "float32",
            "micro_batch": 8,
            "cpu_threads": 1,
            "actor_zero_stage": zero_stage,
            "critic_zero_stage": zero_stage,
        },
        "checkpoint": {"every_updates": EVERY_UPDATES},
    }


# --- one process, watched ---


@dataclass(frozen=True)
class Seen:
    """The state of a run."""

    step: int  # the first that is not complete; 4: all are
    doing: str
    update: int | None  # whole updates that this process has made, or resumed from; None: none yet


class Trainer:
    """Runs `python -m rlhf_train` on `run`, and watches it from outside."""

    def __init__(self, command: Sequence[str], run: RunDir, cache: Path, output: Path) -> None:
        self.run = run
        self.started_at, self._started = time.time(), time.monotonic()
        self.events: list[RawEvent] = []  # written since it started
        self.trains_after_s: float | None = None  # from its start to its first update (or to the end)
        self._offset = run.events.stat().st_size if run.events.exists() else 0
        self._pulse: int | None = None  # our own descriptor of the ranks' signs of life
        self._pulse_at = ""
        self._step = 0
        self._update: int | None = None
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=os.environ | {"RLHF_CACHE": str(cache)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def look(self) -> Seen:
        """Read the events, the signs of life and the folder of checkpoints."""
        events, self._offset = read_events(self.run.events, self._offset)
        self.events += events
        step = next((number for number in (1, 2, 3) if not self.run.step(number).complete.exists()), 4)
        if step != self._step:
            self._step, self._update = step, None
        for event in events:
            if event["kind"] == "resumed" and event["step"] == step:
                self._update = event["from_update"]
        doing = self._doing(step)
        if self.trains_after_s is None and self.events and ORDER[doing] > ORDER[STARTING]:
            self.trains_after_s = time.monotonic() - self._started
        return Seen(step, doing, self._update)

    def _doing(self, step: int) -> str:
        if step > 3 or not self.run.step(step).fields.exists():
            return BETWEEN if step > 1 else STARTING
        words = self._phase()
        updating = re.fullmatch(r"update (\d+)(?:, (rollout|scoring|checkpoint))?", words)
        if updating:
            number, more = int(updating[1]), updating[2]
            self._update = number if more == "checkpoint" else number - 1
        if self._is_saving(step) or (updating and updating[2] == "checkpoint"):
            return SAVE
        if updating:
            return ROLLOUT if updating[2] else UPDATE
        if words == "waiting for the disk" or words.startswith("saving ") or words.endswith(", after"):
            self._update = UPDATES[step]
            return ENDING
        return STARTING

    def _phase(self) -> str:
        """Return rank 0's latest phase; "" before there is one.

        Each step's ranks have a heartbeat file of their own, without a name, which the launcher
        holds open.
        """
        with suppress(OSError):  # the launcher, or the file, may go at any moment
            if self._pulse is None or not _is_same(self._pulse, self._pulse_at):
                self._find_pulse()
        if self._pulse is None:
            return ""
        return read_sign(os.pread(self._pulse, SLOT_BYTES, 0)).phase

    def _find_pulse(self) -> None:
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if not str(link.readlink()).endswith("(deleted)"):
                continue
            size = link.stat().st_size
            if size > 0 and size % SLOT_BYTES == 0:
                self.close()
                self._pulse, self._pulse_at = os.open(link, os.O_RDONLY), str(link)
                return

    def _is_saving(self, step: int) -> bool:
        """Return whether this process has written a checkpoint that is not complete."""
        with suppress(FileNotFoundError, NotADirectoryError):
            for folder in self.run.step(step).checkpoints.iterdir():
                if not (folder / "complete.json").exists() and folder.stat().st_ctime >= self.started_at:
                    return True
        return False

    def family(self) -> list[psutil.Process]:
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill launcher and ranks immediately (ranks have sessions of their own).

        They are gone when this returns.
        """
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=HANG_S)
        psutil.wait_procs(family[1:], timeout=HANG_S)

    def close(self) -> None:
        if self._pulse is not None:
            os.close(self._pulse)
            self._pulse = None


def _is_same(descriptor: int, path: str) -> bool:
    """Return whether descriptor and path are the same file; false if `path` is gone."""
    try:
        return os.fstat(descriptor).st_ino == Path(path).stat().st_ino
    except FileNotFoundError:
        return False


# --- the faults ---


@dataclass(frozen=True)
class Wish:
    """The moment when a run is to be hit.

    It comes `later_s` after the run has made `update` updates of `step` and is doing `doing`.
    """

    step: int
    doing: str
    update: int
    later_s: float
    signal: str = KILLED

    def is_due(self, seen: Seen) -> bool:
        """Return whether the moment has come, or was missed: every wish is to come true."""
        if (seen.step, ORDER[seen.doing]) > (self.step, ORDER[self.doing]):
            return True
        return seen.step == self.step and seen.doing == self.doing and (seen.update or 0) >= self.update


@dataclass
class Fault:
    """What was done to a run, and what happened then."""

    signal: str
    step: int
    doing: str  # when it was hit
    update: int | None
    went_on: bool = False
    lost: int = 0  # updates that were done again
    # From the start of the same command to its first update; None: it was hit again before that.
    back_s: float | None = None

    @property
    def name(self) -> str:
        return f"{self.signal} {self.doing}"


def wishes_of(dice: random.Random, kills: int, terms: int) -> list[Wish]:
    """Make wishes for all three steps, in an order in which one run can be hit by all of them."""
    wishes: list[tuple[int, float, Wish]] = []
    for number in range(kills + terms):
        is_kill = number < kills
        step = 1 + number * 3 // kills if is_kill else dice.choice([1, 2, 3])
        choices = [STARTING, UPDATE, SAVE, *([BETWEEN] if step > 1 else [])]
        doing = dice.choice([*choices, *([ROLLOUT, ROLLOUT] if step == 3 else [ENDING])])
        doing = doing if is_kill else UPDATE
        update = dice.randrange(UPDATES[step] * 3 // 4)  # so that the last step does not end before it is hit
        place = {BETWEEN: -1.0, ENDING: UPDATES[step] + 1.0}.get(doing, float(update))
        at = update if ORDER[doing] == ORDER[UPDATE] else 0
        wish = Wish(step, doing, at, dice.uniform(0, LATER_S[doing]), KILLED if is_kill else ASKED)
        wishes.append((step, place, wish))
    return [wish for _, _, wish in sorted(wishes, key=lambda placed: placed[:2])]


def hit(trainer: Trainer, wish: Wish) -> Fault | None:
    """Wait for the moment, and hit. None: the run ended before."""
    is_due = False
    while trainer.process.poll() is None and not is_due:
        _refuse_to_wait_longer(trainer)
        time.sleep(POLL_S)
        seen = trainer.look()
        is_due = bool(trainer.events) and wish.is_due(seen)  # never twice without an event in between
    until = time.monotonic() + wish.later_s
    while trainer.process.poll() is None and time.monotonic() < until:
        time.sleep(POLL_S)
        trainer.look()  # it keeps the heartbeat file open, which would be gone with the launcher
    if trainer.process.poll() is not None:
        return None
    if wish.signal == KILLED:
        trainer.kill()
        seen = trainer.look()
        if trainer.process.returncode != -signal.SIGKILL:
            return None
        return Fault(KILLED, seen.step, seen.doing, seen.update)
    asked_while = trainer.look().doing
    trainer.process.terminate()
    while trainer.process.poll() is None:
        _refuse_to_wait_longer(trainer)
        time.sleep(POLL_S)
        seen = trainer.look()  # it may end an update first
    if trainer.process.returncode != ExitCode.PREEMPTED:
        return None
    return Fault(ASKED, seen.step, asked_while, seen.update)


def _refuse_to_wait_longer(trainer: Trainer) -> None:
    if time.time() - trainer.started_at > HANG_S:
        trainer.kill()
        raise TimeoutError(f"{trainer.run.path} did not end within {HANG_S:.0f} s")


# --- a run, broken or not ---


@dataclass
class Broken:
    """A run that was hit, compared with its unbroken twin."""

    seed: int
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    unbroken_s: float = 0.0
    ended: bool = False
    differs: str = "it did not end"  # "": it does not differ
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The folder of all runs, and what they share."""

    folder: Path
    options: argparse.Namespace

    def start(self, name: str, seed: int) -> Trainer:
        job = self.folder / f"seed-{seed}.yaml"
        if not job.exists():
            fields = job_of(self.folder / "rows", seed, self.options.ranks, self.options.zero)
            job.write_text(yaml.safe_dump(fields), encoding="utf-8")
        words = ["--job", str(job), "--step", "all", "--run", name, "--output-dir", str(self.folder / "runs")]
        command = [sys.executable, "-m", "rlhf_train", *words]
        return Trainer(command, self.run(name), self.folder / f"{name}.cache", self.folder / f"{name}.out")

    def run(self, name: str) -> RunDir:
        return RunDir(self.folder / "runs" / name)

    def to_the_end(self, trainer: Trainer) -> int:
        while trainer.process.poll() is None:
            _refuse_to_wait_longer(trainer)
            time.sleep(POLL_S if trainer.trains_after_s is None else 0.1)
            trainer.look()
        trainer.look()
        trainer.close()
        return trainer.process.returncode

    def unbroken(self, seed: int) -> float:
        """Run a seed without faults, and return its seconds.

        Raises RuntimeError if it fails, since then there is nothing to compare with.
        """
        name = f"unbroken-{seed}"
        start, trainer = time.monotonic(), self.start(name, seed)
        try:
            code = self.to_the_end(trainer)
        finally:
            trainer.kill()
        if code:
            raise RuntimeError(f"the unbroken run of seed {seed} ended with {code}:\n{self.last_lines(name)}")
        return time.monotonic() - start

    def last_lines(self, name: str) -> str:
        text = (self.folder / f"{name}.out").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-12:])

    def broken(self, seed: int, wishes: Sequence[Wish], say: Any) -> Broken:
        """Start, hit, start again, until all wishes are true and the run has ended."""
        name, found, start = f"broken-{seed}", Broken(seed), time.monotonic()
        left, open_faults, code = list(wishes), list[Fault](), 0
        while True:
            trainer = self.start(name, seed)
            try:
                fault = hit(trainer, left.pop(0)) if left else None
                code = self.to_the_end(trainer) if fault is None else 0
            except TimeoutError as error:
                say(f"  seed {seed}: {error}")
                fault, code = None, -1
            finally:
                trainer.kill()
                trainer.close()
            open_faults = settle(open_faults, trainer, failed=bool(code))
            if fault is None:
                break
            say(f"  seed {seed}: {fault.name}, step {fault.step}, update {fault.update}")
            found.faults.append(fault)
            open_faults.append(fault)
        found.seconds, found.ended = time.monotonic() - start, code == 0
        if code:
            say(f"  seed {seed}: the same command ended with {code}:\n{self.last_lines(name)}")
        return found


def settle(faults: Sequence[Fault], trainer: Trainer, *, failed: bool) -> list[Fault]:
    """Record what the run that was started after `faults` shows about them.

    Returns the faults that it does not settle, since it was hit too early.
    """
    resumed = {event["step"]: event["from_update"] for event in trainer.events if event["kind"] == "resumed"}
    for fault in faults:
        fault.went_on = bool(trainer.events or trainer.process.returncode == 0) and not failed
        if fault is faults[-1]:
            fault.back_s = trainer.trains_after_s
        if fault.step in resumed and fault.update is not None:
            fault.lost = max(0, fault.update - resumed[fault.step])
    return [fault for fault in faults if fault.step not in resumed and trainer.process.returncode]


# --- the comparison ---


def curve(run: RunDir) -> list[RawEvent]:
    """Return what a run has measured, without times."""
    held = [event for event in effective(read_events(run.events)[0]) if event["kind"] in ("metrics", "sample", "end")]
    return [{name: value for name, value in event.items() if name not in NOT_LEARNED} for event in held]


def difference(broken: RunDir, unbroken: RunDir) -> str:
    """Name the first difference between two runs; "": weights and curve are the same."""
    for name in ("step1/model", "step2/model", "step3/model", "step3/model_ema"):
        tensors, wanted = (load_file(run.path / name / "model.safetensors") for run in (broken, unbroken))
        if tensors.keys() != wanted.keys():
            return f"{name}: other tensors"
        if different := [key for key in tensors if not tensors[key].equal(wanted[key])]:
            return f"{name}: {len(different)} of {plural(len(tensors), 'tensors')}, first {different[0]}"
    curves = curve(broken), curve(unbroken)
    if len(curves[0]) != len(curves[1]):
        return f"the curve: {len(curves[0])} and {len(curves[1])} events"
    for event, wanted_event in zip(*curves, strict=True):
        if event != wanted_event:
            return f"the curve: {event} and {wanted_event}"
    left = [
        str(path.relative_to(broken.path))
        for path in broken.path.rglob("*")
        if path.name.endswith(".partial") or path.name == "checkpoints"
    ]
    return f"left over: {', '.join(left)}" if left else ""


def cost_of(run: RunDir) -> dict[str, float]:
    """Return what checkpoints cost an unbroken run."""
    events = read_events(run.events)[0]
    saves = [event for event in events if event["kind"] == "checkpoint" and "held_up_s" in event]
    metrics = [event for event in events if event["kind"] == "metrics"]
    step_s = [max(event["elapsed_s"] for event in metrics if event["step"] == step) for step in (1, 2, 3)]
    return {
        "saves": len(saves),
        "training_s": sum(step_s),
        "held_up_s": sum(event["held_up_s"] for event in saves),
        "median_save_s": median(event["seconds"] for event in saves),
        "largest_bytes": max(event["size_bytes"] for event in saves),
    }


# --- what is printed ---


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"{model}, {plural(os.cpu_count() or 1, 'cores')}; Python {platform.python_version()}, {libraries}"


def table_of(runs: Sequence[Broken]) -> Table:
    """Make a table with a row for each kind of fault; all but `at most` are medians."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("fault", "injected", "resumed", "updates lost", "at most", "trains again", "bit-identical"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    kinds = (STARTING, UPDATE, ROLLOUT, SAVE, ENDING, BETWEEN)
    for name in [f"{sent} {doing}" for sent in (KILLED, ASKED) for doing in kinds]:
        hit_runs = [run for run in runs if any(fault.name == name for fault in run.faults)]
        faults = [fault for run in hit_runs for fault in run.faults if fault.name == name]
        if not faults:
            continue
        lost, back = [fault.lost for fault in faults], [fault.back_s for fault in faults if fault.back_s is not None]
        table.add_row(
            name,
            str(len(faults)),
            str(sum(fault.went_on for fault in faults)),
            f"{median(lost):g}",
            str(max(lost)),
            f"after {median(back):.1f} s" if back else "-",
            f"{sum(not run.differs for run in hit_runs)} of {plural(len(hit_runs), 'runs')}",
        )
    return table


def summary(runs: Sequence[Broken], kills: int) -> tuple[list[str], bool]:
    """Return the lines below the table, and whether all is as it should be."""
    killed = [fault for run in runs for fault in run.faults if fault.signal == KILLED]
    resumed, wanted = sum(fault.went_on for fault in killed), kills * len(runs)
    same = sum(not run.differs for run in runs)
    training_s, held_up_s = (sum(run.cost.get(name, 0.0) for run in runs) for name in ("training_s", "held_up_s"))
    lines = []
    if training_s:
        first = runs[0].cost
        lines += [
            f"unbroken: {median(run.unbroken_s for run in runs):.1f} s, "
            f"of which training took {training_s / len(runs):.1f} s; "
            f"broken: {median(run.seconds for run in runs):.1f} s (medians)",
            f"its {plural(int(first['saves']), 'checkpoints')}, one every {plural(EVERY_UPDATES, 'updates')}, "
            f"the largest {first['largest_bytes'] / 1e6:.1f} MB, {first['median_save_s']:.3f} s each until on disk, "
            f"held up training for {held_up_s / len(runs):.2f} s: {held_up_s / training_s:.1%} of it",
        ]
    if len(killed) < wanted:
        lines.append(f"only {len(killed)} of {plural(wanted, 'kills')} hit a run that was alive")
    lines += [f"seed {run.seed} differs: {run.differs}" for run in runs if run.differs]
    twins = f"{same} of {len(runs)} ended with the weights and the curve of the unbroken run"
    lines.append(f"{resumed} of {wanted} resumed; {twins}")
    asked = [fault for run in runs for fault in run.faults if fault.signal == ASKED]
    return lines, resumed == wanted and same == len(runs) and all(fault.went_on for fault in asked)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="broken runs, each with a seed of its own and an unbroken twin"
    )
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs a run")
    parser.add_argument("--terms", type=int, default=1, help="SIGTERMs a run, besides")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; also of its kills")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0, choices=[0, 1, 2, 3], help="ZeRO stage of all engines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep the runs here (default: a folder that is removed)"
    )
    return parser.parse_args()


def main() -> int:
    options, say = arguments(), console_on(sys.stderr).print
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    bench, runs = Bench(folder, options), list[Broken]()
    try:
        write_rows(folder / "rows")
        for seed in range(options.seed, options.seed + options.runs):
            unbroken_s = bench.unbroken(seed)
            say(f"  seed {seed}: unbroken in {unbroken_s:.1f} s")
            run = bench.broken(seed, wishes_of(random.Random(f"{seed}"), options.kills, options.terms), say)
            run.unbroken_s, run.cost = unbroken_s, cost_of(bench.run(f"unbroken-{seed}"))
            if run.ended:
                run.differs = difference(bench.run(f"broken-{seed}"), bench.run(f"unbroken-{seed}"))
            say(f"  seed {seed}: {plural(len(run.faults), 'faults')}, {run.seconds:.1f} s; {run.differs or 'the same'}")
            runs.append(run)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    out = console_on(sys.stdout)
    out.width = TABLE_WIDTH
    out.print(f"$ python {shlex.join(sys.argv)}\n{machine()}\n")
    out.print(table_of(runs), soft_wrap=False, crop=False)
    out.line()
    lines, is_well = summary(runs, options.kills)
    for line in lines:
        out.print(line)
    if options.json:
        numbers = {"machine": machine(), "command": sys.argv, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
