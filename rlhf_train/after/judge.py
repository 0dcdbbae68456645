"""Score answers by a run's reward model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jobs.errors import ToolkitError
from jobs.run_dir import RunDir
from rlhf_train.after.room import Room
from rlhf_train.after.sources import job_of
from rlhf_train.completion import is_complete
from rlhf_train.data.sequences import Sequences
from rlhf_train.disk import read_json
from rlhf_train.models.networks import ScoreForward, check_same_tokenizer, load_scorer, load_tokenizer


def reward_model_of(run: RunDir | None) -> str | None:
    """Return the reward model of step 2, or the one that took its place; None: there is none."""
    if run is None:
        return None
    if is_complete(run, 2):
        return str(run.step(2).model)
    job = job_of(run)
    return job.own_models.get(2) if job is not None else None


class Judge:
    """A reward model, on the scale that the run's table has."""

    def __init__(self, forward: ScoreForward, tokenizer: Any, device: torch.device) -> None:
        self._forward, self._tokenizer, self._device = forward, tokenizer, device
        self._positions: int | None = getattr(forward.model.config, "max_position_embeddings", None)

    @classmethod
    def load(cls, run: RunDir, source: str, room: Room) -> Judge:
        tokenizer = load_tokenizer(source)
        model = load_scorer(source, tokenizer, room.dtype, 0, needs_head=True).to(room.device).eval()
        # The folder of a reward model of one's own has no scale: its logit counts.
        scale = read_json(run.step(2).reward_scale) if is_complete(run, 2) else None
        numbers = scale or {"shift": 0.0, "scale": 1.0}
        forward = ScoreForward(model.requires_grad_(False), shift=numbers["shift"], scale=numbers["scale"])
        return cls(forward, tokenizer, room.device)

    def has_positions_for(self, prompt: np.ndarray, answer: np.ndarray) -> bool:
        return self._positions is None or len(prompt) + len(answer) <= self._positions

    def reads(self, tokenizer: Any) -> bool:
        """Return whether the reward model reads the tokens of this tokenizer."""
        try:
            check_same_tokenizer(tokenizer, self._tokenizer)
        except ToolkitError:
            return False
        return True

    @torch.no_grad()
    def reward(self, prompt: np.ndarray, answer: np.ndarray) -> float | None:
        """Score an answer's tokens, the EOS included; None: the model has too few positions."""
        if not len(answer) or not self.has_positions_for(prompt, answer):
            return None
        batch = Sequences.of([prompt], [answer], self._tokenizer.pad_token_id, self._device)
        return float(self._forward(batch, batch.last())[0])
