"""Split the rows of the job's data sets among the steps, cut them, and count what becomes of them.

`prepare` reads rows (rlhf_train/data/reading.py) in any form (rlhf_train/data/forms.py), has them
turned into token ids (rlhf_train/data/tokens.py), and splits, cuts and counts at each load. The
split is DeepSpeed-Chat's arithmetic. Where we differ from it:

- rows are split before any is left out, so the limits do not decide which row serves which step;
- every step is measured on the same held-out split; if a data set has none, 5 % of its rows are
  held out before the split;
- rows with the same prompt stay together: held out together, or in the share of one step;
- a data set serves the steps that its rows have columns for; the shares are those of these steps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.errors import ToolkitError
from jobs.formatting import data_row_counts, plural
from jobs.spec import Data, DataSet
from jobs.steps import STEPS
from rlhf_train.data.chat import ChatTemplate, own_template
from rlhf_train.data.encoder import encoder_of
from rlhf_train.data.forms import Form, Row, is_blank, texts_of
from rlhf_train.data.ragged import Order, Ragged, starts
from rlhf_train.data.reading import SourceRows, read, search_folders
from rlhf_train.data.row_store import Keys, StoredRows
from rlhf_train.data.tokens import Chunk, Columns, Say, chunks_of, load, tokenise

ANSWERS = ("response", "chosen", "rejected")
HELD_OUT_SHARE = 0.05  # of the rows, where a data set has no split for them


class Example(NamedTuple):
    prompt: str
    answer: str
    is_chat: bool = False  # the texts are as the chat template writes them, with their control tokens


@dataclass(frozen=True, eq=False)
class Table:
    """One split as token ids.

    It holds every row that was read, also those left out. `step_rows` names the rows that a step
    uses.
    """

    prompt: Ragged  # begins with the special tokens that the tokenizer puts in front
    response: Ragged  # answers end with EOS, unless they were cut
    chosen: Ragged
    rejected: Ragged
    # Step 1|2|3 -> row numbers in the step's own order; empty for a share of 0, and where no data
    # set serves the step. The weight of a data set may repeat its rows.
    step_rows: dict[int, Order]
    # `rows`: those read. Left out for the first reason that holds: `empty_prompt`, `empty_answer`,
    # `prompt_too_long`. Of the rest: `identical_answers` (left out in step 2 only), `answer_cut`.
    # Of all: `duplicate` (equal to an earlier row), `prompt_held_out` (of a row that is measured,
    # too), `control_token` (its text stays text). Then what forms.py counts, if there is any.
    row_counts: dict[str, int]
    # Where some rows are messages: what stands before the response as step 1 reads it, and which of
    # its tokens are learned (0 or 1). None: the prompt, and none of it.
    context: Ragged | None = None
    learned: Ragged | None = None
    # Where some rows lack a chosen answer: text of theirs that can stand in an answer's place.
    answer: Ragged | None = None

    @property
    def before_response(self) -> Ragged:
        """What stands before the response as step 1 reads it."""
        return self.prompt if self.context is None else self.context

    @property
    def some_answer(self) -> Ragged:
        """An answer of each row; the prompt again for a row that has none."""
        return self.chosen if self.answer is None else self.answer

    def example(self, step: int, tokenizer: Any) -> Example:
        """Return the texts of the step's row with the shortest prompt: the prompt and an answer."""
        rows = self.step_rows[step]
        row = int(rows[self.prompt.lengths[rows].argmin()])
        whole = np.concatenate([self.prompt[row], self.some_answer[row]])
        # The answer behind its prompt: by itself, some tokenizers drop its first space.
        is_chat = self.context is not None
        prompt, both = (tokenizer.decode(ids, skip_special_tokens=not is_chat) for ids in (self.prompt[row], whole))
        return Example(prompt, both.removeprefix(prompt), is_chat)

    def digest(self, step: int) -> str:
        """Return the sha256 of the tokens that the step learns from, in its order."""
        digest = hashlib.sha256()
        of_dialogue = [self.context, self.learned] if step == 1 else []  # where some rows are messages
        columns = [*(getattr(self, column) for column in STEPS[step].columns), *filter(None, of_dialogue)]
        for tokens in columns:
            tokens.pick(self.step_rows[step]).hash_into(digest)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Corpus:
    train: Table
    held_out: Table
    digest: str  # sha256 of all rows' texts, in their order


@dataclass(frozen=True)
class _Part:
    """The rows of one data set."""

    entry: DataSet
    train: SourceRows
    held_out: SourceRows

    @property
    def steps(self) -> tuple[int, ...]:
        entry: DataSet = self.entry
        return entry.steps or self.train.form.steps

    @property
    def recognised(self) -> str:
        """Say in a line what the rows are, how many there are, and what was left out or changed."""
        learned, held_out = len(self.train.rows), len(self.held_out.rows)
        counted = data_row_counts(self.train.counted + self.held_out.counted, 0)
        line = f"{self.entry.name}: {self.train.form.title}, {learned} to learn from, {held_out} held out"
        return f"{line}; {counted}" if counted else line

    def shares(self, split: Sequence[float]) -> list[float]:
        """Return the shares of its rows that each step gets."""
        return [share if step in self.steps else 0 for step, share in zip(STEPS, split, strict=True)]


def prepare(
    spec: Data,
    tokenizer: Any,
    *,
    cache: Path,
    rank: int = 0,
    world_size: int = 1,
    say: Say,
    steps: Collection[int] = tuple(STEPS),
) -> Corpus:
    """Read the data sets, tokenise what the cache lacks, and split the rows.

    Every rank calls it, with the same cache folder. steps: those that are asked for; one of them
    without rows is refused. A tokenizer without a chat template gets the one that messages are
    rendered by, so that it is saved with the model.
    """
    parts = _parts(spec, say)
    check_steps(parts, spec, steps)
    encoder = encoder_of(tokenizer)
    has_messages = any(not part.train.form.is_text for part in parts)
    template = None
    if has_messages:
        template = ChatTemplate.of(tokenizer, system=spec.system, arguments=spec.chat_template_kwargs)
        if own_template(tokenizer) is None:
            tokenizer.chat_template = template.source  # which a model is saved with
        if not template.keeps_turns:
            say(f"{template.name} writes earlier turns otherwise once others follow: dialogues teach their last answer")

    def chunks(rows: SourceRows) -> list[Chunk]:
        return chunks_of(rows.rows, encoder, None if rows.form.is_text else template, cache)

    train_chunks = [chunk for part in parts for chunk in chunks(part.train)]
    held_out_chunks = [chunk for part in parts for chunk in chunks(part.held_out)]
    tokenise([*train_chunks, *held_out_chunks][rank::world_size], encoder, say)
    control = re.compile("|".join(map(re.escape, encoder.control.values())))
    prompts = np.concatenate([part.held_out.rows.prompt_keys for part in parts])
    train, held_out = ([getattr(part, side) for part in parts] for side in ("train", "held_out"))
    orders = _split(parts, spec)
    return Corpus(
        train=_table("training", train, load(train_chunks, say), orders, spec, control, steps, held_out=prompts),
        held_out=_table(
            "held-out",
            held_out,
            load(held_out_chunks, say),
            _held_out_orders(parts, spec),
            spec,
            control,
            steps,
            max_rows=spec.eval_rows,
        ),
        digest=_digest([*train, *held_out]),
    )


def _parts(spec: Data, say: Say) -> list[_Part]:
    parts = []
    for entry in spec.entries:
        say(f"reading {entry.name}")
        parts.append(_Part(entry, *_read(entry, spec.seed)))
        say(parts[-1].recognised)
    return parts


def _digest(parts: Iterable[SourceRows]) -> str:
    """Return the sha256 of the texts of all rows."""
    digest = hashlib.sha256()
    for part in parts:
        for row in part.rows:
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def texts(spec: Data) -> Iterator[str]:
    """Yield every training text, for training a tokenizer from scratch."""
    for part in _parts(spec, lambda line: None):
        for row in part.train.rows:
            # A response that is the chosen answer counts once.
            yield from dict.fromkeys(text for cell in row for text in texts_of(cell))


def rows_of_steps(spec: Data, steps: Collection[int] = ()) -> tuple[Iterator[Row], dict[int, Order], list[str]]:
    """Return all training rows, which of them each step gets, in order, and what was recognised.

    Those that tokens will leave out are included. steps: those that are asked for. The last are
    lines, one for each data set. Raises ToolkitError: no data set serves one of the steps.
    """
    parts = _parts(spec, lambda line: None)
    check_steps(parts, spec, steps)
    rows = chain.from_iterable(part.train.rows for part in parts)
    return rows, _split(parts, spec), [part.recognised for part in parts]


def check_steps(parts: Sequence[_Part], spec: Data, steps: Collection[int]) -> None:
    """Raise ToolkitError if a data set is to serve a step that it lacks columns for.

    Or if no data set serves a step that is asked for.
    """
    for part in parts:
        for number in part.entry.steps or ():
            if lacks := _lacks(part.train.form, number):
                raise ToolkitError(
                    f"data set `{part.entry.name}` cannot serve step {number}",
                    why=f"its rows are {part.train.form.title}; step {number} needs {lacks}, too",
                    hint=f"take {number} out of its `steps`",
                )
    for step in steps:
        if spec.split[step - 1] > 0 and not any(step in part.steps for part in parts):
            why = [
                f"`{part.entry.name}`: {part.train.form.title}; "
                + (f"step {step} needs {lacks}, too" if lacks else f"`steps: [{step}]` in its entry lets it serve")
                for part in parts
                for lacks in [_lacks(part.train.form, step)]
            ]
            served = [str(number) for number in STEPS if any(number in part.steps for part in parts)]
            raise ToolkitError(
                f"step {step} has no rows: no data set serves it",
                why="\n".join(why),
                hint=f"name a data set that has them, or ask for step {' and '.join(served)} alone",
            )


def _lacks(form: Form, step: int) -> str:
    """Return the columns that a step needs and rows of this form lack."""
    return " and ".join(column for column in STEPS[step].columns if column not in form.columns)


def _read(entry: DataSet, seed: int) -> tuple[SourceRows, SourceRows]:
    """Read a data set's training and held-out rows.

    Without a held-out split, 5 % of the rows are held out: all rows of the first prompts of
    RandomState(seed)'s shuffle.
    """
    train, held_out = read(entry, search_folders())
    return _hold_out(train, entry.name, seed) if held_out is None else (train, held_out)


def _hold_out(train: SourceRows, name: str, seed: int) -> tuple[SourceRows, SourceRows]:
    """Hold out 5 % of the rows."""
    rows = train.rows
    if len(rows) < 2:
        raise ToolkitError(
            f"data set `{name}` is too small",
            why="it has one row and no held-out split",
            hint="add rows, or a test split",
        )
    flat, ends = rows.by_prompt()
    groups = len(ends) - 1
    order, count = _shuffled(groups, seed), max(1, round(HELD_OUT_SHARE * len(rows)))
    sizes = np.cumsum(np.diff(ends)[order])
    first = int(np.searchsorted(sizes, count)) + 1
    if first == groups:
        raise ToolkitError(
            f"nothing of data set `{name}` can be held out",
            why=f"its {len(rows)} rows have {plural(groups, 'prompts')}, and those of one stay together",
            hint="add rows with other prompts, or a test split",
        )
    held_out, left = (rows.pick(np.sort(_of_groups(part, flat, ends))) for part in (order[:first], order[first:]))
    return (
        replace(train, rows=left, read=train.read - len(held_out)),
        SourceRows(train.form, held_out, read=len(held_out)),
    )


def _of_groups(groups: Order, flat: Order, ends: Order) -> Order:
    """Return the rows of groups, in their order. flat, ends: as `by_prompt` returns them."""
    sizes = np.diff(ends)[groups]
    shift = np.repeat(ends[groups] - starts(sizes)[:-1], sizes)
    return flat[np.arange(sizes.sum()) + shift]


# --- splitting, cutting, counting ---------------------------------------------------------------


def _shuffled(n: int, seed: int) -> Order:
    order = np.arange(n, dtype=np.uint32)  # as DeepSpeed-Chat shuffles it
    np.random.RandomState(seed).shuffle(order)
    return order.astype(np.int64)


def _shares(n: int, split: Sequence[float], seed: int) -> list[Order]:
    """Return which of n rows steps 1, 2 and 3 get: algorithms.md 1.0."""
    points = [0]
    for share in split:
        points.append(points[-1] + round(share / sum(split) * n))
    surplus = points[-1] - n
    # DeepSpeed-Chat's points can fall below 0 (0,5,5 of 3 rows), where a Python slice counts from
    # the end.
    points = [0, *(max(0, point - surplus) for point in points[1:])]
    order = _shuffled(n, seed)
    return [order[start:end] for start, end in pairwise(points)]


def _split(parts: Sequence[_Part], spec: Data) -> dict[int, Order]:
    """Split each data set by itself; join the parts of each step, and shuffle them again.

    Prompts are dealt to the steps that the data set serves, each with all its rows.
    """
    of_parts = []
    for start, part in zip(starts([len(part.train.rows) for part in parts]), parts, strict=False):
        flat, ends = part.train.rows.by_prompt()
        shares = part.shares(spec.split)
        count = len(ends) - 1 if any(shares) else 0
        orders = [_of_groups(share, flat, ends) for share in _shares(count, shares if count else spec.split, spec.seed)]
        of_parts.append([start + _weighted(order, part.entry) for order in orders])
    steps = {step: np.concatenate([part[step - 1] for part in of_parts]) for step in STEPS}
    if len(parts) == 1 and all(len(np.unique(order)) == len(order) for order in steps.values()):
        return steps  # no weight repeats rows, which would stand in groups
    return {step: order[_shuffled(len(order), spec.seed)] for step, order in steps.items()}


def _weighted(order: Order, entry: DataSet) -> Order:
    """Repeat rows `weight` times; of a fraction, take the first rows of this random order."""
    if entry.weight == 1 or not len(order):
        return order
    whole = int(entry.weight)
    count = round((entry.weight - whole) * len(order)) or (0 if whole else 1)
    return np.concatenate([*[order] * whole, order[:count]])


def _held_out_orders(parts: Sequence[_Part], spec: Data) -> dict[int, Order]:
    """Return the held-out rows of each step: of the data sets that serve it."""
    sizes = [len(part.held_out.rows) for part in parts]
    part_of_row = np.repeat(np.arange(len(parts)), sizes)
    order = _shuffled(sum(sizes), spec.seed)
    serves = {step: np.array([step in part.steps for part in parts]) for step in STEPS}
    return {step: order[serves[step][part_of_row[order]]] for step in STEPS}


def _table(
    kind: str,
    parts: Sequence[SourceRows],
    uncut: Columns,
    orders: dict[int, Order],
    spec: Data,
    control: re.Pattern[str],
    steps: Collection[int],
    *,
    held_out: Keys | None = None,
    max_rows: int | None = None,
) -> Table:
    """Cut the answers, count the rows by what becomes of them, and drop unusable rows.

    control: finds the text of a control token; steps: those that are asked for; held_out: the
    keys of the other table's prompts.
    """
    facts = _facts([part.rows for part in parts], control)
    rows = len(facts)
    limit = spec.max_response_tokens
    # What stands before a dialogue's last answer is cut nowhere, so it keeps the prompt's limit.
    before = np.maximum(uncut["prompt"].lengths, uncut.get("context", uncut["prompt"]).lengths)
    empty_prompt = facts["blank_prompt"]
    empty_answer = facts["blank_answer"] & ~empty_prompt
    too_long = (before > spec.max_prompt_tokens) & ~empty_prompt & ~empty_answer
    kept = ~(empty_prompt | empty_answer | too_long)
    cut = kept & np.any([uncut[name].lengths > limit for name in ANSWERS], axis=0)

    all_rows = np.arange(rows)
    response, chosen, rejected = (uncut[name].pick(all_rows, limit) for name in ANSWERS)
    as_chosen = response.lengths == 0
    response = chosen if as_chosen.all() else _either(chosen, response, ~as_chosen)
    identical = kept & facts["has_pair"] & (chosen.lengths == rejected.lengths)
    identical[identical] = [np.array_equal(chosen[i], rejected[i]) for i in np.flatnonzero(identical).tolist()]

    masks = {"empty_prompt": empty_prompt, "empty_answer": empty_answer, "prompt_too_long": too_long}
    masks |= {"identical_answers": identical, "answer_cut": cut}
    row_counts = {"rows": sum(part.read for part in parts), **{name: int(mask.sum()) for name, mask in masks.items()}}
    row_keys, prompt_keys = (
        np.concatenate([getattr(part.rows, name) for part in parts]) for name in ("row_keys", "prompt_keys")
    )
    row_counts["duplicate"] = rows - len(np.unique(row_keys))
    row_counts["prompt_held_out"] = 0 if held_out is None else int(np.isin(prompt_keys, held_out).sum())
    row_counts["control_token"] = int(facts["has_control"].sum())
    row_counts |= sum((part.counted for part in parts), Counter())
    # Step 2 learns nothing from a pair of identical answers.
    usable = {step: kept & ~identical if step == 2 else kept for step in orders}
    step_rows = {step: order[usable[step][order]][:max_rows] for step, order in orders.items()}
    for step in (step for step, order in step_rows.items() if not len(order) and spec.split[step - 1] > 0):
        if step not in steps and not len(orders[step]):
            continue  # no data set serves it, and it is not asked for
        counts = ", ".join(f"{name} {count}" for name, count in row_counts.items())
        raise ToolkitError(
            f"step {step} has no {kind} rows left",
            why=f"its share of the {kind} data: {len(orders[step])} rows; all {kind} data: {counts}",
            hint="add rows, raise data.max_prompt_tokens, or change data.split",
        )
    answer = None
    if not chosen.lengths.all():
        answer = _either(uncut["prompt"].pick(all_rows, limit), response, response.lengths > 0)
    return Table(
        uncut["prompt"],
        response,
        chosen,
        rejected,
        step_rows,
        row_counts,
        uncut.get("context"),
        uncut.get("learned"),
        answer,
    )


def _facts(parts: Sequence[StoredRows], control: re.Pattern[str]) -> npt.NDArray[np.void]:
    """Return what is counted of each row, (n,), with a field for each fact."""
    kinds = [(name, bool) for name in ("blank_prompt", "blank_answer", "has_pair", "has_control")]
    facts = np.zeros(sum(map(len, parts)), kinds)
    for number, row in enumerate(chain.from_iterable(parts)):
        facts[number] = (
            is_blank(row.prompt),
            any(answer is not None and is_blank(answer) for answer in row[1:]),
            row.rejected is not None,
            control.search("\0".join(text for cell in row for text in texts_of(cell))) is not None,
        )
    return facts


def _either(first: Ragged, second: Ragged, takes_second: npt.NDArray[np.bool_]) -> Ragged:
    """Return, for each row, its tokens in the second or in the first."""
    sources = np.arange(len(first)) + len(first) * takes_second
    return Ragged.join([first, second]).pick(sources)
