"""What people type, put into the form that Invoke parses, or answered with the call that was meant.

Invoke itself answers `fab train gpu-box` with "No idea what 'gpu-box' is!".
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invoke import Collection, Exit

from jobs.errors import ExitCode, ToolkitError
from remote.output import Sayer

SHORT = {"logs": {"-f": "--follow", "-n": "--tail"}}  # as `tail` and other tools have them
STEPS = re.compile(r"[1-3](,[1-3])*,?")


@dataclass(frozen=True)
class Flags:
    """The flags of one verb: whether each takes a value. `positional`: words that need no flag."""

    takes_value: Mapping[str, bool]
    positional: int = 0


def mended(words: Sequence[str], verbs: Mapping[str, Flags], core: Mapping[str, bool]) -> list[str]:
    """Return the words with each box behind its `--host`, and steps with commas.

    verbs: all of them. core: Fabric's own flags, which may stand anywhere. Raises ToolkitError: no
    such verb or flag, or a word that belongs to none.
    """
    rest, before = list(words), list[str]()  # before the first verb: the box, as `--host NAME` or alone
    while rest and rest[0] not in verbs:
        word = rest.pop(0)
        if word.startswith("--host="):
            before = ["--host", word.partition("=")[2]]
        elif word == "--host" and rest:
            before = ["--host", rest.pop(0)]
        elif word.startswith("-"):
            return list(words)  # Invoke knows what to say
        elif rest and rest[0] in verbs and not before:
            before = ["--host", word]
        else:
            raise _no_verb(word, verbs)
    if not rest:
        hint = f"e.g. fab ps {shlex.join(before)}; fab --list shows the verbs"
        raise ToolkitError("which verb?", hint=hint)
    mended_words: list[str] = []
    while rest:
        verb = rest.pop(0)
        mended_words += [verb, *_of_verb(verb, verbs, core, before, rest)]
        before = []
    return mended_words


def _of_verb(
    verb: str, verbs: Mapping[str, Flags], core: Mapping[str, bool], before: list[str], rest: list[str]
) -> list[str]:
    """Take the words of one verb from `rest`, which then begins with the next verb."""
    known, found, positional = verbs[verb], list(before), verbs[verb].positional
    while rest and not (rest[0] in verbs and not positional):
        word = rest.pop(0)
        flag, _, value = word.partition("=")
        flag = SHORT.get(verb, {}).get(flag, flag)
        takes_value = known.takes_value.get(flag.replace("_", "-"), core.get(flag))
        if takes_value is not None:
            found.append(f"{flag}={value}" if value or word.endswith("=") else flag)
            if takes_value and "=" not in word and rest:
                found.append(rest.pop(0))
                while flag == "--step" and rest and STEPS.fullmatch(rest[0]) and STEPS.fullmatch(found[-1]):
                    found[-1] = f"{found[-1].rstrip(',')},{rest.pop(0)}"
        elif word.startswith("--"):
            raise _no_flag(verb, flag, known)
        elif word.startswith("-") and word != "-":
            found.append(word)  # Fabric's short flags may be joined to their values
        elif positional:
            positional -= 1
            found.append(word)
        elif "--host" in known.takes_value and not {"--host", "-H", "--hosts"} & {
            each.partition("=")[0] for each in found
        }:
            found += ["--host", word]
        else:
            raise ToolkitError(
                f"`fab {verb}` does not know what `{word}` is",
                hint=f"each value follows its flag; `fab --help {verb}` lists them",
            )
    return found


def _no_verb(word: str, verbs: Mapping[str, Flags]) -> ToolkitError:
    near = difflib.get_close_matches(word, verbs, n=1)
    guess = f"did you mean `fab {near[0]}`? " if near else ""
    return ToolkitError(f"there is no verb `{word}`", hint=f"{guess}the verbs are {', '.join(verbs)}")


def _no_flag(verb: str, flag: str, known: Flags) -> ToolkitError:
    near = difflib.get_close_matches(flag, known.takes_value, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return ToolkitError(f"`fab {verb}` has no flag {flag}", hint=f"{guess}`fab --help {verb}` lists its flags")


def arguments_of(task: Any) -> list[Any]:
    """Return Invoke's arguments of a task. Its help stays: Invoke takes it out as it reads."""
    task = copy.copy(task)
    task.help = dict(task.help)
    return list(task.get_arguments())


def flags_of(arguments: Sequence[Any]) -> Flags:
    """Read the flags of a task, or of Fabric itself, from Invoke's own arguments."""
    takes_value = {
        ("--" if len(name) > 1 else "-") + name.replace("_", "-"): argument.takes_value
        for argument in arguments
        for name in argument.names
    }
    return Flags(takes_value, sum(bool(argument.positional) for argument in arguments))


def mend_call(program: Any, verbs: Collection) -> None:
    """Mend the words of this call, before Invoke parses them; it has read its own flags by now.

    Ends the call with our own words if there is a mistake.
    """
    core = getattr(program, "core", None)
    if core is None or not core.unparsed:
        return
    known = {name: flags_of(arguments_of(task)) for name, task in verbs.tasks.items()}
    try:
        core.unparsed[:] = mended(core.unparsed, known, flags_of(program.core_args()).takes_value)
    except ToolkitError as error:
        Sayer()(error)
        raise Exit(code=int(ExitCode.USAGE)) from None
