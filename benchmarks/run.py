"""What the product's speed is, against what the machine can do and beside its peers: one table a NAME, JSON beside.

`python benchmarks/run.py --list` says the names. A number is a median of several repeats, with the least and the most; the
foot of a table names the machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[0] = str(CHECKOUT)  # not this folder, whose `remote` is another

import torch  # noqa: E402

from benchmarks import ceilings, decode, growth, memory, padding, ppo, side_by_side, steps  # noqa: E402
from benchmarks.figures import Table  # noqa: E402
from benchmarks.product import MALLOC, Where  # noqa: E402
from benchmarks.work import SIZES, Size  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "numpy", "triton")


@dataclass(frozen=True)
class Bench:
    """What every measurement is given."""

    options: argparse.Namespace
    size: Size
    where: Where
    folder: Path  # for runs and models; each NAME has one of its own

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def do_ceilings(bench: Bench) -> Table:
    return ceilings.table(ceilings.measure(bench.where.device, bench.options.repeats), bench.where)


def do_decode(bench: Bench) -> Table:
    device, repeats = bench.where.device, bench.options.repeats
    return decode.table(bench.size, bench.where, repeats, bench.options.seed, ceilings.measure(device, repeats), bench.say)


def do_step(name: str) -> Callable[[Bench], Table]:
    def do(bench: Bench) -> Table:
        device, repeats = bench.where.device, bench.options.repeats
        ceiling = ceilings.measure(device, repeats)
        return steps.table(name, bench.size, bench.folder, bench.where, 2 * repeats, bench.options.seed, ceiling, bench.say)

    return do


def do_ppo(bench: Bench) -> Table:
    return ppo.table(bench.size, bench.folder, bench.where, bench.options.repeats, bench.options.seed, bench.options.lengths, bench.say)


def do_peers(bench: Bench) -> Table:
    return side_by_side.table(bench.size, bench.folder, bench.where, bench.options, bench.options.seed, bench.say)


def do_padding(bench: Bench) -> Table:
    return padding.table(bench.options.data, bench.folder, bench.where, 2 * bench.options.repeats, bench.say)


def do_memory(bench: Bench) -> Table:
    return memory.table(bench.size, bench.folder, bench.where, bench.options.seed, bench.say)


def do_growth(bench: Bench) -> Table:
    ranks = most_ranks("growth", bench.where.device)
    return growth.table(bench.size, bench.folder, bench.where, bench.options.repeats, bench.options.seed, ranks, bench.say)


def do_start_up(bench: Bench) -> Table:
    """What benchmarks/start_up.py prints and writes."""
    file = bench.folder / "start_up.json"
    words = [str(Path(__file__).parent / "start_up.py"), "--json", str(file)]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    return Table("start-up", [""], [], done.stdout.splitlines(), json.loads(file.read_text(encoding="utf-8")))


NAMES: dict[str, tuple[Callable[[Bench], Table], str]] = {
    "ceilings": (do_ceilings, "matmul rate and copy bandwidth of this machine"),
    "decode": (do_decode, "a decode step of the rollouts against its floor, and prefill"),
    "sft": (do_step("sft"), "step 1's samples/s and tokens/s, and the share of the matmul rate"),
    "reward": (do_step("reward"), "the same of step 2"),
    "ppo": (do_ppo, "step 3's phases and samples/s, at full and at real lengths"),
    "padding": (do_padding, "the share of real tokens in the three steps at default settings, on the rows of --data"),
    "memory": (do_memory, "the most memory that each step takes"),
    "start-up": (do_start_up, "from a command to its first update, by benchmarks/start_up.py"),
    "growth": (do_growth, "how step 3's cost grows: length of answers, batch, model, ranks"),
    "peers": (do_peers, "step 3 beside TRL, DeepSpeed-Chat and Hugging Face's generate, in turn"),
}


def most_ranks(name: str, device: str) -> int:
    if name != "growth":
        return 1
    return min(2, torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1)


def machine(where: Where) -> str:
    parts = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if where.device == "cuda" else []
    parts += [f"{os.cpu_count()} CPUs ({processor()})", f"threads {where.threads}", f"{platform.system()} {platform.release()}"]
    return ", ".join([*parts, f"load {os.getloadavg()[0]:.1f}"])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def foot(bench: Bench, seconds: float) -> list[str]:
    lines = [f"$ python {shlex.join(sys.argv)}", machine(bench.where), versions()]
    if bench.where.device == "cpu":
        lines.append(" ".join(f"{name}={value}" for name, value in MALLOC.items()) + " for every measured process")
    return [*lines, f"size {bench.options.size}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s"]


def quietest_cores(cores: set[int], count: int) -> set[int]:
    """Those of `cores` that idle most during half a second."""

    def idle() -> dict[int, int]:
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if line.startswith("cpu")]
        return {int(row[0][3:]): int(row[4]) for row in rows if row[0] != "cpu"}

    before = idle()
    time.sleep(0.5)
    after = idle()
    return set(sorted(cores, key=lambda core: before[core] - after[core])[:count])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; --list says which")
    parser.add_argument("--list", action="store_true", help="say the names")
    parser.add_argument("--size", choices=list(SIZES), help="of the models (default: small on a CPU, opt-1.3b on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a rank, and of a peer (default: 1, on a GPU 8)")
    parser.add_argument("--repeats", type=int, default=5, help="that count, of each measurement (updates of a process in ppo and peers)")
    parser.add_argument("--rounds", type=int, default=3, help="of peers: processes of each side, in turn")
    parser.add_argument("--lengths", choices=["both", "full", "real"], default="both", help="of ppo and peers")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="rows for padding, in the columns of Dahoas/rm-static")
    parser.add_argument("--deepspeed-chat", type=Path, metavar="PATH", help="a checkout of DeepSpeedExamples, for peers")
    parser.add_argument("--python-of-peers", metavar="PATH", help="an interpreter that has their packages (default: environments made for them)")
    parser.add_argument("--peers-here", action="store_true", help="their packages can be imported by this interpreter")
    parser.add_argument("--go-on", action="store_true", help="leave out a peer that fails, and say so below the table")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the numbers (default: benchmarks/results/)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep models and runs here (default: a folder that is removed)")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown or not (options.names or options.list):
        parser.error(f"{f'`{unknown[0]}` is no NAME' if unknown else 'name what to measure'}: {', '.join(NAMES)}")
    if "padding" in options.names and options.data is None:
        parser.error("padding needs --data FOLDER")
    return options


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(f"{name:<10} {what}" for name, (_, what) in NAMES.items()))
        return 0
    if options.device == "cpu" and any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})  # decode is measured in this process
    options.threads = options.threads or (1 if options.device == "cpu" else 8)
    options.size = options.size or ("opt-1.3b" if options.device == "cuda" else "small")
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        if "peers" in options.names:  # before this process is bound to a core
            side_by_side.prepare(options, lambda text: print(text, file=sys.stderr, flush=True))
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="benchmarks-"))).resolve()
    written, cores = {}, os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    try:
        for name in options.names:
            bench = Bench(options, SIZES[options.size], Where(options.device, options.threads), folder / name)
            shutil.rmtree(bench.folder, ignore_errors=True)
            bench.folder.mkdir(parents=True)
            bench.say(f"{name}:")
            if options.device == "cpu" and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, quietest_cores(cores, options.threads * most_ranks(name, "cpu")))
            began = time.monotonic()
            table = NAMES[name][0](bench)
            lines = foot(bench, time.monotonic() - began)
            print(f"\n{table}\n" + "\n".join(lines), flush=True)
            written[name] = {**asdict(table), "foot": lines}
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        if written:
            file = options.output or RESULTS / f"{'-'.join(written)}-{options.size}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(written, indent=1), encoding="utf-8")
            print(f"\nnumbers: {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
