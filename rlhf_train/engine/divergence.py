"""Divergence skips updates whose numbers are not finite, and ends a run with too many of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.errors import ExitCode, ToolkitError
from jobs.events import Event, Warning
from jobs.formatting import plural
from jobs.steps import STEPS

if TYPE_CHECKING:
    from rlhf_train.engine.deepspeed_engine import Engine

# With so many skipped updates in a row, or in a step, the run has diverged.
MOST_SKIPPED_IN_A_ROW, MOST_SKIPPED = 5, 50


@dataclass
class Skips:
    """How many updates were skipped because of numbers that are not finite."""

    in_a_row: int = 0  # up to now; 0 after an update that went well
    in_all: int = 0  # in the step


class Divergence:
    """Applies a step's updates, counts those that it skips, and ends a run that has diverged.

    Every rank has one.
    """

    def __init__(
        self,
        step: int,
        updates: int,
        skips: Skips,
        *,
        emit: Callable[[Event], None],
        last_good: Callable[[], str],
    ) -> None:
        """Begin with `skips`, which a checkpoint may have restored.

        updates: of the whole step. last_good: names the last good checkpoint; all ranks call it
        before they raise.
        """
        self.step = step
        self.updates = updates
        self.skips = skips
        self._emit = emit
        self._last_good = last_good

    def apply(self, *engines: Engine) -> list[float]:
        """Update all engines' weights, and return their gradient norms.

        A norm that is not finite counts as a skipped update, unless the engine's float16 loss scale
        may be the reason and can still go lower. Raises ToolkitError if the run has diverged.
        """
        norms = [engine.step() for engine in engines]
        update = engines[0].update
        spoiled = [norm for norm, engine in zip(norms, engines, strict=True) if engine.is_spoiled]
        if spoiled:
            raise self._diverged(update, f"its gradient norm is {spoiled[0]}, and the weights were updated with it")
        may_be_broken = [norm for norm, engine in zip(norms, engines, strict=True) if not engine.scale_can_fall]
        broken = [norm for norm in may_be_broken if not math.isfinite(norm)]
        if broken:
            self._count(update, f"its gradient norm is {broken[0]}")
        else:
            self.skips.in_a_row = 0
        return norms

    def skip(self, update: int, why: str, *engines: Engine) -> None:
        """Skip an update of `engines` that was not applied.

        Raises ToolkitError if it is one too many.
        """
        self._count(update, why)
        for engine in engines:
            engine.skip()

    def check(self, numbers: Mapping[str, float]) -> None:
        """Raise ToolkitError if a number that was measured in the end is not finite.

        The last updates may all have been skipped, but too few of them to end the run.
        """
        broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if broken:
            found = ", ".join(f"the {name} on held-out data is {value}" for name, value in broken.items())
            raise self._diverged(self.updates, found)

    def _count(self, update: int, why: str) -> None:
        """Count a skipped update. Raises ToolkitError if it is one too many."""
        skips = self.skips
        skips.in_a_row += 1
        skips.in_all += 1
        if skips.in_a_row < MOST_SKIPPED_IN_A_ROW and skips.in_all < MOST_SKIPPED:
            message = f"update {update} is left out: {why} ({skips.in_all} so far)"
            self._emit(Warning(step=self.step, message=message))
            return
        is_row = skips.in_a_row >= MOST_SKIPPED_IN_A_ROW
        left_out = f"{skips.in_a_row} updates in a row" if is_row else plural(skips.in_all, "updates")
        raise self._diverged(update, f"{why}; {left_out} were left out")

    def _diverged(self, update: int, why: str) -> ToolkitError:
        return diverged(self.step, update, why, self._last_good())


def diverged(step: int, update: int, why: str, last_good: str) -> ToolkitError:
    """Make the error that ends a run whose numbers went wrong.

    last_good: a sentence about the last checkpoint.
    """
    part = STEPS[step].section
    settings = f"lower the learning rate or {part}.max_grad_norm, raise {part}.warmup_updates"
    return ToolkitError(
        f"step {step} diverged at update {update}",
        why=why,
        hint=f"{settings}, or look for broken rows in the data\n{last_good}",
        exit_code=ExitCode.TRAINING,
    )
