"""What is measured is what is saved: merged weights, against a plain model that holds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.spec import Lora, Ppo, Scratch
from rlhf_train.data.sequences import BatchPlan, Sequences
from rlhf_train.engine.deepspeed_engine import DTYPES, Engine, full_state
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.adapters import add_lora, merge_lora
from rlhf_train.models.networks import ActorForward, load_causal, load_tokenizer, train_tokenizer
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.merged import merged
from tests import in_process, tiny

LORA, PAD, EOS = Lora(rank=4, alpha=8.0), 1, 2
SPEC = Ppo(rollout_batch=8, global_batch=4, actor_learning_rate=1.0, critic_learning_rate=1.0)
PROMPTS = [np.array([2, 70, 80, 90]), np.array([2, 71]), np.array([2, 72, 73, 74, 75]), np.array([2, 81, 82])]
ANSWERS = [np.array([60, 61, 62, EOS]), np.array([63, EOS]), np.array([64, 65, EOS]), np.array([66, EOS])]
BATCH = Sequences.of(PROMPTS, ANSWERS, PAD, torch.device("cpu"))


def trained(world: World, precision: str, stage: int, learning_rate: float) -> Engine:
    model = load_causal(Scratch(config=tiny.OPT), train_tokenizer(tiny.WORDS, 320), DTYPES[precision], 1)
    add_lora(model, LORA, 1)
    how: dict[str, Any] = {"precision": precision, "zero_stage": stage, "world": world}
    engine = Engine(ActorForward(model), SPEC, learning_rate, 8, BatchPlan(4, 1, 1), **how)
    for _ in range(2):
        learn(engine)
    return engine


def learn(engine: Engine) -> None:
    engine.backward(-engine(BATCH)[0].mean(), last=True)
    engine.step()


def saved(engine: Engine) -> Any:
    """A plain model with the weights that are saved."""
    model: Any = engine.module.model
    state = merge_lora(full_state(model, keep=True), model)
    dtype = state["model.decoder.layers.0.fc1.weight"].dtype
    plain = AutoModelForCausalLM.from_config(model.config).to(dtype).eval()
    plain.load_state_dict(state, strict=False)  # tied weights stand once
    plain.tie_weights()
    plain.logit_transform = model.logit_transform
    return plain


@torch.no_grad()
def log_probs(network: Any) -> torch.Tensor:
    return network(BATCH)[0].float().clone()


@pytest.mark.parametrize(("precision", "stage"), [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 1)])
def test_inside_the_block_it_is_the_saved_model_and_after_it_the_trained_one(
    world: World, precision: str, stage: int
) -> None:
    engine = trained(world, precision, stage, 0.05)
    plain, before = ActorForward(saved(engine)), log_probs(engine)
    assert plain.model.dtype == DTYPES[precision]
    with merged(engine.module.model, engine.settle):
        found = log_probs(engine)
    exact = 0.0 if precision == "bfloat16" else 1e-5
    torch.testing.assert_close(found, log_probs(plain), rtol=0, atol=exact)
    if precision == "bfloat16":  # the merge has rounded
        assert (found - before).abs().max() > 1e-3
    assert log_probs(engine).equal(before)
    learn(engine)
    assert (log_probs(engine) - before).abs().max() > 1e-3


def test_what_will_be_saved_in_float32_is_measured_with_its_adapters(world: World) -> None:
    """Steps of 1e-5: bfloat16 would lose them."""
    engine = trained(world, "bfloat16", 1, 1e-5)
    plain, before = saved(engine), log_probs(engine)
    assert plain.dtype == torch.float32
    with merged(engine.module.model, engine.settle):
        assert log_probs(engine).equal(before)


@pytest.mark.parametrize("is_static", [True, False])
def test_rollouts_inside_the_block_are_the_saved_models(world: World, is_static: bool) -> None:
    engine = trained(world, "float32", 0, 0.05)

    def sample(model: Any) -> tuple[list[int], np.ndarray]:
        how: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "batch": 4, "is_static": is_static}
        made = Rollouts(model, eos_id=EOS, pad_id=PAD, device=world.device, **how).generate(
            PROMPTS, seed=0, row_ids=range(4)
        )
        return np.concatenate(made.tokens).tolist(), np.concatenate(made.log_probs)

    with merged(engine.module.model):
        tokens, found = sample(engine.module.model)
    expected_tokens, expected = sample(saved(engine))
    assert tokens == expected_tokens
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- whole steps --------------------------------------------------------------------------------


def job(folder: Path) -> dict[str, Any]:
    tree = tiny.job(tiny.write_rows(folder / "rows", train=48))
    tree["actor"]["lora"] = {"rank": 4, "alpha": 8.0}
    tree["hardware"]["precision"] = "bfloat16"
    tree["sft"] |= {"learning_rate": 0.05, "max_updates": 2}
    tree["reward"] |= {"max_updates": 1}
    tree["ppo"] |= {"rollout_batch": 8, "max_updates": 1, "actor_learning_rate": 0.05, "normalize_rewards": False}
    return tree


def test_the_ends_numbers_are_those_of_the_merged_model(world: World, tmp_path: Path) -> None:
    """In bfloat16, at a rate at which bfloat16 keeps what was learned, but not all of it."""
    run, tree = tmp_path / "run", job(tmp_path)
    sft = in_process.train(world, run, tree, 1)
    rows = [json.loads(line) for line in (tmp_path / "rows/test.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft.model).eval(), load_tokenizer(sft.model)
    assert model.dtype == torch.bfloat16
    nll, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = (tokenizer(row["chosen"], add_special_tokens=False)["input_ids"] + [EOS])[:12]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        nll -= float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
        count += len(answer)
    assert sft.perplexity_after == pytest.approx(math.exp(nll / count), rel=1e-4)
