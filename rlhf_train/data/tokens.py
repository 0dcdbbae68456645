"""Turn rows into token ids, in a cache by content; all ranks share the work."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import struct
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration, plural
from rlhf_train.data.chat import ChatTemplate, Message
from rlhf_train.data.encoder import Encoder
from rlhf_train.data.forms import Row, Turns
from rlhf_train.data.ragged import Ragged
from rlhf_train.data.row_store import StoredRows

# Of messages: the dialogue in front of the response as step 1 reads it, and which of its tokens are
# learned (0 or 1).
OF_MESSAGES = ("context", "learned")
CHUNK_ROWS = 4096  # rows in a file of the cache; a rank's unit of work
MOST_CHUNKS = 512  # of a data set: a mapped file holds a file descriptor
CACHE_VERSION = 2  # raise it when the same text gets other ids
HASH_BYTES, READ_BYTES = 32, 2**20
ZIP_HEADER_BYTES = 30  # before the name of a file in a zip archive
POLL_S, SAY_EVERY_S = 0.1, 5.0

Say = Callable[[str], None]
_TextRow = tuple[str, str | None, str | None, str | None]
_MessageRow = tuple[Turns, Message | None, Message | None, Message | None]
Columns = dict[str, Ragged]  # by the names of Row's fields, and for messages of OF_MESSAGES


class Chunk(NamedTuple):
    """Some rows of a data set, and their file in the cache."""

    file: Path
    source: StoredRows
    start: int
    stop: int
    template: ChatTemplate | None  # None: the rows are text

    @property
    def names(self) -> tuple[str, ...]:
        return Row._fields if self.template is None else (*Row._fields, *OF_MESSAGES)

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self) -> list[Row]:
        return list(self.source.between(self.start, self.stop))


def chunks_of(rows: StoredRows, encoder: Encoder, template: ChatTemplate | None, cache: Path) -> list[Chunk]:
    """Cut rows into chunks, each with its file in the cache.

    template: of rows of messages; None: they are text. The cache key hashes exactly what the ids
    depend on: the text and the tokenizer. Limits, seed and shares are applied later.
    """
    size = max(CHUNK_ROWS, -(-len(rows) // MOST_CHUNKS))
    settings: list[Any] = [CACHE_VERSION, size, encoder.front, encoder.eos, len(encoder.identity)]
    first = next(iter(rows))
    absent = [name for name in Row._fields if getattr(first, name) is None]
    if template is not None or absent:  # plain pairs keep the key that they have always had
        settings += [template.fingerprint if template else "", absent]
    key = hashlib.sha256(json.dumps(settings).encode() + encoder.identity)
    for column in range(len(Row._fields)):
        key.update(np.fromiter((len(_written(row[column])) for row in rows), "<i8", len(rows)).tobytes())
        for row in rows:
            key.update(_written(row[column]).encode())
    folder = cache / "tokens" / key.hexdigest()
    return [
        Chunk(folder / f"chunk-{start // size:05d}", rows, start, min(start + size, len(rows)), template)
        for start in range(0, len(rows), size)
    ]


def _written(cell: Any) -> str:
    return cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)


def tokenise(chunks: Sequence[Chunk], encoder: Encoder, say: Say) -> None:
    """Write the chunks that the cache lacks or that are damaged. Say how far it is, and how long.

    A fast tokenizer's own threads use all cores.
    """
    missing = [chunk for chunk in chunks if _read_chunk(chunk) is None]
    begun, last_said, done, total = time.monotonic(), -SAY_EVERY_S, 0, sum(map(len, missing))
    for number, chunk in enumerate(missing, 1):
        now = time.monotonic()
        if now - last_said >= SAY_EVERY_S:
            last_said = now
            left = f", about {duration((total - done) * (now - begun) / done)} left" if done else ""
            say(f"tokenising: part {number} of {len(missing)}, {plural(len(chunk), 'rows')}{left}")
        _write_chunk(chunk.file, token_columns(chunk, encoder))
        done += len(chunk)


def token_columns(chunk: Chunk, encoder: Encoder) -> Columns:
    """Return the columns of a chunk, uncut; a cell that the row lacks is an empty list."""
    return (
        _text_columns(chunk.rows(), encoder)
        if chunk.template is None
        else _message_columns(chunk.rows(), chunk.template)
    )


def _text_columns(rows: Sequence[Row], encoder: Encoder) -> Columns:
    """Return the four columns; a response that is the chosen answer has length 0, too."""
    plain = cast("Sequence[_TextRow]", rows)
    prompts = list(dict.fromkeys(row[0] for row in plain))
    of_prompt = dict(zip(prompts, encoder.ids(prompts), strict=True))
    pairs = list(dict.fromkeys((row[0], answer) for row in plain for answer in row[1:] if answer is not None))
    of_answer = dict(zip(pairs, encoder.answers(pairs), strict=True))

    def column(answers: Iterable[str | None]) -> Ragged:
        cells = zip(plain, answers, strict=True)
        return Ragged.of([[] if text is None else [*of_answer[row[0], text], encoder.eos] for row, text in cells])

    return {
        "prompt": Ragged.of([[*encoder.front, *of_prompt[row[0]]] for row in plain]),
        "response": column(None if response == chosen else response for _, response, chosen, _ in plain),
        "chosen": column(row[2] for row in plain),
        "rejected": column(row[3] for row in plain),
    }


def _message_columns(rows: Sequence[Row], template: ChatTemplate) -> Columns:
    """Return the six columns of messages."""
    plain = cast("Sequence[_MessageRow]", rows)
    columns = {"prompt": Ragged.of(template.prompts([row[0] for row in plain]))}
    for place, name in ((2, "chosen"), (3, "rejected")):
        answers = iter(template.answers([(row[0], row[place]) for row in plain if row[place] is not None]))  # type: ignore[misc]
        columns[name] = Ragged.of([[] if row[place] is None else next(answers) for row in plain])
    dialogues = iter(template.dialogues([(*row[0], row[1]) for row in plain if row[1] is not None]))
    parts = [([], [], []) if row[1] is None else _cut_dialogue(*next(dialogues)) for row in plain]
    names = ("context", "learned", "response")
    return columns | {name: Ragged.of([part[place] for part in parts]) for place, name in enumerate(names)}


def _cut_dialogue(ids: list[int], is_learned: list[bool]) -> tuple[list[int], list[int], list[int]]:
    """Return what stands before the last answer, which of these tokens are learned, and the answer.

    The first token is never learned: nothing stands before it, from which it could be predicted.
    """
    end = max((place for place, learned in enumerate(is_learned, 1) if learned), default=0)
    start = next((place for place in range(end - 1, 0, -1) if not is_learned[place - 1]), 1)
    return ids[:start], [0, *map(int, is_learned[1:start])], ids[start:end]


def _write_chunk(file: Path, columns: Columns) -> None:
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


def _read_chunk(chunk: Chunk) -> Columns | None:
    """Map a chunk's columns from its file; None if the file is missing or damaged.

    All of the file is read once, for its hash, but only the lists that are used stay in memory, and
    all ranks of a machine share them.
    """
    try:
        with chunk.file.open("rb") as stream:
            wanted, digest = stream.read(HASH_BYTES), hashlib.sha256()
            while block := stream.read(READ_BYTES):
                digest.update(block)
            if digest.digest() != wanted:
                return None
            stream.seek(0)
            mapped = np.memmap(stream, np.uint8, "r")
            with zipfile.ZipFile(stream) as archive:
                arrays = {
                    name.removesuffix(".npy"): _array(stream, archive, name, mapped) for name in archive.namelist()
                }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ToolkitError(
            f"cannot read the token cache {chunk.file}", why=str(error), exit_code=ExitCode.UNFIT
        ) from None
    return {name: Ragged.packed(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in chunk.names}


def _array(stream: BinaryIO, archive: zipfile.ZipFile, name: str, mapped: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Return an array of an .npz file that is not compressed, as a part of the mapped file."""
    stream.seek(archive.getinfo(name).header_offset)
    header = stream.read(ZIP_HEADER_BYTES)
    # A zip archive's header of a file ends with the lengths of its name and of its extra field.
    stream.seek(sum(struct.unpack("<HH", header[-4:])), os.SEEK_CUR)
    version = np.lib.format.read_magic(stream)
    assert version == (1, 0), version
    (count,), _, dtype = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    found: npt.NDArray[Any] = mapped[start : start + count * dtype.itemsize].view(dtype)
    return found


def load(chunks: Sequence[Chunk], say: Say) -> Columns:
    """Read the columns of all chunks, and wait for those that other ranks still make.

    If some of them are messages, the rows of text get the columns of messages, too: of their
    context, which is the prompt, nothing is learned.
    """
    parts, last_said = [], time.monotonic()
    for number, chunk in enumerate(chunks, 1):
        while (part := _read_chunk(chunk)) is None:
            if time.monotonic() - last_said >= SAY_EVERY_S:
                last_said = time.monotonic()
                say(f"waiting for another rank to tokenise part {number} of {len(chunks)}: {chunk.file}")
            time.sleep(POLL_S)
        parts.append(part)
    names = max((chunk.names for chunk in chunks), key=len)
    for part in (part for part in parts if len(part) < len(names)):
        prompt = part["prompt"]
        none = np.zeros(int(prompt.sizes.max(initial=0)), np.int32)
        place = np.zeros_like(prompt.starts)
        part |= {"context": prompt, "learned": Ragged((none,), place, place, prompt.sizes)}
    return {name: Ragged.join([part[name] for part in parts]) for name in names}
