"""This program measures the product's speed against the machine's limits and against its peers.

Each NAME prints a table and writes JSON; `python benchmarks/run.py --list` lists the names. A
number is a median of several repeats, with the least and the most. The foot of a table names the
machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(CHECKOUT)  # not this folder, which has a `remote` of its own

from benchmarks.machine import MALLOC, Where, quietest_cores  # noqa: E402

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "ceilings": "matmul rate and copy bandwidth of this machine",
    "decode": "a decode step of the rollouts against its floor, and prefill",
    "sft": "step 1's samples/s and tokens/s, and the share of the matmul rate",
    "reward": "the same of step 2",
    "ppo": "step 3's phases and samples/s, at full and at real lengths",
    "padding": "the share of real tokens in the three steps at default settings, on the rows of --data",
    "memory": "the most memory that each step takes",
    "start-up": "from a command to its first update, by benchmarks/start_up.py",
    "growth": "how step 3's cost grows: length of answers, batch, model, ranks",
    "scaling-sft": "step 1 on 1 and on 2 GPUs: ZeRO 1 to 3, LoRA, GPUs that do not reach each other",
    "scaling-reward": "the same of step 2",
    "scaling-ppo": "the same of step 3",
    "curves": "whether 1 and 2 GPUs learn the same, on the rows of --data",
    "killed-rank": "all three steps on 2 ranks, one of which is killed, on the rows of --data",
    "fits-24gb": "which of OPT-1.3b's recipes fit on two cards of 24 GB",
    "peers": "step 3 against TRL, DeepSpeed-Chat and Hugging Face's generate, in turn",
}
# Of benchmarks/work.py, which takes seconds to import.
SIZES = (
    "tiny", "small", "small-llama", "opt-1.3b", "smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "qwen2.5-1.5b"
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; --list says which")
    parser.add_argument("--list", action="store_true", help="say the names")
    parser.add_argument(
        "--size", choices=list(SIZES), help="of the models (default: small on a CPU, opt-1.3b on a GPU)"
    )
    parser.add_argument(
        "--next-to", nargs="+", choices=["eager", "static"], default=[], metavar="HOW",
        help="for decode: also time answers by the model's own forward (eager), or by Hugging Face's generate with "
        "its static cache (static)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where PyTorch sees a GPU")
    parser.add_argument("--threads", type=int, help="of a rank, and of a peer (default: 1, on a GPU 8)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="that count, of each measurement (updates of a process in ppo and peers)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of peers: processes of each side, in turn")
    parser.add_argument("--lengths", choices=["both", "full", "real"], default="both", help="of ppo and peers")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="rows for padding, curves and killed-rank, in the columns of Dahoas/rm-static",
    )
    parser.add_argument(
        "--deepspeed-chat", type=Path, metavar="PATH", help="a checkout of DeepSpeedExamples, for peers"
    )
    parser.add_argument(
        "--python-of-peers",
        metavar="PATH",
        help="an interpreter that has their packages (default: environments made for them)",
    )
    parser.add_argument("--peers-here", action="store_true", help="their packages can be imported by this interpreter")
    parser.add_argument("--go-on", action="store_true", help="leave out a peer that fails, and say so below the table")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the numbers (default: benchmarks/results/)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep models and runs here (default: a folder that is removed)"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown or not (options.names or options.list):
        parser.error(f"{f'`{unknown[0]}` is no NAME' if unknown else 'name what to measure'}: {', '.join(NAMES)}")
    if options.data is None and (needy := {"padding", "curves", "killed-rank"} & {*options.names}):
        parser.error(f"{' and '.join(sorted(needy))} need --data FOLDER")
    return options


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(f"{name:<10} {what}" for name, what in NAMES.items()))
        return 0
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        # Decode is measured in this process.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})

    import torch

    from benchmarks.figures import Table
    from benchmarks.tables import TABLES, Bench, foot, most_ranks
    from benchmarks.work import SIZES as SHAPES

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.threads = options.threads or (1 if options.device == "cpu" else 8)
    options.size = options.size or ("opt-1.3b" if options.device == "cuda" else "small")
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="benchmarks-"))).resolve()
    written, cores = dict[str, Any](), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        for name in options.names:
            where = Where(options.device, options.threads, cores=frozenset(cores))
            bench = Bench(options, SHAPES[options.size], where, folder / name)
            shutil.rmtree(bench.folder, ignore_errors=True)
            bench.folder.mkdir(parents=True)
            bench.say(f"{name}:")
            if options.device == "cpu" and cores:
                os.sched_setaffinity(0, quietest_cores(cores, options.threads * most_ranks(name, "cpu")))
            began = time.monotonic()
            table: Table = TABLES[name](bench)
            lines = foot(bench, time.monotonic() - began)
            print(f"\n{table}\n" + "\n".join(lines), flush=True)
            written[name] = {**asdict(table), "foot": lines}
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        if written:
            file_name = f"{'-'.join(written)}-{options.size}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}.json"
            file = options.output or RESULTS / file_name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(written, indent=1), encoding="utf-8")
            print(f"\nnumbers: {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
