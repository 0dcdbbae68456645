"""Measure how fast rows become token ids, and what memory a rank needs for them.

    .venv/bin/python benchmarks/rows.py 20000 200000 1000000

A line for each number of rows: short rows of text pairs, read, tokenised and split in a process of
its own, first without a cache, then with it. `memory` is what the process has at most, less what
it had after its imports; `of files` is the part of it at the end that is mapped from the cache,
which ranks of one machine share.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(CHECKOUT)  # not this folder, which has a `remote` of its own

WORDS = ["red", "blue", "tall", "small", "cat", "dog", "tree", "house", "runs", "sings", "bread", "milk", "rice", "tea"]
VOCABULARY = 512


def write_rows(file: Path, count: int) -> None:
    """Write rows of some 30 words, each with a prompt of its own."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            words = [" ".join(draw.choices(WORDS, k=draw.randint(4, 16))) for _ in range(3)]
            row = {
                "prompt": f"\n\nHuman: {number} {words[0]}\n\nAssistant:",
                "chosen": f" {words[1]}",
                "rejected": f" {words[2]}",
            }
            stream.write(json.dumps(row) + "\n")


def measured(folder: Path) -> None:
    """Prepare the folder's rows, and print what it took; run in a process of its own."""
    from jobs.spec import Data
    from rlhf_train.data.dataset import prepare
    from rlhf_train.models.networks import train_tokenizer

    rows = folder / "rows.jsonl"
    with rows.open(encoding="utf-8") as stream:
        tokenizer = train_tokenizer((next(stream) for _ in range(500)), VOCABULARY)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    corpus = prepare(Data(datasets=(str(rows),)), tokenizer, cache=folder / "cache", say=lambda what: None)
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = corpus.train.digest(2)
    print(json.dumps({"seconds": seconds, "mib": (most - before) / 1024, "files_mib": mapped_mib(), "digest": digest}))


def mapped_mib() -> float:
    """Return the memory of this process that is mapped from files; Linux alone says so."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssFile"))
    return float(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[20_000, 200_000], metavar="ROWS")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        return measured(options.measured)
    print(f"{'rows':>9}  {'cache':<5}  {'seconds':>8}  {'rows/s':>8}  {'memory':>9}  {'of files':>9}")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder, "rows.jsonl"), count)
            digests = set()
            for cache in ("none", "there"):
                command = [sys.executable, __file__, "--measured", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                digests.add(found["digest"])
                print(
                    f"{count:>9}  {cache:<5}  {found['seconds']:>8.1f}  {count / found['seconds']:>8.0f}"
                    f"  {found['mib']:>5.0f} MiB  {found['files_mib']:>5.0f} MiB",
                    flush=True,
                )
            assert len(digests) == 1
    return None


if __name__ == "__main__":
    main()
