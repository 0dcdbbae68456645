"""What is measured is what is saved: merged weights, against a plain model that holds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jobs.spec import Lora, Ppo, Scratch
from rlhf_train import compat
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


@pytest.mark.parametrize("stage", [1, 3])
def test_what_will_be_saved_in_float32_is_measured_in_float32(world: World, stage: int) -> None:
    """Steps of 1e-5: bfloat16 would lose them."""
    engine = trained(world, "bfloat16", stage, 1e-5)
    plain, before = saved(engine), log_probs(engine)
    assert plain.dtype == torch.float32
    with merged(engine.module.model, engine.settle) as is_float32:
        found = log_probs(engine)
    assert is_float32
    torch.testing.assert_close(found, log_probs(ActorForward(plain)), rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 1e-3  # the engine's own are rounded
    assert log_probs(engine).equal(before)
    assert engine.module.model.dtype == torch.bfloat16
    learn(engine)
    assert not log_probs(engine).equal(before)


@pytest.mark.parametrize("is_static", [True, False])
def test_rollouts_inside_the_block_are_the_saved_models(world: World, is_static: bool) -> None:
    engine = trained(world, "float32", 0, 0.05)

    def sample(model: Any) -> tuple[list[int], np.ndarray]:
        how: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "batch": 4, "is_static": is_static}
        made = Rollouts(model, stop_ids=[EOS], pad_id=PAD, device=world.device, **how).generate(
            PROMPTS, seed=0, row_ids=range(4)
        )
        return np.concatenate(made.tokens).tolist(), np.concatenate(made.log_probs)

    with merged(engine.module.model):
        tokens, found = sample(engine.module.model)
    expected_tokens, expected = sample(saved(engine))
    assert tokens == expected_tokens
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rollouts_in_float32_are_the_saved_models(world: World) -> None:
    """With a static decoder made before, which reads 16-bit weights."""
    engine = trained(world, "bfloat16", 1, 1e-5)

    def rollouts(model: Any) -> Rollouts:
        how: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "batch": 4}
        return Rollouts(model, stop_ids=[EOS], pad_id=PAD, device=world.device, **how)

    own, which = rollouts(engine.module.model), {"seed": 0, "row_ids": range(4)}
    rounded = own.generate(PROMPTS, **which)
    with merged(engine.module.model) as is_float32:
        made = own.generate(PROMPTS, **which, by_own_forward=is_float32)
    expected = rollouts(saved(engine)).generate(PROMPTS, **which)
    assert [tokens.tolist() for tokens in made.tokens] == [tokens.tolist() for tokens in expected.tokens]
    np.testing.assert_allclose(np.concatenate(made.log_probs), np.concatenate(expected.log_probs), atol=1e-5)
    again = own.generate(PROMPTS, **which)
    np.testing.assert_array_equal(np.concatenate(again.log_probs), np.concatenate(rounded.log_probs))


# --- whole steps --------------------------------------------------------------------------------


def job(folder: Path, learning_rate: float) -> dict[str, Any]:
    tree = tiny.job(tiny.write_rows(folder / "rows", train=48))
    tree["actor"]["lora"] = {"rank": 4, "alpha": 8.0}
    tree["hardware"]["precision"] = "bfloat16"
    tree["sft"] |= {"learning_rate": learning_rate, "max_updates": 2}
    tree["reward"] |= {"max_updates": 1}
    tree["ppo"] |= {"rollout_batch": 8, "max_updates": 1, "actor_learning_rate": learning_rate}
    tree["ppo"] |= {"normalize_rewards": False}
    return tree


@pytest.mark.parametrize(("learning_rate", "dtype"), [(0.05, torch.bfloat16), (1e-5, torch.float32)])
def test_the_ends_numbers_are_those_of_the_saved_models(
    world: World, tmp_path: Path, learning_rate: float, dtype: torch.dtype
) -> None:
    """At a rate at which bfloat16 keeps what was learned, but not all of it, and at a lower one."""
    run, tree = tmp_path / "run", job(tmp_path, learning_rate)
    sft = in_process.train(world, run, tree, 1)
    rows = [json.loads(line) for line in (tmp_path / "rows/test.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft.model).eval(), load_tokenizer(sft.model)
    assert model.dtype == dtype
    nlls, counts = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = (tokenizer(row["chosen"], add_special_tokens=False)["input_ids"] + [EOS])[:12]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        nlls.append(-float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
        counts.append(len(answer))
    expected, rows_seen = math.exp(sum(nlls) / sum(counts)), len(rows)
    assert (sft.perplexity_after, sft.held_out_rows) == (pytest.approx(expected, rel=1e-4), rows_seen)
    # The error is about the jackknife's, which leaves out each row in turn.
    without = [math.exp((sum(nlls) - nll) / (sum(counts) - count)) for nll, count in zip(nlls, counts, strict=True)]
    jackknife = math.sqrt((rows_seen - 1) / rows_seen) * np.linalg.norm(np.array(without) - np.mean(without))
    assert sft.perplexity_error_after == pytest.approx(jackknife, rel=2 / rows_seen)


def test_step_3s_numbers_are_those_of_the_actor_that_is_saved_in_float32(world: World, tmp_path: Path) -> None:
    """Greedy answers, of plain transformers too; the KL to the reference in float32."""
    run, tree = tmp_path / "run", job(tmp_path, 1e-4)
    tree["ppo"] |= {"top_k": 1}
    end = in_process.train(world, run, tree, 1, 2, 3)
    folders = [run / f"step{step}/model" for step in (1, 2, 3)]
    actor, tokenizer = AutoModelForCausalLM.from_pretrained(folders[2]).eval(), load_tokenizer(str(folders[2]))
    assert actor.dtype == torch.float32
    reference = AutoModelForCausalLM.from_pretrained(folders[0], **compat.dtype_argument(torch.bfloat16)).float()
    reward = AutoModelForSequenceClassification.from_pretrained(folders[1]).float()
    lines = (tmp_path / "rows/test.jsonl").read_text(encoding="utf-8").splitlines()
    kls, rewards, lengths = [], [], []
    for prompt in (tokenizer(json.loads(line)["prompt"], return_tensors="pt")["input_ids"] for line in lines):
        whole = actor.generate(prompt, do_sample=False, max_new_tokens=12, temperature=None, top_k=None, top_p=None)
        answer = whole[:, prompt.shape[1] :]
        with torch.no_grad():
            ours, theirs = (
                model(whole).logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1).gather(2, answer[:, :, None])
                for model in (actor, reference)
            )
            rewards.append(float(reward(whole).logits))
        kls.append(float((ours - theirs).sum()))
        lengths.append(answer.shape[1])
    assert end.response_length_after == pytest.approx(np.mean(lengths))
    assert end.kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert end.mean_reward_after == pytest.approx(np.mean(rewards), abs=0.02)  # the reward model's, in bfloat16
