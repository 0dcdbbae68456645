"""Turn chat messages into token ids by the tokenizer's own chat template.

Only the template makes control tokens: what somebody typed stays text, also where it looks like a
control token. A prompt's ids are what `apply_chat_template` asks with, and an answer's ids follow
them. Its last token is the one that closes the turn. What the template writes behind that token
(mostly a line break) is part of the next turn.

A template is a program. What it writes of a dialogue's first turns is compared with what it writes
of the whole, and a template that writes them otherwise is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.nodes import Call, Compare, Const, Getattr, Test
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jobs.errors import ToolkitError
from jobs.spec import Data
from rlhf_train.data.encoder import BareTokenizer, behind

HUMAN = "Human/Assistant"
VERSION = 1  # raise it when the same messages get other ids
# No characters: no text contains them. Where a run of text is cut, what a template marks as the
# assistant's with {% generation %}, and a message's content in a probe.
CUT, BEGIN, END, CONTENT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
OURS = re.compile(f"[{CUT}-{CONTENT}]")
MARKS = re.compile(f"[{BEGIN}{END}]")
NEVER = r"(?!)"
# A template may write today's date. In data it is always this one (the default of Llama 3's), so
# that a run which resumes tomorrow learns from the same tokens.
DATE = datetime(2024, 7, 26)
# A template is a program, and raises what a program raises.
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# What every template reads, or gets from its tokenizer. Not a person's to set.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
# The form of Dahoas/rm-static and Anthropic/hh-rlhf, by whether the rows are text.
HUMAN_ASSISTANT = {
    is_text: "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] -}}"
    "{%- elif message['role'] == 'user' -%}{{- '\\n\\nHuman: ' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '\\n\\nAssistant: ' + message['content'] | trim -}}"
    f"{{%- if {closes} -%}}{{{{- eos_token -}}}}{{%- endif -%}}"
    "{%- else -%}{{- raise_exception('a role is system, user or assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}"
    for is_text, closes in ((True, "loop.last"), (False, "true"))
}


class Message(NamedTuple):
    role: str  # system, user, assistant or tool
    content: str
    tool_calls: Sequence[Mapping[str, Any]] | None = None  # of an assistant, as the template wants them


class Part(NamedTuple):
    """A piece of a rendered dialogue."""

    text: str
    is_learned: bool


PLAIN = {"role": "user", "content": CONTENT}


class RewrittenTurn(ToolkitError):
    """The template writes a turn otherwise once another follows."""


class ChatTemplate:
    """A tokenizer's chat template, checked. A tokenizer without one gets Human/Assistant's.

    `source` is the template in Jinja as it is saved with a model: with `arguments` as its defaults,
    and with a generation prompt where it had none.
    """

    def __init__(self, tokenizer: Any, source: str, name: str, system: str | None, arguments: Mapping[str, Any]):
        defaults = "".join(f"{_default(*argument)}" for argument in sorted(arguments.items()))
        defaults = f"{defaults}\n" if defaults else ""  # Jinja leaves this line break out
        self.name, self.source = name, defaults + source.removeprefix(defaults)
        self._tokenizer, self._system, self._arguments = tokenizer, system, dict(arguments)
        self._names = dict(tokenizer.special_tokens_map)
        self._encode = BareTokenizer(tokenizer)
        self._compile()
        self._check_arguments(source.removeprefix(defaults))
        self._typed = self._answered = _Typed([])  # until it is known what they are
        self._probe()

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        system: Literal["merge", "drop"] | None = None,
        arguments: Mapping[str, Any] = {},
    ) -> ChatTemplate:
        """Take the tokenizer's template and look at what it writes.

        system: what becomes of a system turn where the template refuses one: it is put in front of
        the first user turn (`merge`), or left out (`drop`). arguments: what else the template
        reads, e.g. {"enable_thinking": False}.
        Raises ToolkitError: the template cannot be read, refuses a plain question, or does not
        read an argument.
        """
        source = own_template(tokenizer) or human_assistant(tokenizer, is_text=False)
        name = HUMAN if is_human_assistant(source) else f"the chat template of {_model(tokenizer)}"
        return cls(tokenizer, source, name, system, arguments)

    @classmethod
    def human(cls, tokenizer: Any) -> ChatTemplate:
        """Return Human/Assistant's, as rows of text have it, whatever the tokenizer brings."""
        return cls(tokenizer, human_assistant(tokenizer, is_text=True), HUMAN, None, {})

    # --- what messages become ---

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to and with the generation prompt, as `apply_chat_template` makes them.

        Raises ToolkitError: the template refuses the messages.
        """
        return self.prompts([messages])[0]

    def answer(self, prompt_messages: Sequence[Message], answer: Message) -> list[int]:
        """Return the ids behind `prompt()`; the last is the token that closes the turn.

        Raises ToolkitError: the template refuses the messages, does not close the turn, or writes
        the prompt otherwise once an answer follows.
        """
        return self.answers([(prompt_messages, answer)])[0]

    def dialogue(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids up to the end of the last answer, and which are learned.

        Those of assistant turns are, with the token that closes each: by the template's own
        {% generation %}, else what follows each prompt. Where the template writes an earlier turn
        otherwise than it was asked for (Qwen3's leaves out what was thought), the last answer alone
        is learned, behind its own prompt: see `keeps_turns`.
        Raises ToolkitError: as `answer`.
        """
        return self.dialogues([messages])[0]

    def prompts(self, rows: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Do what `prompt` does for many rows."""
        parts = [[Part(self._render(messages, asks=True), False)] for messages in rows]
        return [list(chain.from_iterable(ids)) for ids in self._ids(parts)]

    def answers(self, rows: Sequence[tuple[Sequence[Message], Message]]) -> list[list[int]]:
        """Do what `answer` does for many rows."""
        return [ids[-1] for ids in self._ids([self._parts_of_answer(*row) for row in rows])]

    def dialogues(self, rows: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Do what `dialogue` does for many rows."""
        parts = [self._parts_of_dialogue(messages) for messages in rows]
        found = []
        for row, ids in zip(parts, self._ids(parts), strict=True):
            learned = [part.is_learned for part, piece in zip(row, ids, strict=True) for _ in piece]
            found.append((list(chain.from_iterable(ids)), learned))
        return found

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the one that closes a turn, and the tokenizer's EOS."""
        closing = self._tokenizer.convert_tokens_to_ids([self._closing] if self._closing else [])
        return tuple(dict.fromkeys(id_ for id_ in [*closing, self._tokenizer.eos_token_id] if id_ is not None))

    @cached_property
    def fingerprint(self) -> str:
        """Same fingerprint and same tokenizer: the same messages get the same ids."""
        content = [VERSION, self.source, self._system, self._names]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def keeps_turns(self) -> bool:
        """Whether a dialogue of plain turns is one sequence in which each answer is learned.

        Raises ToolkitError: as `answer`.
        """
        talk = [Message(role, "a") for role in ("user", "assistant")] * 2
        return sum(part.is_learned for part in self._parts_of_dialogue(talk)) == 2

    # --- rendering ---

    def _parts_of_answer(self, prompt: Sequence[Message], answer: Message) -> list[Part]:
        before = self._render(prompt, asks=True)
        whole = self._render([*prompt, answer])
        start = before
        if not whole.startswith(before):
            # Mistral 0.3's puts a system text into the last turn if that is the user's. Behind the
            # prompt that is asked with, an answer stands as behind a plain one.
            start, plain = self._asked_plainly, self._rendered([PLAIN, self._mapping(answer)])
            if not (plain.startswith(start) and before.endswith(start.rpartition(CONTENT)[2])):
                raise self._rewrites(before, whole)
            whole = plain
        return [Part(before, False), Part(whole[len(start) : self._end(whole, len(start))], True)]

    def _parts_of_dialogue(self, messages: Sequence[Message]) -> list[Part]:
        if self._marking is not None:
            return self._parts_by_marks(messages, self._marking)
        try:
            return self._parts_by_prompts(messages)
        except RewrittenTurn:
            last = max(i for i, message in enumerate(messages) if message.role == "assistant")
            return self._parts_of_answer(messages[:last], messages[last])

    def _parts_by_prompts(self, messages: Sequence[Message]) -> list[Part]:
        """Cut a dialogue where each prompt ends, and where its answer ends."""
        whole = self._render(messages)
        parts, place = list[Part](), 0
        for turn in (i for i, message in enumerate(messages) if message.role == "assistant"):
            before, answer = self._parts_of_answer(messages[:turn], messages[turn])
            asked = before.text + answer.text
            if not whole.startswith(asked) or len(before.text) < place:
                raise self._rewrites(asked, whole)
            parts += [Part(before.text[place:], False), answer]
            place = len(asked)
        return parts

    def _parts_by_marks(self, messages: Sequence[Message], program: jinja2.Template) -> list[Part]:
        """Cut a dialogue where {% generation %} begins, and where its answer ends."""
        marked = self._render(messages, program=program)
        whole = MARKS.sub("", marked)
        places = [mark.start() - number for number, mark in enumerate(MARKS.finditer(marked))]
        spans = list(zip(places[::2], places[1::2], strict=False))
        if len(spans) < sum(message.role == "assistant" for message in messages):
            raise ToolkitError(
                f"{self.name} marks fewer turns than the assistant has",
                why=f"its {{% generation %}} marks {len(spans)} in {_short(whole)}",
                hint="mark each turn of the assistant in the template, or none",
            )
        parts, place = list[Part](), 0
        for begin, end in spans:
            if whole.startswith(self._asking, begin):  # a prompt brings it
                begin += len(self._asking)
            closed = self._end(whole, begin)
            if closed > end and whole[end:closed].removesuffix(self._closing or "").strip():
                closed = end  # one of several marks in a turn
            parts += [Part(whole[place:begin], False), Part(whole[begin:closed], True)]
            place = closed
        return parts

    def _end(self, whole: str, begin: int) -> int:
        """Return where the answer that begins there ends: behind the token that closes it."""
        if self._closing is None:
            raise ToolkitError(
                f"{self.name} closes an answer with no token",
                why="a model that learns from it would not learn where an answer ends",
                hint="give the tokenizer a template that ends an assistant's turn with EOS or a token of its own",
            )
        end = whole.find(self._closing, begin)
        if end >= 0:
            return end + len(self._closing)
        raise ToolkitError(
            f"{self.name} does not close this answer with {self._closing}", why=f"it writes {_short(whole[begin:])}"
        )

    def _rewrites(self, asked: str, whole: str) -> RewrittenTurn:
        same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(whole))
        return RewrittenTurn(
            f"{self.name} writes a turn otherwise once another follows",
            why=f"behind {_short(asked[:same][-30:])} stands {_short(asked[same:])}, later {_short(whole[same:])}",
            hint="an answer would be learned behind a prompt that nobody asks with; "
            "give the tokenizer a template whose turns stay as they are",
        )

    def _render(
        self, messages: Sequence[Message], *, asks: bool = False, program: jinja2.Template | None = None
    ) -> str:
        """Return the template's text, with CUT inside of typed control tokens.

        asks: with the generation prompt.
        """
        taken = self._taken(messages)
        try:
            return self._rendered([self._mapping(message) for message in taken], asks, program)
        except ToolkitError as error:
            roles = ", ".join(message.role for message in taken)
            first = next((message.content for message in taken if message.role != "system"), "")
            raise ToolkitError(
                error.what,
                why=f"{error.why}\nthe turns are {roles}; the first says {_short(first)}",
                hint="leave these messages out of the data, or take a model whose template has turns like these",
            ) from None

    def _rendered(
        self, messages: list[dict[str, Any]], asks: bool = False, program: jinja2.Template | None = None
    ) -> str:
        try:
            return (program or self._program).render(self._names, messages=messages, add_generation_prompt=asks)
        except TEMPLATE_ERRORS as error:
            raise ToolkitError(f"{self.name} refuses these messages", why=str(error)) from None

    def _taken(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Do with a system turn what `system` says, where the template refuses one."""
        if self.takes_system or not messages or messages[0].role != "system":
            return messages
        system, *others = messages
        if self._system == "drop":
            return others
        if self._system == "merge" and others and others[0].role == "user":
            return [others[0]._replace(content=f"{system.content}\n\n{others[0].content}"), *others[1:]]
        raise ToolkitError(
            f"{self.name} refuses a system turn",
            why=self._why_no_system,
            hint="data.system=merge puts it in front of the first user turn, data.system=drop leaves it out",
        )

    def _mapping(self, message: Message) -> dict[str, Any]:
        typed = self._answered if message.role == "assistant" else self._typed
        calls = {} if message.tool_calls is None else {"tool_calls": typed.as_text(message.tool_calls)}
        return {"role": message.role, "content": typed.as_text(message.content), **calls}

    # --- ids ---

    def _ids(self, rows: Sequence[Sequence[Part]]) -> list[list[list[int]]]:
        """Encode each part of each row, as it stands behind the parts before it.

        A part that a token of the whole text would cross begins with a token of its own.
        """
        plain = {
            i: [part.text for part in row] for i, row in enumerate(rows) if not any(CUT in part.text for part in row)
        }
        found = dict[int, list[list[int]]]()
        # 1. Most tokenizers make of each part by itself what they make of it in the whole. To see
        # so costs less than to encode each beginning, where these are many.
        long = {i: texts for i, texts in plain.items() if len(texts) > 2}
        known = self._encoded(chain.from_iterable([*texts, "".join(texts)] for texts in long.values()))
        for i, texts in long.items():
            ids = [known[text] for text in texts]
            if list(chain.from_iterable(ids)) == known["".join(texts)]:
                found[i] = ids
        # 2. Else a part is what a longer beginning has more than a shorter one.
        beginnings = {i: [*accumulate(texts)] for i, texts in plain.items() if i not in found}
        known = self._encoded(chain.from_iterable(beginnings.values()))
        for i, longer in beginnings.items():
            steps = _steps([known[text] for text in longer])
            if steps is not None:
                found[i] = steps
        # 3. Where a token crosses a border or text was cut, one part after the other.
        result = []
        for i, row in enumerate(rows):
            pieces = [part.text.split(CUT) for part in row]
            ids = found[i] if i in found else self._ids_in_context(pieces)
            self._check(pieces, ids)
            result.append(ids)
        return result

    def _encoded(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Encode each text once."""
        each = list(dict.fromkeys(texts))
        return dict(zip(each, self._encode(each), strict=True))

    def _ids_in_context(self, row: Sequence[Sequence[str]]) -> list[list[int]]:
        """Encode the parts of one row, each cut into pieces inside of typed control tokens."""
        result: list[list[int]] = []
        text, ids, is_cut = "", list[int](), False  # text and ids since the last cut
        for part in row:
            made: list[int] = []
            for number, piece in enumerate(part):
                if number:
                    text, ids, is_cut = "", [], True
                if is_cut and not text:
                    [new] = behind([piece], self._encode)
                else:
                    [both] = self._encode([text + piece])
                    new = both[len(ids) :] if both[: len(ids)] == ids else behind([piece], self._encode)[0]
                made += new
                ids, text = ids + new, text + piece
            result.append(made)
        return result

    def _check(self, row: Sequence[Sequence[str]], ids: Sequence[Sequence[int]]) -> None:
        """Raise ToolkitError if the ids have more control tokens than the template wrote."""
        unknown = self._tokenizer.unk_token  # other text may become that, too
        written = sum(token != unknown for part in row for piece in part for token in self._typed.found(piece))
        made = sum(map(self._control_ids.__contains__, chain.from_iterable(ids)))
        if made != written:
            text = "".join(chain.from_iterable(row))
            raise ToolkitError(
                "the tokenizer makes control tokens of plain text",
                why=f"{made} control tokens, not {written}, in {_short(text)}",
                hint="take that text out of the data set",
            )

    # --- what the template is ---

    def _compile(self) -> None:
        plain, marking = _environment(), _environment(marks=True)
        try:
            self._program = plain.from_string(self.source)
            has_marks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.source)
            self._marking = marking.from_string(self.source) if has_marks else None
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", "?")
            raise ToolkitError(f"{self.name} cannot be read", why=f"line {line}: {error}") from None

    def _check_arguments(self, source: str) -> None:
        environment = _environment()
        tree = environment.parse(source)
        names = [*tree.find_all(jinja2.nodes.Name)]
        tested = {test.node.name for test in tree.find_all(Test) if isinstance(test.node, jinja2.nodes.Name)}
        own = {name.name for name in names if name.ctx == "store"} - tested
        read = jinja2.meta.find_undeclared_variables(tree)
        may = read - own - GIVEN - {*self._names} - {*environment.globals}
        if unknown := sorted(set(self._arguments) - may):
            raise ToolkitError(
                f"{self.name} reads no {', '.join(f'`{name}`' for name in unknown)}",
                why=f"it reads {', '.join(sorted(may)) or 'no arguments'}",
                hint="change data.chat_template_kwargs",
            )

    def _probe(self) -> None:
        """Find out what the template does, by what it writes of a few messages."""
        asked = self._rendered([PLAIN])
        turns = [PLAIN, {"role": "assistant", "content": CONTENT}]
        before, _, behind = self._rendered(turns).rpartition(CONTENT)
        header = before.removeprefix(asked)
        is_asking = self._rendered(turns[:1], asks=True) != asked
        if not is_asking and header.strip() and before.startswith(asked):
            # It ignores add_generation_prompt, so that a model would be asked to write the header.
            prompt = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(header)} }}}}{{% endif %}}"
            self.source = self.source.removesuffix("\n") + prompt
            self._compile()
        self._asked_plainly = self._rendered(turns[:1], asks=True)
        self._asking = self._asked_plainly.removeprefix(asked)

        # Special tokens, and others by which the template tells what is whose. A thought or a call
        # of a tool is tokens in an answer.
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip()]
        special = {token.content for token in added if token.special} | {self._tokenizer.eos_token} - {None}
        others = {token.content for token in added} - special
        written = "".join([before, behind, self._asked_plainly])
        self._typed = _Typed(special | {token for token in others if token in self.source})
        self._answered = _Typed(special | {token for token in others if token in written} - _looked_for(self.source))
        self._closing = next(iter(self._typed.found(behind)), None)
        ids = self._tokenizer.convert_tokens_to_ids(sorted(self._typed.tokens))
        self._control_ids = frozenset(ids) - {self._tokenizer.unk_token_id}

        system, user = ({"role": role, "content": CONTENT + role} for role in ("system", "user"))
        try:
            self.takes_system = CONTENT + "system" in self._rendered([system, user])
            self._why_no_system = "the template leaves its text out"
        except ToolkitError as error:
            self.takes_system, self._why_no_system = False, error.why


class _Typed:
    """What must stay text where somebody typed it."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(tokens)
        longest_first = sorted(self.tokens, key=lambda token: (-len(token), token))
        inside = (f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in longest_first if len(token) > 1)
        self._whole = re.compile("|".join(map(re.escape, longest_first)) or NEVER)
        self._inside = re.compile("|".join(inside) or NEVER)

    def found(self, text: str) -> list[str]:
        return self._whole.findall(text)

    def as_text(self, value: Any) -> Any:
        """Cut whatever looks like a control token behind its first character."""
        if isinstance(value, str):
            value = OURS.sub("", value)
            return self._inside.sub(CUT, value) if self._whole.search(value) else value
        if isinstance(value, Mapping):
            return {self.as_text(key): self.as_text(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.as_text(item) for item in value]
        return value


def _looked_for(source: str) -> set[str]:
    """Return the texts that a template looks for in messages, e.g. `</think>` to cut there."""
    tree = _environment().parse(source)
    found = [compare.expr for compare in tree.find_all(Compare) if compare.ops[0].op in {"in", "notin"}]
    found += [arg for call in tree.find_all(Call) if isinstance(call.node, Getattr) for arg in call.args]
    return {node.value for node in found if isinstance(node, Const) and isinstance(node.value, str)}


def own_template(tokenizer: Any) -> str | None:
    """Return the chat template that a tokenizer brings; of several, the default."""
    found = getattr(tokenizer, "chat_template", None)
    return (found.get("default") if isinstance(found, dict) else found) or None


def human_assistant(tokenizer: Any, *, is_text: bool) -> str:
    """Return Human/Assistant in Jinja, for a tokenizer without a template.

    It begins with the special tokens that the tokenizer puts before a text. EOS closes each answer.
    is_text: the last alone, as in rows of text, whose prompts hold earlier answers as they are.
    """
    front = BareTokenizer(tokenizer).front
    names = ("bos_token" if id_ == tokenizer.bos_token_id else json.dumps(tokenizer.decode([id_])) for id_ in front)
    return "".join(f"{{{{- {name} -}}}}" for name in names) + HUMAN_ASSISTANT[is_text]


def is_human_assistant(source: str) -> bool:
    return source.endswith((HUMAN_ASSISTANT[True], HUMAN_ASSISTANT[False]))


def saved_template(tokenizer: Any, data: Data) -> Any:
    """Return the chat template that a model is saved with, as its tokenizer holds it.

    It asks in the form that the model was trained on: without a template of its own, in that of
    rows of text. (Messages give the tokenizer theirs before training.)
    """
    own = getattr(tokenizer, "chat_template", None)
    if own_template(tokenizer) is None:
        return human_assistant(tokenizer, is_text=True)
    try:
        source = ChatTemplate.of(tokenizer, system=data.system, arguments=data.chat_template_kwargs).source
    except ToolkitError:  # nobody was asked by it: the rows are text
        return own
    return {**own, "default": source} if isinstance(own, dict) else source


def stop_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the tokens that end an answer, in order of their ids.

    They are what closes a turn in the tokenizer's chat template, its EOS, and what the generation
    config of the model names (None: it has none).
    """
    named = getattr(generation_config, "eos_token_id", None)
    others = named if isinstance(named, list) else [named]
    try:
        own = ChatTemplate.of(tokenizer).stop_ids
    except ToolkitError:  # nobody can ask by it
        own = (tokenizer.eos_token_id,)
    return tuple(sorted({id_ for id_ in (*own, *others) if id_ is not None}))


def _steps(longer: Sequence[list[int]]) -> list[list[int]] | None:
    """Return what each list has more than the one before; None if one does not begin with it."""
    before = [[], *longer]
    if any(ids[: len(start)] != start for start, ids in zip(before, longer, strict=False)):
        return None
    return [ids[len(start) :] for start, ids in zip(before, longer, strict=False)]


def _default(name: str, value: Any) -> str:
    """Return Jinja that sets a variable which nobody has set."""
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """Write a value of a job file as Jinja reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _environment(*, marks: bool = False) -> ImmutableSandboxedEnvironment:
    """Return Jinja as transformers sets it up for chat templates.

    marks: what stands in {% generation %} is put between BEGIN and END.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.extend(marks=(BEGIN, END) if marks else ("", ""))
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = DATE.strftime
    environment.filters["tojson"] = tojson
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what a template marks as the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        begin, end = getattr(self.environment, "marks")  # noqa: B009  # mypy knows no extended fields
        return f"{begin}{caller()}{end}"


def _model(tokenizer: Any) -> str:
    return f"`{tokenizer.name_or_path}`" if getattr(tokenizer, "name_or_path", "") else "the tokenizer"


def _short(text: str) -> str:
    text = text.replace(CUT, "")
    return json.dumps(text if len(text) <= 60 else f"{text[:60]}...", ensure_ascii=False)
