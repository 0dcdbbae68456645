"""Words as people type them. Expected calls by hand."""

from __future__ import annotations

import shlex

import pytest

from jobs.errors import ToolkitError
from remote import tasks
from remote.verbs.command_line import arguments_of, flags_of, mended

VERBS = {name: flags_of(arguments_of(verb)) for name, verb in tasks.verbs().tasks.items()}
CORE = {"-H": True, "--hosts": True, "-i": True, "--dry": False, "--help": False}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train gpu-box", "train --host gpu-box"),
        ("train gpu-box --step 1 2", "train --host gpu-box --step 1,2"),
        ("train --step 1 2 3 gpu-box", "train --step 1,2,3 --host gpu-box"),
        ("train --host x --step 1, 2 --detach", "train --host x --step 1,2 --detach"),
        ("train --step all --host x", "train --step all --host x"),
        ("train --step=1 --set ppo.kl_coef=0.1 x", "train --step=1 --set ppo.kl_coef=0.1 --host x"),
        ("--host X ps", "ps --host X"),
        ("--host=X ps", "ps --host X"),
        ("gpu-box ps --json", "ps --host gpu-box --json"),
        ("logs -f gpu-box", "logs --follow --host gpu-box"),
        ("logs -n 20 --host x", "logs --tail 20 --host x"),
        ("ps -H a,b", "ps -H a,b"),
        ("ps --hosts a", "ps --hosts a"),
        ("add gpu-box ssh", "add gpu-box ssh"),
        ("add gpu-box 'ssh -p 1 root@h' --price 1", "add gpu-box 'ssh -p 1 root@h' --price 1"),
        (
            "add gpu-box ssh -p 1 root@h -L 8080:localhost:8080 --price 1",
            "add gpu-box 'ssh -p 1 root@h -L 8080:localhost:8080' --price 1",
        ),
        ("logs -n=20 x", "logs --tail=20 --host x"),
        ("add --help", "add --help"),
        ("deploy a train a --detach", "deploy --host a train --host a --detach"),
        ("exec a --command ls", "exec --host a --command ls"),
        ("exec --host a --command train", "exec --host a --command train"),
        ("ps --host stop", "ps --host stop"),  # a box of that name
    ],
)
def test_what_was_typed_becomes_what_was_meant(typed: str, meant: str) -> None:
    assert mended(shlex.split(typed), VERBS, CORE) == shlex.split(meant)


@pytest.mark.parametrize(
    ("typed", "what", "hint"),
    [
        ("trian --host x", "there is no verb `trian`", "did you mean `fab train`?"),
        ("gpu-box", "there is no verb `gpu-box`", "the verbs are add, trust,"),
        ("--host gpu-box", "which verb?", "fab ps --host gpu-box"),
        ("train --stpe 1", "`fab train` has no flag --stpe", "did you mean --step?"),
        ("train a --run --detach", "`fab train` lacks the value of --run", "`fab --help train`"),
        ("train a --job", "`fab train` lacks the value of --job", "`fab --help train`"),
        ("tunnel a --port x", "--port x is not a whole number", ""),
        ("logs a -n=x", "--tail x is not a whole number", ""),
        ("--step 1 train a", "fab itself has no flag --step", "fab VERB --step ..."),
        ("tunnel a 6006", "`fab tunnel` does not know what `6006` is", "did you mean --port 6006?"),
        ("tunnel a x", "`fab tunnel` does not know what `x` is", "each value follows its flag"),
        ("logs a demo", "`fab logs` does not know what `demo` is", "did you mean --run demo?"),
        ("ps a b", "`fab ps` does not know what `b` is", "did you mean --host a,b?"),
        ("help", "there is no verb `help`", "the verbs are add, trust,"),
        ("add gpu-box", "`fab add` lacks a name, or what the rental page shows", "fab add gpu-box 'ssh "),
        ("train a opt-1.3b", "`fab train` does not know what `opt-1.3b` is", "`fab --help train`"),
    ],
)
def test_what_cannot_be_meant_is_answered(typed: str, what: str, hint: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        mended(typed.split(), VERBS, CORE)
    assert caught.value.what == what and hint in caught.value.hint
