"""Read data sets by name; tokenise, cache and split their rows.

`read_rows` turns a name into rows of text. `_tokenise` and `_load` turn these into token ids in a
cache by content; all ranks share the work. `_table` splits, cuts and counts at each load. The split
is DeepSpeed-Chat's arithmetic. Where we differ from it:

- rows are split before any is left out, so the limits do not decide which row serves which step;
- every step is measured on the same held-out split; if a data set has none, 5 % of its rows are
  held out before the split;
- rows with the same prompt stay together: held out together, or in the share of one step;
- text that looks like a control token (`</s>` typed by a user) stays text;
- an answer's ids are those that follow its prompt's ids in the text of both.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

import jobs.errors
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import plural
from jobs.spec import Data
from jobs.steps import STEPS

REQUIRED = ("prompt", "chosen", "rejected")
ANSWERS = ("response", "chosen", "rejected")
HELD_OUT_NAMES = ("test", "validation", "eval")  # the first that a data set has
HELD_OUT_SHARE = 0.05  # of the rows, where it has none
MISTAKES_SHOWN, ROWS_SHOWN = 10, 3  # for one file; of one mistake
NEUTRAL = ("\n", "a", ".", "1", "é")  # texts to put before another; one of them merges with none of its tokens
CHUNK_ROWS = 4096  # rows in a file of the cache; a rank's unit of work
CACHE_VERSION = 2  # raise it when the same text gets other ids
POLL_S, SAY_EVERY_S = 0.1, 5.0

Say = Callable[[str], None]
Order = npt.NDArray[np.int64]  # row numbers


class Row(NamedTuple):
    prompt: str
    response: str  # what step 1 learns; `chosen`, where there is no such column
    chosen: str
    rejected: str


@dataclass(frozen=True, eq=False)
class Ragged:
    """Token lists of many lengths in two flat arrays."""

    values: npt.NDArray[np.int32]  # (N,)
    offsets: npt.NDArray[np.int64]  # (n+1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        row = range(len(self))[index]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        return cls(np.fromiter(chain.from_iterable(lists), dtype=np.int32), _starts([len(tokens) for tokens in lists]))

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), _starts(lengths))

    def pick(self, rows: Order, max_tokens: int) -> Ragged:
        """Return these rows in this order, each cut after `max_tokens`."""
        offsets = _starts(np.minimum(self.lengths[rows], max_tokens))
        shift = np.repeat(self.offsets[rows] - offsets[:-1], np.diff(offsets))
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)


def _starts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of n parts starts, and the end: (n+1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


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
    step_rows: dict[int, Order]  # step 1|2|3 -> row numbers in the step's own order; empty only for a share of 0
    # `rows`: those read. Left out for the first reason that holds: `empty_prompt`, `empty_answer`,
    # `prompt_too_long`. Of the rest: `identical_answers` (left out in step 2 only), `answer_cut`.
    # Of all: `duplicate` (equal to an earlier row), `prompt_held_out` (of a row that is measured,
    # too), `control_token` (its text stays text).
    row_counts: dict[str, int]

    def example(self, step: int, tokenizer: Any) -> tuple[str, str]:
        """Return the texts of the step's row with the shortest prompt: the prompt and an answer."""
        rows = self.step_rows[step]
        row = int(rows[self.prompt.lengths[rows].argmin()])
        whole = np.concatenate([self.prompt[row], self.chosen[row]])
        # The answer behind its prompt: by itself, some tokenizers drop its first space.
        prompt, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (self.prompt[row], whole))
        return prompt, both.removeprefix(prompt)

    def digest(self, step: int) -> str:
        """Return the sha256 of the tokens that the step learns from, in its order."""
        digest = hashlib.sha256()
        for column in STEPS[step].columns:
            tokens: Ragged = getattr(self, column)
            picked = tokens.pick(self.step_rows[step], np.iinfo(np.int64).max)
            digest.update(picked.offsets.tobytes())
            digest.update(picked.values.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Corpus:
    train: Table
    held_out: Table
    digest: str  # sha256 of all rows' texts, in their order


def prepare(spec: Data, tokenizer: Any, *, cache: Path, rank: int = 0, world_size: int = 1, say: Say) -> Corpus:
    """Read the data sets, tokenise what the cache lacks, and split the rows.

    Every rank calls it, with the same cache folder.
    """
    encoder = _encoder(tokenizer)
    train, held_out = zip(*(_read(name, spec.seed, say) for name in spec.datasets), strict=True)
    train_chunks, held_out_chunks = (
        [chunk for rows in part for chunk in _chunks(rows, encoder, cache)] for part in (train, held_out)
    )
    _tokenise([*train_chunks, *held_out_chunks][rank::world_size], encoder, say)
    train_orders = _split(train, spec)
    held_out_orders = dict.fromkeys((1, 2, 3), _shuffled(sum(map(len, held_out)), spec.seed))
    control = re.compile("|".join(map(re.escape, encoder.control.values())))
    prompts = {row.prompt for rows in held_out for row in rows}
    return Corpus(
        train=_table("training", train, _load(train_chunks, say), train_orders, spec, control, prompts),
        held_out=_table(
            "held-out", held_out, _load(held_out_chunks, say), held_out_orders, spec, control, max_rows=spec.eval_rows
        ),
        digest=_digest([*train, *held_out]),
    )


def _digest(parts: Iterable[list[Row]]) -> str:
    """Return the sha256 of the texts of all rows."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def texts(spec: Data) -> Iterator[str]:
    """Yield every training text, for training a tokenizer from scratch."""
    for name in spec.datasets:
        for row in _read(name, spec.seed, lambda line: None)[0]:
            yield from dict.fromkeys(row)  # a response that is the chosen answer counts once


def rows_of_steps(spec: Data) -> dict[int, list[Row]]:
    """Return the texts of each step's training rows, those included that tokens will leave out."""
    train = [_read(name, spec.seed, lambda line: None)[0] for name in spec.datasets]
    rows = list(chain.from_iterable(train))
    return {step: [rows[i] for i in order] for step, order in _split(train, spec).items()}


# --- reading ------------------------------------------------------------------------------------


def _read(name: str, seed: int, say: Say) -> tuple[list[Row], list[Row]]:
    """Read a data set's training and held-out rows.

    Without a held-out split, 5 % of the rows are held out: all rows of the first prompts of
    RandomState(seed)'s shuffle.
    """
    say(f"reading {name}")
    train, held_out = read_rows(name, search_folders())
    if not held_out:
        if len(train) < 2:
            raise ToolkitError(
                f"data set `{name}` is too small",
                why="it has one row and no held-out split",
                hint="add rows, or a test split",
            )
        groups = _by_prompt(train)
        order, count = _shuffled(len(groups), seed), max(1, round(HELD_OUT_SHARE * len(train)))
        sizes = np.cumsum([len(groups[i]) for i in order])
        first = int(np.searchsorted(sizes, count)) + 1
        if first == len(groups):
            raise ToolkitError(
                f"nothing of data set `{name}` can be held out",
                why=f"its {len(train)} rows have {plural(len(groups), 'prompts')}, and those of one stay together",
                hint="add rows with other prompts, or a test split",
            )
        parts = (order[:first], order[first:])
        held_out, train = ([train[i] for i in sorted(chain.from_iterable(groups[g] for g in part))] for part in parts)
    return train, held_out


def search_folders() -> tuple[Path, Path]:
    """Return where a data set's path may begin: this folder, and the folder of our code."""
    return Path.cwd(), Path(jobs.errors.__file__).parents[1]


def find_data_set(name: str, search: Sequence[Path]) -> Path | None:
    """Return the file or folder that a data set's name means; None if it is a hub name.

    Raises ToolkitError: it is a path, and nothing is there.
    """
    places = [folder / Path(name).expanduser() for folder in search]
    found = next((place for place in places if os.access(place, os.F_OK)), None)
    if found is None and (name.startswith((".", "/", "~")) or name.count("/") > 1 or _is_file_name(name)):
        looked_for = "\n".join(dict.fromkeys(f"no {place}" for place in places))
        raise ToolkitError(
            f"there is no data set `{name}`",
            why=looked_for,
            hint="data.datasets takes files (.jsonl, .json, .csv, .parquet), folders and hub names",
        )
    return found


def read_rows(name: str, search: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Read training rows and held-out rows; none are held out if the data set has no such split.

    `name` is a path in a folder of `search`, to a .jsonl file or a folder, or else a hub name.
    Raises ToolkitError.
    """
    found = find_data_set(name, search)
    if found is not None and found.is_file() and found.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl([found]), []
    if found is None or _builder(found) or (found.is_dir() and not any(found.glob("*.jsonl"))):
        return _read_by_datasets(name, found)
    train = sorted(found.glob("train*.jsonl"))
    held_out = next(filter(None, (sorted(found.glob(f"{word}*.jsonl")) for word in HELD_OUT_NAMES)), [])
    if not train:
        kinds = ".jsonl, .json, .csv or .parquet file (.gz, too)"
        why = f"there is no train*.jsonl in {found}" if found.is_dir() else f"{found} is no {kinds}"
        hint = f"name a {kinds}, or a folder with train*.jsonl and, if there is one, test*.jsonl"
        raise ToolkitError(f"no training rows in `{name}`", why=why, hint=hint)
    return _read_jsonl(train), _read_jsonl(held_out)


def _by_prompt(rows: Sequence[Row]) -> list[list[int]]:
    """Return the row numbers of each prompt, in the order in which prompts appear."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(number)
    return list(groups.values())


def _is_file_name(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".jsonl", ".json", ".csv", ".parquet"))


def _builder(file: Path) -> str:
    """Return the word that `datasets` has for a file of rows; "" for a folder or another file."""
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    return kind if kind in ("json", "csv", "parquet") and file.is_file() else ""


class _BadRow(Exception):
    """Raised for a bad row; its arguments are the mistakes."""


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise _BadRow(f"column 1: a row is an object with {', '.join(REQUIRED)}, not {_shown(value)}")
    mistakes = []
    for column in (column for column in Row._fields if column in REQUIRED or column in value):
        if column not in value:
            mistakes.append(f"column `{column}`: missing; the row has {', '.join(value) or 'none'}")
        elif not isinstance(value[column], str):
            mistakes.append(f"column `{column}`: text is wanted, not {_shown(value[column])}")
        elif half := re.search("[\ud800-\udfff]", value[column]):
            mistakes.append(f"column `{column}`: {_shown(half[0])} is half a character (a lone surrogate)")
    if mistakes:
        raise _BadRow(*mistakes)
    columns = {"response": value["chosen"], **value}
    return Row(*(columns[column] for column in Row._fields))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _parsed(line: bytes) -> Row:
    try:
        return _row(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        raise _BadRow(f"column {error.start + 1} (in bytes): not UTF-8: byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise _BadRow(f"column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; 5000 open brackets
        raise _BadRow(f"column 1: no JSON that can be read: {error}") from None


def _collect(items: Iterable[tuple[int, Any]], parse: Callable[[Any], Row], *, source: str, unit: str) -> list[Row]:
    """Return all rows of a file or split, or raise one error with its mistakes.

    items: the number of a line or row, and what stands there.
    """
    rows: list[Row] = []
    places: dict[str, list[int]] = {}  # of each mistake
    for number, item in items:
        try:
            rows.append(parse(item))
        except _BadRow as bad:
            for mistake in bad.args:
                places.setdefault(mistake, []).append(number)
    if places:
        mistakes = [_places(unit, numbers) + f", {mistake}" for mistake, numbers in places.items()]
        if len(mistakes) > MISTAKES_SHOWN:
            mistakes = [*mistakes[:MISTAKES_SHOWN], f"(no more than {MISTAKES_SHOWN} are shown)"]
        hint = "every row needs the texts prompt, chosen and rejected, and may have response"
        raise ToolkitError(f"bad rows in {source}", why="\n".join(mistakes), hint=hint)
    if not rows:
        raise ToolkitError(f"no rows in {source}")
    return rows


def _places(unit: str, numbers: Sequence[int]) -> str:
    """`line 4`; `lines 4 and 7`; `lines 4, 7, 9 and 30 more`."""
    shown = ", ".join(map(str, numbers[:ROWS_SHOWN]))
    if len(numbers) == 1:
        return f"{unit} {shown}"
    more = len(numbers) - ROWS_SHOWN
    if more > 0:
        return f"{unit}s {shown} and {more} more"
    return f"{unit}s {' and '.join(shown.rsplit(', ', 1))}"


def _read_jsonl(files: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise ToolkitError(f"cannot read {file}", why=str(error)) from None
        lines = enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1)
        rows += _collect([pair for pair in lines if pair[1].strip()], _parsed, source=str(file), unit="line")
    return rows


def _read_by_datasets(name: str, found_at: Path | None) -> tuple[list[Row], list[Row]]:
    """Read a hub name, a parquet, csv or json file, a folder of them, or what `save_to_disk` wrote.

    found_at: the file or folder; None: a hub name.
    """
    import datasets  # takes seconds, and JSONL does not need it
    from datasets.builder import DatasetGenerationError

    from rlhf_train.data import hub

    datasets.disable_progress_bar()
    place = found_at or hub.data_set(name)
    # Words such as None and N/A are text: csv has no other way to write them.
    more = (
        {"keep_default_na": False} if place.name.endswith((".csv", ".csv.gz")) or any(place.glob("**/*.csv*")) else {}
    )
    try:
        saved = any((place / file).exists() for file in ("dataset_dict.json", "state.json"))
        if saved:
            found = datasets.load_from_disk(str(place))
        elif builder := _builder(place):
            found = datasets.load_dataset(builder, data_files={"train": str(place)}, **more)
        else:
            found = datasets.load_dataset(str(place), **more)
    except (OSError, ValueError, TypeError, RuntimeError, DatasetGenerationError) as error:
        why = "\n".join(f"{type(each).__name__}: {each}" for each in (error, error.__cause__) if each)
        hint = (
            "wanted: train*.jsonl; or parquet, csv or json files; "
            "or what `save_to_disk` of the same datasets version wrote"
        )
        downloaded = f"cannot load the data set `{name}`, although its download is complete"
        what = f"cannot load the data set in {found_at}" if found_at else downloaded
        raise ToolkitError(what, why=why, hint=hint) from None
    splits = found if isinstance(found, dict) else {"train": found}
    if "train" not in splits:
        raise ToolkitError(f"data set `{name}` has no split `train`", why=f"its splits: {', '.join(splits)}")
    held_out = [word for word in HELD_OUT_NAMES if word in splits][:1]
    train, *rest = (_rows_of(splits[word], f"data set `{name}`, split `{word}`") for word in ("train", *held_out))
    return train, rest[0] if rest else []


def _rows_of(split: Any, source: str) -> list[Row]:
    missing = [f"`{column}`" for column in REQUIRED if column not in split.column_names]
    if missing:
        why = f"its columns: {', '.join(split.column_names)}"
        raise ToolkitError(f"{source}: no column {', '.join(missing)}", why=why)
    columns = [column for column in Row._fields if column in split.column_names]
    values = split.select_columns(columns)[:]
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*(values[column] for column in columns), strict=True))
    return _collect(enumerate(rows), _row, source=source, unit="row")


# --- tokenising, with a cache by content --------------------------------------------------------


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer that never makes control tokens of text; the caller adds `front` and `eos`."""

    encode: Callable[[list[str]], list[list[int]]]  # without special tokens
    front: list[int]  # special tokens before every prompt, e.g. BOS
    eos: int
    control: dict[int, str]  # tokens that text must not become
    identity: bytes  # same bytes, same ids

    def ids(self, lines: list[str]) -> list[list[int]]:
        """Encode texts, and split a control token that a user typed, e.g. into `<` and `/s>`.

        Not by split_special_tokens: transformers 4.35 refuses it for fast tokenizers, 4.46 ignores
        it for slow ones.
        """
        return self._as_text(lines, self.encode)

    def _as_text(self, lines: list[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        found, control = encode(lines), self.control.values()
        for i in (i for i, ids in enumerate(found) if not self.control.keys().isdisjoint(ids)):
            inside = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in control)
            first, *others = re.split(inside, lines[i])
            found[i] = list(chain.from_iterable([*encode([first]), *self._behind(others)]))
            if left := self.control.keys() & found[i]:
                raise ToolkitError(
                    "the tokenizer makes control tokens of plain text",
                    why=f"{', '.join(self.control[token] for token in left)} in {_shown(lines[i])}",
                    hint="take that text out of the data set",
                )
        return found

    def answers(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """Encode answers as they follow their prompts, (prompt, answer) each.

        Prompt and answer are encoded as one text, and cut where the prompt's own ids end. A
        tokenizer that puts a space in front of every text (LLaMA 2) so puts none in between.
        Where a token crosses the border, the answer is encoded behind a neutral text instead.
        """
        prompts = dict.fromkeys(prompt for prompt, _ in pairs)
        starts = dict(zip(prompts, self.ids(list(prompts)), strict=True))
        found = self.ids([prompt + answer for prompt, answer in pairs])
        crossed = []
        for i, (prompt, _) in enumerate(pairs):
            start = starts[prompt]
            if found[i][: len(start)] == start:
                found[i] = found[i][len(start) :]
            else:
                crossed.append(i)
        for i, ids in zip(crossed, self._as_text([pairs[i][1] for i in crossed], self._behind), strict=True):
            found[i] = ids
        return found

    def _behind(self, lines: list[str]) -> list[list[int]]:
        """Encode texts as they stand behind other text, with whose end they share no token."""
        found: dict[int, list[int]] = {}
        for neutral in NEUTRAL:
            left = [i for i in range(len(lines)) if i not in found]
            if not left:
                break
            [start] = self.encode([neutral])
            for i, ids in zip(left, self.encode([neutral + lines[i] for i in left]), strict=True):
                if ids[: len(start)] == start:
                    found[i] = ids[len(start) :]
        if left := [i for i in range(len(lines)) if i not in found]:
            found |= dict(zip(left, self.encode([lines[i] for i in left]), strict=True))
        return [found[i] for i in range(len(lines))]


def _encoder(tokenizer: Any) -> _Encoder:
    eos = tokenizer.eos_token_id
    if eos is None:
        hint = "give the tokenizer an eos_token"
        raise ToolkitError("the tokenizer has no EOS token", why="answers end with it", hint=hint)
    if tokenizer.is_fast:
        # A copy: the caller's truncation and padding stay as they are, and no long text warns.
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        batch = getattr(backend, "encode_batch_fast", backend.encode_batch)  # from tokenizers 0.20 on
        identity = backend.to_str().encode()

        def call(lines: list[str], special: bool) -> list[list[int]]:
            return [encoding.ids for encoding in batch(lines, add_special_tokens=special)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            identity = b"".join(file.name.encode() + file.read_bytes() for file in sorted(Path(folder).iterdir()))

        def call(lines: list[str], special: bool) -> list[list[int]]:
            ids: list[list[int]] = tokenizer(
                lines, add_special_tokens=special, truncation=False, padding=False, verbose=False
            )["input_ids"]
            return ids

    # `front` is what stands before the text. What stands behind the text, e.g. EOS, is dropped.
    [bare], [framed] = call(["a"], False), call(["a"], True)
    front = next(framed[:i] for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control.pop(tokenizer.unk_token_id, None)  # unknown text may become that
    return _Encoder(lambda lines: call(lines, False), front, eos, {**control, eos: tokenizer.eos_token}, identity)


class _Chunk(NamedTuple):
    file: Path
    rows: list[Row]


def _chunks(rows: list[Row], encoder: _Encoder, cache: Path) -> list[_Chunk]:
    """Cut rows into chunks, each with its file in the cache.

    The cache key hashes exactly what the ids depend on: the text and the tokenizer. Limits, seed
    and shares are applied later.
    """
    settings = [CACHE_VERSION, CHUNK_ROWS, encoder.front, encoder.eos, len(encoder.identity)]
    key = hashlib.sha256(json.dumps(settings).encode() + encoder.identity)
    for column in zip(*rows, strict=True):
        key.update(np.array([len(text) for text in column], dtype="<i8").tobytes())
        key.update("".join(column).encode())
    folder = cache / "tokens" / key.hexdigest()
    return [
        _Chunk(folder / f"chunk-{i // CHUNK_ROWS:05d}", rows[i : i + CHUNK_ROWS])
        for i in range(0, len(rows), CHUNK_ROWS)
    ]


def _tokenise(chunks: Sequence[_Chunk], encoder: _Encoder, say: Say) -> None:
    """Write the chunks that the cache lacks or that are damaged."""
    last_said = -SAY_EVERY_S
    for number, chunk in enumerate(chunks, 1):
        if _read_chunk(chunk.file) is None:
            if time.monotonic() - last_said >= SAY_EVERY_S:
                last_said = time.monotonic()
                say(f"tokenising: part {number} of {len(chunks)}, {len(chunk.rows)} rows")
            _write_chunk(chunk.file, _token_columns(chunk.rows, encoder))


def _token_columns(rows: list[Row], encoder: _Encoder) -> dict[str, Ragged]:
    """Return the four columns, uncut; a response that is the chosen answer has length 0."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    of_prompt = dict(zip(prompts, encoder.ids(prompts), strict=True))
    pairs = list(dict.fromkeys((row.prompt, answer) for row in rows for answer in row[1:]))
    of_answer = dict(zip(pairs, encoder.answers(pairs), strict=True))

    def column(name: str) -> Ragged:
        return Ragged.of([[*of_answer[row.prompt, getattr(row, name)], encoder.eos] for row in rows])

    return {
        "prompt": Ragged.of([[*encoder.front, *of_prompt[row.prompt]] for row in rows]),
        "response": Ragged.of(
            [[] if row.response == row.chosen else [*of_answer[row.prompt, row.response], encoder.eos] for row in rows]
        ),
        "chosen": column("chosen"),
        "rejected": column("rejected"),
    }


def _write_chunk(file: Path, columns: dict[str, Ragged]) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{name}_{part}": getattr(columns[name], part) for name in columns for part in ("values", "offsets")
    }
    np.savez(buffer, **arrays)
    content, partial = buffer.getvalue(), file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        hint = "free some disk space, or put the cache into a folder that you may write to"
        raise ToolkitError(
            f"cannot write the token cache {file}", why=str(error), hint=hint, exit_code=ExitCode.UNFIT
        ) from None


def _read_chunk(file: Path) -> dict[str, Ragged] | None:
    """Read a chunk's columns; None if the file is missing or damaged."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ToolkitError(f"cannot read the token cache {file}", why=str(error), exit_code=ExitCode.UNFIT) from None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    arrays = np.load(io.BytesIO(content[32:]))
    return {name: Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in Row._fields}


def _load(chunks: Sequence[_Chunk], say: Say) -> dict[str, Ragged]:
    """Read the columns of all chunks, and wait for those that other ranks still make."""
    parts, last_said = [], time.monotonic()
    for number, chunk in enumerate(chunks, 1):
        while (part := _read_chunk(chunk.file)) is None:
            if time.monotonic() - last_said >= SAY_EVERY_S:
                last_said = time.monotonic()
                say(f"waiting for another rank to tokenise part {number} of {len(chunks)}: {chunk.file}")
            time.sleep(POLL_S)
        parts.append(part)
    return {name: Ragged.join([part[name] for part in parts]) for name in Row._fields}


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


def _split(train: Sequence[list[Row]], spec: Data) -> dict[int, Order]:
    """Split each data set by itself; join the parts of each step, and shuffle them again.

    Prompts are dealt to the steps, each with all its rows.
    """
    parts = []
    for start, rows in zip(_starts([len(rows) for rows in train]), train, strict=False):
        groups = _by_prompt(rows)
        shares = _shares(len(groups), spec.split, spec.seed)
        parts.append([start + np.array([i for g in share for i in groups[g]], dtype=np.int64) for share in shares])
    steps = {step: np.concatenate([part[step - 1] for part in parts]) for step in (1, 2, 3)}
    return {step: order[_shuffled(len(order), spec.seed)] for step, order in steps.items()} if len(train) > 1 else steps


def _table(
    kind: str,
    parts: Sequence[list[Row]],
    uncut: dict[str, Ragged],
    orders: dict[int, Order],
    spec: Data,
    control: re.Pattern[str],
    held_out: Set[str] = frozenset(),
    max_rows: int | None = None,
) -> Table:
    """Cut the answers, count the rows by what becomes of them, and drop unusable rows.

    control: finds the text of a control token; held_out: the prompts of the other table.
    """
    rows = list(chain.from_iterable(parts))
    empty_prompt = np.array([not row.prompt.strip() for row in rows], dtype=bool)
    empty_answer = np.array([not all(answer.strip() for answer in row[1:]) for row in rows], dtype=bool) & ~empty_prompt
    too_long = (uncut["prompt"].lengths > spec.max_prompt_tokens) & ~empty_prompt & ~empty_answer
    kept = ~(empty_prompt | empty_answer | too_long)
    cut = kept & np.any([uncut[name].lengths > spec.max_response_tokens for name in ANSWERS], axis=0)

    all_rows = np.arange(len(rows))
    response, chosen, rejected = (uncut[name].pick(all_rows, spec.max_response_tokens) for name in ANSWERS)
    as_chosen = response.lengths == 0
    if as_chosen.all():
        response = chosen
    else:
        sources = all_rows + len(rows) * ~as_chosen  # in the chosen answers, or behind them in the responses
        response = Ragged.join([chosen, response]).pick(sources, spec.max_response_tokens)
    identical = kept & (chosen.lengths == rejected.lengths)
    identical[identical] = [np.array_equal(chosen[i], rejected[i]) for i in np.flatnonzero(identical).tolist()]

    masks = {"empty_prompt": empty_prompt, "empty_answer": empty_answer, "prompt_too_long": too_long}
    masks |= {"identical_answers": identical, "answer_cut": cut}
    row_counts = {"rows": len(rows), **{name: int(mask.sum()) for name, mask in masks.items()}}
    row_counts["duplicate"] = len(rows) - len(set(rows))
    row_counts["prompt_held_out"] = sum(row.prompt in held_out for row in rows)
    row_counts["control_token"] = sum(control.search("\0".join(row)) is not None for row in rows)
    # Step 2 learns nothing from a pair of identical answers.
    usable = {step: kept & ~identical if step == 2 else kept for step in orders}
    step_rows = {step: order[usable[step][order]][:max_rows] for step, order in orders.items()}
    for step in (step for step, order in step_rows.items() if not len(order) and spec.split[step - 1] > 0):
        counts = ", ".join(f"{name} {count}" for name, count in row_counts.items())
        raise ToolkitError(
            f"step {step} has no {kind} rows left",
            why=f"its share of the {kind} data: {len(orders[step])} rows; all {kind} data: {counts}",
            hint="add rows, raise data.max_prompt_tokens, or change data.split",
        )
    return Table(uncut["prompt"], response, chosen, rejected, step_rows, row_counts)
