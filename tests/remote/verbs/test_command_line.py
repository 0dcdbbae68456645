"""Words as people type them. Expected calls by hand."""

from __future__ import annotations

import shlex

import pytest

from jobs.errors import ToolkitError
from remote import tasks
from remote.verbs.command_line import arguments_of, flags_of, mended

VERBS = {verb.name: flags_of(arguments_of(verb)) for verb in tasks.VERBS}
CORE = {"-H": True, "--hosts": True, "-i": True, "--dry": False}


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
        ("train a opt-1.3b", "`fab train` does not know what `opt-1.3b` is", "`fab --help train`"),
    ],
)
def test_what_cannot_be_meant_is_answered(typed: str, what: str, hint: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        mended(typed.split(), VERBS, CORE)
    assert caught.value.what == what and hint in caught.value.hint
