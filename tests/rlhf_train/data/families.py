"""Chat templates of known families, with their formats token by token, written by hand.

The tokenizers have a token a byte or a character, so that ids can be counted out: special tokens
come first, in the order of `tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_train.data.chat import Message

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
SYSTEM, USER, ANSWER = Message("system", "Be kind."), Message("user", "Hi there"), Message("assistant", "Hello!")
USER_2, ANSWER_2 = Message("user", "Bye"), Message("assistant", "See you.")
TALK = (USER, ANSWER, USER_2, ANSWER_2)
CHARACTERS = "\n▁" + "".join(map(chr, range(33, 127)))

Written = Sequence[str | list[str]]  # tokens and texts; a list is learned


@dataclass(frozen=True)
class Family:
    template: str  # file name; "": the tokenizer has none
    kind: str  # how text is cut: see `tokenizer`
    tokens: Sequence[str]  # numbered from 0
    eos: str
    bos: str | None
    written: Written  # TALK; `messages`, where they are given
    messages: Sequence[Message] = TALK
    plain: frozenset[str] = frozenset()  # of `tokens`, those that are not special
    strips: bool = False  # tokens swallow white space behind them

    def tokenizer(self) -> Any:
        """Make the tokenizer.

        kind `bytes`: a token a byte, and one for two line breaks. Else a token a character, with
        `▁` for a space: `legacy` puts one more at the start of each text and behind each special
        token (LLaMA 2), `first` at the start of a text only, `bare` nowhere (Gemma).
        """
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        first = len(vocabulary)
        if self.kind == "bytes":
            vocabulary |= {character: first + byte for byte, character in enumerate(_byte_characters())}
            vocabulary["ĊĊ"] = first + 256
            made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            made.decoder = decoders.ByteLevel()
        else:
            vocabulary |= {character: first + number for number, character in enumerate(CHARACTERS)}
            made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=self.tokens[0]))
            if self.kind == "first":
                made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            else:
                steps = [normalizers.Prepend("▁")] if self.kind == "legacy" else []
                made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
            made.decoder = decoders.Metaspace()
        for token in self.tokens:
            is_special = token not in self.plain
            added = AddedToken(token, special=is_special, normalized=False, rstrip=self.strips and token != self.eos)
            (made.add_special_tokens if is_special else made.add_tokens)([added])
        if self.bos is not None:
            made.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, vocabulary[self.bos])]
            )
        template = (TEMPLATES / f"{self.template}.jinja").read_text() if self.template else None
        return PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token=self.bos, eos_token=self.eos, chat_template=template,
            unk_token=None if self.kind == "bytes" else self.tokens[0],
            model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        )  # fmt: skip

    def ids(self, written: Written) -> list[int]:
        """Count out the ids."""
        texts = (text for part in written for text in ([part] if isinstance(part, str) else part))
        return [number for text in texts for number in self._numbers(text)]

    def learned(self, written: Written) -> list[bool]:
        return [not isinstance(part, str) for part in written for _ in self.ids([part])]

    def _numbers(self, text: str) -> list[int]:
        if text in self.tokens:
            return [self.tokens.index(text)]
        if self.kind != "bytes":
            return [len(self.tokens) + CHARACTERS.index(character) for character in text]
        lines = text.encode().replace(b"\n\n", b"\0")  # no text has this byte
        return [len(self.tokens) + (256 if byte == 0 else byte) for byte in lines]


def _byte_characters() -> list[str]:
    """Return the character that byte-level BPE has for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
THOUGHTS = frozenset({"<think>", "</think>"})
LLAMA_2 = ("<unk>", "<s>", "</s>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
START, END = "<|im_start|>", "<|im_end|>"
HEAD, TAIL, TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

FAMILIES: dict[str, Family] = {
    # The base model's EOS is <|endoftext|>, and its tokenizer has this template.
    "qwen2.5-base": Family(
        "qwen2.5", "bytes", QWEN[:3], "<|endoftext|>", None,
        [START, "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", END, "\n",
         START, "user\nHi there", END, "\n", START, "assistant\n", ["Hello!", END], "\n",
         START, "user\nBye", END, "\n", START, "assistant\n", ["See you.", END]],
    ),
    "qwen2.5-system": Family(
        "qwen2.5", "bytes", QWEN[:3], END, None,
        [START, "system\nBe kind.", END, "\n", START, "user\nHi there", END, "\n", START, "assistant\n",
         ["Hello!", END]],
        messages=(SYSTEM, USER, ANSWER),
    ),
    "qwen3": Family(
        "qwen3", "bytes", QWEN, END, None,
        [START, "user\nHi there", END, "\n", START, "assistant\n", ["<think>", "\n\n", "</think>", "\n\nHello!", END]],
        messages=(USER, ANSWER), plain=THOUGHTS,
    ),
    "qwen3-thought": Family(
        "qwen3", "bytes", QWEN, END, None,
        [START, "user\nHi there", END, "\n", START, "assistant\n",
         ["<think>", "\nA greeting.\n", "</think>", "\n\nHello!", END]],
        messages=(USER, Message("assistant", "<think>\nA greeting.\n</think>\n\nHello!")), plain=THOUGHTS,
    ),
    "llama-2": Family(
        "llama2", "legacy", LLAMA_2, "</s>", "<s>",
        ["<s>", "▁[INST]▁Hi▁there▁[/INST]", ["▁Hello!▁", "</s>"], "<s>", "▁[INST]▁Bye▁[/INST]", ["▁See▁you.▁", "</s>"]],
    ),
    "llama-2-system": Family(
        "llama2", "legacy", LLAMA_2, "</s>", "<s>",
        ["<s>", "▁[INST]▁<<SYS>>\nBe▁kind.\n<</SYS>>\n\nHi▁there▁[/INST]", ["▁Hello!▁", "</s>"]],
        messages=(SYSTEM, USER, ANSWER),
    ),
    "llama-3": Family(
        "llama3", "bytes", LLAMA_3, TURN, "<|begin_of_text|>",
        ["<|begin_of_text|>", HEAD, "user", TAIL, "\n\nHi there", TURN, HEAD, "assistant", TAIL, "\n\n",
         ["Hello!", TURN], HEAD, "user", TAIL, "\n\nBye", TURN, HEAD, "assistant", TAIL, "\n\n", ["See you.", TURN]],
    ),
    # The base model's EOS is <|end_of_text|>.
    "llama-3.2": Family(
        "llama3.2", "bytes", LLAMA_3, "<|end_of_text|>", "<|begin_of_text|>",
        ["<|begin_of_text|>", HEAD, "system", TAIL,
         "\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.", TURN,
         HEAD, "user", TAIL, "\n\nHi there", TURN, HEAD, "assistant", TAIL, "\n\n", ["Hello!", TURN]],
        messages=(SYSTEM, USER, ANSWER),
    ),
    "mistral-0.2": Family(
        "mistral-0.2", "legacy", LLAMA_2, "</s>", "<s>",
        ["<s>", "▁[INST]▁Hi▁there▁[/INST]", ["Hello!", "</s>"], "▁[INST]▁Bye▁[/INST]", ["See▁you.", "</s>"]],
    ),
    "mistral-0.3": Family(
        "mistral-0.3", "first", (*LLAMA_2, "[INST]", "[/INST]"), "</s>", "<s>",
        ["<s>", "[INST]", "▁Hi▁there", "[/INST]", ["▁Hello!", "</s>"],
         "[INST]", "▁Bye", "[/INST]", ["▁See▁you.", "</s>"]],
    ),
    "gemma": Family(
        "gemma", "bare", ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>",
        ["<bos>", "<start_of_turn>", "user\nHi▁there", "<end_of_turn>", "\n",
         "<start_of_turn>", "model\n", ["Hello!", "<end_of_turn>"], "\n",
         "<start_of_turn>", "user\nBye", "<end_of_turn>", "\n", "<start_of_turn>", "model\n",
         ["See▁you.", "<end_of_turn>"]],
        plain=frozenset({"<start_of_turn>", "<end_of_turn>"}),
    ),
    "phi-3": Family(
        "phi3", "legacy", ("<unk>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>", None,
        ["<|user|>", "▁Hi▁there", "<|end|>", "<|assistant|>", ["▁Hello!", "<|end|>"],
         "<|user|>", "▁Bye", "<|end|>", "<|assistant|>", ["▁See▁you.", "<|end|>"]],
        strips=True,
    ),
    "phi-4": Family(
        "phi4", "bytes", (START, "<|im_sep|>", END, "<|endoftext|>"), "<|endoftext|>", None,
        [START, "system", "<|im_sep|>", "Be kind.", END, START, "user", "<|im_sep|>", "Hi there", END,
         START, "assistant", "<|im_sep|>", ["Hello!", END]],
        messages=(SYSTEM, USER, ANSWER),
    ),
    "zephyr": Family(
        "zephyr", "legacy", LLAMA_2, "</s>", "<s>",
        ["▁<|user|>\nHi▁there", "</s>", "▁\n<|assistant|>\n", ["Hello!", "</s>"],
         "▁\n<|user|>\nBye", "</s>", "▁\n<|assistant|>\n", ["See▁you.", "</s>"]],
    ),
    "smollm-2": Family(
        "smollm2", "bytes", QWEN[:3], END, None,
        [START, "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face", END, "\n",
         START, "user\nHi there", END, "\n", START, "assistant\n", ["Hello!", END], "\n",
         START, "user\nBye", END, "\n", START, "assistant\n", ["See you.", END]],
    ),
    "smollm-3": Family(
        "smollm3", "bytes", QWEN[:3], END, None,
        [START, "user\nHi there", END, "\n", START, "assistant\n", ["Hello!", END], "\n",
         START, "user\nBye", END, "\n", START, "assistant\n", ["See you.", END]],
    ),
    "deepseek-v2": Family(
        "deepseek-v2", "bytes", DEEPSEEK[:2], DEEPSEEK[1], DEEPSEEK[0],
        [DEEPSEEK[0], "User: Hi there\n\nAssistant:", [" Hello!", DEEPSEEK[1]],
         "User: Bye\n\nAssistant:", [" See you.", DEEPSEEK[1]]],
    ),
    "deepseek-v3": Family(
        "deepseek-v3", "bytes", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0],
        [DEEPSEEK[0], "<｜User｜>", "Hi there", "<｜Assistant｜>", ["Hello!", DEEPSEEK[1]],
         "<｜User｜>", "Bye", "<｜Assistant｜>", ["See you.", DEEPSEEK[1]]],
        plain=frozenset(DEEPSEEK[2:]),
    ),
    # GPT-2 and OPT have no template: the form of Dahoas/rm-static, closed by EOS.
    "gpt-2": Family(
        "", "bytes", ("<|endoftext|>",), "<|endoftext|>", None,
        ["\n\nHuman: Hi there\n\nAssistant:", [" Hello!", "<|endoftext|>"],
         "\n\nHuman: Bye\n\nAssistant:", [" See you.", "<|endoftext|>"]],
    ),
    "opt": Family(
        "", "bytes", ("<s>", "<pad>", "</s>", "<unk>"), "</s>", "</s>",
        ["</s>", "\n\nHuman: Hi there\n\nAssistant:", [" Hello!", "</s>"],
         "\n\nHuman: Bye\n\nAssistant:", [" See you.", "</s>"]],
    ),
}  # fmt: skip
