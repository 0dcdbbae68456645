"""TensorBoard's files of a run, written from its events while it trains."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.events import RawEvent, time_of
from jobs.formatting import one_line, verdict_of
from jobs.run_dir import RunDir
from jobs.steps import STEPS
from jobs.views.report.history import METRICS

FLUSH_S = 10  # until numbers are on disk
SHOWN_KINDS = ("metrics", "sample", "resumed")


class TensorBoardFile:
    """Takes the events of a run, and never harms it: what goes wrong is said once, by `warn`.

    Each step has a folder, which TensorBoard calls a run: its metrics are scalars over its updates,
    its answers are texts. What a resume makes again replaces what was written before.
    """

    def __init__(self, run: RunDir, warn: Callable[[str], object]) -> None:
        self._folder, self._warn = run.tensorboard, warn
        self._writers: dict[int, Any] = {}
        self._flushed_at_s = time.monotonic()
        self._has_failed = False

    def feed(self, event: RawEvent) -> None:
        self._guarded(lambda: self._write(event))

    def close(self) -> None:
        self._guarded(lambda: [writer.close() for writer in self._writers.values()])

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a full disk, a package that is not there, an event that is damaged
            if not self._has_failed:
                self._warn(f"TensorBoard's file could not be written: {one_line(error)}")
            self._has_failed = True

    def _write(self, event: RawEvent) -> None:
        step = event.get("step")
        if step not in STEPS or event["kind"] not in SHOWN_KINDS:
            return
        is_first = step not in self._writers
        if is_first:
            self._writers[step] = _new_file(self._folder / f"step{step}")
        self._writers[step].write(tensorboard_event(event).SerializeToString())
        if is_first or time.monotonic() - self._flushed_at_s >= FLUSH_S:
            for writer in self._writers.values():  # also of a step that has ended, and writes no more
                writer.flush()
            self._flushed_at_s = time.monotonic()


def _new_file(folder: Path) -> Any:
    """Begin a file as TensorBoard names it.

    Its own EventFileWriter writes in a thread, whose errors end up on the console.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    file = folder / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
    writer = RecordWriter(file.open("ab"))
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    writer.flush()
    return writer


def tensorboard_event(event: RawEvent) -> Any:
    """Return TensorBoard's event (protobuf) for one of ours, of SHOWN_KINDS."""
    # Imported where it is used: it takes half a second.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary

    at, update = time_of(event), int(event.get("update", 0))
    wall_time = at if math.isfinite(at) else 0.0
    if event["kind"] == "resumed":  # it drops what has this step, or a later one
        start = SessionLog(status=SessionLog.START)
        return Event(wall_time=wall_time, step=int(event.get("from_update", 0)) + 1, session_log=start)
    if event["kind"] == "sample":
        return Event(wall_time=wall_time, step=update, summary=Summary(value=[_text(event)]))
    values = [Summary.Value(tag=name, simple_value=float(event[name])) for name in METRICS if name in event]
    return Event(wall_time=wall_time, step=update, summary=Summary(value=values))


def _text(sample: RawEvent) -> Any:
    """Make a text of an answer, set in by four spaces: it is shown as it is, not as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    parts = [str(sample.get("prompt")), verdict_of(sample), str(sample.get("response"))]
    lines = [line for part in parts for line in (*part.strip().split("\n"), "")]
    text = "\n".join(f"    {line}" for line in lines).encode("utf-8", "backslashreplace")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return Summary.Value(
        tag=f"answers {sample.get('when')}/{sample.get('place', 0)}",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(dtype=DT_STRING, string_val=[text], tensor_shape=shape),
    )
