"""Test that step 3's loop state reads back from a checkpoint, also from another version's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jobs.spec import Ppo
from rlhf_train.steps.context import Clock
from rlhf_train.steps.experience import Experience, Scored, TrainerView
from rlhf_train.steps.held_out import Summary
from rlhf_train.steps.ppo_state import SUMS, LoopState, Tally, explained_variance

LEAST: dict[str, Any] = {
    "rollout_batch": 2,
    "global_batch": 1,
    "actor_learning_rate": 1.0,
    "critic_learning_rate": 1.0,
}


def experience() -> Experience:
    """A rollout of two responses."""
    numbers = np.array([-0.5, -0.25], np.float32)
    view = TrainerView(numbers, numbers, 1.5)
    row = Scored(np.array([2, 5]), np.array([7, 2]), True, numbers, numbers, 0.75, view)
    return Experience.of([row, row], Ppo(**LEAST), 0.1, on_policy=False)


def state() -> LoopState:
    """After the first of two updates of a rollout."""
    tally = Tally(entropy=1.5, scored=8, scored_computed=9, rollout_s=1.0, score_s=2.0)
    tally.add({name: 1 / (place + 3) for place, name in enumerate(SUMS)}, [0.5, 0.25])
    tally.updates, tally.train_s = 1, 3.0
    return LoopState(
        before=Summary(reward=0.5, kl=0.25, kl_k3=0.375, objective=0.125, length=3.0, ended=0.75, good=None),
        kl_coef=1 / 3,
        shift=-0.1,
        scale=0.7,
        clock=Clock(100.0),
        training=Clock(50.0),
        rollout_micro_batch=4,
        tally=tally,
        experience=experience(),
    )


def saved() -> dict[str, Any]:
    """The numbers as they come back from the disk."""
    return json.loads(json.dumps(state().numbers()))


def test_the_loop_is_read_as_it_was_written() -> None:
    numbers = saved()
    assert list(numbers) == ["before", "kl_coef", "shift", "scale", "reference", "tally", "elapsed_s", "seconds"]
    found, expected = LoopState.read(numbers, state().tensors(), 4), state()
    assert (found.before, found.tally) == (expected.before, expected.tally)
    assert (found.kl_coef, found.shift, found.scale) == (1 / 3, -0.1, 0.7)
    assert 50.0 <= found.training() < 60.0 and 100.0 <= found.clock() < 110.0
    assert found.experience is not None
    tensors = expected.tensors()
    assert found.tensors().keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in found.tensors().items())


def test_between_two_rollouts_there_is_none_to_read() -> None:
    whole = state()
    whole.end_rollout()
    assert whole.tensors() == {}
    found = LoopState.read(json.loads(json.dumps(whole.numbers())), {}, 4)
    assert found.experience is None and found.tally == Tally()


def test_an_older_checkpoint_lacks_a_sum_and_a_field() -> None:
    """What it lacks counts from now on."""
    numbers = saved()
    del numbers["tally"]["sums"]["value_clipped"], numbers["tally"]["scored_computed"]
    found = LoopState.read(numbers, state().tensors(), 4).tally
    assert found.sums["value_clipped"] == 0.0 and found.scored_computed == 0
    found.add(dict.fromkeys(SUMS, 2.0), [0.5, 0.25])
    assert found.sums["value_clipped"] == 2.0
    assert found.sums["policy_loss"] == state().tally.sums["policy_loss"] + 2.0


def test_explained_variance_by_hand() -> None:
    to_go, values = [1.0, 2.0, 6.0], [1.5, 2.0, 4.0]
    # Mean 3, variance (4 + 1 + 9) / 3; squared errors 0.25 + 0 + 4.
    sums = {"tokens": 3.0, "to_go": 9.0, "to_go_squared": 41.0, "value_error": 4.25}
    assert sum((a - b) ** 2 for a, b in zip(to_go, values, strict=True)) == sums["value_error"]
    assert explained_variance(sums) == pytest.approx(1 - 4.25 / 14)
    assert explained_variance(sums | {"value_error": 14.0}) == pytest.approx(0)  # the mean as the value
    assert explained_variance({"tokens": 2.0, "to_go": 4.0, "to_go_squared": 8.0, "value_error": 1.0}) is None


def test_what_is_unknown_in_a_checkpoint_is_ignored() -> None:
    numbers = saved()
    numbers["tally"]["sums"]["of_another_version"] = 1.0
    numbers["tally"]["another"] = numbers["before"]["another"] = numbers["another"] = 1.0
    found = LoopState.read(numbers, state().tensors(), 4)
    assert found.tally == state().tally and found.before == state().before
    found.tally.add(dict.fromkeys(SUMS, 1.0), [0.5, 0.25])
    assert list(found.tally.sums) == list(SUMS)
