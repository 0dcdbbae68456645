"""Test a small main job from scratch on real human preference data.

It runs all three steps, and then a program that does not know us loads the models.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from env.settings import Settings
from tests.tiny import CHECKOUT, Trained, run

DATA = CHECKOUT.parent / "shared/data/hh-rm-mini"
HELD_OUT = 80  # of its 300 held-out rows: the evaluations would take longer than the training
PROMPT, RESPONSE = 256, 64


def opt(hidden: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return {
        "config": {
            "model_type": "opt",
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "max_position_embeddings": 512,
            **sizes,
        }
    }


JOB: dict[str, Any] = {
    "name": "hh-rm-mini",
    "actor": {"model": opt(64, 4), "tokenizer_vocabulary": 2048},
    "critic": {"model": opt(48, 3)},  # smaller than the actor, as opt-350m is than opt-1.3b
    "data": {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
    "sft": {"global_batch": 16, "learning_rate": 3e-3, "max_updates": 15},
    "reward": {"global_batch": 16, "learning_rate": 1e-3, "max_updates": 10},
    "ppo": {
        "rollout_batch": 16,
        "global_batch": 8,
        "max_updates": 6,
        "actor_learning_rate": 3e-4,
        "critic_learning_rate": 3e-4,
    },
    "hardware": {"device": "cpu", "micro_batch": 8, "cpu_threads": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if not DATA.is_dir():
        reason = f"needs the preference pairs in {DATA}"
        (pytest.fail if Settings.from_environ(os.environ).ci else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("real")
    rows, file = folder / "rows", folder / "job.yaml"
    rows.mkdir()
    (rows / "train.jsonl").symlink_to(DATA / "train.jsonl")
    held_out = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:HELD_OUT]
    (rows / "test.jsonl").write_text("".join(held_out), encoding="utf-8")
    file.write_text(yaml.safe_dump({**JOB, "data": {**JOB["data"], "datasets": [str(rows)]}}), encoding="utf-8")
    return run(folder, ["--job", str(file), "--run", "real", "--step", "all"])


def test_real_lengths_are_in_it(trained: Trained) -> None:
    (plan,) = trained.events("plan", 1)
    assert plan["data"]["rows"] == 1500
    assert plan["data"]["prompt_too_long"] < 500  # most prompts are there
    assert plan["data"]["answer_cut"] > 100
    assert plan["data"]["empty_prompt"] == plan["data"]["empty_answer"] == 0


def test_all_curves_are_whole_and_finite(trained: Trained) -> None:
    assert [event["update"] for event in trained.events("metrics", 1)] == list(range(1, 16))
    assert [event["update"] for event in trained.events("metrics", 2)] == list(range(1, 11))
    assert [event["update"] for event in trained.events("metrics", 3)] == [2, 4, 6]
    for step in (1, 2, 3):
        for event in [*trained.events("metrics", step), trained.end(step)]:
            assert all(math.isfinite(value) for value in event.values() if isinstance(value, float)), event


def test_the_ends_carry_the_numbers(trained: Trained) -> None:
    sft, reward, ppo = (trained.end(step) for step in (1, 2, 3))
    assert 1500 < sft["perplexity_before"] < 3000  # of 2048 tokens, before anything is learned
    assert sft["perplexity_after"] < 0.5 * sft["perplexity_before"]
    assert 0.3 < reward["reward_accuracy"] < 0.7  # ten updates learn little
    assert abs(ppo["kl_before"]) < 1e-4 and ppo["kl"] != ppo["kl_before"]
    assert 1 <= ppo["response_length_after"] <= RESPONSE
    assert {"mean_reward_before", "mean_reward_after", "seconds"} <= ppo.keys()
    assert all(end["seconds"] > 0 and Path(end["model"]).is_dir() for end in (sft, reward, ppo))


# Everything again from the text: tokenised, cut, and scored by transformers alone, one row at
# a time.
STRANGER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

step1, step2, step3, data, longest_prompt, longest_response = sys.argv[1:]
rows = [json.loads(line) for line in open(data, encoding="utf-8")]
actor, tuned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (step1, step3))
reward = AutoModelForSequenceClassification.from_pretrained(step2)
tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (step1, step2, step3)]
assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() == tokenizers[2].get_vocab()
nll = tokens = correct = pairs = 0
with torch.no_grad():
    for row in rows:
        prompt = tokenizers[0](row["prompt"])["input_ids"]
        if len(prompt) > int(longest_prompt):
            continue
        answers = {}
        for name in ("response", "chosen", "rejected"):
            ids = tokenizers[0](row[name], add_special_tokens=False)["input_ids"] + [tokenizers[0].eos_token_id]
            answers[name] = ids[: int(longest_response)]
        ids = torch.tensor([prompt + answers["response"]])
        labels = torch.tensor([[-100] * len(prompt) + answers["response"]])
        count = len(answers["response"])
        nll, tokens = nll + actor(input_ids=ids, labels=labels).loss.item() * count, tokens + count
        if answers["chosen"] != answers["rejected"]:
            pair = [torch.tensor([prompt + answers[name]]) for name in ("chosen", "rejected")]
            chosen, rejected = (reward(input_ids=row).logits.item() for row in pair)
            correct, pairs = correct + (chosen > rejected), pairs + 1
    torch.manual_seed(0)
    prompt = tokenizers[2](rows[0]["prompt"], return_tensors="pt")
    new = tuned.generate(**prompt)[0, prompt["input_ids"].shape[1] :].tolist()
print(json.dumps({"perplexity": math.exp(nll / tokens), "correct": correct, "pairs": pairs, "generated": new}))
"""


def test_a_stranger_finds_the_same_numbers(trained: Trained) -> None:
    models = [str(trained.dir.step(step).model) for step in (1, 2, 3)]
    command = [
        sys.executable,
        "-c",
        STRANGER,
        *models,
        str(trained.dir.path.parents[1] / "rows/test.jsonl"),
        str(PROMPT),
        str(RESPONSE),
    ]
    done = subprocess.run(command, cwd=trained.dir.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["perplexity"] == pytest.approx(trained.end(1)["perplexity_after"], rel=1e-5)
    # One pair may stand so near to a tie that rounding decides it.
    assert found["correct"] == pytest.approx(trained.end(2)["reward_accuracy"] * found["pairs"], abs=1.01)
    assert found["pairs"] > HELD_OUT / 2
    assert 1 <= len(found["generated"]) <= RESPONSE
