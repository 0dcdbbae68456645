"""Tiny models in folders, to talk to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlhf_train.models.networks import train_tokenizer
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, with_template: bool = False) -> Any:
    texts = [f"\n\nHuman: {word} 🙂 你好\n\nAssistant: {word}" for word in tiny.WORDS]
    made = train_tokenizer(texts, 330)
    if with_template:
        made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
        made.chat_template = TEMPLATE
    return made


def save(
    folder: Path,
    *,
    family: str = "opt",
    with_template: bool = False,
    positions: int = 96,
    ends: bool = True,
    **generation: Any,
) -> Path:
    """Save a model with random weights, its tokenizer and its generation config.

    ends: false: the EOS has a logit of about -50 (OPT).
    """
    words = tokenizer(with_template=with_template)
    torch.manual_seed(4)
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    if family == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=positions, initializer_range=0.2, **ids,
            )
        )  # fmt: skip
    else:
        shape = {**tiny.OPT, "max_position_embeddings": positions, "init_std": 0.2}
        shape.pop("model_type")
        model = OPTForCausalLM(OPTConfig(vocab_size=len(words), dropout=0.0, **shape, **ids))
    if not ends:
        with torch.no_grad():
            model.model.decoder.final_layer_norm.bias[0] = 5.0
            model.lm_head.weight[words.eos_token_id, 0] = -10.0
    model.generation_config = GenerationConfig(**{**ids, "max_new_tokens": 12, **generation})
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def greedy(folder: Path, prompt_ids: list[int], stops: list[int], limit: int) -> list[int]:
    """What plain transformers answers with the likeliest tokens, the stop token included."""
    cls = LlamaForCausalLM if "Llama" in (folder / "config.json").read_text() else OPTForCausalLM
    made: Any = cls.from_pretrained(folder).generate(
        torch.tensor([prompt_ids]), attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        do_sample=False, max_new_tokens=limit, eos_token_id=stops, pad_token_id=1,
    )  # fmt: skip
    return made[0, len(prompt_ids) :].tolist()
