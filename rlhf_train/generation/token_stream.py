"""Sample one answer token by token, for somebody who reads along.

The tokens are those that `Rollouts` would sample with the same uniforms: the static decoder
generates for the families that it knows, any other model generates by its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_train import compat
from rlhf_train.generation.decoder import Decoder, Sampling, draw
from rlhf_train.generation.families.known import network_of
from rlhf_train.models.head import transform_of

ROOM = 256  # the cache's width is a multiple of this, so a longer conversation seldom needs another


class TokenStream:
    """Samples answers of a model, token by token; several answers may be sampled in turn."""

    def __init__(self, model: Any, sampling: Sampling, *, is_static: bool = True) -> None:
        """is_static: false: generate by the model's own forward."""
        self.model, self.sampling = model, sampling
        self.device: torch.device = model.get_input_embeddings().weight.device
        network = network_of(model) if is_static else None
        self.is_static, self._most_static = network is not None, network.most_tokens if network is not None else None
        self._decoder: Decoder | None = None
        self._wants_positions = compat.takes_position_ids(model.base_model)

    def tokens(self, prompt: np.ndarray, uniforms: Tensor, stop_ids: Set[int]) -> Iterator[int]:
        """Yield an answer's tokens as they are sampled; the one in `stop_ids` is the last.

        uniforms: (R,) float64 in [0, 1), one for each token; there are no more tokens than these.
        """
        fits = self._most_static is None or len(prompt) + len(uniforms) <= self._most_static
        sample = self._sample_static if self.is_static and fits else self._sample_eagerly
        for token in sample(prompt, uniforms.unsqueeze(0)):
            yield token
            if token in stop_ids:
                return

    def _sample_static(self, prompt: np.ndarray, uniforms: Tensor) -> Iterator[int]:
        limit = uniforms.shape[1]
        decoder = self._decoder_for(len(prompt) + limit, limit)
        self._decoder = None  # while it is in use, another answer gets another one
        try:
            with torch.no_grad():
                decoder.begin(uniforms)
                decoder.prefill([0], [0], [prompt])
            for place in range(limit):
                yield int(decoder.state.tokens[0, place])
                if place + 1 < limit:
                    with torch.no_grad():
                        decoder.advance(1, len(prompt) + place + 1, 1)
        finally:
            self._decoder = decoder

    def _decoder_for(self, width: int, limit: int) -> Decoder:
        """Return the last decoder, or a new one if its cache is too small."""
        last = self._decoder
        if last is not None and last.width >= width and last.state.tokens.shape[1] > limit:
            return last
        network = network_of(self.model)
        assert network is not None
        self._decoder = last = None  # before the new cache is allocated
        room = -(-width // ROOM) * ROOM
        self._decoder = Decoder(
            # The reader decides where an answer stops.
            network,
            slots=1,
            width=room,
            rows=1,
            limit=limit,
            sampling=self.sampling,
            stop_ids=(),
        )
        return self._decoder

    def _sample_eagerly(self, prompt: np.ndarray, uniforms: Tensor) -> Iterator[int]:
        """Sample by the model's own forward, with its KV cache."""
        limit, cache = uniforms.shape[1], None
        uniforms = uniforms.to(self.device)
        inputs = torch.from_numpy(prompt.astype(np.int64)).to(self.device).unsqueeze(0)
        mask = torch.ones_like(inputs)
        positions = torch.arange(len(prompt), device=self.device).unsqueeze(0)
        for place in range(limit):
            extra = {"position_ids": positions} if self._wants_positions else {}
            with torch.no_grad():
                out = self.model.base_model(
                    input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
                )
                raw = self.model.get_output_embeddings()(out.last_hidden_state[:, -1])
                token, _ = draw(transform_of(self.model)(raw.float()), uniforms[:, place], self.sampling)
            yield int(token)
            cache, inputs = out.past_key_values, token.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            positions = positions[:, -1:] + 1
