"""Work of exactly known size for every measured side: model folders with random weights, their
tokenizer, prompts, rows of text.

What ends an answer is in the weights, so that whoever loads the folder samples answers of the same
lengths: never a special token; or, with a countdown, as many tokens as the prompt's last word says;
or an EOS with the same probability at every token.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD, EOS = 1, 2
# the final layer norm's bias, and minus the unembedding, along the one direction that keeps special
# tokens away
PUSH = 10.0
CHAIN_NORM = 8.0  # of the countdown's embeddings
CALM = 0.02  # of what the countdown's layers add to the residual stream, so that the token's own embedding stands out
THRESHOLD, LOUD = (
    0.6,
    100.0,
)  # cosine at which a token of the countdown is recognised, and how loudly the next one is said

# Means before what is too long is drawn again, as shares of the most: 130 and 50 tokens of 256 are
# left, as in hh-rlhf (median 127 and 36).
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


@dataclass(frozen=True)
class Size:
    """Shapes of the models, and of step 3's work with them."""

    actor: dict[str, Any]
    critic: dict[str, Any]
    batch: int  # prompts a rollout and an update
    prompt_tokens: int
    response_tokens: int
    real_prompt_tokens: int = 256  # the most, where lengths are drawn after real ones
    real_response_tokens: int = 256
    precision: str = "float32"
    micro_batch: int | None = None  # of the peers; None: the batch. The product chooses its own
    decode_batches: tuple[int, ...] = field(default=(16, 64))

    @property
    def vocabulary(self) -> int:
        return self.actor["vocab_size"]


OPT_350M = opt(1024, 24, 16, 50272, 2048, word_embed_proj_dim=512, do_layer_norm_before=False)
SIZES = {
    "tiny": Size(opt(64, 2, 4, 256, 64), opt(32, 2, 2, 256, 64), 8, 8, 6, 24, 16, decode_batches=(2,)),
    "small": Size(opt(256, 4, 8, 2048, 512), opt(128, 4, 4, 2048, 512), 64, 64, 64),
    "opt-1.3b": Size(
        opt(2048, 24, 32, 50272, 2048),
        OPT_350M,
        256,
        256,
        256,
        precision="bfloat16",
        micro_batch=64,
        decode_batches=(16, 64, 256),
    ),
}


# --- models --------------------------------------------------------------------------------------------------------


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """`w17` is token 17, and each word one token."""
    words = {
        word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), vocabulary))])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(fields: dict[str, Any], **more: Any) -> Any:
    fields = {
        **fields,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        **more,
    }
    return AutoConfig.for_model(**fields)


@torch.no_grad()
def actor_of(fields: dict[str, Any], seed: int, *, countdown: int = 0, end_probability: float = 0.0) -> Any:
    """OPT with the head tied to the embedding; its answers do not end.

    countdown: they do, after as many tokens as the prompt's last word says: see `countdown_word`;
    the most that it can say.
    end_probability: they do with this probability at every token. What else is said does not depend
    on what was said.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(fields))
    decoder, embedding = model.model.decoder, model.get_input_embeddings().weight
    # The last direction is one of final layer norm and head alone: a constant there, which special
    # tokens answer with -PUSH^2.
    embedding[:, -1] = 0
    embedding[: len(SPECIAL), -1] = -PUSH
    decoder.final_layer_norm.weight[-1], decoder.final_layer_norm.bias[-1] = 0, PUSH
    if countdown:
        _count_down(decoder, embedding, countdown)
    if end_probability:
        state = decoder.final_layer_norm.bias
        decoder.final_layer_norm.weight[:] = 0  # so the state before the head is its bias, everywhere
        others = (embedding.float() @ state.float()).index_fill(0, torch.tensor([EOS]), -torch.inf).logsumexp(0)
        embedding[EOS] = state / state.norm() ** 2 * (others + math.log(end_probability / (1 - end_probability)))
    return model.eval()


def countdown_word(tokens: int) -> int:
    """The token that an answer of so many tokens, the EOS included, comes after."""
    return len(SPECIAL) - 1 + tokens


def _count_down(decoder: Any, embedding: torch.Tensor, longest: int) -> None:
    """Neuron k of the last layer recognises `countdown_word(k)` and says the one before it; the
    first says EOS.
    """
    chain = [EOS, *map(countdown_word, range(1, longest + 1))]
    vectors = embedding[chain]
    vectors[:, -1] = 0
    vectors[:, :-1] -= vectors[:, :-1].mean(1, keepdim=True)  # a layer norm leaves such a vector's direction
    vectors *= CHAIN_NORM / vectors.norm(dim=1, keepdim=True)
    embedding[chain] = vectors
    for layer in decoder.layers:
        layer.self_attn.out_proj.weight *= CALM
        layer.fc2.weight *= CALM
    last, width = decoder.layers[-1], embedding.shape[1]
    unit = vectors / CHAIN_NORM
    last.fc1.weight[:longest] = unit[1:] / math.sqrt(width)
    last.fc1.bias[:longest] = -THRESHOLD
    last.fc2.weight[:, :longest] = unit[:-1].T * CHAIN_NORM * LOUD


def critic_of(fields: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(_config(fields, num_labels=1)).eval()


def write_model(model: Any, vocabulary: int, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    tokenizer_of(vocabulary).save_pretrained(str(folder))
    return folder


def write_models(size: Size, folder: Path, seed: int, *, real_lengths: bool) -> tuple[Path, Path]:
    """-> folders of the actor and of the critic, which the reward model is too."""
    actor = actor_of(size.actor, seed, countdown=size.real_response_tokens if real_lengths else 0)
    return write_model(actor, size.vocabulary, folder / "actor"), write_model(
        critic_of(size.critic, seed), size.vocabulary, folder / "critic"
    )


def matmul_parameters(fields: dict[str, Any], *, with_head: bool) -> int:
    """Weights that a token is multiplied with: no embeddings, but the head that is tied to them."""
    width, feed = fields["hidden_size"], fields["ffn_dim"]
    count = fields["num_hidden_layers"] * (4 * width * width + 2 * width * feed)
    projected = fields["word_embed_proj_dim"]
    if projected != width:
        count += 2 * width * projected
    return count + (projected * fields["vocab_size"] if with_head else 0)


def weight_bytes_of_decoding(fields: dict[str, Any], bytes_each: int) -> int:
    """What a decode step reads of the weights: those of the matrix products, and their biases and
    norms.
    """
    width, feed = fields["hidden_size"], fields["ffn_dim"]
    small = fields["num_hidden_layers"] * (4 * width + feed + width + 4 * width) + 2 * width
    return (matmul_parameters(fields, with_head=True) + small) * bytes_each


# --- prompts and rows ----------------------------------------------------------------------------------------------


def drawn_lengths(
    dice: np.random.RandomState, count: int, mean: float, shape: float, least: int, most: int
) -> np.ndarray:
    """Whole numbers after a gamma distribution of this mean, those beyond the limits drawn again."""
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
    """Random words. With real lengths the last word says how long the answer is."""
    dice, count = np.random.RandomState(seed), count or size.batch
    first = len(SPECIAL) + size.real_response_tokens  # words that count nothing down
    if not real_lengths:
        rows = dice.randint(first, size.vocabulary, (count, size.prompt_tokens))
        return Prompts(rows.tolist(), [size.response_tokens] * count)
    lengths = drawn_lengths(dice, count, MEAN_PROMPT * size.real_prompt_tokens, 2.0, 4, size.real_prompt_tokens)
    answers = drawn_lengths(dice, count, MEAN_ANSWER * size.real_response_tokens, 1.0, 2, size.real_response_tokens)
    ids = [
        [*dice.randint(first, size.vocabulary, n - 1).tolist(), countdown_word(int(a))]
        for n, a in zip(lengths, answers, strict=True)
    ]
    return Prompts(ids, answers.tolist())


def text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(rows: Sequence[dict[str, str]], folder: Path) -> Path:
    """A data set with these training rows; the first are held out too, since some must be."""
    folder.mkdir(parents=True)
    for name, lines in (("train", rows), ("test", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return folder


def prompt_rows(prompts: Prompts) -> list[dict[str, str]]:
    return [{"prompt": text(ids), "chosen": "w4", "rejected": "w5"} for ids in prompts.ids]
