"""Read the rows of a data set: files, folders, what `save_to_disk` wrote, and names of a hub."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jobs.errors
from jobs.errors import ToolkitError
from jobs.spec import DATA_COLUMNS, DataSet
from rlhf_train.data.forms import FIRST_ROWS, TEXT_PAIRS, BadRow, Form, make, recognise
from rlhf_train.data.row_store import RowStore, StoredRows

HELD_OUT_NAMES = ("test", "validation", "eval")  # the first that a data set has
MISTAKES_SHOWN, ROWS_SHOWN = 10, 3  # for one file; of one mistake
BATCH_ROWS = 1024  # that `datasets` turns into Python's objects together
PAGE = "docs/models-and-data.md"  # it shows every form

Items = Iterable[tuple[int, Any]]  # the number of a line or row, and what stands there


@dataclass(frozen=True)
class SourceRows:
    """The training rows of a data set, or its held-out rows."""

    form: Form
    rows: StoredRows
    counted: Counter[str] = field(default_factory=Counter)  # rows that are left out, or were changed, by reason
    read: int = 0  # those left out included


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


def read(entry: DataSet, search: Sequence[Path]) -> tuple[SourceRows, SourceRows | None]:
    """Read training rows and held-out rows; None are held out if the data set has no such split.

    The entry's name is a path in a folder of `search`, to a file or a folder, or else a hub name.
    Raises ToolkitError.
    """
    name, found = entry.name, find_data_set(entry.name, search)
    is_jsonl = found is not None and found.is_file() and found.name.endswith((".jsonl", ".jsonl.gz"))
    if found is None or _builder(found) or (found.is_dir() and not any(found.glob("*.jsonl"))):
        return _read_by_datasets(entry, found)
    if entry.config is not None:
        raise ToolkitError(
            f"data set `{name}` has no configuration `{entry.config}`",
            why="files of .jsonl have no configurations",
            hint="take `config` out of its entry in data.datasets",
        )
    if is_jsonl:
        if entry.split not in (None, "train"):
            raise _no_split(entry, ["train"])
        return _read_jsonl([found], entry, None), None
    wanted = entry.split or "train"
    train = sorted(found.glob(f"{wanted}*.jsonl"))
    if not train and entry.split is not None:
        raise _no_split(entry, sorted(file.stem for file in found.glob("*.jsonl")))
    held_out = next(filter(None, (sorted(found.glob(f"{word}*.jsonl")) for word in _held_out_names(wanted))), [])
    if not train:
        kinds = ".jsonl, .json, .csv or .parquet file (.gz, too)"
        why = f"there is no train*.jsonl in {found}" if found.is_dir() else f"{found} is no {kinds}"
        hint = f"name a {kinds}, or a folder with train*.jsonl and, if there is one, test*.jsonl"
        raise ToolkitError(f"no training rows in `{name}`", why=why, hint=hint)
    rows = _read_jsonl(train, entry, None)
    return rows, _read_jsonl(held_out, entry, rows.form) if held_out else None


def _held_out_names(split: str) -> list[str]:
    """Return the splits that may hold out rows of one: `test_prefs` for `train_prefs`."""
    return [split.replace("train", word) for word in HELD_OUT_NAMES] if "train" in split else []


def _no_split(entry: DataSet, there: Sequence[str]) -> ToolkitError:
    hint = f"name one in its entry: {{name: {entry.name}, split: {there[0]}}}" if there else ""
    return ToolkitError(
        f"data set `{entry.name}` has no split `{entry.split or 'train'}`",
        why=f"its splits: {', '.join(there)}",
        hint=hint,
    )


def _is_file_name(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".jsonl", ".json", ".csv", ".parquet"))


def _builder(file: Path) -> str:
    """Return the word that `datasets` has for a file of rows; "" for a folder or another file."""
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    return kind if kind in ("json", "csv", "parquet") and file.is_file() else ""


# --- rows of any source ---------------------------------------------------------------------------


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"column {error.start + 1} (in bytes): not UTF-8: byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; 5000 open brackets
        raise BadRow(f"column 1: no JSON that can be read: {error}") from None


def _collect(
    items: Items,
    parse: Callable[[Any], Any],
    entry: DataSet,
    form: Form | None,
    store: RowStore,
    *,
    source: str,
    unit: str,
    columns: Sequence[str] = (),
) -> SourceRows:
    """Add all rows of a file or split to the store, or raise one error with its mistakes.

    form: which the rows must have; None: that of the first ones. columns: all that there are, if
    the items lack some.
    """
    items = iter(items)
    first = list(islice(items, FIRST_ROWS))
    form = form or _form([value for _, item in first if (value := _tried(parse, item))], entry, source, columns)
    before, counted, total = len(store), Counter[str](), 0
    places: dict[str, list[int]] = {}  # of each mistake
    for number, item in chain(first, items):
        total += 1
        try:
            made = make(_renamed(parse(item), entry), form)
        except BadRow as bad:
            for mistake in bad.args:
                places.setdefault(mistake, []).append(number)
            continue
        counted.update(made.counted)
        if made.row is not None:
            store.add(made.row)
    if places:
        mistakes = [_places(unit, numbers) + f", {mistake}" for mistake, numbers in places.items()]
        if len(mistakes) > MISTAKES_SHOWN:
            mistakes = [*mistakes[:MISTAKES_SHOWN], f"(no more than {MISTAKES_SHOWN} are shown)"]
        hint = f"{form.title}: every row needs {form.wanted}; {PAGE} shows each form"
        raise ToolkitError(f"bad rows in {source}", why="\n".join(mistakes), hint=hint)
    if not total:
        raise ToolkitError(f"no rows in {source}")
    if len(store) == before:
        why = ", ".join(f"{name} {count}" for name, count in counted.items())
        hint = f"{PAGE} says what becomes of each row"
        raise ToolkitError(f"all {total} rows in {source} are left out", why=why, hint=hint)
    return SourceRows(form, StoredRows(store), counted, total)


def _tried(parse: Callable[[Any], Any], item: Any) -> Mapping[str, Any] | None:
    try:
        value = parse(item)
    except BadRow:  # it is said when all rows are read
        return None
    return value if isinstance(value, Mapping) else None


def _renamed(value: Any, entry: DataSet) -> Any:
    """Give columns the names that the entry has for them."""
    if not entry.columns or not isinstance(value, Mapping):
        return value
    kept = {name: cell for name, cell in value.items() if name not in entry.columns.values()}
    return kept | {ours: value[theirs] for ours, theirs in entry.columns.items() if theirs in value}


def _form(first: Sequence[Mapping[str, Any]], entry: DataSet, source: str, columns: Sequence[str]) -> Form:
    """Return the form of the first rows. Raises ToolkitError: they have none that is known."""
    there = list(columns or dict.fromkeys(chain.from_iterable(first)))
    for theirs in (entry.columns or {}).values():
        if first and theirs not in there:
            raise ToolkitError(
                f"{source}: no column `{theirs}`",
                why=f"its columns: {', '.join(there)}",
                hint=f"mend `columns` in the entry of `{entry.name}`: our name, then the data set's",
            )
    form = recognise([_renamed(row, entry) for row in first])
    if form is None and first:
        known = {*(entry.columns or {}), *there}
        example = next((name for name in there if name not in DATA_COLUMNS), "question")
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in known]
        what = (
            f"no column {', '.join(f'`{name}`' for name in missing)}" if len(missing) < 3 else "no form that is known"
        )
        raise ToolkitError(
            f"{source}: {what}",
            why=f"its columns: {', '.join(there)}",
            hint=f"say which is which: {{name: {entry.name}, columns: {{prompt: {example}}}}}; {PAGE} shows each form",
        )
    return form or TEXT_PAIRS


def _places(unit: str, numbers: Sequence[int]) -> str:
    """`line 4`; `lines 4 and 7`; `lines 4, 7, 9 and 30 more`."""
    shown = ", ".join(map(str, numbers[:ROWS_SHOWN]))
    if len(numbers) == 1:
        return f"{unit} {shown}"
    more = len(numbers) - ROWS_SHOWN
    if more > 0:
        return f"{unit}s {shown} and {more} more"
    return f"{unit}s {' and '.join(shown.rsplit(', ', 1))}"


# --- files of JSON lines --------------------------------------------------------------------------


def _read_jsonl(files: Sequence[Path], entry: DataSet, form: Form | None) -> SourceRows:
    store, counted, read = RowStore(), Counter[str](), 0
    for file in files:
        part = _collect(_lines(file), _parsed, entry, form, store, source=str(file), unit="line")
        form, read = part.form, read + part.read
        counted += part.counted
    return SourceRows(part.form, StoredRows(store), counted, read)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers. Raises ToolkitError."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, text.removesuffix(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ToolkitError(f"cannot read {file}", why=str(error)) from None


# --- the datasets library -------------------------------------------------------------------------


def _read_by_datasets(entry: DataSet, found_at: Path | None) -> tuple[SourceRows, SourceRows | None]:
    """Read a hub name, a parquet, csv or json file, a folder of them, or what `save_to_disk` wrote.

    found_at: the file or folder; None: a hub name.
    """
    import datasets  # takes seconds, and JSONL does not need it
    from datasets.builder import DatasetGenerationError

    from rlhf_train.data import hub

    datasets.disable_progress_bar()
    name = entry.name
    place = found_at or hub.data_set(name, entry.config)
    # Words such as None and N/A are text: csv has no other way to write them.
    more = (
        {"keep_default_na": False} if place.name.endswith((".csv", ".csv.gz")) or any(place.glob("**/*.csv*")) else {}
    )
    # The folder of a hub's data set holds one configuration.
    config = entry.config if found_at else None
    try:
        saved = any((place / file).exists() for file in ("dataset_dict.json", "state.json"))
        if config is not None and (saved or place.is_file()):
            raise hub.no_configuration(name, config, [])
        if saved:
            found = datasets.load_from_disk(str(place))
        elif builder := _builder(place):
            found = datasets.load_dataset(builder, data_files={"train": str(place)}, **more)
        else:
            configs = datasets.get_dataset_config_names(str(place)) if found_at else []
            if config not in (None, *configs) or (config is None and len(configs) > 1 and "default" not in configs):
                raise hub.no_configuration(name, config, configs)
            found = datasets.load_dataset(str(place), config, **more)
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
    wanted = entry.split or "train"
    if wanted not in splits:
        raise _no_split(entry, [*splits])
    train = _rows_of(splits[wanted], entry, None, wanted)
    held_out = next((word for word in _held_out_names(wanted) if word in splits), None)
    return train, _rows_of(splits[held_out], entry, train.form, held_out) if held_out else None


def _rows_of(split: Any, entry: DataSet, form: Form | None, word: str) -> SourceRows:
    theirs = {*DATA_COLUMNS, *(entry.columns or {}).values()}
    names = [column for column in split.column_names if column in theirs] or split.column_names
    return _collect(
        enumerate(_objects(split.select_columns(names))),
        lambda value: value,
        entry,
        form,
        RowStore(),
        source=f"data set `{entry.name}`, split `{word}`",
        unit="row",
        columns=split.column_names,
    )


def _objects(split: Any) -> Iterator[dict[str, Any]]:
    for batch in split.iter(BATCH_ROWS):
        yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))
