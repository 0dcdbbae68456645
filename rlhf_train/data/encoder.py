"""Turn text into token ids, as they follow each other in one text.

- text that looks like a control token (`</s>` typed by a user) stays text;
- an answer's ids are those that follow its prompt's ids in the text of both.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jobs.errors import ToolkitError
from jobs.formatting import shown

Encode = Callable[[list[str]], list[list[int]]]

NEUTRAL = ("\n", "a", ".", "1", "é")  # texts to put before another; one of them merges with none of its tokens


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that never makes control tokens of text; the caller adds `front` and `eos`."""

    encode: Encode  # without special tokens
    front: list[int]  # special tokens before every prompt, e.g. BOS
    eos: int
    control: dict[int, str]  # tokens that text must not become
    identity: bytes  # same bytes, same ids

    def ids(self, lines: list[str]) -> list[list[int]]:
        """Encode texts, and split a control token that a user typed, e.g. into `<` and `/s>`.

        Not by split_special_tokens: transformers 4.35 refuses it for fast tokenizers, 4.46 ignores
        it for slow ones.
        """
        return self._as_text(lines, self.encode)

    def _as_text(self, lines: list[str], encode: Encode) -> list[list[int]]:
        found, control = encode(lines), self.control.values()
        for i in (i for i, ids in enumerate(found) if not self.control.keys().isdisjoint(ids)):
            inside = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in control)
            first, *others = re.split(inside, lines[i])
            found[i] = list(chain.from_iterable([*encode([first]), *behind(others, self.encode)]))
            if left := self.control.keys() & found[i]:
                raise ToolkitError(
                    "the tokenizer makes control tokens of plain text",
                    why=f"{', '.join(self.control[token] for token in left)} in {shown(lines[i])}",
                    hint="take that text out of the data set",
                )
        return found

    def answers(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """Encode answers as they follow their prompts, (prompt, answer) each.

        Prompt and answer are encoded as one text, and cut where the prompt's own ids end. A
        tokenizer that puts a space in front of every text (LLaMA 2) so puts none in between.
        Where a token crosses the border, the answer is encoded behind a neutral text instead.
        """
        prompts = dict.fromkeys(prompt for prompt, _ in pairs)
        starts = dict(zip(prompts, self.ids(list(prompts)), strict=True))
        found = self.ids([prompt + answer for prompt, answer in pairs])
        crossed = []
        for i, (prompt, _) in enumerate(pairs):
            start = starts[prompt]
            if found[i][: len(start)] == start:
                found[i] = found[i][len(start) :]
            else:
                crossed.append(i)
        for i, ids in zip(
            crossed, self._as_text([pairs[i][1] for i in crossed], partial(behind, encode=self.encode)), strict=True
        ):
            found[i] = ids
        return found


def behind(lines: Sequence[str], encode: Encode) -> list[list[int]]:
    """Encode texts as they stand behind other text, with whose end they share no token."""
    found: dict[int, list[int]] = {}
    for neutral in NEUTRAL:
        left = [i for i in range(len(lines)) if i not in found]
        if not left:
            break
        [start] = encode([neutral])
        for i, ids in zip(left, encode([neutral + lines[i] for i in left]), strict=True):
            if ids[: len(start)] == start:
                found[i] = ids[len(start) :]
    if left := [i for i in range(len(lines)) if i not in found]:
        found |= dict(zip(left, encode([lines[i] for i in left]), strict=True))
    return [found[i] for i in range(len(lines))]


class BareTokenizer:
    """A tokenizer that cuts and pads nothing, and puts no special tokens around a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._backend = tokenizer, None
        if tokenizer.is_fast:
            # A copy: the caller's truncation and padding stay as they are, and no long text warns.
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()

    def __call__(self, lines: list[str], *, special: bool = False) -> list[list[int]]:
        """Encode texts. special: with the special tokens that the tokenizer puts around each."""
        if self._backend is None:
            ids: list[list[int]] = self._tokenizer(
                lines, add_special_tokens=special, truncation=False, padding=False, verbose=False
            )["input_ids"]
            return ids
        batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)  # from tokenizers 0.20 on
        return [encoding.ids for encoding in batch(lines, add_special_tokens=special)]

    @property
    def front(self) -> list[int]:
        """The special tokens before a text. Those behind it, e.g. EOS, do not count."""
        [bare], [framed] = self(["a"]), self(["a"], special=True)
        return next(framed[:i] for i in range(len(framed)) if framed[i : i + len(bare)] == bare)

    @property
    def identity(self) -> bytes:
        """The same bytes: the same ids."""
        if self._backend is not None:
            return self._backend.to_str().encode()
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            return b"".join(file.name.encode() + file.read_bytes() for file in sorted(Path(folder).iterdir()))


def encoder_of(tokenizer: Any) -> Encoder:
    eos = tokenizer.eos_token_id
    if eos is None:
        hint = "give the tokenizer an eos_token"
        raise ToolkitError("the tokenizer has no EOS token", why="answers end with it", hint=hint)
    bare = BareTokenizer(tokenizer)
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control.pop(tokenizer.unk_token_id, None)  # unknown text may become that
    return Encoder(bare, bare.front, eos, {**control, eos: tokenizer.eos_token}, bare.identity)
