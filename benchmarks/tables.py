"""This module maps each NAME of benchmarks/run.py to the function that makes its table.

It also makes the foot of all tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import ceilings, decode, growth, memory, padding, ppo, scaling, side_by_side, steps
from benchmarks.figures import Table
from benchmarks.machine import MALLOC, Where, machine, versions
from benchmarks.work import Size, write_models


@dataclass(frozen=True)
class Bench:
    """The input of every measurement."""

    options: argparse.Namespace
    size: Size
    where: Where
    folder: Path  # for runs and models; each NAME has its own

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def do_ceilings(bench: Bench) -> Table:
    return ceilings.table(ceilings.measure(bench.where.device, bench.options.repeats), bench.where)


def do_decode(bench: Bench) -> Table:
    repeats = bench.options.repeats
    ceiling = ceilings.measure(bench.where.device, repeats)
    return decode.table(bench.size, bench.where, repeats, bench.options.seed, ceiling, bench.say, bench.options.next_to)


def do_step(name: str) -> Callable[[Bench], Table]:
    def do(bench: Bench) -> Table:
        repeats, seed = bench.options.repeats, bench.options.seed
        ceiling = ceilings.measure(bench.where.device, repeats)
        return steps.table(name, bench.size, bench.folder, bench.where, 2 * repeats, seed, ceiling, bench.say)

    return do


def do_ppo(bench: Bench) -> Table:
    options = bench.options
    return ppo.table(bench.size, bench.folder, bench.where, options.repeats, options.seed, options.lengths, bench.say)


def do_peers(bench: Bench) -> Table:
    """Make the peers' environments with all cores, and measure with one."""
    measured_cores = os.sched_getaffinity(0) if bench.where.cores else set()
    if measured_cores:
        os.sched_setaffinity(0, bench.where.cores)
    side_by_side.prepare(bench.options, bench.say)
    if measured_cores:
        os.sched_setaffinity(0, measured_cores)
    return side_by_side.table(bench.size, bench.folder, bench.where, bench.options, bench.options.seed, bench.say)


def do_padding(bench: Bench) -> Table:
    return padding.table(bench.options.data, bench.folder, bench.where, 2 * bench.options.repeats, bench.say)


def do_memory(bench: Bench) -> Table:
    return memory.table(bench.size, bench.folder, bench.where, bench.options.seed, bench.say)


def do_growth(bench: Bench) -> Table:
    ranks, options = most_ranks("growth", bench.where.device), bench.options
    return growth.table(bench.size, bench.folder, bench.where, options.repeats, options.seed, ranks, bench.say)


def do_scaling(name: str) -> Callable[[Bench], Table]:
    def do(bench: Bench) -> Table:
        updates = bench.options.repeats if name == "ppo" else 2 * bench.options.repeats
        seed, models = bench.options.seed, _models(bench)
        return scaling.speed(name, bench.size, bench.folder, bench.where, updates, seed, models, bench.say)

    return do


def _models(bench: Bench) -> Path:
    """Return the folder of random models, which are written once for all NAMEs of a call."""
    folder = bench.folder.parent / "models"
    if not folder.exists():
        write_models(bench.size, folder, bench.where.device, bench.options.seed)
    return folder


def do_curves(bench: Bench) -> Table:
    return scaling.curves(bench.size, bench.options.data, bench.folder, bench.where, bench.options.seed, bench.say)


def do_killed_rank(bench: Bench) -> Table:
    return scaling.killed_rank(bench.options.data, bench.folder, bench.where, bench.say)


def do_fits(bench: Bench) -> Table:
    return scaling.fits(bench.size, bench.folder, bench.where, bench.options.seed, _models(bench), bench.say)


def do_start_up(bench: Bench) -> Table:
    """Return what benchmarks/start_up.py prints and writes."""
    file = bench.folder / "start_up.json"
    words = [str(Path(__file__).parent / "start_up.py"), "--json", str(file)]
    words += ["--repeats", str(min(3, bench.options.repeats)), "--set", f"hardware.device={bench.where.device}"]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    return Table("start-up", [], [], done.stdout.strip().splitlines(), json.loads(file.read_text(encoding="utf-8")))


TABLES: dict[str, Callable[[Bench], Table]] = {
    "ceilings": do_ceilings,
    "decode": do_decode,
    "sft": do_step("sft"),
    "reward": do_step("reward"),
    "ppo": do_ppo,
    "padding": do_padding,
    "memory": do_memory,
    "start-up": do_start_up,
    "growth": do_growth,
    "scaling-sft": do_scaling("sft"),
    "scaling-reward": do_scaling("reward"),
    "scaling-ppo": do_scaling("ppo"),
    "curves": do_curves,
    "killed-rank": do_killed_rank,
    "fits-24gb": do_fits,
    "peers": do_peers,
}


def most_ranks(name: str, device: str) -> int:
    if name != "growth" and name != "killed-rank" and not name.startswith("scaling"):
        return 1
    return min(2, torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1)


def foot(bench: Bench, seconds: float) -> list[str]:
    malloc = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    lines = [
        f"$ python {shlex.join(sys.argv)}",
        machine(bench.where),
        versions(),
        f"{malloc} for every measured process",
    ]
    return [*lines, f"size {bench.options.size}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s"]
