"""Test skipped updates, whose numbers are not finite, and the end of a run with too many of them.

Whole runs are in tests/faults.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from jobs.errors import ToolkitError
from jobs.events import Warning
from jobs.run_dir import RunDir
from rlhf_train.engine import divergence
from rlhf_train.engine.divergence import Skips
from tests.rlhf_train.engine.step import Step

pytestmark = pytest.mark.pinned


def test_updates_that_are_left_out(run: RunDir) -> None:
    step = Step(run, {"every_updates": 1}, updates=100)
    step.update(1)
    for number in range(2, 6):
        step.divergence.skip(number, "its loss is not finite")
        step.update(number)
    assert step.saved_updates() == [1]  # the result may be bad
    warnings = [event.message for event in step.events if isinstance(event, Warning)]
    assert warnings == [
        f"update {number} is left out: its loss is not finite ({number - 1} so far)" for number in range(2, 6)
    ]
    with pytest.raises(ToolkitError, match="step 1 diverged at update 6") as raised:
        step.divergence.skip(6, "its loss is not finite")
    assert raised.value.why == "its loss is not finite; 5 updates in a row were left out"
    assert raised.value.exit_code == 4
    assert raised.value.hint.endswith("the last good checkpoint is that of update 1")


@pytest.mark.parametrize("scale_can_fall", [False, True])
def test_weights_that_are_spoiled_end_the_run(run: RunDir, scale_can_fall: bool) -> None:
    """Also next to an engine whose own norm is due to its loss scale."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    well, spoiled = (
        SimpleNamespace(step=lambda: math.inf, scale_can_fall=scale_can_fall, is_spoiled=bad, update=2)
        for bad in (False, True)
    )
    with pytest.raises(ToolkitError, match="step 1 diverged at update 2") as raised:
        step.divergence.apply(well, spoiled)  # type: ignore[arg-type]
    assert raised.value.why == "its gradient norm is inf, and the weights were updated with it"


@pytest.mark.parametrize(("scale_can_fall", "in_a_row"), [(True, 0), (False, 1)])
def test_a_norm_that_is_not_finite_counts_when_the_loss_scale_is_at_its_floor(
    run: RunDir, scale_can_fall: bool, in_a_row: int
) -> None:
    step = Step(run, {})
    engine = SimpleNamespace(step=lambda: math.inf, scale_can_fall=scale_can_fall, is_spoiled=False, update=1)
    assert step.divergence.apply(engine) == [math.inf]  # type: ignore[arg-type]
    assert step.checkpointer.skips == Skips(in_a_row, in_a_row)
    warnings = [event.message for event in step.events if isinstance(event, Warning)]
    assert warnings == ["update 1 is left out: its gradient norm is inf (1 so far)"] * in_a_row


def test_too_many_are_left_out_in_all(run: RunDir) -> None:
    step = Step(run, {}, updates=1000)
    for number in range(1, divergence.MOST_SKIPPED):
        step.divergence.skip(number, "why")
        step.checkpointer.skips.in_a_row = 0  # as an update that went well does
    with pytest.raises(ToolkitError) as raised:
        step.divergence.skip(99, "why")
    assert raised.value.why == "why; 50 updates were left out"
