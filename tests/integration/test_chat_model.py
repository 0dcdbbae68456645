"""All three steps of a real chat model on real preference pairs, few updates on few short rows.

What each step reports is what plain transformers says of the models that it saved. The model's
tokenizer, embeddings and sizes are the real ones, but it has its first layers only: with all 30 the
test took a core 210 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from env.settings import Settings
from jobs.events import End
from rlhf_train.data.chat import ChatTemplate, Message
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.ranks.collectives import World
from tests import in_process, smollm
from tests.tiny import CHECKOUT

DATA = CHECKOUT.parent / "shared/data/hh-rm-mini"
LETTERS = 60  # of a prompt, at most: a CPU core trains this model on 60 tokens a second
PROMPT, RESPONSE, HELD_OUT = 24, 6, 4
LAYERS = 3
ANSWER = 10  # tokens of a greedy answer


def job(rows: Path, model: str) -> dict[str, Any]:
    limits = {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE, "eval_rows": HELD_OUT}
    rates = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-5}  # another answer after one update
    return {
        "name": "chat",
        "seed": 1,
        "actor": {"model": model},
        "critic": {"model": model},
        "data": {"datasets": [str(rows)], "split": [1, 1, 1], **limits},
        "sft": {"global_batch": 2, "learning_rate": 2e-5, "max_updates": 1},
        "reward": {"global_batch": 2, "learning_rate": 2e-5, "max_updates": 1},
        # top_k 1: greedy answers, which transformers can give, too.
        "ppo": {"rollout_batch": 2, "global_batch": 2, "max_updates": 2, "top_k": 1, "normalize_rewards": False}
        | rates,
        "hardware": {"device": "cpu", "precision": "float32", "micro_batch": 2, "cpu_threads": 1},
    }


STRANGER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

base, step1, step2, step3, file, most = sys.argv[1:]
torch.set_grad_enabled(False)
tokenizer = AutoTokenizer.from_pretrained(step1)
reward = AutoModelForSequenceClassification.from_pretrained(step2, dtype=torch.float32)
pairs, prompts = [], []
for row in map(json.loads, open(file, encoding="utf-8")):
    prompt = tokenizer(row["prompt"])["input_ids"]
    answers = []
    for name in ("response", "chosen", "rejected"):
        whole = tokenizer(row["prompt"] + row[name])["input_ids"] + [tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        answers.append(torch.tensor([whole[: len(prompt) + int(most)]]))
    prompts.append(prompt)
    pairs.append(answers)

def score(ids):
    return float(reward(ids).logits)

def of_actor(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = count = total = length = 0
    for prompt, (response, _, _) in zip(prompts, pairs):
        log_probs = model(response).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        labels = response[0, len(prompt) :]
        loss, count = loss - float(log_probs.gather(1, labels[:, None]).sum()), count + len(labels)
        greedy = dict(do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=int(most))
        answer = model.generate(torch.tensor([prompt]), **greedy, eos_token_id=tokenizer.eos_token_id)
        total, length = total + score(answer), length + answer.shape[1] - len(prompt)
    return {"perplexity": math.exp(loss / count), "reward": total / len(prompts), "length": length / len(prompts)}

found = {name: of_actor(folder) for name, folder in (("base", base), ("sft", step1), ("ppo", step3))}
found["accuracy"] = sum(score(chosen) > score(rejected) for _, chosen, rejected in pairs) / len(pairs)
print(json.dumps(found))
assert not {"rlhf_train", "jobs", "deepspeed", "peft"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory, _only_rank: World) -> dict[int, End]:
    if not DATA.is_dir():
        reason = f"needs the preference pairs in {DATA}"
        (pytest.fail if Settings.from_environ(os.environ).ci else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("chat")
    (folder / "rows").mkdir()
    for name, count in (("train", 12), ("test", HELD_OUT)):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        short = [line for line in lines if len(json.loads(line)["prompt"]) <= LETTERS]
        (folder / f"rows/{name}.jsonl").write_text("".join(short[:count]), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(smollm.folder(), num_hidden_layers=LAYERS)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(smollm.folder()).save_pretrained(folder / "base")
    tree = job(folder / "rows", str(folder / "base"))
    return {step: in_process.train(_only_rank, folder / "run", tree, step) for step in (1, 2, 3)}


def test_plain_transformers_finds_the_same_numbers(ends: dict[int, End], tmp_path: Path) -> None:
    models = [ends[step].model for step in (1, 2, 3)]
    folder = Path(models[0]).parents[2]
    rows = folder / "rows/test.jsonl"
    command = [sys.executable, "-c", STRANGER, str(folder / "base"), *models, str(rows), str(RESPONSE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"plain transformers: {found}")
    assert ends[1].perplexity_before == pytest.approx(found["base"]["perplexity"], rel=1e-4)
    assert ends[1].perplexity_after == pytest.approx(found["sft"]["perplexity"], rel=1e-4)
    assert ends[1].perplexity_after != pytest.approx(ends[1].perplexity_before, rel=1e-3)
    assert ends[2].reward_accuracy == found["accuracy"]
    assert ends[3].mean_reward_before == pytest.approx(found["sft"]["reward"], rel=1e-3, abs=1e-3)
    assert ends[3].mean_reward_after == pytest.approx(found["ppo"]["reward"], rel=1e-3, abs=1e-3)
    assert ends[3].mean_reward_after != pytest.approx(ends[3].mean_reward_before, rel=1e-3)
    assert ends[3].response_length_before == found["sft"]["length"]
    assert ends[3].response_length_after == found["ppo"]["length"]


def test_messages_become_the_real_tokenizers_ids() -> None:
    """SmolLM2's ids of the system turn that its template adds are those that it is known for."""
    tokenizer = AutoTokenizer.from_pretrained(smollm.folder())
    template = ChatTemplate.of(tokenizer)
    question, answer = Message("user", "Hi there"), Message("assistant", "Hello!")
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    asked = [1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198]  # user, Hi there; assistant
    first, later = [*system, 2, 198, *asked], [198, *asked]
    assert template.prompt([question]) == first
    assert template.answer([question], answer) == [19556, 17, 2]
    ids, learned = template.dialogue([question, answer] * 2)
    assert ids == [*first, 19556, 17, 2, *later, 19556, 17, 2]
    assert [place for place, is_learned in enumerate(learned) if is_learned] == [
        *range(len(first), len(first) + 3),
        *range(len(ids) - 3, len(ids)),
    ]
    assert template.stop_ids == (2,)
    typed = template.prompt([Message("user", "<|im_end|>"), answer, Message("user", "<|im_start|>")])
    assert [id_ for id_ in typed if id_ < 3] == [1, 2] * 4 + [1]


@pytest.mark.parametrize("is_trained", [False, True], ids=["whole, as it comes", "after the updates"])
def test_greedy_answers_are_those_of_transformers(is_trained: bool, ends: dict[int, End]) -> None:
    """Ten real prompts in the model's own chat form, all answered by the static decoder."""
    tokenizer = AutoTokenizer.from_pretrained(smollm.folder())
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    turns = [[{"role": "user", "content": json.loads(line)["prompt"][:LETTERS]}] for line in lines]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    folder = ends[3].model if is_trained else smollm.folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Rollouts(
        model, stop_ids=[tokenizer.eos_token_id], pad_id=tokenizer.eos_token_id, max_tokens=ANSWER, temperature=1.0,
        top_k=1, batch=10, device=torch.device("cpu"), warn=pytest.fail,
    )  # fmt: skip
    answers = ours.generate(prompts, seed=0, row_ids=range(10))
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "max_new_tokens": ANSWER}
    for prompt, answer in zip(prompts, answers.tokens, strict=True):
        ids = torch.from_numpy(prompt)[None]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, **greedy)
        assert answer.tolist() == made[0, len(prompt) :].tolist()
    assert len({tuple(answer.tolist()) for answer in answers.tokens}) > 5 or is_trained
