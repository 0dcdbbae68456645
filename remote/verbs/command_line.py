"""What people type, put into the form that Invoke parses, or answered with the call that was meant.

Invoke itself answers `fab train gpu-box` with "No idea what 'gpu-box' is!".
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invoke import Collection, Exit

from jobs.errors import ExitCode, ToolkitError
from remote.output import Sayer

SHORT = {"logs": {"-f": "--follow", "-n": "--tail"}}  # as `tail` and other tools have them
STEPS = re.compile(r"[1-3](,[1-3])*,?")
# The flag that a second word of a verb is most likely meant for; else its run, or a second box.
SECOND = {"tunnel": "--port", "exec": "--command", "train": "--job", "doctor": "--job", "deploy": "--job"}
ADD = "fab add gpu-box 'ssh -p 41022 root@host'"


@dataclass(frozen=True)
class Flags:
    """The flags of one verb: whether each takes a value. `positional`: words that need no flag.

    numbers: the flags whose value is a whole number.
    """

    takes_value: Mapping[str, bool]
    positional: int = 0
    numbers: frozenset[str] = frozenset()


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
            flag = word.partition("=")[0]
            raise ToolkitError(f"fab itself has no flag {flag}", hint=f"a verb's flags follow it: fab VERB {flag} ...")
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
            if takes_value and "=" not in word:
                if not rest or rest[0] in known.takes_value:
                    raise ToolkitError(f"`fab {verb}` lacks the value of {flag}", hint=f"see `fab --help {verb}`")
                value = rest.pop(0)
                while flag == "--step" and rest and STEPS.fullmatch(rest[0]) and STEPS.fullmatch(value):
                    value = f"{value.rstrip(',')},{rest.pop(0)}"
                found += [flag, value]
            else:
                found.append(word.replace(word.partition("=")[0], flag, 1))
            if flag in known.numbers and not re.fullmatch(r"-?[0-9]+", value):
                raise ToolkitError(f"{flag} {value} is not a whole number")
        elif word.startswith("--"):
            raise _no_flag(verb, flag, known)
        elif word.startswith("-") and word != "-":
            found.append(word)  # Fabric's short flags may be joined to their values
        elif positional:
            positional -= 1
            if verb == "add" and word == "ssh":  # pasted without quotes
                while rest and not rest[0].startswith("--"):
                    word += f" {shlex.quote(rest.pop(0))}"
            found.append(word)
        elif "--host" in known.takes_value and not {"--host", "-H", "--hosts"} & {
            each.partition("=")[0] for each in found
        }:
            found += ["--host", word]
        else:
            raise ToolkitError(f"`fab {verb}` does not know what `{word}` is", hint=_second(verb, word, found, known))
    if positional and not {"--help", "-h"} & {*found}:
        raise ToolkitError(f"`fab {verb}` lacks a name, or what the rental page shows", hint=ADD)
    return found


def _second(verb: str, word: str, found: list[str], known: Flags) -> str:
    flag = SECOND.get(verb, "--run" if "--run" in known.takes_value else "--host")
    if flag == "--host" and flag in found:
        word = f"{found[found.index(flag) + 1]},{word}"
    meant = f"{flag} {shlex.quote(word)}" if flag in known.takes_value else ""
    guess = f"did you mean {meant}? " if meant and not (flag in known.numbers and not word.isdigit()) else ""
    return f"{guess}each value follows its flag; `fab --help {verb}` lists them"


def _no_verb(word: str, verbs: Mapping[str, Flags]) -> ToolkitError:
    near = difflib.get_close_matches(word, verbs, n=1, cutoff=0.7)
    guess = f"did you mean `fab {near[0]}`? " if near else ""
    hint = f"{guess}the verbs are {', '.join(verbs)}; `fab --help VERB` explains one"
    return ToolkitError(f"there is no verb `{word}`", hint=hint)


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
    named = {
        ("--" if len(name) > 1 else "-") + name.replace("_", "-"): argument
        for argument in arguments
        for name in argument.names
    }
    return Flags(
        {flag: argument.takes_value and not argument.optional for flag, argument in named.items()},
        sum(bool(argument.positional) for argument in arguments),
        frozenset(flag for flag, argument in named.items() if argument.kind is int),
    )


def words_of(program: Any) -> list[str]:
    """Return the words of this call but Fabric's own flags, as the list that Invoke parses next.

    Empty if there is no call, or if it only asks for a list or for help.
    """
    core = getattr(program, "core", None)
    return core.unparsed if core is not None else []


def mend_call(program: Any, verbs: Collection, names: Iterable[str]) -> None:
    """Mend the words of this call, before Invoke parses them.

    verbs: those that the call names. names: of all verbs. Ends the call with our own words if there
    is a mistake.
    """
    words = words_of(program)
    if not words:
        return
    flags = {name: flags_of(arguments_of(task)) for name, task in verbs.tasks.items()}
    known = {name: flags.get(name, Flags({})) for name in names}
    try:
        words[:] = mended(words, known, flags_of(program.core_args()).takes_value)
    except ToolkitError as error:
        Sayer()(error)
        raise Exit(code=int(ExitCode.USAGE)) from None
