"""Models that one stack saves and the other loads, with what the saving stack makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf_train.models.networks import load_causal, load_tokenizer, train_tokenizer
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny

BODY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3["original_max_position_embeddings"] = 32
# By family. The default of rope_theta is 10,000 in both stacks.
SIZES: dict[str, dict[str, Any]] = {
    "llama": BODY | {"rope_theta": 500_000.0, "rope_scaling": LLAMA_3},
    "qwen2": BODY | {"rope_theta": 1_000_000.0, "tie_word_embeddings": True},
}
NAMES = ("opt", *SIZES)
# How Qwen2 splits text before BPE; its class in transformers 5 has this rule built in.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
TURNS = [{"role": "user", "content": "red cat's house . "}, {"role": "assistant", "content": "Grüße"}]
TEXTS = (
    "\n\nHuman: red cat's  house, 1250 %\n\nAssistant: Grüße 你好 .",
    "<|im_start|>user\n\ttall tree<|im_end|>",
)


def save_all(world: World, folder: Path) -> None:
    """Train each model for one update, by step 1, and put what it saved into `folder/NAME`.

    expected.json next to it has what this stack makes of it. `folder/NAME-source` is the model that
    it started from, as transformers alone saves it.
    """
    rows = tiny.write_rows(folder / "rows", train=24, held_out=4)
    for name in NAMES:
        tree = tiny.job(rows)
        tree["sft"] |= {"global_batch": 4, "max_updates": 1}
        if name != "opt":  # OPT is made from a config, and its tokenizer from the rows
            tree["actor"] = {"model": make_source(name, folder / f"{name}-source")}
        end = in_process.train(world, folder / "runs" / name, tree, 1)
        shutil.move(end.model, folder / name)
        describe(folder / name)


def make_source(name: str, folder: Path) -> str:
    """Save a model with random weights by transformers alone, and describe it."""
    tokenizer = qwen2_tokenizer() if name == "qwen2" else llama_tokenizer()
    fields: dict[str, Any] = {"model_type": name} | SIZES[name]
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>" if name == "qwen2" else "</s>"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = sorted(stops)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    describe(folder)
    return str(folder)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(tiny.WORDS, 320)
    tokenizer.chat_template = CHAT
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer that is built like Qwen2's: nothing in front, ends by <|im_end|>."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(tiny.WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT
    )


def describe(folder: Path) -> None:
    (folder / "expected.json").write_text(json.dumps(what_it_is(folder)), encoding="utf-8")


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return found


def what_it_is(folder: Path) -> dict[str, Any]:
    """Return what plain transformers makes of a model's folder, as JSON values."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return logits_of(model) | {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "inputs": sorted(tokenizer(TEXTS[0])),
        "text": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS],
        "tokens": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)],
        "chat": tokenizer.apply_chat_template(TURNS, tokenize=False) if tokenizer.chat_template else None,
        "dtype": str(next(model.parameters()).dtype),
        "stops": _as_list(GenerationConfig.from_pretrained(folder).eos_token_id),
    }


def loaded_by_us(folder: Path) -> dict[str, Any]:
    """Return what our own loading makes of it, for a job whose `actor.model` it is."""
    tokenizer = load_tokenizer(str(folder))
    model = load_causal(str(folder), tokenizer, torch.float32, 0).eval()
    return logits_of(model) | {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "chat": tokenizer.apply_chat_template(TURNS, tokenize=False),
        "stops": _as_list(model.generation_config.eos_token_id),
    }


def logits_of(model: Any) -> dict[str, Any]:
    """Return the logits after the last of 90 tokens, where a wrong RoPE shows."""
    ids = torch.arange(90)[None] * 7 % 250 + 5
    with torch.no_grad():
        return {"logits": model(input_ids=ids, use_cache=False).logits[0, -2:].float().tolist()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Say what differs, but for rounding."""
    logits = [torch.tensor(side["logits"]) for side in (found, expected)]
    same_shape = logits[0].shape == logits[1].shape
    worst = float((logits[0] - logits[1]).abs().max()) if same_shape else float("inf")
    different = [f"logits by {worst:.1e}"] if not worst < 1e-4 else []
    names = [name for name in found if name != "logits" and found[name] != expected[name]]
    return different + [f"{name}: {found[name]!r}, not {expected[name]!r}" for name in names]


def _as_list(ids: int | list[int]) -> list[int]:
    return ids if isinstance(ids, list) else [ids]
