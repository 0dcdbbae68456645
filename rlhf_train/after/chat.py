"""`rlhf-train chat` talks to a run's model, a model's folder, or a model of the hub."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import ExitCode, ToolkitError

if TYPE_CHECKING:  # torch and transformers take seconds: --help does not need them
    from rlhf_train.after.chat_model import ChatModel, Wishes
    from rlhf_train.after.judge import Judge
    from rlhf_train.after.screen import Screen
    from rlhf_train.after.session import Models, Session
    from rlhf_train.after.sources import Source

PROMPT = "you> "
EXAMPLES = """examples:
  rlhf-train chat                                  the newest model of your runs
  rlhf-train chat gpu-box/demo                     a run that `fab fetch` has brought
  rlhf-train chat demo --compare step1,step3       two models' answers, with their rewards
  rlhf-train chat runs/demo/step3/model --temperature 0
  rlhf-train chat demo --once "What colour is snow?"
  echo "What colour is snow?" | rlhf-train chat demo"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "rlhf-train chat",
        description="Talk to a model. In the chat, /help lists the commands.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "model", nargs="?", metavar="RUN|MODEL", help="a run, a model's folder, or a model of the hub (default: newest)"
    )
    p.add_argument("--compare", metavar="A,B", help="let two models answer, e.g. step1,step3 of the run")
    p.add_argument("--once", metavar="TEXT", help="answer this and end; only the answer is on standard output")
    p.add_argument("--system", metavar="TEXT", default="", help="what the model shall be")
    p.add_argument("--temperature", type=at_least_zero, metavar="T", help="0: always the likeliest token")
    p.add_argument("--top-k", type=_whole, metavar="K", help="sample from the K likeliest tokens; 0: from all")
    p.add_argument("--top-p", type=_share, metavar="P", help="sample from the likeliest tokens with the sum P")
    p.add_argument("--max-tokens", type=_positive, metavar="N", help="of an answer")
    p.add_argument("--seed", type=_whole, metavar="N", help="for the same answers again")
    p.add_argument(
        "--template", choices=("auto", "own", "human"), default="auto",
        help="the tokenizer's own, or Human/Assistant (default: its own where it has one)",
    )  # fmt: skip
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="where run folders are kept (default: runs)")
    return p


def at_least_zero(text: str) -> float:
    if not 0 <= _number(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"`{text}` is no number from 0 on")
    return float(text)


def _share(text: str) -> float:
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no number above 0 and up to 1")
    return float(text)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number from 1 on")
    return int(text)


def _number(text: str) -> float:
    """Return NaN for what is no number: it lies in no range."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def chat(argv: Sequence[str], default_runs: Path) -> int:
    """Talk, or answer once. Raises ToolkitError; KeyboardInterrupt while models are loaded."""
    args = parser().parse_args(argv)
    is_talk = args.once is None and sys.stdin.isatty()
    if is_talk and not sys.stdout.isatty():
        raise ToolkitError("a talk needs a terminal", hint='--once "TEXT" for one answer, or a pipe: echo hi | ...')
    text = args.once if args.once is not None or is_talk else sys.stdin.read()
    if not is_talk and not text.strip():
        raise ToolkitError("there is no question", why="the text is empty", hint='--once "What colour is snow?"')
    try:
        return _chat(args, default_runs, text)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK


def _chat(args: argparse.Namespace, default_runs: Path, text: str | None) -> int:
    from rlhf_train.after.sources import find_source, find_sources, names_a_step

    # 1. Which models? Mistakes are said before anything is loaded.
    runs = args.output_dir or default_runs
    is_run_needed = args.model is not None or not args.compare or names_a_step(args.compare)
    base = find_source(args.model, runs) if is_run_needed else None
    sources = find_sources(args.compare, base, runs) if args.compare else [base] if base else []

    # 2. Load them.
    if sys.stderr.isatty():
        print("loading ...", end="\r", file=sys.stderr, flush=True)
    from rlhf_train.after.chat_model import Wishes
    from rlhf_train.after.screen import Screen
    from rlhf_train.after.session import Interrupt, Session, hello

    screen = Screen(sys.stdout, sys.stderr)
    wishes = Wishes(args.temperature, args.top_k, args.top_p, args.max_tokens, args.template, args.seed)
    loader = Loader([runs, default_runs], wishes, screen)
    models = loader.load(sources)
    if sys.stderr.isatty():
        print(" " * len("loading ..."), end="\r", file=sys.stderr, flush=True)

    home = base or sources[0]

    def compare(words: str | None) -> Models:
        chosen = [home] if words is None else find_sources(words, home, runs)
        if missing := loader.missing(chosen):
            screen.note(f"loading {' and '.join(source.title for source in missing)} ...")
        return loader.load(chosen)

    session = Session(models, screen, compare, interrupt=Interrupt(), runs=runs)
    session.set_system(args.system)

    # 3. Answer.
    if text is not None:
        return ExitCode.OK if session.ask(text.strip("\n")) else ExitCode.INTERRUPTED
    screen.note(hello(models[0], str(models[0][0].device)))
    screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends\n")
    return _talk(session, screen, _reader(is_dumb=screen.is_dumb))


class Loader:
    """Loads models to talk to. Those of the last call are taken as they are, not loaded again."""

    def __init__(self, runs: Sequence[Path], wishes: Wishes, screen: Screen) -> None:
        """runs: where runs of this machine may be that train."""
        self._runs, self._wishes, self._screen = runs, wishes, screen
        self._models: dict[str, ChatModel] = {}
        self._judges: dict[tuple[Path, str], Judge] = {}

    def missing(self, sources: Sequence[Source]) -> list[Source]:
        return list({source.model: source for source in sources if source.model not in self._models}.values())

    def load(self, sources: Sequence[Source]) -> Models:
        """Return the models, and for two of them the reward model of the first one's run.

        If it fails or is interrupted, those of the last call are still held.
        """
        from transformers.utils import logging

        from rlhf_train.after.chat_model import ChatModel
        from rlhf_train.after.judge import Judge, reward_model_of
        from rlhf_train.after.room import find_room

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        run = next((source.run for source in sources if source.run is not None), None)
        judge_source = reward_model_of(run) if len(sources) > 1 else None
        judge_key = (run.path, judge_source) if run is not None and judge_source is not None else None
        missing = self.missing(sources)
        models, judges = dict(self._models), dict(self._judges)
        needed = [source.model for source in missing]
        if judge_key and judge_key not in judges:
            needed.append(judge_key[1])
        if needed:
            folders = [source.run.path.absolute().parent for source in sources if source.run is not None]
            room = find_room(needed, [*self._runs, *folders])
            models |= {source.model: ChatModel.load(source, room, self._wishes) for source in missing}
            if run is not None and judge_key and judge_key not in judges:
                judges[judge_key] = Judge.load(run, judge_key[1], room)
            if room.note:
                self._screen.note(f"note: {room.note}")
        self._say_not_applied([models[source.model] for source in missing])
        self._models = {source.model: models[source.model] for source in sources}
        self._judges = {key: judge for key, judge in judges.items() if key == judge_key}
        return [models[source.model] for source in sources], judges[judge_key] if judge_key else None

    def _say_not_applied(self, models: Sequence[ChatModel]) -> None:
        from rlhf_train.after.chat_model import not_applied

        for model in models:
            if left_out := not_applied(model.model.generation_config):
                self._screen.note(f"warning: {model.source.title}: not applied here: {', '.join(left_out)}")


def _reader(*, is_dumb: bool) -> Callable[[], str]:
    """Return the function that reads a line of the terminal.

    It raises KeyboardInterrupt at Ctrl-C and EOFError at Ctrl-D.
    """
    if is_dumb:  # prompt_toolkit writes escape sequences there, too
        return _read_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    output = create_output()
    # Else it asks the terminal for its cursor, and warns where none answers.
    output.enable_cpr = False  # type: ignore[attr-defined]
    prompts: PromptSession[str] = PromptSession(history=InMemoryHistory(), output=output, reserve_space_for_menu=0)
    return lambda: prompts.prompt(PROMPT)


def _read_line() -> str:
    try:
        return input(PROMPT)
    except (KeyboardInterrupt, EOFError):
        print()
        raise


def _talk(session: Session, screen: Screen, read: Callable[[], str]) -> int:
    while True:
        try:
            text = read()
        except KeyboardInterrupt:  # at the prompt: it empties the line
            continue
        except EOFError:
            return ExitCode.OK
        session.line(text)
        screen.line()
