"""Score responses with the frozen networks, in length-sorted batches.

The reference gives log-probs, the reward model a score, and the judge another one if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_train.data.sequences import Sequences, split_into_passes
from rlhf_train.engine.deepspeed_engine import Engine
from rlhf_train.generation.rollout import Responses
from rlhf_train.models.networks import ActorForward
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.experience import Scored, TrainerView, response_values
from rlhf_train.steps.text_reading import TextReader

# Size of a scoring pass on a GPU, in training passes: without gradients no activations are kept.
# With gradient checkpointing it is 1, since training itself keeps little then. A CPU gains nothing:
# 64 rows took no longer in passes of 8 than in passes of 16, 32 or 64.
GPU_PASS_FACTOR = 4

Trainer = tuple[Engine, Engine | None]  # actor, and critic if the method has one


@dataclass(frozen=True)
class TextScoring:
    """How a reward model with a tokenizer of its own is given the answers."""

    read: TextReader
    pad_id: int | None  # of its tokenizer; None: rows are packed


@dataclass(frozen=True)
class Scorer:
    """Scores responses with the frozen networks.

    It makes few passes, of rows alike in length, and as many on each rank.
    """

    context: StepContext
    reference: ActorForward | WithoutAdapters
    reward_model: Forward
    pad_id: int | None  # None: rows are packed
    pass_tokens: int  # computed by a training pass, at most
    judge: Forward | None = None  # a second reward model, from whose scores nothing learns
    text_scoring: TextScoring | None = None  # None: the reward model reads the actor's tokens

    def score(
        self, prompts: Sequence[np.ndarray], responses: Responses, trainer: Trainer | None = None
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the networks' numbers for each response, in order, and the tokens computed.

        trainer: actor and critic, if they are to score the responses too. The numbers are those of
        `score_batch`, and with `trainer` also those of `trainer_view`: (tokens,) arrays, or floats.
        """
        world, temperature = self.context.world, self.context.job.ppo.temperature
        lengths = np.array([len(p) for p in prompts], dtype=np.int64) + responses.lengths
        order = np.argsort(-lengths, kind="stable")
        batches: list[tuple[np.ndarray, dict[str, Tensor]]] = []
        computed = 0
        is_large = world.device.type != "cpu" and not self.context.job.hardware.gradient_checkpointing
        tokens = self.pass_tokens * (GPU_PASS_FACTOR if is_large else 1)
        for part in passes_of_all(world.gather(lengths[order]), tokens, packed=self.pad_id is None):
            rows = order[part]
            if not len(rows):  # other ranks have one more row
                continue
            self.context.heartbeat.beat()
            own = [prompts[i] for i in rows], [responses.tokens[i] for i in rows]
            batch = Sequences.of(*own, self.pad_id, world.device)
            text = self.text_scoring
            read = batch if text is None else Sequences.of(*text.read(*own), text.pad_id, world.device)
            computed += batch.input_ids.numel()
            numbers = score_batch(
                batch,
                reference=self.reference,
                reward_model=self.reward_model,
                read=read,
                judge=self.judge,
                temperature=temperature,
            )
            if trainer is not None:
                numbers |= trainer_view(batch, actor=trainer[0], critic=trainer[1], temperature=temperature)
            batches.append((rows, numbers))
        of_row: dict[int, dict[str, Any]] = {}
        for rows, numbers in batches:  # only now does the host wait for a GPU
            arrays = to_host(numbers)
            for place, row in enumerate(rows):
                count = len(responses.tokens[row])
                of_row[int(row)] = {
                    name: array[place, :count] if array.ndim == 2 else float(array[place])
                    for name, array in arrays.items()
                }
        return [of_row[row] for row in range(len(prompts))], computed

    def score_rollout(
        self,
        prompts: Sequence[np.ndarray],
        responses: Responses,
        trainer: Trainer | None = None,
    ) -> tuple[list[Scored], int]:
        """Score responses as `score` does, and put the rollout's own numbers next to them."""
        found, computed = self.score(prompts, responses, trainer)
        scored = [
            Scored(
                prompt=prompt,
                response=responses.tokens[row],
                ended=bool(responses.ended[row]),
                rollout_log_probs=responses.log_probs[row],
                ref_log_probs=numbers["ref_log_probs"],
                score=numbers["score"],
                judge_score=numbers.get("judge_score"),
                trainer=trainer_of(numbers) if trainer is not None else None,
            )
            for row, (prompt, numbers) in enumerate(zip(prompts, found, strict=True))
        ]
        return scored, computed


def trainer_of(numbers: Mapping[str, Any]) -> TrainerView:
    """Take the numbers of actor and critic out of a response's numbers."""
    return TrainerView(numbers["log_probs"], numbers.get("values"), numbers["entropy"])


def passes_of_all(lengths: Sequence[np.ndarray], tokens: int, *, packed: bool) -> list[slice]:
    """Cut rows, longest first, into passes of at most `tokens`, the same passes on all ranks.

    Under ZeRO-3 all ranks must take part in each forward pass. At each place the longest row of any
    rank counts. lengths: of each rank's rows; a rank with fewer rows has none in the last places.
    """
    most = max(len(own) for own in lengths)
    longest = np.max([np.pad(own, (0, most - len(own))) for own in lengths], axis=0)
    return split_into_passes(longest, tokens, packed=packed)


Forward = Callable[..., tuple[Tensor, Tensor | None]]


class WithoutAdapters:
    """The actor with its adapters off: a reference without weights of its own.

    It is called as an ActorForward is.
    """

    def __init__(self, actor: ActorForward) -> None:
        self._actor = actor

    @property
    def model(self) -> Any:
        return self._actor.model

    @torch.no_grad()
    def __call__(self, batch: Sequences, **how: Any) -> tuple[Tensor, Tensor | None]:
        from peft.tuners.tuners_utils import BaseTunerLayer  # here, since it takes a second and only LoRA needs it

        adapted: list[Any] = [module for module in self._actor.modules() if isinstance(module, BaseTunerLayer)]
        for layer in adapted:
            layer.enable_adapters(False)
        try:
            return self._actor(batch, **how)
        finally:
            for layer in adapted:
                layer.enable_adapters(True)  # also makes them trainable again


@torch.no_grad()
def score_batch(
    batch: Sequences,
    *,
    reference: Forward,
    reward_model: Forward,
    read: Sequences | None = None,
    judge: Forward | None = None,
    temperature: float,
) -> dict[str, Tensor]:
    """Score one micro batch with the frozen networks.

    read: the same rows as the reward model reads them; default: as the actor does. Returns (B, R)
    log-probs of the reference, (B,) scores, and with a judge (B,) scores of it.
    """
    read = batch if read is None else read
    ref_log_probs, _ = reference(batch, temperature=temperature)
    numbers = {"ref_log_probs": batch.spread(ref_log_probs), "score": reward_model(read, read.last())[0]}
    return numbers if judge is None else {**numbers, "judge_score": judge(batch, batch.last())[0]}


def mean_entropies(entropies: Tensor, batch: Sequences) -> Tensor:
    """Average the entropies of response tokens over each response: (B,).

    entropies: (N,), in the order of `predicted()`.
    """
    return batch.spread(entropies).sum(1) / batch.response_lengths


def to_host(numbers: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copy (B,) and (B, R) tensors to the host in float32, all in one copy."""
    columns = [tensor.float().unsqueeze(1) if tensor.ndim == 1 else tensor.float() for tensor in numbers.values()]
    joined = torch.cat(columns, dim=1).cpu().numpy()
    parts = np.split(joined, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1)
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(numbers.items(), parts, strict=True)}


@torch.no_grad()
def trainer_view(batch: Sequences, *, actor: Forward, critic: Forward | None, temperature: float) -> dict[str, Tensor]:
    """Score one micro batch with the networks in training.

    Returns (B, R) log-probs and, with a critic, values, and (B,) mean entropies of a token.
    """
    log_probs, entropies = actor(batch, temperature=temperature, with_entropy=True)
    assert entropies is not None
    numbers = {"log_probs": batch.spread(log_probs), "entropy": mean_entropies(entropies, batch)}
    return numbers if critic is None else {**numbers, "values": response_values(critic, batch)}
