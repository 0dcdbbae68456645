"""The scripts of remote/on_box as they are sent, what they share, and what PROTOCOL.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remote.scripts import GPU_COPY_CHECK, ON_BOX, READS_LIB, dispatch_script, script

SHELLS = [shell for shell in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(shell[0])] or [["sh"]]
SENT = ("probe.sh", "land.sh", "results.sh")
LIE_THERE = ("supervisor.sh", "environment.sh")  # with our code, lib.sh next to them
BY_WORDS = ("probe.sh", "environment.sh")  # NAME=VALUE in place of a verb


def text_of(name: str) -> str:
    return (ON_BOX / name).read_text(encoding="utf-8")


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent_is_whole(name: str) -> None:
    assert text_of(name).count(READS_LIB) == 1
    sent = script(name).decode()
    assert READS_LIB not in sent and GPU_COPY_CHECK not in sent and sent.count("\nread_line() {") == 1


@pytest.mark.parametrize("name", LIE_THERE)
def test_what_lies_there_reads_the_library_next_to_it(name: str) -> None:
    assert text_of(name).count(READS_LIB) == 1


def test_what_goes_along_with_most_calls_needs_nothing() -> None:
    assert "lib.sh" not in dispatch_script() and "#" not in {
        line.lstrip()[:1] for line in dispatch_script().splitlines()
    }


def test_each_script_is_one_or_the_other() -> None:
    assert {path.name for path in ON_BOX.glob("*.sh")} == {*SENT, *LIE_THERE, "dispatch.sh", "lib.sh"}


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent_is_clean(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not in this Python's environment; the lock brings it")
    said = subprocess.run([shellcheck, "--shell=sh", "-"], input=script(name), capture_output=True, check=False)
    assert said.returncode == 0, said.stdout.decode()


# --- what they share ------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("strict", ["", "set -eu"])
def test_the_library(tmp_path: Path, shell: list[str], strict: str) -> None:
    (tmp_path / "torn").write_text("no newline  here ")
    (tmp_path / "empty").write_text("")
    (tmp_path / "two").write_text("\\one\ntwo\n")
    asked = f"""
        {strict}
        cd {tmp_path}
        answer() {{ if "$@"; then printf 'yes '; else printf 'no '; fi; }}
        answer has sh; answer has no-such-program
        for file in torn two empty none; do answer read_line $file; printf '[%s] ' "$value"; done
        for text in 0 123456789012345 1234567890123456 '' -1 1a; do answer is_number "$text"; done
        sleep 30 & child=$!
        answer is_alive $child; began=$since
        [ "$parent" = $$ ] && echo child
        answer is_running $child "$began"; answer is_running $child 1; answer is_running '' "$began"
        while [ "$(command_of $child)" != 'sleep 30 ' ]; do sleep 0.1; done
        kill $child
        while is_alive $child; do sleep 0.1; done # it waits to be reaped, or is gone
        answer is_running $child "$began"
        wait $child || true
        answer fields_of $child; answer fields_of 4194305
        is_number "$(free_kb /)" && echo free
    """
    done = subprocess.run(
        [*shell, "-c", text_of("lib.sh") + asked],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )
    assert (done.stdout, done.stderr, done.returncode) == (
        "yes no yes [no newline  here ] yes [\\one] no [] no [] yes yes no no no no yes child\n"
        "yes no no no no no free\n",
        "",
        0,
    )


# --- what PROTOCOL.md says ------------------------------------------------------------------------


def verbs_of(name: str, text: str) -> set[str]:
    """Return a script's verbs: the patterns of `case $verb in`, or what the verb is compared with.

    Or the words NAME=VALUE that it takes.
    """
    if name in BY_WORDS:
        return set(re.findall(r"\b([a-z_]+)=\*\)", text))
    cases = "".join(re.findall(r"^case \$verb in\b.*?\besac$", text, re.MULTILINE | re.DOTALL))
    patterns = re.findall(r"(?:^ {4}| in )([a-z_]+(?: \| [a-z_]+)*)\)", cases, re.MULTILINE)
    return {verb for pattern in patterns for verb in pattern.split(" | ")} | set(
        re.findall(r'"\$verb" = ([a-z_]+) \]', text)
    )


def documented(name: str, protocol: str) -> set[str]:
    """Of a section: the first words of its calls, or of its table."""
    (section,) = re.findall(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", protocol, re.MULTILINE | re.DOTALL)
    if name in BY_WORDS:
        return {
            word
            for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
            for word in re.findall(r"`([a-z_]+)`", row)
        }
    return set(re.findall(r"^ {4}([a-z_]+)(?= |$)", section, re.MULTILINE)) - {"sh"}


@pytest.mark.parametrize("name", sorted({*SENT, *LIE_THERE, "dispatch.sh"}))
def test_each_verb_stands_in_the_protocol_and_the_reverse(name: str) -> None:
    assert len(verbs_of(name, text_of(name))) > 2
    assert verbs_of(name, text_of(name)) == documented(name, text_of("PROTOCOL.md"))


def test_a_verb_that_is_missing_is_seen() -> None:
    land, protocol = text_of("land.sh"), text_of("PROTOCOL.md")
    assert verbs_of("land.sh", land.replace("in look |", "in peek | look |")) - documented("land.sh", protocol) == {
        "peek"
    }
    assert documented("land.sh", protocol.replace("    look ROOT", "    peek ROOT\n    look ROOT")) - verbs_of(
        "land.sh", land
    ) == {"peek"}
    assert verbs_of("probe.sh", text_of("probe.sh") + "x=*) ;;") - documented("probe.sh", protocol) == {"x"}


def test_each_file_has_its_section() -> None:
    sections = set(re.findall(r"^## (.*)$", text_of("PROTOCOL.md"), re.MULTILINE))
    assert sections == {path.name for path in ON_BOX.iterdir() if path.is_file()} - {"PROTOCOL.md", "lib.sh"}
