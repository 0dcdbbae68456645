"""A talk: what the lines that somebody types do, a question or a command."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import ToolkitError
from jobs.formatting import plural
from rlhf_train.after.chat_model import ChatModel, Reply
from rlhf_train.after.judge import Judge
from rlhf_train.after.screen import Screen
from rlhf_train.after.template import label

HELP = """/reset          begin a new conversation
/system TEXT    say what the model shall be; without TEXT: nothing again
/compare A,B    let two models answer: steps, runs, folders; /compare off ends it
/save [FILE]    write the conversation into a file (JSON), in chats/ of the run
/help           this list
Ctrl-C stops an answer, Ctrl-D ends the chat."""


class Interrupt:
    """Whether Ctrl-C was pressed since the answer began."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note Ctrl-C, which then stops nothing by itself; a second one ends the program."""
        self.is_asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            if self.is_asked:
                raise KeyboardInterrupt
            self.is_asked = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass
class Talk:
    """One model and what was said to it."""

    model: ChatModel
    messages: list[dict[str, str]] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)

    def ask(self, text: str, system: str) -> Reply:
        question = {"role": "user", "content": text}
        first = [{"role": "system", "content": system}] if system else []
        reply = self.model.reply([*first, *self.messages, question])
        self.messages.append(question)
        return reply

    def keep(self, reply: Reply) -> None:
        """Keep an answer, or forget the question if there is none: turns must alternate."""
        if reply.text:
            self.messages.append({"role": "assistant", "content": reply.text})
        else:
            self.messages.pop()


Models = tuple[list[ChatModel], Judge | None]


class Session:
    def __init__(
        self,
        models: Models,
        screen: Screen,
        compare: Callable[[str | None], Models],
        *,
        interrupt: Interrupt,
        runs: Path,
    ) -> None:
        """compare: loads the models of `A,B`; None: the model of the run that the session is about.

        runs: where a conversation with models of no run is saved.
        """
        self._screen, self._compare, self._interrupt, self._runs = screen, compare, interrupt, runs
        self._system = ""
        self._take(models)

    def _take(self, models: Models) -> None:
        self._talks, self._judge = [Talk(model) for model in models[0]], models[1]
        self._noted: set[str] = set()  # said once in a conversation

    def line(self, text: str) -> None:
        """Do what a line says. Errors are shown, and the session goes on."""
        word, _, rest = text.strip().partition(" ")
        commands = {
            "/reset": lambda _: self._reset(),
            "/system": self._change_system,
            "/compare": self._set_compare,
            "/save": self._save,
            "/help": lambda _: self._screen.note(HELP),
        }
        try:
            if word in commands:
                commands[word](rest.strip())
            elif word.startswith("/") and word[1:].isalpha():
                self._screen.note(f"there is no {word}; /help lists the commands")
            elif text.strip():
                self.ask(text)
        except ToolkitError as error:
            self._screen.note(error)

    # --- questions ---

    def ask(self, text: str) -> bool:
        """Let each model answer, and return whether no answer was stopped."""
        with self._interrupt.watched():
            if len(self._talks) == 2 and self._screen.has_room_for_two:
                self._ask_next_to_each_other(text)
            else:
                for talk in self._talks:
                    if self._interrupt.is_asked:
                        break
                    self._ask_one(talk, text)
        if self._interrupt.is_asked:
            self._screen.note("stopped by Ctrl-C")
        return not self._interrupt.is_asked

    def _ask_one(self, talk: Talk, text: str) -> None:
        reply = talk.ask(text, self._system)
        if len(self._talks) > 1:
            self._screen.title(talk.model.source.title)
        self._screen.begin()
        self._finish(talk, reply, self._screen.piece)
        self._screen.end()
        self._say_of(talk, reply)
        if len(self._talks) > 1:
            if reward := self._reward(talk, reply):
                self._screen.line(reward)
            else:
                self._say_why_no_reward(talk, reply)
            if talk is not self._talks[-1]:
                self._screen.line()

    def _ask_next_to_each_other(self, text: str) -> None:
        # 1. Both are asked before one answers: a question that one refuses is put to none.
        replies: list[Reply] = []
        try:
            for talk in self._talks:
                replies.append(talk.ask(text, self._system))
        except ToolkitError:
            for talk, reply in zip(self._talks, replies, strict=False):
                talk.keep(reply)
            raise

        # 2. They answer in turn.
        pieces = [iter(reply) for reply in replies]
        columns = self._screen.next_to_each_other([talk.model.source.title for talk in self._talks])
        with columns:
            while (place := columns.next_to_grow()) is not None and not self._interrupt.is_asked:
                if piece := next(pieces[place], ""):
                    columns.push(place, piece)
                else:
                    columns.finish(place)

        # 3. What became of them.
        asked = list(zip(self._talks, replies, strict=True))
        for talk, reply in asked:
            talk.keep(reply)
        rewards = [self._reward(talk, reply) for talk, reply in asked]
        if any(rewards):
            columns.row(rewards)
        for (talk, reply), reward in zip(asked, rewards, strict=True):
            self._say_of(talk, reply)
            if not reward:
                self._say_why_no_reward(talk, reply)

    def _finish(self, talk: Talk, reply: Reply, show: Callable[[str], object]) -> None:
        """Take the answer to its end, or until Ctrl-C."""
        for piece in reply:
            show(piece)
            if self._interrupt.is_asked:
                break
        talk.keep(reply)

    def _reward(self, talk: Talk, reply: Reply) -> str:
        """Score an answer; "" where no reward model reads this model's tokens."""
        value = None
        if self._judge is not None and self._judge.reads(talk.model.tokenizer):
            value = self._judge.reward(reply.prompt, reply.tokens)
        if reply.text:
            talk.rewards.append(value)
        return "" if value is None else f"reward {value:.2f}"

    def _say_why_no_reward(self, talk: Talk, reply: Reply) -> None:
        """Say, once in a conversation, why a comparison has no reward."""
        titles = [each.model.source.title for each in self._talks]
        run = next((each.model.source.run for each in self._talks if each.model.source.run), None)
        if self._judge is None:
            why = f"run `{run.name}` has no reward model" if run else "no run, and so no reward model, belongs to them"
            self._note_once(f"note: no rewards for {' and '.join(titles)}: {why}")
        elif not self._judge.reads(talk.model.tokenizer):
            self._note_once(f"note: no rewards for {talk.model.source.title}: the reward model reads other tokens")
        elif not self._judge.has_positions_for(reply.prompt, reply.tokens):
            self._note_once("note: no reward where conversation and answer outgrow the reward model's positions")

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._screen.note(text)

    def _say_of(self, talk: Talk, reply: Reply) -> None:
        """Say what an answer does not show by itself."""
        if not reply.text.strip() and not self._interrupt.is_asked:
            model = "the model" if len(self._talks) == 1 else talk.model.source.title
            self._screen.note(f"note: {model} ended its answer immediately")
        if reply.dropped:
            turns = plural(reply.dropped, "oldest turns" if reply.dropped > 1 else "oldest turn")
            self._screen.note(f"note: the {turns} no longer fit into the model and were left out")

    # --- commands ---

    def _reset(self) -> None:
        self._take(([talk.model for talk in self._talks], self._judge))
        self._screen.note("a new conversation")

    def set_system(self, text: str) -> None:
        self._system = text

    def _change_system(self, text: str) -> None:
        self.set_system(text)
        self._screen.note("the system text is set" if text else "there is no system text now")

    def _set_compare(self, words: str) -> None:
        try:
            models = self._compare(None if words == "off" else words or "step1,step3")
        except KeyboardInterrupt:
            self._screen.note("stopped by Ctrl-C: the conversation goes on as it was")
            return
        self._take(models)
        self._screen.note("a new conversation, with " + " and ".join(talk.model.source.title for talk in self._talks))

    def _save(self, name: str) -> None:
        folder = self._saves()
        path = (folder / Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser()).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                json.dump(self.record(), file, ensure_ascii=False, indent=1)
                file.write("\n")
        except OSError as error:
            raise ToolkitError(
                f"cannot write {path}", why=error.strerror or str(error), hint="/save FILE with another name"
            ) from None
        self._screen.note(f"saved in {path}")

    def _saves(self) -> Path:
        """Return the folder that a relative name belongs to.

        It is not the working directory: that of a container is gone with it.
        """
        run = next((talk.model.source.run for talk in self._talks if talk.model.source.run), None)
        return run.chats if run else self._runs

    def record(self) -> list[dict[str, object]]:
        """Return what was said, by model."""
        first = [{"role": "system", "content": self._system}] if self._system else []
        return [
            {"model": talk.model.source.model, "messages": [*first, *talk.messages]}
            | ({"rewards": talk.rewards} if len(self._talks) > 1 else {})
            for talk in self._talks
        ]


def hello(models: Sequence[ChatModel], device: str) -> str:
    """Say who answers, and how."""
    lines = [": ".join(dict.fromkeys((model.source.title, model.source.model))) for model in models]
    first = models[0]
    how = "always the likeliest token" if first.sampling.is_greedy else f"temperature {first.sampling.temperature:g}"
    limits = [f"top_k {first.sampling.top_k}"] if first.sampling.top_k and not first.sampling.is_greedy else []
    limits += [f"top_p {first.sampling.top_p:g}"] if first.sampling.top_p else []
    return "\n".join([*lines, ", ".join([f"on {device}", f"template {label(first.template)}", how, *limits])])
