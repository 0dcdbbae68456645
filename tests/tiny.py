"""Jobs that train in seconds: rows, a job, and runs of `rlhf-train` on them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import yaml

from jobs.events import effective, read_events
from jobs.run_dir import RunDir

if TYPE_CHECKING:
    import torch

CHECKOUT = Path(__file__).parents[1]
WORDS = ["red", "blue", "tall", "small", "cat", "dog", "tree", "house", "runs", "sings"]
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 96,
    "init_std": 0.1,
}


def write_rows(folder: Path, train: int = 240, held_out: int = 21) -> Path:
    """A data set: say the words of the prompt again (chosen), or others (rejected).

    Prompts and answers of many lengths.
    """
    generator = random.Random(0)

    def words() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 4)))

    folder.mkdir()
    for name, count in (("train", train), ("test", held_out)):
        rows = []
        for _ in range(count):
            wanted, other = words(), words() + " no"
            rows.append(
                {"prompt": f"\n\nHuman: {wanted}\n\nAssistant:", "chosen": f" {wanted}", "rejected": f" {other}"}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def job(data: Path) -> dict[str, Any]:
    """Make a job of four updates a step, so few that rounding errors have no time to grow.

    Answers end, or do not end, within 12 tokens.
    """
    return {
        "name": "tiny",
        "seed": 1,
        "actor": {"model": {"config": OPT}, "tokenizer_vocabulary": 320},
        "critic": {"model": "actor"},
        "data": {
            "datasets": [str(data)],
            "split": [1, 1, 1],
            "max_prompt_tokens": 64,
            "max_response_tokens": 12,
            "eval_rows": 21,
        },
        "sft": {"global_batch": 8, "learning_rate": 1e-2, "max_updates": 4},
        "reward": {"global_batch": 8, "learning_rate": 1e-3, "max_updates": 4},
        "ppo": {
            "rollout_batch": 16,
            "global_batch": 8,
            "max_updates": 4,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
        },
        "hardware": {"ranks": 1, "device": "cpu", "precision": "float32", "micro_batch": 4, "cpu_threads": 1},
    }


@dataclass(frozen=True)
class Trained:
    """A run that ended with exit code 0."""

    dir: RunDir

    def events(self, kind: str, step: int) -> list[dict[str, Any]]:
        """All that were written, also those of updates that a killed run made again."""
        return _of(read_events(self.dir.events)[0], kind, step)

    def effective_events(self, kind: str, step: int) -> list[dict[str, Any]]:
        return _of(effective(read_events(self.dir.events)[0]), kind, step)

    def end(self, step: int) -> dict[str, Any]:
        (event,) = self.events("end", step)
        return event

    def weights(self, step: int, folder: str = "model") -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file  # the rest of this file needs no torch, and tests without torch use it

        return load_file(self.dir.step(step).path / folder / "model.safetensors")


def _of(events: Sequence[dict[str, Any]], kind: str, step: int) -> list[dict[str, Any]]:
    return [event for event in events if (event["kind"], event.get("step")) == (kind, step)]


def train(folder: Path, name: str, settings: Sequence[str] = (), steps: Sequence[str] = ("all",)) -> Trained:
    """Run `rlhf-train` on the tiny job in `folder`, which is made at the first call.

    name: of the run.
    """
    file = folder / "job.yaml"
    if not file.exists():
        file.write_text(yaml.safe_dump(job(write_rows(folder / "rows"))), encoding="utf-8")
    return run(folder, ["--job", str(file), "--run", name, "--step", *steps], settings)


def train_killed(
    folder: Path, name: str, settings: Sequence[str], *, at: Sequence[tuple[int, int]], then: Sequence[str] = ()
) -> Trained:
    """Train, and kill all processes (SIGKILL) each time that `at`'s next (step, update) is reached.

    A checkpoint of that step is there then. After each kill the same command runs again; after the
    last kill it also has the settings `then`.
    """
    run_dir = RunDir(folder / "runs" / name)
    words = words_of(folder, ["--job", str(folder / "job.yaml"), "--run", name], settings)
    for step, update in at:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "rlhf_train", *words],
            cwd=CHECKOUT,
            env=environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        least = {"metrics": update, "checkpoint": 1}
        while least.keys() - {
            e["kind"]
            for e in read_events(run_dir.events)[0]
            if e["kind"] in least and (e["step"], e["update"]) >= (step, least[e["kind"]])
        }:
            assert launcher.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.002)
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        for process in family:
            process.kill()
        launcher.wait()
        psutil.wait_procs(family[1:], timeout=60)
    return train(folder, name, [*settings, *then])


def words_of(folder: Path, arguments: Sequence[str], settings: Sequence[str] = ()) -> list[str]:
    words = ["--output-dir", str(folder / "runs"), *arguments]
    for setting in settings:
        words += ["--set", setting]
    return words


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"RLHF_CACHE": str(folder / "cache")}


def run(folder: Path, arguments: Sequence[str], settings: Sequence[str] = ()) -> Trained:
    """`rlhf-train`, which must end with 0, with its runs and its cache in `folder`."""
    from tests import launcher

    assert launcher.train(words_of(folder, arguments, settings), folder / "cache") == 0
    return Trained(RunDir(folder / "runs" / arguments[arguments.index("--run") + 1]))
