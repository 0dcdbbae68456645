"""Every path of a run. No other file joins one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FORMAT = 1  # of a run folder; raised when older code can no longer go on with what newer code has written


@dataclass(frozen=True)
class StepDir:
    """`step1/`, `step2/` or `step3/` of a run."""

    path: Path

    @property
    def fields(self) -> Path:
        """The job fields that this step was started with (JSON)."""
        return self.path / "fields.json"

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
        """What the step goes on from when it was stopped; gone when it is complete."""
        return self.path / "checkpoints"

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update}"

    @property
    def best(self) -> Path:
        """With `checkpoint.best_every_updates`: the weights that did best on held-out data, as
        `model`.
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
    def format(self) -> Path:
        """The number of this folder's format (JSON).

        Absent: it was begun before there was one, and is of format 1.
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
    def tokenizer(self) -> Path:
        """The tokenizer trained for a model that starts from a config."""
        return self.path / "tokenizer"

    @property
    def lock(self) -> Path:
        """Held (flock) by the process that trains here; a crash lets go of it."""
        return self.path / "job" / "lock"

    @property
    def cancelled(self) -> Path:
        """Written before SIGTERM by who cancels the run: it is not to go on."""
        return self.path / "job" / "cancelled"

    # The rest of job/ is written by remote/on_box/supervisor.sh, each file one line. Absent: not
    # known, or the run was started by hand.

    @property
    def request(self) -> Path:
        """Of the start that made this job."""
        return self.path / "job" / "request"

    @property
    def supervisor(self) -> Path:
        """Its process; `start` (in ticks since the boot) and `boot` beside it tell it from a later
        one with the same number.
        """
        return self.path / "job" / "pid"

    @property
    def process(self) -> Path:
        """Of the job itself, on a box without Docker: number and start time."""
        return self.path / "job" / "process"

    @property
    def container(self) -> Path:
        """Of the job itself, by name, on a box with Docker."""
        return self.path / "job" / "container"

    @property
    def started(self) -> Path:
        """Seconds since 1970, by the box's clock; so are `heartbeat` and `ended`."""
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
        """The job's exit code; written last, when nothing of it runs any more."""
        return self.path / "job" / "exit"

    @property
    def output(self) -> Path:
        """What the job has printed: why it failed before there was a log."""
        return self.path / "job" / "output"

    @property
    def fitted(self) -> Path:
        """The micro batches that fit into memory here, after larger ones did not (JSON)."""
        return self.path / "job" / "fitted.json"

    @property
    def redo(self) -> Path:
        """What a `--redo` that is under way has still to do (JSON)."""
        return self.path / "job" / "redo.json"

    def step(self, number: int) -> StepDir:
        return StepDir(self.path / f"step{number}")
