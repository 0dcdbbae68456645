"""Test examples/ by its job file's command, in three steps; and train on a file of each form."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from jobs.events import Event, Metrics, Plan, Progress, read_events
from jobs.run_dir import RunDir
from jobs.spec import Data
from jobs.steps import STEPS
from rlhf_train.data import dataset
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny

CHECKOUT = Path(__file__).parents[2]
COMMAND = ".venv/bin/python -m rlhf_train --job examples/job.yaml --step all"


@pytest.mark.parametrize("page", ["README.md", "docs/models-and-data.md", "examples/job.yaml"])
def test_the_command_is_shown(page: str) -> None:
    assert COMMAND in (CHECKOUT / page).read_text(encoding="utf-8")


def test_the_rows_have_the_form_that_the_pages_say() -> None:
    rows = {
        name: [json.loads(line) for line in (CHECKOUT / f"examples/data/{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "test")
    }
    assert [len(rows["train"]), len(rows["test"])] == [20, 4]
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len({*prompts}) == 24
    assert all(prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:") for prompt in prompts)
    assert all(
        {*row} == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]
        for part in rows.values()
        for row in part
    )


def test_the_rule_tells_good_answers_from_bad_ones() -> None:
    asked = "from examples.rule import is_good; print(*(is_good('p', *answer) for answer in {answers}))"
    answers = [(" It is so.", True), (" It is so.", False), (" It is so", True), (" No.", True), ("", True)]
    done = subprocess.run(
        [sys.executable, "-c", asked.format(answers=answers)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "False", "False", "False"]


def test_the_job_trains_all_three_steps_on_the_rows(tmp_path: Path) -> None:
    environment = os.environ | {"RLHF_RUNS": str(tmp_path / "runs"), "RLHF_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, *shlex.split(COMMAND)[1:]]
    done = subprocess.run(
        words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunDir(tmp_path / "runs" / "example")
    events = read_events(run.events)[0]
    plans = [event for event in events if event["kind"] == "plan"]
    ends = {event["step"]: event for event in events if event["kind"] == "end"}
    assert [plan["step"] for plan in plans] == [1, 2, 3] == sorted(ends)
    assert [plan["data"] for plan in plans] == [{**plans[0]["data"], "rows": 20}] * 3
    assert sum(plan["rows"] for plan in plans) == 20  # none left out: each step has its third
    assert ends[1]["perplexity_after"] < ends[1]["perplexity_before"] / 2
    assert "good_share_after" in ends[3]  # the rule was asked
    assert all((run.step(step).model / "model.safetensors").is_file() for step in (1, 2, 3))


# --- examples/forms: a file of each form of rows ---

FORMS = CHECKOUT / "examples/forms"
# Each file, what its rows are called, and the step that learns from them here.
FILES: dict[str, tuple[str, int]] = {
    "text-pairs.csv": ("pairs of text", 2),
    "dialogues-as-text.jsonl": ("pairs of whole dialogues as text", 2),
    "message-pairs.jsonl": ("pairs of messages", 2),
    "message-pairs-without-prompt.jsonl": ("pairs of messages", 2),
    "ultrafeedback.jsonl": ("pairs of messages", 2),
    "sharegpt.json": ("dialogues of messages", 1),
    "alpaca.json": ("instructions with an output", 1),
    "messages.jsonl": ("dialogues of messages", 1),
    "prompt-completion.jsonl": ("responses as text", 1),
    "prompts.jsonl": ("prompts as text", 3),
    "instruction-pairs.json": ("pairs with an instruction", 2),
    "message-completion.jsonl.gz": ("responses as messages", 1),
    "message-prompts.jsonl": ("prompts as messages", 3),
    "messages-without-answer.jsonl": ("dialogues without answers", 3),
    "instructions.json": ("instructions", 3),
}
ROWS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An actor and a reward model with random weights, of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    rows = [json.loads(line) for line in (CHECKOUT / "examples/data/train.jsonl").open(encoding="utf-8")]
    tokenizer = train_tokenizer(["".join(row.values()) for row in rows], 320)
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "vocab_size": len(tokenizer), "num_labels": 1}
    shape = {name: value for name, value in tiny.OPT.items() if name != "model_type"}
    torch.manual_seed(0)
    for name, kind in (("actor", OPTForCausalLM), ("reward", OPTForSequenceClassification)):
        kind(OPTConfig(**shape | {"max_position_embeddings": 256}, **ids)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("actor", "reward")}


def test_each_file_of_the_folder_is_trained_on() -> None:
    assert {file.name for file in FORMS.iterdir()} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_form_is_trained_on(name: str, models: dict[str, str], world: World, tmp_path: Path) -> None:
    title, step = FILES[name]
    tree = tiny.job(FORMS / name)
    tree["actor"], tree["critic"] = {"model": models["actor"]}, {"model": models["reward"]}
    if step == 3:
        tree["actor"]["sft_model"], tree["critic"]["reward_model"] = models["actor"], models["reward"]
    tree["data"] |= {"split": [int(step == number) for number in STEPS], "max_prompt_tokens": 140}
    tree["data"] |= {"max_response_tokens": 80, "eval_rows": 4}
    section = tree[STEPS[step].section]
    section |= {"global_batch": 4, "max_updates": 1} | ({"rollout_batch": 4} if step == 3 else {})
    events: list[Event] = []
    in_process.train(world, tmp_path / "run", tree, step, events=events)
    said = [event.doing for event in events if isinstance(event, Progress)]
    # Of 12 rows one is held out: 5 % of them, and at least one.
    assert f"{FORMS / name}: {title}, {ROWS - 1} to learn from, 1 held out" in said
    (plan,) = [event for event in events if isinstance(event, Plan)]
    assert (plan.rows, plan.data["rows"], plan.data["answer_cut"]) == (ROWS - 1, ROWS - 1, 0)
    assert [event.update for event in events if isinstance(event, Metrics)] == [1]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON."""
    content = (FORMS / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    return json.loads(text) if ".json" in Path(name).suffixes else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_answers_alone_are_learned_of_each_form(name: str, models: dict[str, str], tmp_path: Path) -> None:
    """All files hold the same questions and answers. Between control tokens a turn is a text."""
    tokenizer, step = AutoTokenizer.from_pretrained(models["actor"]), FILES[name][1]
    spec = Data.model_validate({**tiny.job(FORMS / name)["data"], "max_prompt_tokens": 140, "max_response_tokens": 80})
    corpus = dataset.prepare(spec, tokenizer, cache=tmp_path, say=lambda line: None, steps=[step])

    def texts(ids: Iterable[int]) -> list[str]:
        return [text.strip() for text in tokenizer.decode(ids).split("</s>") if text.strip()]

    answers = {row["instruction"]: (row["chosen"], row["rejected"]) for row in rows_of("instruction-pairs.json")}
    for table in (corpus.train, corpus.held_out):
        assert len(table.prompt) > 0
        for row, prompt in enumerate(table.prompt):
            asked = re.findall(r"Human: (.*?)\n\nAssistant:", tokenizer.decode(prompt))
            good, bad = zip(*(answers[question] for question in asked), strict=True)
            earlier = [] if table.learned is None else table.before_response[row][table.learned[row].astype(bool)]
            if step == 1:
                assert texts([*earlier, *table.response[row]]) == [*good]
            if step == 2:
                assert (texts(table.chosen[row]), texts(table.rejected[row])) == ([*good], [*bad])


def test_the_page_shows_three_rows_of_each_file() -> None:
    page = (CHECKOUT / "docs/models-and-data.md").read_text(encoding="utf-8")
    shown = [
        [json.loads(line) for line in block.splitlines()] for block in re.findall(r"```json\n(.*?)```", page, re.S)
    ]
    for name in FILES.keys() - {"text-pairs.csv"}:
        assert rows_of(name)[:3] in shown, name
