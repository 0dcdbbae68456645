"""This module makes work of exactly known size: random models, their tokenizer, prompts, rows.

The weights decide where an answer ends, so every side that loads the folder samples answers of the
same lengths: without a special token; or, with a countdown, as many tokens as the prompt's last
word says; or, with an OPT, with the same probability of an EOS at every token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf_train import compat

SPECIAL = ("<s>", "<pad>", "</s>", "a")  # the product encodes an `a`, to see what stands before a text
PAD, EOS = 1, 2
WORDS = 8192  # that prompts and rows are made of, at most
# OPT: the final layer norm's bias, and minus the unembedding, along the direction that keeps
# special tokens from being sampled. LLaMA-like models: the final norm's weight along it.
PUSH, LLAMA_PUSH = 10.0, 60.0
CHAIN_NORM = 8.0  # of the countdown's embeddings
# The countdown's layers are scaled by this, so that the token's own embedding dominates the
# residual stream.
CALM = 0.02
THRESHOLD = 0.6  # cosine at which an OPT's token of the countdown is recognised
# The same of a LLaMA-like one, next to its vector of CHAIN_NORM: in numbers of the constant.
GATED_THRESHOLD = 4.0
LOUD = 100.0  # scale of the logit of the next token of the countdown

# Means before lengths that are too long are drawn again, as shares of the maximum. Of 256 tokens,
# means of 130 and 50 are left, as in hh-rlhf (medians 127 and 36).
MEAN_PROMPT, MEAN_ANSWER = 200 / 256, 50 / 256


def opt(hidden: int, layers: int, heads: int, vocabulary: int, positions: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        **more,
    }


def llama_like(
    family: str, width: int, layers: int, heads: str, feed: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """Return a config's fields. heads: of queries, of keys, and numbers of each, as `12/2/128`."""
    queries, keys, numbers = map(int, heads.split("/"))
    return {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": numbers,
        "intermediate_size": feed,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **more,
    }


@dataclass(frozen=True)
class Size:
    """Shapes of the models, and of step 3's work with them."""

    actor: dict[str, Any]
    critic: dict[str, Any]
    batch: int  # prompts a rollout and an update
    prompt_tokens: int
    response_tokens: int
    real_prompt_tokens: int = 256  # the maximum where lengths are like real ones
    real_response_tokens: int = 256
    precision: str = "float32"
    micro_batch: int | None = None  # of the peers; None: the batch. The product chooses its own
    decode_batches: tuple[int, ...] = field(default=(16, 64))

    @property
    def vocabulary(self) -> int:
        return self.actor["vocab_size"]

    @property
    def words(self) -> int:
        return min(self.vocabulary, WORDS)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def on_a_gpu(actor: dict[str, Any], critic: dict[str, Any]) -> Size:
    return Size(
        actor, critic, 256, 256, 256, precision="bfloat16", micro_batch=64, decode_batches=(16, 64, 256)
    )  # fmt: skip


# Those of models on the hub have the shapes of their config.json files.
SMOLLM2_135M = llama_like("llama", 576, 30, "9/3/64", 1536, 49152)
QWEN3_06B = llama_like("qwen3", 1024, 28, "16/8/128", 3072, 151936)
LLAMA_32_1B = llama_like("llama", 2048, 16, "32/8/64", 8192, 128256)
QWEN25_05B = llama_like("qwen2", 896, 24, "14/2/64", 4864, 151936)
QWEN25_15B = llama_like("qwen2", 1536, 28, "12/2/128", 8960, 151936)
OPT_350M = opt(1024, 24, 16, 50272, 2048, word_embed_proj_dim=512, do_layer_norm_before=False)
SIZES = {
    "tiny": Size(opt(64, 2, 4, 256, 64), opt(32, 2, 2, 256, 64), 8, 8, 6, 24, 16, decode_batches=(2,)),
    "small": Size(opt(256, 4, 8, 2048, 512), opt(128, 4, 4, 2048, 512), 64, 64, 64),
    # About as many weights as `small`.
    "small-llama": Size(
        llama_like("llama", 256, 4, "8/2/32", 683, 2048), llama_like("llama", 128, 4, "4/1/32", 341, 2048), 64, 64, 64
    ),
    "opt-1.3b": on_a_gpu(opt(2048, 24, 32, 50272, 2048), OPT_350M),
    "smollm2-135m": on_a_gpu(SMOLLM2_135M, SMOLLM2_135M),
    "qwen3-0.6b": on_a_gpu(QWEN3_06B, QWEN3_06B),
    "llama-3.2-1b": on_a_gpu(LLAMA_32_1B, LLAMA_32_1B),
    "qwen2.5-1.5b": on_a_gpu(QWEN25_15B, QWEN25_05B),
}


# --- models ---


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer in which each word is one token: `w17` is token 17.

    They are added tokens, which Qwen2's own class also keeps. 150,000 of them would take it 14 s to
    load, so a model may know more tokens than its tokenizer does, as many real ones do.
    """
    words = [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), min(vocabulary, WORDS)))]
    backend = Tokenizer(models.BPE(vocab={words[0]: 0}, merges=[]))
    backend.add_tokens([AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="</s>",  # Qwen2's class would add a token of its own, at which answers end
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(fields: dict[str, Any], **more: Any) -> Any:
    without = {"dropout": 0.0} if fields["model_type"] == "opt" else {}
    special = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
    return AutoConfig.for_model(**{**fields, **without, "attention_dropout": 0.0, **special, **more})


@torch.no_grad()
def actor_of(fields: dict[str, Any], seed: int, *, countdown: int = 0, end_probability: float = 0.0) -> Any:
    """Make a model with the head tied to the embedding, whose answers do not end.

    countdown: answers end after as many tokens as the prompt's last word says, at most this many:
    see `countdown_word`. end_probability: an OPT's answers end with this probability at every
    token, and their other tokens do not depend on the text before.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(fields)).eval()
    if fields["model_type"] == "opt":
        _opt_without_end(model, countdown, end_probability)
    else:
        assert not end_probability
        _llama_without_end(model, countdown)
    return model


def _opt_without_end(model: Any, countdown: int, end_probability: float) -> None:
    """Only the final layer norm and the head use the last direction.

    The state is a constant there, which gives special tokens a logit of -PUSH^2.
    """
    decoder, embedding = model.model.decoder, model.get_input_embeddings().weight
    embedding[:, -1] = 0
    embedding[: len(SPECIAL), -1] = -PUSH
    decoder.final_layer_norm.weight[-1], decoder.final_layer_norm.bias[-1] = 0, PUSH
    if countdown:
        vectors = _chain(embedding, countdown)
        for layer in decoder.layers:
            layer.self_attn.out_proj.weight *= CALM
            layer.fc2.weight *= CALM
        last, unit = decoder.layers[-1], vectors / CHAIN_NORM
        last.fc1.weight[:countdown] = unit[1:] / math.sqrt(embedding.shape[1])
        last.fc1.bias[:countdown] = -THRESHOLD
        last.fc2.weight[:, :countdown] = unit[:-1].T * CHAIN_NORM * LOUD
    if end_probability:
        state = decoder.final_layer_norm.bias
        decoder.final_layer_norm.weight[:] = 0  # the state before the head is then always its bias
        others = (embedding.float() @ state.float()).index_fill(0, torch.tensor([EOS]), -torch.inf).logsumexp(0)
        embedding[EOS] = state / state.norm() ** 2 * (others + math.log(end_probability / (1 - end_probability)))


def _llama_without_end(model: Any, countdown: int) -> None:
    """The last number of each embedding is 1, of special tokens -1; no layer reads or writes it.

    There is no bias: the state is that constant there, which the final norm makes larger, and the
    logit of a special token is as far below 0 as that of another is raised.
    """
    body, embedding = model.model, model.get_input_embeddings().weight
    vectors = _chain(embedding, countdown) if countdown else None
    embedding[:, -1] = 1
    embedding[: len(SPECIAL), -1] = -1
    body.norm.weight[-1] = LLAMA_PUSH
    calm = CALM if countdown else 1.0
    for layer in body.layers:
        layer.input_layernorm.weight[-1] = layer.post_attention_layernorm.weight[-1] = 0
        for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
            product.weight *= calm
            product.weight[-1] = 0
    if vectors is not None:
        # The last layer reads the constant: it is the gates' bias, and all of the other factor.
        last, unit = body.layers[-1], vectors / CHAIN_NORM
        last.post_attention_layernorm.weight[-1] = 1
        last.mlp.gate_proj.weight[:countdown] = unit[1:]
        last.mlp.gate_proj.weight[:countdown, -1] = -GATED_THRESHOLD
        last.mlp.up_proj.weight[:countdown] = 0
        last.mlp.up_proj.weight[:countdown, -1] = 1
        last.mlp.down_proj.weight[:, :countdown] = unit[:-1].T * CHAIN_NORM * LOUD


def countdown_word(tokens: int) -> int:
    """Return the token that an answer of so many tokens, the EOS included, follows."""
    return len(SPECIAL) - 1 + tokens


def _chain(embedding: torch.Tensor, longest: int) -> torch.Tensor:
    """Give EOS and the words of a countdown embeddings of their own, whose last number is 0.

    Neuron k of the last layer is to recognise `countdown_word(k)` and to say the word before it.
    The first neuron says EOS.
    """
    chain = [EOS, *map(countdown_word, range(1, longest + 1))]
    vectors = embedding[chain]
    vectors[:, -1] = 0
    vectors[:, :-1] -= vectors[:, :-1].mean(1, keepdim=True)  # a layer norm leaves such a vector's direction
    vectors *= CHAIN_NORM / vectors.norm(dim=1, keepdim=True)
    embedding[chain] = vectors
    return vectors


def critic_of(fields: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(_config(fields, num_labels=1)).eval()


def write_model(model: Any, vocabulary: int, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    tokenizer_of(vocabulary).save_pretrained(str(folder))
    return folder


def write_models(size: Size, folder: Path, device: str, seed: int, *, real_lengths: bool = False) -> Path:
    """Write `actor/` and `critic/`, which is the reward model too, in the precision of training.

    They are made on the GPU, since a CPU takes half a minute for OPT-1.3b.
    """
    countdown = size.real_response_tokens if real_lengths else 0
    with torch.device(device):
        write_model(actor_of(size.actor, seed, countdown=countdown).to(size.dtype), size.vocabulary, folder / "actor")
        write_model(critic_of(size.critic, seed).to(size.dtype), size.vocabulary, folder / "critic")
    compat.free_gpu_memory()
    return folder


def matmul_parameters(fields: dict[str, Any], *, with_head: bool) -> int:
    """Count the weights that a token is multiplied with.

    Embeddings do not count, but the head that is tied to them does.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(fields))
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    return sum(module.weight.numel() for module in linear if with_head or module is not head)


# --- prompts and rows ---


def drawn_lengths(
    dice: np.random.RandomState, count: int, mean: float, shape: float, least: int, most: int
) -> np.ndarray:
    """Draw whole numbers from a gamma distribution, and again those beyond the limits."""
    lengths: list[int] = []
    while len(lengths) < count:
        length = math.ceil(dice.gamma(shape, mean / shape))
        if least <= length <= most:
            lengths.append(length)
    return np.array(lengths)


@dataclass(frozen=True)
class Prompts:
    """Token ids of one rollout, and how long its answers will be."""

    ids: list[list[int]]
    answers: list[int]  # tokens, EOS included

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def answer_tokens(self) -> int:
        return sum(self.answers)


def prompts_of(size: Size, seed: int, *, real_lengths: bool, count: int | None = None) -> Prompts:
    """Make prompts of random words; with real lengths the last word says how long the answer is."""
    dice, count = np.random.RandomState(seed), count or size.batch
    first = len(SPECIAL) + size.real_response_tokens  # words that count nothing down
    if not real_lengths:
        rows = dice.randint(first, size.words, (count, size.prompt_tokens))
        return Prompts(rows.tolist(), [size.response_tokens] * count)
    lengths = drawn_lengths(dice, count, MEAN_PROMPT * size.real_prompt_tokens, 2.0, 4, size.real_prompt_tokens)
    answers = drawn_lengths(dice, count, MEAN_ANSWER * size.real_response_tokens, 1.0, 2, size.real_response_tokens)
    ids = [
        [*dice.randint(first, size.words, n - 1).tolist(), countdown_word(int(a))]
        for n, a in zip(lengths, answers, strict=True)
    ]
    return Prompts(ids, answers.tolist())


def text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(rows: Sequence[dict[str, str]], folder: Path) -> Path:
    """Write a data set with these training rows; the first are held out too, since some must be."""
    folder.mkdir(parents=True)
    for name, lines in (("train", rows), ("test", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return folder


def prompt_rows(prompts: Prompts) -> list[dict[str, str]]:
    return [{"prompt": text(ids), "chosen": "w4", "rejected": "w5"} for ids in prompts.ids]
