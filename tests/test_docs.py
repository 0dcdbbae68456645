"""Test that the pages for people are right: their files exist, and their commands are commands."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric.main import program
from invoke.exceptions import ParseError
from invoke.parser import Parser, ParserContext

from benchmarks.run import NAMES
from jobs.errors import ToolkitError
from jobs.spec import find_job, load_job
from remote import tasks
from remote.verbs.command_line import arguments_of, flags_of, mended
from rlhf_train.__main__ import parser, report_parser, settings_of
from rlhf_train.after import chat
from tests.pages import commands_of
from tests.test_house import INSIDE

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w/.-])(?:[\w.-]+/)*[\w.-]+(?:/|\.(?:py|sh|toml|yaml|yml|env|md|txt|pem|in))?(?![\w/-])")
OURS = {"benchmarks", "docker", "docs", "env", "examples", "jobs", "remote", "rlhf_train", "tests", ".ci"}
THE_USERS_OWN = {"my-job.yaml", "boxes.yaml", "job.yaml"}  # and job.yaml of a run folder
VERBS_BY_NAME = tasks.verbs().tasks


def tracked_names() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip(f"needs a git checkout: {listing.stderr.strip()}")
    return {Path(name).name for name in listing.stdout.splitlines()}


def parts_in(text: str, package: str) -> dict[str, set[str]]:
    """The pyramid's table of one package: its parts in order, each with those that it imports."""
    rows = re.findall(rf"^\| `{package}/(\w+)(?:\.py)?` \|.*\| (.*?) ?\|$", text, flags=re.MULTILINE)
    return {part: set(filter(None, imports.split(", "))) for part, imports in rows}


@pytest.mark.parametrize("package", INSIDE)
def test_the_pyramid_is_what_the_imports_are_held_to(package: str) -> None:
    assert parts_in((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), package) == INSIDE[package]


def code_spans(text: str) -> Iterator[str]:
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def missing_files(text: str, folder: Path, names: set[str]) -> list[str]:
    """List links, and files in code spans, that do not exist.

    names: of all files, for those that stand without their folder.
    """
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (folder / link).exists()]
    for span in code_spans(text):
        for path in PATH.findall(span):
            if path.split("/")[0] in OURS and "/" in path:
                missing += [] if (ROOT / path).exists() else [path]
            elif "/" not in path and re.search(r"\.(py|sh|toml|yaml|md)$", path) and path not in names | THE_USERS_OWN:
                missing.append(path)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert missing_files(page.read_text(encoding="utf-8"), page.parent, tracked_names()) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`jobs/spec.py`, `jobs/gone.py` and `spec.py:12`", ["jobs/gone.py"]),
        ("see [this](docs/gone.md#a) and [that](README.md)", ["docs/gone.md"]),
        ("`gone.sh`, `boxes.yaml`, `runs/gone.py`, `fab gone`", ["gone.sh"]),
        ("`python benchmarks/gone.py --list`", ["benchmarks/gone.py"]),
        ("```\njobs/gone.py `jobs/gone.py`\n```", []),
        ("`remote/gone/` and `tests/remote`", ["remote/gone/"]),
    ],
)
def test_a_missing_file_is_seen(text: str, missing: list[str]) -> None:
    assert missing_files(text, ROOT, {"spec.py"}) == missing


def mistake_in(words: list[str]) -> str:
    """Why this is no command of ours; "" if it is one."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    first, rest = words[0], words[1:]
    if first == "make":
        targets = re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return ", ".join(word for word in rest if word not in targets and "=" not in word)
    if first == "fab":
        return mistake_in_fab(rest)
    if words[:3] == ["docker", "compose", "run"] and "chat" in words:
        return mistake_in_training(words[words.index("chat") :])
    if words[:3] == ["docker", "compose", "up"]:
        services = re.findall(r"^  ([a-z]+):", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"), re.MULTILINE)
        return ", ".join(sorted({*words[3:]} - {*services}))
    if words[:2] == ["docker", "compose"]:
        return mistake_in_training(rest[rest.index("train") + 1 :])
    if first == ".venv/bin/rlhf-train":
        return mistake_in_training(rest)
    if words[:3] == [".venv/bin/python", "-m", "rlhf_train"]:
        return mistake_in_training(rest[2:])
    if first == ".venv/bin/python" and (ROOT / rest[0]).is_file():
        return ", ".join(
            word for word in rest[1:] if rest[0] == "benchmarks/run.py" and word not in NAMES and word != "--list"
        )
    if first in ("python3", "alias"):
        return ""
    if first == ".fab/bin/pip":
        return "" if (ROOT / rest[-1]).is_file() else rest[-1]
    return f"{first} is not known here"


def mistake_in_fab(words: list[str]) -> str:
    """As `fab` reads them: mended by us, then parsed by Invoke; and the job that they name."""
    arguments = {name: arguments_of(task) for name, task in VERBS_BY_NAME.items()}
    known = {name: flags_of(each) for name, each in arguments.items()}
    try:
        call_as_mended = mended(words, known, flags_of(program.core_args()).takes_value)
        contexts = [ParserContext(name, args=each) for name, each in arguments.items()]
        (call,) = Parser(contexts=contexts).parse_argv(call_as_mended)
        job, settings = (call.args[name].value if name in call.args else None for name in ("job", "set"))
        if job and job not in THE_USERS_OWN:
            load_job(job, settings or [])
    except (ToolkitError, ParseError) as error:
        return str(error)
    return ", ".join(argument.name for argument in call.missing_positional_args)


def mistake_in_training(arguments: list[str]) -> str:
    if arguments[:1] == ["report"]:
        report_parser().parse_args(arguments[1:])
        return ""
    if arguments[:1] == ["chat"]:
        chat.parser().parse_args(arguments[1:])
        return ""
    args = parser().parse_args(arguments)  # ends this process where they are wrong, which pytest shows
    if args.job not in THE_USERS_OWN:
        find_job(args.job)
        load_job(args.job, settings_of(args))
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {
        shlex.join(words): mistake
        for words in commands_of(page.read_text(encoding="utf-8"))
        if (mistake := mistake_in(words))
    } == {}


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("make demo SEED=1", ""),
        ("make gone", "gone"),
        ("fab train --host a --job demo --step 1,2", ""),
        ("fab gone --host a", "gone"),
        ("fab fetch --host a --gone", "--gone"),
        ("fab train --host a --job demo --run", "lacks the value of --run"),
        ("fab train --host a --job demo --set ppo.klcoef=1", "ppo.klcoef: unknown field"),
        ("fab add gpu-box", "lacks a name, or what the rental page shows"),
        ("MIRROR=cn docker compose run train --step 3", ""),
        (".venv/bin/python benchmarks/run.py ppo gone", "gone"),
        ("pip install rlhf-box", "pip is not known here"),
    ],
)
def test_a_wrong_command_is_seen(command: str, mistake: str) -> None:
    found = mistake_in(shlex.split(command))
    assert mistake in found and bool(mistake) == bool(found)


def test_readme_begins_with_two_commands() -> None:
    first = list(commands_of((ROOT / "README.md").read_text(encoding="utf-8")))[:2]
    assert first == [["make", "demo"], ["make", "test"]]


def test_readme_names_every_verb_and_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rented = (ROOT / "docs/rented-box.md").read_text(encoding="utf-8")
    for name in VERBS_BY_NAME:
        assert f"`{name}`" in text and f"`{name}`" in rented, name
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()})" in text


def test_each_form_of_rows_is_on_its_page() -> None:
    from rlhf_train.data import forms

    page = (ROOT / "docs/models-and-data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([\w ]+) \| `.*` .*\| ([123, ]+) \| (yes|no) \|$", page, flags=re.MULTILINE)
    ours = [form for form in vars(forms).values() if isinstance(form, forms.Form)]
    assert sorted(listed) == sorted(
        (form.title, ", ".join(map(str, form.steps)), "no" if form.is_text else "yes") for form in ours
    )


def test_each_fate_of_a_row_is_one_that_a_test_shows() -> None:
    from jobs.formatting import ROW_COUNTS
    from tests.rlhf_train.data import test_dataset, test_forms

    page = (ROOT / "docs/models-and-data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| .* \| .* \| ([\w ]+): ([\w -]+) \| `(\w+)` \|$", page, flags=re.MULTILINE)
    assert {name: (outcome, noun) for outcome, noun, name in listed} | {"rows": ("", "rows")} == ROW_COUNTS
    tested = {counted for *_, counted in test_forms.COUNTED}
    tested |= {word for _, words in test_dataset.FATES for word in words.split(" and ")}
    # Those of several rows, and of a tokenizer:
    # test_prompts_on_both_sides_duplicates_and_typed_control_tokens_are_counted.
    assert ROW_COUNTS.keys() - tested == {"rows", "duplicate", "prompt_held_out", "control_token"}


def test_the_exit_codes_are_all_explained() -> None:
    from jobs.errors import ExitCode

    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)
    assert sorted(map(int, listed)) == sorted(int(code) for code in ExitCode)


def texts_of(folder: str) -> Iterator[str]:
    """The texts that our code may print, with … for each value in an f-string."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def what_one_sees(page: str) -> list[str]:
    """The words in code spans of the paragraphs that begin with `You see`."""
    paragraphs = re.findall(r"^\*\*You see\*\* (.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)]


def test_the_error_words_of_troubleshooting_are_ours() -> None:
    texts = "\n".join(text for folder in ("jobs", "remote", "rlhf_train") for text in texts_of(folder))
    spans = what_one_sees((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    # `fab tunnel` and `hub` are a verb and a line, not errors.
    errors = [span for span in spans if not span.startswith("fab ") and span != "hub"]
    assert len(errors) > 15
    pieces = {piece.strip() for span in errors for piece in span.split("…")}
    assert [piece for piece in sorted(pieces) if piece not in texts] == []


def test_troubleshooting_names_fields_that_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    fields = (ROOT / "docs/job-file.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:actor|critic|data|sft|reward|ppo|hardware|checkpoint)\.[a-z_]+)", page))
    assert len(named) > 20 and [name for name in sorted(named) if f"`{name}`" not in fields] == []


def test_the_glossary_is_in_alphabetical_order() -> None:
    words = [
        word.lower()
        for word in re.findall(
            r"^\*\*([^*]+)\*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    ]
    assert len(words) > 40 and words == sorted(words)
