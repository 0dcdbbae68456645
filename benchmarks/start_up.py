"""This program measures the time from a command, or from the end of a step, to the next update.

`python benchmarks/start_up.py` trains the demo for a few updates a step and prints medians: cold,
with nothing of ours in the caches, and warm, as in a second run. Whether the disk's own cache is
cold depends on what ran before. `--rows FOLDER` trains on other rows. `--set` changes the job as in
rlhf-train: hardware.device=cuda, say. All times but the imports come from the events of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

from rich import box
from rich.table import Table

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.faults import TABLE_WIDTH, machine  # noqa: E402
from jobs.events import RawEvent, read_events  # noqa: E402
from jobs.run_dir import RunDir  # noqa: E402
from jobs.views.console import console_on  # noqa: E402

# Some seconds of training a step, since a step prepares the next one too. Step 3 makes four updates
# from one rollout.
FEW = ["sft.max_updates=120", "reward.max_updates=80", "ppo.max_updates=4", "ppo.warmup_updates=1", "data.eval_rows=64"]
# Rows of real chats are longer than the demo's.
LONGER = ["data.max_prompt_tokens=256", "data.max_response_tokens=64", "actor.model.config.max_position_embeddings=512"]

# What a step does before its first update, with the first words of the events that say so.
STARTING, ROWS, MODELS, TRYING, BEFORE = "processes", "rows", "models", "trial update", "scores, update"
PHASES = {
    ROWS: ("training a tokenizer", "reading", "tokenising", "waiting for another rank"),
    MODELS: ("loading", "a checkpoint has", "reading the checkpoint"),
    TRYING: ("trying",),
}

COLD, WARM = "cold", "warm"
LIBRARIES = ("torch", "transformers", "deepspeed", "datasets")
IMPORTS = {
    "launcher": "import rlhf_train.__main__, rlhf_train.plan.machine, rlhf_train.launch",
    "rank": "import rlhf_train.worker; from rlhf_train.steps import sft, reward, ppo; "
    "import transformers.models.opt.modeling_opt",
}
GROUP = """
import time, torch, torch.distributed as dist
from rlhf_train.engine.deepspeed_engine import connect
from rlhf_train.ranks.collectives import World
begun = time.perf_counter()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
connect(World(0, 1, torch.device("cpu")), 0)
print(time.perf_counter() - begun)
"""


@dataclass
class Row:
    """The seconds of each repeat of one wait, in all and by phase."""

    what: str
    caches: str
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    def cells(self) -> list[str]:
        phases = [
            f"{median(self.phases[name]):.2f}" if name in self.phases else "-"
            for name in (STARTING, ROWS, MODELS, TRYING, BEFORE)
        ]
        spread = f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"
        return [self.what, self.caches, f"{median(self.seconds):.2f}", spread, *phases]


def measure(repeats: int, settings: Sequence[str] = (), rows: Path | None = None, job: str = "demo") -> list[Row]:
    """Return a row for each wait before a first update, and one for the whole command.

    Each repeat runs with cold and then with warm caches.
    """
    found: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        folder = Path(name)
        wanted = [*FEW, *([f"data.datasets=[{json.dumps(str(rows))}]", *LONGER] if rows else []), *settings]
        for number in range(repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for caches in (COLD, WARM):
                for what, seconds, phases in once(folder, f"{caches}-{number}", job, wanted):
                    row = found.setdefault((what, caches), Row(what, caches))
                    row.seconds.append(seconds)
                    for phase, its_seconds in phases.items():
                        row.phases.setdefault(phase, []).append(its_seconds)
    return list(found.values())


def once(folder: Path, name: str, job: str, settings: Sequence[str]) -> list[tuple[str, float, Mapping[str, float]]]:
    """Run the job once, and return each wait: its name, its seconds, its seconds by phase."""
    words = [sys.executable, "-m", "rlhf_train", "--job", job, "--output-dir", str(folder / "runs"), "--run", name]
    for setting in settings:
        words += ["--set", setting]
    cache = folder / "cache"
    caches = {"RLHF_CACHE": f"{cache}/rlhf-box", "XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": f"{cache}/triton"}
    begun = time.time()
    done = subprocess.run(words, cwd=CHECKOUT, env=os.environ | caches, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    events = read_events(RunDir(folder / "runs" / name).events)[0]
    waits: list[tuple[str, float, Mapping[str, float]]] = []
    since = begun
    for step in (1, 2, 3):
        of_step = [event for event in events if event.get("step") == step]
        first = next(event for event in of_step if event["kind"] == "metrics")
        what = "command -> update 1" if step == 1 else f"end of step {step - 1} -> update"
        waits.append((what, time_of(first) - since, phases_of(of_step[: of_step.index(first) + 1], since)))
        since = time_of(of_step[-1])
    return [*waits, ("whole command", ended - begun, {})]


def time_of(event: RawEvent) -> float:
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()


def phases_of(events: Sequence[RawEvent], since: float) -> dict[str, float]:
    """Return the seconds by phase.

    Each event begins a phase, and the last event is the first update's.
    """
    spent: dict[str, float] = defaultdict(float)
    phase, begun = STARTING, since
    for event in events:
        spent[phase] += time_of(event) - begun
        begun = time_of(event)
        if event["kind"] == "progress":
            phase = next((name for name, words in PHASES.items() if event["doing"].startswith(words)), BEFORE)
    return spent


IMPORT_LINE = r"^import time:\s+([0-9]+) \|\s+[0-9]+ \|\s+(\S+)"  # (microseconds, module)


def imports(repeats: int) -> dict[str, dict[str, float]]:
    """Return the median seconds that each process's imports take, by package.

    They are measured by `python -X importtime`, which itself slows imports a little.
    """
    found: dict[str, dict[str, float]] = {}
    for process, statement in IMPORTS.items():
        sums: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            output = run_python("-X", "importtime", "-c", statement).stderr
            spent: Counter[str] = Counter()
            for micros, module in re.findall(IMPORT_LINE, output, flags=re.MULTILINE):
                package = module.split(".")[0]
                spent[package if package in LIBRARIES else "other"] += int(micros)
            for package in (*LIBRARIES, "other"):
                sums[package].append(spent[package] / 1e6)
            sums["sum"].append(sum(spent.values()) / 1e6)
        found[process] = {package: median(seconds) for package, seconds in sums.items()}
    found["rank"]["process group"] = median(float(run_python("-c", GROUP).stdout.split()[-1]) for _ in range(repeats))
    return found


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=CHECKOUT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )


def container_s(repeats: int) -> list[float] | str:
    """Measure `docker compose run` up to Python's first line, or say why that is not possible."""
    try:
        image = subprocess.run(
            ["docker", "compose", "images", "--quiet", "train"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
        )
        engine = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    except OSError:
        return "there is no Docker here"
    if engine.returncode:
        return "no Docker engine answers"
    if image.returncode:
        return "docker compose does not know the service here"
    words = ["docker", "compose", "run", "--rm", "--no-TTY", "--entrypoint", "/opt/entrypoint", "train"]
    words += ["python", "-c", "import time; print(time.time())"]
    seconds = []
    for _ in range(repeats + 1):
        begun = time.time()
        done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`docker compose run` ended with {done.returncode}: {done.stderr.strip()[-200:]}"
        seconds.append(float(done.stdout.split()[-1]) - begun)
    return seconds[1:]  # the first may have built the image


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("seconds, median", "caches", "all", "from, to", STARTING, ROWS, MODELS, TRYING, BEFORE):
        table.add_column(name, justify="left" if name in ("seconds, median", "caches") else "right")
    for row in sorted(rows, key=lambda row: row.caches != COLD):
        table.add_row(*row.cells())
    return table


def table_of_imports(found: Mapping[str, Mapping[str, float]]) -> Table:
    names = [*LIBRARIES, "other", "sum", "process group"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("imports, s", *names):
        table.add_column(name, justify="left" if name == "imports, s" else "right")
    for process, seconds in found.items():
        table.add_row(process, *(f"{seconds[name]:.2f}" if name in seconds else "-" for name in names))
    return table


def named_machine() -> str:
    command = ["sh", "-c", "nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    gpus = [name for name in output.split("\n") if name]
    return machine() + (f"; {len(gpus)} x {gpus[0]}" if gpus else "; no GPU") + f"; load {os.getloadavg()[0]:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs with cold caches, and as many with warm ones")
    parser.add_argument("--job", default="demo", help="as for rlhf-train; of each step a few updates are done")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="train on these rows")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=v", help="change a field of the job; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    options, before = parser.parse_args(), named_machine()
    rows = measure(options.repeats, options.set, options.rows and options.rows.resolve(), options.job)
    found, container = imports(options.repeats), container_s(options.repeats)
    out = console_on(sys.stdout)
    out.width = TABLE_WIDTH
    out.print(f"$ python {shlex.join(sys.argv)}\n{before}\n")
    out.print(table_of(rows), soft_wrap=False, crop=False)
    out.line()
    out.print(table_of_imports(found), soft_wrap=False, crop=False)
    measured = container if isinstance(container, str) else f"{median(container):.2f} s"
    out.print(f"\n`docker compose run train` to Python's first line: {measured}")
    if options.json:
        numbers = {
            "machine": before,
            "command": sys.argv,
            "rows": [asdict(row) for row in rows],
            "imports": found,
            "container": container,
        }
        options.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
