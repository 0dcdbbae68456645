"""The paths of a run. No other file puts them together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Of a run folder. It is raised when older code can no longer resume what newer code has written, or
# newer code would go on otherwise. In 1, rows of like length shared an update of steps 1 and 2, and
# a rollout was kept without its objectives.
FORMAT = 2
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also of a job, which names its run


@dataclass(frozen=True)
class StepDir:
    """`step1/`, `step2/` or `step3/` of a run."""

    path: Path

    @property
    def fields(self) -> Path:
        """The job fields that this step was started with (JSON)."""
        return self.path / "fields.json"

    @property
    def rows(self) -> Path:
        """The sha256 of the texts of all rows that this step read (JSON)."""
        return self.path / "rows.json"

    @property
    def complete(self) -> Path:
        """Written last, with the step's `end` event: its model is whole."""
        return self.path / "complete.json"

    @property
    def model(self) -> Path:
        """The step's result in plain Hugging Face format."""
        return self.path / "model"

    @property
    def model_ema(self) -> Path:
        """Step 3 with `ppo.ema_decay`: the exponential moving average of the actor."""
        return self.path / "model_ema"

    @property
    def reward_scale(self) -> Path:
        """Step 2: shift and scale that step 3 found for this reward model (JSON)."""
        return self.model / "reward_scale.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints from which a stopped step resumes; removed when the step is complete."""
        return self.path / "checkpoints"

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update}"

    @property
    def best(self) -> Path:
        """The best weights on held-out data, in the format of `model`.

        They are kept with `checkpoint.best_every_updates`.
        """
        return self.path / "best"


@dataclass(frozen=True)
class RunDir:
    """`runs/<name>/`: all that one run reads and writes."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def job_file(self) -> Path:
        """The resolved job."""
        return self.path / "job.yaml"

    @property
    def id(self) -> Path:
        """A random word that tells this run from any other, also from one of the same name.

        If it is absent, the folder was begun before there were ids.
        """
        return self.path / "id"

    @property
    def format(self) -> Path:
        """The number of this folder's format (JSON).

        If it is absent, the folder was begun before there was a number, and has format 1.
        """
        return self.path / "format"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """Everything that the ranks and their libraries print."""
        return self.path / "train.log"

    @property
    def report(self) -> Path:
        """The page that says whether the run worked; it is made from the events alone."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, a folder for each step; they are made from the events alone."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Files of Weights & Biases, with `track: [wandb]`. Its library names them."""
        return self.path / "wandb"

    @property
    def chats(self) -> Path:
        """The conversations with its models that somebody saved (JSON)."""
        return self.path / "chats"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer trained for a model that starts from a config."""
        return self.path / "tokenizer"

    @property
    def lock(self) -> Path:
        """The lock (flock) of the process that trains here; a crash releases it."""
        return self.path / "job" / "lock"

    @property
    def cancelled(self) -> Path:
        """The mark that the run shall not resume, written by a cancel before it sends SIGTERM."""
        return self.path / "job" / "cancelled"

    # remote/on_box/supervisor.sh writes the rest of job/, each file one line. If a file is absent,
    # its value is not known, or the run was started by hand.

    @property
    def request(self) -> Path:
        """The id of the request that started this job."""
        return self.path / "job" / "request"

    @property
    def supervisor(self) -> Path:
        """The supervisor's process number.

        `start` (in ticks since the boot) and `boot`, next to it, tell the process from a later one
        with the same number.
        """
        return self.path / "job" / "pid"

    @property
    def process(self) -> Path:
        """The job's process, on a box without Docker: number and start time."""
        return self.path / "job" / "process"

    @property
    def container(self) -> Path:
        """The name of the job's container, on a box with Docker."""
        return self.path / "job" / "container"

    @property
    def started(self) -> Path:
        """When the job started: seconds since 1970, by the box's clock.

        `heartbeat` and `ended` are in the same unit.
        """
        return self.path / "job" / "started"

    @property
    def heartbeat(self) -> Path:
        """When the supervisor was last alive."""
        return self.path / "job" / "heartbeat"

    @property
    def ended(self) -> Path:
        return self.path / "job" / "ended"

    @property
    def exit(self) -> Path:
        """The job's exit code, written last, when none of its processes runs any more."""
        return self.path / "job" / "exit"

    @property
    def output(self) -> Path:
        """The job's output, which shows why it failed before there was a log."""
        return self.path / "job" / "output"

    @property
    def fitted(self) -> Path:
        """The micro batches that fit into memory here, after larger ones did not (JSON)."""
        return self.path / "job" / "fitted.json"

    @property
    def redo(self) -> Path:
        """The steps that an unfinished `--redo` has still to train (JSON)."""
        return self.path / "job" / "redo.json"

    def step(self, number: int) -> StepDir:
        return StepDir(self.path / f"step{number}")
