"""This module measures the product's rollouts: seconds a decode step against a floor.

The floor follows from the measured bandwidth and, on a CPU, from the matmul rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.ceilings import Ceilings, clock_of, now
from benchmarks.figures import Spread, Table, decode_floor_s, kv_bytes
from benchmarks.machine import Where
from benchmarks.work import EOS, PAD, Size, actor_of, prompts_of
from rlhf_train.generation.families.known import read_network
from rlhf_train.generation.rollout import Rollouts

TARGETS = {16: 1.6, 64: 1.3, 256: 1.15}  # of the floor, on a GPU
COLUMNS = [
    "batch",
    "floor ms/step",
    "measured ms/step",
    "of the floor",
    "target",
    "decode tokens/s",
    "prefill ms",
    "whole s",
    "tokens/s",
]


def static_cache_s(model: Any, prompts: list[np.ndarray], tokens: int, device: str, repeats: int) -> list[float]:
    """Return the seconds of Hugging Face's generate with its static cache."""
    ids, taken = torch.from_numpy(np.stack(prompts)).to(device), []
    how = {"disable_compile": True} if device == "cpu" else {}
    for _ in range(repeats + 1):
        began = now(device)
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens,
                pad_token_id=PAD, eos_token_id=None, cache_implementation="static", **how,
            )  # fmt: skip
        taken.append(now(device) - began)
    return taken[1:]


NEXT_TO = {"eager": "whole s by its own forward", "static": "whole s by HF's static cache"}


def generation_s(
    model: Any, prompts: list[np.ndarray], tokens: int, device: str, repeats: int, *, is_static: bool = True
) -> list[float]:
    """Return the seconds of whole calls with answers of so many tokens.

    The first call does not count, since it may capture or compile.
    """
    rollouts = Rollouts(
        model,
        stop_ids=[EOS],
        is_static=is_static,
        pad_id=PAD,
        max_tokens=tokens,
        temperature=1.0,
        batch=len(prompts),
        device=torch.device(device),
    )
    taken = []
    for number in range(repeats + 1):
        began = now(device)
        made = rollouts.generate(prompts, seed=number, row_ids=range(len(prompts)))
        taken.append(now(device) - began)
        assert made.lengths.tolist() == [tokens] * len(prompts), "an answer has ended before its time"
    return taken[1:]


def measure(
    model: Any,
    size: Size,
    batch: int,
    device: str,
    repeats: int,
    seed: int,
    ceiling: Ceilings,
    next_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a decode step as the difference between answers of two lengths.

    The rest of the shorter call is prefill and all that is done once.
    """
    prompts = [np.array(ids) for ids in prompts_of(size, seed, real_lengths=False, count=batch).ids]
    long, short = size.response_tokens, max(2, size.response_tokens // 8)
    longer, shorter = (Spread.of(generation_s(model, prompts, tokens, device, repeats)) for tokens in (long, short))
    step_s = (longer.median - shorter.median) / (long - short)
    each, network = model.dtype.itemsize, read_network(model)
    matrices, small = weights_of(model)
    # The middle of the steps in the difference.
    positions = size.prompt_tokens + (long + short) / 2
    cache = kv_bytes(len(network.layers), network.key_width, batch, positions, each)
    floor_s = decode_floor_s(
        (matrices + small) * each,
        cache,
        ceiling.copy.median,
        # A GPU computes while it reads; a CPU of one core does one or the other.
        0.0 if device == "cuda" else 2 * batch * matrices,
        ceiling.flops.median,
    )
    prefill_s = shorter.median - (short - 1) * step_s
    return {
        "batch": batch,
        "floor_s": floor_s,
        "step_s": step_s,
        "prefill_s": prefill_s,
        "whole_s": longer.median,
        "longer": longer,
        "tokens": long,
        "eager": Spread.of(generation_s(model, prompts, long, device, 1, is_static=False))
        if "eager" in next_to
        else None,
        "static": Spread.of(static_cache_s(model, prompts, long, device, 1)) if "static" in next_to else None,
    }


def weights_of(model: Any) -> tuple[int, int]:
    """Count the weights that a decode step reads: of matrices, with the head, and of all else."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    return sum(module.weight.numel() for module in linear), vectors


def lay_flat(model: Any) -> None:
    """Lay all matrices in one tensor and all vectors in another, as DeepSpeed's 16-bit engine does.

    Keys, values and queries are then one product.
    """
    for is_matrix in (True, False):
        parts = [parameter for parameter in model.parameters() if (parameter.ndim >= 2) == is_matrix]
        vector_to_parameters(parameters_to_vector(parts).detach(), parts)


def table(
    size: Size,
    where: Where,
    repeats: int,
    seed: int,
    ceiling: Ceilings,
    say: Callable[[str], None],
    next_to: Sequence[str] = (),
) -> Table:
    device = where.device
    with torch.device(device):
        model = actor_of(size.actor, seed).to(size.dtype)
    if device == "cuda":
        lay_flat(model)
    rows, numbers = [], []
    for batch in size.decode_batches:
        say(f"  batch {batch}")
        found = measure(model, size, batch, device, repeats, seed, ceiling, next_to)
        numbers.append(found)
        target = TARGETS.get(batch) if device == "cuda" and size.actor["model_type"] == "opt" else None
        rows.append(row_of(found, target, size.prompt_tokens) + [f"{found[how]:.3f}" for how in next_to])
    long, short = size.response_tokens, max(2, size.response_tokens // 8)
    computed = "" if device == "cuda" else ", or the products at the measured matmul rate, if that takes longer"
    notes = [
        f"prompts of {size.prompt_tokens} tokens; "
        f"a step is the difference of answers of {long} and {short} tokens, {repeats} repeats each",
        f"floor: weights and live keys and values, read once at the measured copy bandwidth{computed}",
        f"whole: prefill and all steps; tokens/s counts prompts and answers; {clock_of(where)}",
    ]
    columns = COLUMNS + [NEXT_TO[how] for how in next_to]
    return Table(f"decode of {size.actor['model_type']}", columns, rows, notes, numbers)


def row_of(found: dict[str, Any], target: float | None, prompt_tokens: int) -> list[str]:
    batch, ratio = found["batch"], found["step_s"] / found["floor_s"]
    verdict = f"{target:g}x: {'met' if ratio <= target else 'MISSED'}" if target else "-"
    return [
        str(batch),
        f"{1000 * found['floor_s']:.2f}",
        f"{1000 * found['step_s']:.2f}",
        f"{ratio:.2f}x",
        verdict,
        f"{batch / found['step_s']:,.0f}",
        f"{1000 * found['prefill_s']:.0f}",
        f"{found['longer']:.3f}",
        f"{batch * (prompt_tokens + found['tokens']) / found['whole_s']:,.0f}",
    ]
