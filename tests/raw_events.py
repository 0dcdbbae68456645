"""Events as a run writes them, for the tests of what a person sees of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jobs.events import RawEvent


def event(kind: str, step: int | None = None, at_s: float = 0.0, **fields: Any) -> RawEvent:
    minutes, seconds = divmod(at_s, 60)
    time = f"2025-01-05T12:{int(minutes):02}:{seconds:06.3f}Z"
    return {"schema": 1, "seq": 0, "time": time, "kind": kind, **({} if step is None else {"step": step}), **fields}


PLAN = event(
    "plan", 3, updates=480, rows=1920, ranks=1, device="cpu", device_reason="PyTorch sees no GPU", precision="float32",
    global_batch=32, micro_batch=16, gradient_accumulation=2, zero_stage=0,
    data={
        "rows": 2000, "empty_prompt": 0, "empty_answer": 3, "prompt_too_long": 1, "identical_answers": 2,
        "answer_cut": 5,
    },
)  # fmt: skip
# What a plan of step 1 says of steps 1 and 2.
EXPECTED = {
    "1": {"updates": 10, "update_s": 1.0, "fixed_s": 4.0},
    "2": {"updates": 30, "update_s": 2.0, "fixed_s": 8.0},
}
PPO = event(
    "metrics", 3, update=120, updates=480, elapsed_s=96.0, learning_rate=9.65e-6, tokens_per_s=3120.4,
    real_token_share=0.9, grad_norm=1.5, policy_loss=0.01234, value_loss=0.45678, mean_reward=1.234, kl=0.0321,
    kl_k3=0.0321, entropy=2.3456, clip_fraction=0.0214, response_length=64.25,
    eos_share=0.921, kl_coef=0.1, ratio=1.0,
)  # fmt: skip
SFT = event(
    "metrics",
    1,
    update=1,
    updates=10,
    elapsed_s=2.0,
    learning_rate=9.65e-6,
    tokens_per_s=900.0,
    grad_norm=1.25,
    loss=3.21,
)
REWARD = event(
    "metrics",
    2,
    update=10,
    updates=10,
    elapsed_s=20.0,
    learning_rate=5e-5,
    tokens_per_s=1e6,
    grad_norm=1.25,
    loss=0.6931,
    accuracy=0.625,
    margin=0.1,
)
END_1 = event(
    "end", 1, updates=10, seconds=62.0, model="runs/demo/step1/model", perplexity_before=31.2, perplexity_after=8.414
)
END_2 = event("end", 2, updates=10, seconds=38.4, model="runs/demo/step2/model", reward_accuracy=0.874)
END_3 = event(
    "end", 3, updates=480, seconds=3720.0, model="runs/demo/step3/model", mean_reward_before=-0.52,
    mean_reward_after=1.934, kl_before=0.0, kl=0.4101, kl_k3_before=0.0, kl_k3=0.4101, good_share_before=0.48,
    good_share_after=0.94,
    response_length_before=20.31, response_length_after=30.1, eos_share_before=0.7, eos_share_after=0.991,
)  # fmt: skip
# Four points: 0, 1/3, 2/3 and 1 of the way up, in eight heights.
ROLLOUTS = [
    PPO | {"update": i * 30, "elapsed_s": i * 24.0, "mean_reward": 0.5 * i - 0.8, "kl_k3": 0.03 * i}
    for i in (1, 2, 3, 4)
]
# Nothing but kind and step, of each kind; the last two are `resumed` and `end`.
BARE = [
    event(kind, 3)
    for kind in ("plan", "progress", "metrics", "sample", "checkpoint", "warning", "error", "resumed", "end")
]


def sample(when: str, response: str, **fields: Any) -> RawEvent:
    return event(
        "sample", 3, when=when, prompt=fields.pop("prompt", "Human: hi\nAssistant:"), response=response, **fields
    )


def squeezed(lines: Iterable[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines if line.strip()]
