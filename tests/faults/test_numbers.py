"""Test numbers that go wrong.

An update without a finite loss is skipped, a run that has diverged ends, and odd answers are
reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.events import Event, Warning
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.engine import checkpoint_files
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.experience import Experience, Scored, TrainerView
from rlhf_train.steps.ppo import warn_of_odd_answers
from tests import tiny
from tests.faults.scene import Scene, curve, error_of, events, fault, warnings
from tests.tiny import Trained

Said = pytest.CaptureFixture[str]

LEFT_OUT = ["update 2 is left out: its loss is not finite (1 so far)"]


def test_one_update_is_left_out(base: Scene, untroubled: Trained) -> None:
    """Skip update 2 for either of its passes, and for one rank of two.

    The other updates train as before, since nothing of it is left in gradients or moments.
    """
    assert base.train("first-pass", met=fault("nan", first=5, last=5)) == 0
    assert base.train("second-pass", met=fault("nan", first=6, last=6)) == 0
    assert base.train("rank-1", "hardware.ranks=2", met=fault("nan", rank=1, first=4, last=4)) == 0
    expected = curve(base.run("first-pass"))
    assert list(expected) == [1, 3, 4]
    assert expected[1] == curve(untroubled.dir)[1]
    assert expected[3] != pytest.approx(curve(untroubled.dir)[3], rel=1e-3)  # it lacks an update
    for name in ("first-pass", "second-pass", "rank-1"):
        run = base.run(name)
        assert warnings(run) == LEFT_OUT
        assert curve(run) == pytest.approx(expected, rel=1e-5)
        assert Trained(run).end(1)["updates"] == 4
        assert all(bool(tensor.isfinite().all()) for tensor in Trained(run).weights(1).values())
    after = {name: Trained(base.run(name)).end(1)["perplexity_after"] for name in ("first-pass", "rank-1")}
    assert after["rank-1"] == pytest.approx(after["first-pass"], rel=1e-4)


@pytest.mark.parametrize(("ranks", "first"), [(1, 7), (2, 5)])  # two passes an update, or one: from update 3 on
def test_five_in_a_row_end_the_run(base: Scene, capsys: Said, ranks: int, first: int) -> None:
    """Whichever rank is the first to say so: only one of them knows what is on disk."""
    run, settings = (
        base.run(f"diverged-{ranks}"),
        ["sft.max_updates=10", "checkpoint.every_updates=2", f"hardware.ranks={ranks}"],
    )
    assert base.train(run.name, *settings, met=fault("nan", first=first)) == 4
    output = capsys.readouterr().err
    assert error_of(output) == (
        "error: step 1 diverged at update 7\n"
        "  why: its loss is not finite; 5 updates in a row were left out\n\n"
        "hint: lower the learning rate or sft.max_grad_norm, raise sft.warmup_updates, "
        "or look for broken rows in the data\n"
        "      the last good checkpoint is that of update 2\n"
    )
    assert "Traceback" not in output
    assert list(curve(run)) == [1, 2]
    assert warnings(run) == [
        f"update {update} is left out: its loss is not finite ({update - 2} so far)" for update in (3, 4, 5, 6)
    ]
    saved = checkpoint_files.latest(run.step(1), pytest.fail)
    assert saved is not None and saved.update == 2 and saved.state["skipped"] == [0, 0]
    assert [path.name for path in run.step(1).checkpoints.iterdir()] == ["update-2"]


def test_a_kl_that_explodes_ends_the_run(base: Scene, untroubled: Trained, capsys: Said) -> None:
    run, settings = base.run("far"), ["ppo.max_kl=1e-9", "ppo.actor_learning_rate=0.03", "checkpoint.every_updates=1"]
    assert base.train("far", *settings, step="3", more=("--from", "untroubled")) == 4
    first, second = events(run, "metrics", 3)  # one a rollout of two updates; the first is the reference's own
    assert first["kl"] == 0.0 and second["kl"] > 1e-9
    # The second rollout is not trained on, so nothing is saved.
    assert (second["update"], second["grad_norm"], "policy_loss" in second, second["mean_reward"] is not None) == (
        3,
        0.0,
        False,
        True,
    )
    assert [path.name for path in run.step(3).checkpoints.iterdir()] == ["update-2"]
    assert error_of(capsys.readouterr().err) == (
        f"error: step 3's KL to the reference exploded: {second['kl']:.4g} nats a response before update 3\n"
        "  why: ppo.max_kl is 1e-09: the actor no longer writes what the reference could have written\n\n"
        "hint: lower ppo.actor_learning_rate, raise ppo.kl_coef, or set ppo.kl_target, in a run of its own:\n"
        "      `--run NEW --from far`; the last good checkpoint is that of update 2\n"
    )
    assert not run.step(3).model.exists()


# --- answers ---

EOS, LIMIT = 2, 4
EMPTY, CUT, PLAIN, FULL = ([EOS], True), ([7, 7, 7, 7], False), ([7, EOS], True), ([7, 7, 7, EOS], True)


def answers(*kinds: tuple[list[int], bool]) -> Experience:
    """What a rollout of these (tokens, whether it ended) becomes."""
    rows = []
    for tokens, ended in kinds:
        numbers: Any = np.zeros(len(tokens), np.float32)
        rows.append(
            Scored(
                np.array([EOS, 5]), np.array(tokens), ended, numbers, numbers, 0.0, TrainerView(numbers, numbers, 1.0)
            )
        )
    return Experience.of(rows, Job.model_validate(tiny.job(Path("rows"))).ppo, kl_coef=0.1, on_policy=False)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([EMPTY, EMPTY, EMPTY], "all 3 answers of this rollout are empty: the first token is the EOS"),
        ([CUT, CUT], "all 2 answers of this rollout ran to the limit of 4 tokens: none ended with an EOS"),
        ([EMPTY, EMPTY, PLAIN], None),
        ([EMPTY, CUT], None),
        ([CUT, FULL], None),  # as long, but it ended
        ([PLAIN, FULL], None),
    ],
)
def test_odd_answers_are_told(kinds: list[tuple[list[int], bool]], message: str | None) -> None:
    told: list[Event] = []
    job = Job.model_validate(tiny.job(Path("rows")))
    place = Placement("cpu", "", 1, "float32", 0, 0, (4, 4, 4), 64, 1)
    context = StepContext(job, RunDir(Path("run")), World(0, 1, torch.device("cpu")), place, Path("cache"), told.append)
    warn_of_odd_answers(context, answers(*kinds), LIMIT)
    assert [event.message for event in told if isinstance(event, Warning)] == ([message] if message else [])
    assert all(isinstance(event, Warning) and event.step == 3 and event.hint for event in told)
