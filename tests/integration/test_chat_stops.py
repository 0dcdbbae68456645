"""Step 3 of a model that closes a turn with a token that is not its EOS, like base Qwen2.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from jobs.events import End
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny
from tests.rlhf_train.after import models
from tests.rlhf_train.data.families import TEMPLATES


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory, _only_rank: World) -> End:
    """One update. The model never writes EOS, and often what closes a turn."""
    folder = tmp_path_factory.mktemp("stops")
    tokenizer = models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (TEMPLATES / "qwen2.5.jinja").read_text()
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids: Any = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    config = OPTConfig(**{name: value for name, value in tiny.OPT.items() if name != "model_type"}, **ids)
    torch.manual_seed(0)
    actor, reward = (
        OPTForCausalLM(config),
        OPTForSequenceClassification(config.__class__(**config.to_dict(), num_labels=1)),
    )
    with torch.no_grad():
        actor.model.decoder.final_layer_norm.bias[0] = 5.0
        actor.lm_head.weight[:, 0] = 0.0
        actor.lm_head.weight[[closing, tokenizer.eos_token_id], 0] = torch.tensor([2.0, -10.0])
    for name, model in (("actor", actor), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tree = tiny.job(tiny.write_rows(folder / "rows", train=24, held_out=8))
    tree["actor"] = {"model": str(folder / "actor"), "sft_model": str(folder / "actor")}
    tree["critic"] = {"model": str(folder / "reward"), "reward_model": str(folder / "reward")}
    tree["data"] |= {"split": [0, 0, 1]}
    tree["ppo"] |= {"max_updates": 1, "rollout_batch": 8}
    return in_process.train(_only_rank, folder / "run", tree, 3)


def test_answers_end_with_what_closes_a_turn(end: End) -> None:
    assert end.eos_share_before is not None and end.eos_share_before > 0.9
    assert end.response_length_before is not None and end.response_length_before < 6


def test_whoever_loads_the_model_stops_there_and_asks_by_the_template(end: End) -> None:
    tokenizer = AutoTokenizer.from_pretrained(end.model)
    config = json.loads((Path(end.model) / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
