"""A model to talk to: loaded with its tokenizer, it answers conversations piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf_train.after.answer_text import AnswerText
from rlhf_train.after.room import Room
from rlhf_train.after.sources import Source
from rlhf_train.after.template import fitted, stop_texts, template_of
from rlhf_train.data.chat import Message, stop_ids
from rlhf_train.generation.decoder import Sampling
from rlhf_train.generation.rollout import draw_uniforms
from rlhf_train.generation.token_stream import TokenStream
from rlhf_train.models.networks import check_causal, load_causal, load_tokenizer

DEFAULT_TOKENS = 512  # of an answer, where the generation config names no limit
DEFAULT_TOP_K = 50  # what transformers samples from, where a generation config that samples names none
CONTEXT = 8  # tokens of the prompt's end that an answer is decoded behind


@dataclass(frozen=True)
class Wishes:
    """What the user wants otherwise than the model's generation config says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    template: str = "auto"
    seed: int | None = None


class Reply:
    """One answer: iterate over it for its text, as it comes; then it tells what it was."""

    def __init__(self, prompt: np.ndarray, dropped: int, tokens: Iterator[int], text: AnswerText, stop_ids: set[int]):
        self.prompt, self.dropped = prompt, dropped
        self._tokens, self._text, self._stop_ids = tokens, text, stop_ids
        self._end: list[int] = []  # the stop token, if one was sampled

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            if token in self._stop_ids:
                self._end = [token]
                break
            if piece := self._text.push(token):
                yield piece
            if self._text.is_stopped:
                break
        if rest := self._text.finish():
            yield rest

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def tokens(self) -> np.ndarray:
        """The answer's tokens, with the stop token; without what became a stop text."""
        return np.array(self._text.tokens + self._end, dtype=np.int64)


class ChatModel:
    def __init__(self, source: Source, model: Any, tokenizer: Any, wishes: Wishes) -> None:
        self.source, self.model, self.tokenizer, self._wishes = source, model, tokenizer, wishes
        config = model.generation_config
        self.template = template_of(tokenizer, wishes.template)
        self.sampling = sampling_of(config, wishes)
        self.stop_ids = {*stop_ids(tokenizer, config)}
        self.stop_texts = (*stop_texts(self.template), *stop_texts_of(config))
        self.limit: int = wishes.max_tokens or config.max_new_tokens or DEFAULT_TOKENS
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._stream = TokenStream(model, self.sampling)
        self._row = 0

    @classmethod
    def load(cls, source: Source, room: Room, wishes: Wishes) -> ChatModel:
        """Raises ToolkitError: no language model, no tokenizer, not here."""
        check_causal(source.model)
        tokenizer = load_tokenizer(source.model)
        model = load_causal(source.model, tokenizer, room.dtype, 0).to(room.device).eval().requires_grad_(False)
        # The head may have rows without a token.
        model.logit_transform = replace(model.logit_transform, tokens=len(tokenizer))
        return cls(source, model, tokenizer, wishes)

    @property
    def device(self) -> torch.device:
        return self._stream.device

    def reply(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """Begin an answer to the last message. Raises ToolkitError: it is too long, or refused."""
        turns = [Message(message["role"], message["content"]) for message in messages]
        prompt, dropped = fitted(self.template, turns, positions=self.positions, answer=self.limit)
        limit = self.limit if self.positions is None else min(self.limit, self.positions - len(prompt))
        # Without a seed, each answer is another one; with it, a conversation can be had again.
        seed = self._wishes.seed if self._wishes.seed is not None else int(torch.seed() % 2**63)
        uniforms = draw_uniforms(seed, [self._row], limit)[0]
        self._row += 1
        text = AnswerText(self._decode, prompt[-CONTEXT:].tolist(), self.stop_texts)
        tokens = self._stream.tokens(prompt, uniforms, self.stop_ids)
        return Reply(prompt, dropped, tokens, text, self.stop_ids)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def sampling_of(config: Any, wishes: Wishes) -> Sampling:
    """Return how tokens are sampled: as the generation config says, but for the wishes.

    A config that does not sample means the likeliest token, unless a way of sampling is asked for.
    """
    is_asked = any(wish is not None for wish in (wishes.temperature, wishes.top_k, wishes.top_p))
    if wishes.temperature == 0 or not (config.do_sample or is_asked):
        return Sampling(top_k=1)

    def chosen(name: str, default: float) -> float:
        own = getattr(config, name, None) if config.do_sample else None
        return next(value for value in (getattr(wishes, name), own, default) if value is not None)

    top_k = int(chosen("top_k", DEFAULT_TOP_K if config.do_sample else 0))
    top_p = chosen("top_p", 1.0)
    return Sampling(chosen("temperature", 1.0), top_k or None, top_p if top_p < 1 else None)


def stop_texts_of(config: Any) -> tuple[str, ...]:
    """Return the texts that end an answer by the generation config: one, a list, or none."""
    named = config.stop_strings
    return tuple(text for text in ([named] if isinstance(named, str) else named or []) if text)


def not_applied(config: Any) -> list[str]:
    """List the settings of a generation config that would change answers, and do nothing here."""
    plain = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "min_p": (None, 0.0),
             "typical_p": (None, 1.0), "bad_words_ids": (None,), "suppress_tokens": (None,)}  # fmt: skip
    return [
        f"{name} {value}" for name, neutral in plain.items() if (value := getattr(config, name, None)) not in neutral
    ]
