"""Find what a model does to its logits after the output embedding, and do the same.

We call the head for chosen tokens only, so we never run the model's own forward. Gemma caps its
logits there, Granite and Cohere scale them. `find_transform` measures it instead of knowing
families: it feeds large states into the head, and compares the model's logits with the head's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import ExitCode, ToolkitError

SPREAD = 40.0  # standard deviation of the head's output: beyond Gemma's cap of 30, so that a cap shows
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest logit
# A logit of no probability. It is finite in float16, and times a probability of 0 it is 0.
NEVER = -3e4
SAME_NUMBER = 0.01  # a measured number is taken for one in the config that differs by less than this share


@dataclass(frozen=True)
class LogitTransform:
    """Makes logits of a head's output x: cap tanh(scale x / cap); without a cap: scale x.

    tokens: how many ids the tokenizer has, in step 3: the head may have rows for more (Qwen2.5 has
    151,665 ids, and 151,936 or 152,064 rows). Those rows are never sampled, and have no
    probability.
    """

    scale: float = 1.0
    cap: float | None = None
    tokens: int | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """raw: (..., V). Returns the logits, (..., V)."""
        logits = raw * self.scale if self.scale != 1.0 else raw
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return self.without_unused(logits)

    def without_unused(self, logits: Tensor) -> Tensor:
        """Return logits whose rows without a token have no probability."""
        if self.tokens is None or self.tokens >= logits.shape[-1]:
            return logits
        unused = torch.arange(logits.shape[-1], device=logits.device) >= self.tokens
        return logits.masked_fill(unused, NEVER)


IDENTITY = LogitTransform()


def transform_of(model: Any) -> LogitTransform:
    """Return the transform that was found when the model was loaded."""
    found: LogitTransform = getattr(model, "logit_transform", IDENTITY)
    return found


@torch.no_grad()
def find_transform(model: Any) -> LogitTransform:
    """Measure what the model's own forward does to the output of its head.

    Raises ToolkitError if it is neither a scale nor a cap by tanh.
    """
    raw, logits = _head_and_logits(model)
    limit = TOLERANCE[logits.dtype] * float(logits.abs().max())
    raw, logits = raw.float(), logits.float()
    for transform in _candidates(raw, logits, model.config):
        if float((transform(raw) - logits).abs().max()) <= limit:
            return transform
    raise ToolkitError(
        f"{type(model).__name__} changes its logits in a way that is not known here",
        why="its own forward and its output embedding differ by neither a scale nor a cap (tanh)",
        hint="choose another model: OPT, GPT-2, LLaMA, Mistral, Qwen and Gemma are among those that work",
        exit_code=ExitCode.USAGE,
    )


def _head_and_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Return the head's output and the model's logits, both (16, V), for large random states."""
    head, seen = model.get_output_embeddings(), list[Tensor]()
    generator = torch.Generator().manual_seed(0)

    def replaced(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        states = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
        return (states * (SPREAD / head.forward(states).float().std()),)

    was_training = model.training
    handles = [
        head.register_forward_pre_hook(replaced),
        head.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, -2))),
    ]
    try:
        ids = torch.arange(16).remainder(model.get_input_embeddings().num_embeddings).reshape(1, 16)
        logits = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, -2)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    (raw,) = seen
    return raw, logits


def _candidates(raw: Tensor, logits: Tensor, config: Any) -> Iterator[LogitTransform]:
    yield IDENTITY
    # Near 0 a cap does nothing, so the slope there is the scale.
    small = raw.abs() < 0.05 * SPREAD
    slope = float((raw[small] * logits[small]).sum() / raw[small].square().sum())
    scales = [1.0, _number_of(config, slope)]
    yield from map(LogitTransform, scales[1:])
    for scale in scales:
        at = raw.abs().argmax()
        cap = _cap(scale * float(raw.flatten()[at].abs()), float(logits.flatten()[at].abs()))
        if cap is not None:
            yield LogitTransform(scale, _number_of(config, cap))


def _cap(without: float, with_cap: float) -> float | None:
    """Solve cap tanh(without / cap) = with_cap for cap; None if nothing was capped."""
    if not 0 < with_cap < without:
        return None
    low, high = with_cap, 1e3 * without
    for _ in range(200):
        middle = (low + high) / 2
        value = middle * float(torch.tanh(torch.tensor(without / middle, dtype=torch.float64)))
        low, high = (middle, high) if value < with_cap else (low, middle)
    return (low + high) / 2


def _number_of(config: Any, measured: float) -> float:
    """Return the number of the config, or its inverse, that `measured` must be; else `measured`."""
    numbers = [float(value) for value in config.to_dict().values() if type(value) in (int, float) and value]
    known = [number for value in numbers for number in (value, 1 / value)]
    nearest = min(known, key=lambda number: abs(number - measured), default=measured)
    return nearest if abs(nearest - measured) <= SAME_NUMBER * abs(measured) else measured
