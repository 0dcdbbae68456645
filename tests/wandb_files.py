"""Read what Weights & Biases keeps of a run that is offline: records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7  # https://github.com/google/leveldb/blob/main/doc/log_format.md


def records(file: Path) -> Iterator[Record]:
    """Yield the records of a `.wandb` file, which begins with a header of 7 bytes."""
    data, at, whole = file.read_bytes(), HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:  # no record begins in a block's last bytes
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def offline_runs(folder: Path) -> list[list[Record]]:
    """Return the records of each start of a run, the oldest first."""
    return [list(records(file)) for file in sorted(folder.glob("offline-run-*/*.wandb"))]


def points(found: list[Record], name: str, x: str) -> list[tuple[int, Any]]:
    """Return a metric's points by the metric `x`."""
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    return [(row[x], row[name]) for row in rows if name in row]
