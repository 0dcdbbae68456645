"""What steps 1 and 2 report after training is what their saved models give in plain transformers.

Small models with random weights, of each family that may be trained, all loaded in one process that
does not know us.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from env.settings import load_families
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny


@dataclass(frozen=True)
class Family:
    sizes: Mapping[str, Any]
    scores: bool = False  # a reward model of it is trained, too


POSITIONS = 96
BODY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
GROUPED = BODY | {"num_key_value_heads": 2}
NARROW = GROUPED | {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.2}
FAMILIES = {
    "opt": Family(tiny.OPT, scores=True),
    "gpt2": Family(GPT, scores=True),
    "gpt_neox": Family(BODY, scores=True),
    "gptj": Family(GPT | {"rotary_dim": 4}),
    "bloom": Family({"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "falcon": Family({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}),
    "phi": Family(BODY),
    "llama": Family(GROUPED, scores=True),
    "mistral": Family(GROUPED | {"sliding_window": 8}, scores=True),  # shorter than the rows
    "mixtral": Family(GROUPED | {"num_local_experts": 4}),
    "qwen2": Family(GROUPED),
    "qwen3": Family(NARROW),
    "smollm3": Family(GROUPED | {"no_rope_layers": [1, 0]}),
    "olmo2": Family(GROUPED),
    "gemma": Family(NARROW),
    "gemma2": Family(NARROW | {"final_logit_softcapping": 3.0}, scores=True),
    "gemma3_text": Family(NARROW | {"sliding_window": 8}),
    "granite": Family(GROUPED | {"logits_scaling": 8.0}),
}
PRESENT = [name for name in FAMILIES if name in CONFIG_MAPPING]
SCORING = [name for name in PRESENT if FAMILIES[name].scores]


@pytest.mark.pinned
def test_the_table_says_which_families_transformers_has() -> None:
    is_pinned_stack = int(transformers.__version__.split(".")[0]) < 5
    flavour, table = "cu118" if is_pinned_stack else "cu130", load_families()
    assert {name for name in table if flavour in table[name].flavours} == table.keys() & CONFIG_MAPPING.keys()
    assert table.keys() >= FAMILIES.keys()


# All rows from their texts, one row at a time, without our code.
STRANGER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

torch.set_grad_enabled(False)
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]

def encode(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in whole)
        yield len(prompt), *(torch.tensor([ids + [tokenizer.eos_token_id]])[:, : len(prompt) + 12] for ids in whole)

def perplexity(folder):
    model, nll, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for prompt, ids, _ in encode(folder):
        log_probs = model(ids).logits[0].log_softmax(-1)[prompt - 1 : -1]
        nll, count = nll - float(log_probs.gather(1, ids[0, prompt:, None]).sum()), count + ids.shape[1] - prompt
    return math.exp(nll / count)

def accuracy(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = [[float(model(ids).logits) for ids in answers] for _, *answers in encode(folder)]
    return sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)

kinds = {"step1": perplexity, "step2": accuracy}
print(json.dumps({folder: kinds[folder.split("/")[-2]](folder) for folder in sys.argv[2:]}))
assert not {"rlhf_train", "jobs", "deepspeed", "peft"} & set(sys.modules)
"""


@dataclass(frozen=True)
class Numbers:
    reported: float
    of_saved_model: float


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory, _only_rank: World) -> dict[tuple[str, int], Numbers]:
    """By family and step: perplexity of step 1, accuracy of step 2."""
    folder = tmp_path_factory.mktemp("families")
    rows = tiny.write_rows(folder / "rows", train=48, held_out=40)
    reported: dict[tuple[str, int], tuple[str, float]] = {}
    critic = make_model("opt", folder / "models/opt")  # for families of which transformers makes no classifier
    for name in PRESENT:
        model = make_model(name, folder / "models" / name)
        tree = job(rows, model, model if FAMILIES[name].scores else critic)
        end = in_process.train(_only_rank, folder / name, tree, 1)
        assert end.perplexity_after is not None
        reported[name, 1] = end.model, end.perplexity_after
        if FAMILIES[name].scores:
            end = in_process.train(_only_rank, folder / name, tree, 2)
            assert end.reward_accuracy is not None
            reported[name, 2] = end.model, end.reward_accuracy
    models = [model for model, _ in reported.values()]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(rows / "test.jsonl"), *models],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {which: Numbers(value, found[model]) for which, (model, value) in reported.items()}


def make_model(family: str, folder: Path) -> str:
    tokenizer = train_tokenizer([f"\n\nHuman: {word}\n\nAssistant: {word}" for word in tiny.WORDS], 320)
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    sizes = {name: value for name, value in FAMILIES[family].sizes.items() if name != "model_type"}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def job(rows: Path, actor: str, critic: str) -> dict[str, Any]:
    tree = tiny.job(rows)
    tree["actor"], tree["critic"] = {"model": actor}, {"model": critic}
    tree["data"]["eval_rows"] = 40
    for step, rate in (("sft", 3e-3), ("reward", 3e-5)):
        tree[step] |= {"global_batch": 4, "max_updates": 2, "learning_rate": rate}
    return tree


@pytest.mark.parametrize("family", PRESENT)
def test_the_perplexity_is_that_of_the_saved_model(numbers: dict[tuple[str, int], Numbers], family: str) -> None:
    found = numbers[family, 1]
    assert found.reported == pytest.approx(found.of_saved_model, rel=1e-5)
    assert 2 < found.reported < 1e4


@pytest.mark.parametrize("family", SCORING)
def test_the_accuracy_is_that_of_the_saved_classifier(numbers: dict[tuple[str, int], Numbers], family: str) -> None:
    found = numbers[family, 2]
    assert found.reported == found.of_saved_model
    assert 0 < found.reported < 1  # neither all pairs nor none: a model that reads otherwise would differ
