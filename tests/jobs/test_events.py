import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from jobs.events import (
    KINDS,
    NOT_SHOWN,
    NUMBER,
    Checkpoint,
    End,
    Error,
    Event,
    EventWriter,
    Metrics,
    Plan,
    Progress,
    Resumed,
    Sample,
    Warning,
    effective,
    metric,
    parse,
    parsed,
    read_events,
)

pytestmark = pytest.mark.pinned

ONE_OF_EACH: list[Event] = [
    Plan(
        step=1, updates=2, rows=64, ranks=1, device="cpu", device_reason="no GPU", precision="float32", global_batch=32,
        micro_batch=16, gradient_accumulation=2, zero_stage=0, data={"read": 70, "left out: empty answers": 6},
    ),
    Progress(step=1, doing="evaluating"),
    Metrics(
        step=1, update=1, updates=2, elapsed_s=0.5, learning_rate=1e-6, tokens_per_s=3120.0, real_token_share=0.9,
        grad_norm=1.5, loss=2.25,
    ),
    Sample(step=3, when="before", prompt="two\nlines\r\u2028", response="\x1b[31m 你好", reward=-0.5, good=False),
    Checkpoint(step=1, update=2, path="runs/a b/step1", size_bytes=12, seconds=0.25),
    Warning(message="no step"),
    Error(rank=1, what="bad", why="because", hint="do", exit_code=4),
    Resumed(step=1, from_update=1),
    End(step=1, updates=2, seconds=3.5, model="runs/a/step1/model", perplexity_before=31.25, perplexity_after=8.5),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def write(path: Path, *events: Event) -> None:
    writer = EventWriter(path)
    for event in events:
        writer(event)


def test_every_kind_survives_the_file(path: Path) -> None:
    write(path, *ONE_OF_EACH)
    lines, _ = read_events(path)
    assert [parse(line) for line in lines] == ONE_OF_EACH
    assert [line["kind"] for line in lines] == list(KINDS) == [event.kind for event in ONE_OF_EACH]


def test_a_line_is_one_json_object_with_number_time_and_no_nones(path: Path) -> None:
    write(path, Warning(message="hot"), Progress(step=2, doing="saving"))
    first, second = path.read_text(encoding="utf-8").splitlines()
    time = json.loads(first)["time"]
    assert len(time) == len("2025-01-05T12:00:03.123Z") and time.endswith("Z")
    assert json.loads(first) == {"schema": 1, "seq": 0, "time": time, "kind": "warning", "message": "hot"}
    assert json.loads(second)["seq"] == 1


def test_a_metric_that_does_not_say_how_it_is_shown_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(Metrics):
        tokens_lost: float | None = field(default=None, metadata=metric(".0f", "tokens lost", NUMBER))
        tokens_found: float | None = field(default=None, metadata=NOT_SHOWN)

    assert [each.name for each in fields(More)][-2:] == ["tokens_lost", "tokens_found"]
    with pytest.raises(TypeError, match=r"Bare\.tokens_lost needs metadata"):

        class Bare(Metrics):
            tokens_lost: float | None = None

    with pytest.raises(TypeError, match=r"Required\.tokens_lost needs metadata"):

        class Required(Metrics):
            tokens_lost: float

    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'label' and 'place'"):
        metric(".0f")  # type: ignore[call-arg]


def test_the_writer_returns_the_line_that_it_wrote(path: Path) -> None:
    returned = [EventWriter(path)(event) for event in ONE_OF_EACH[:1]]
    assert returned == read_events(path)[0]


def test_a_number_that_is_not_finite_is_a_word_and_the_line_is_json(path: Path) -> None:
    write(
        path,
        Sample(step=3, when="after", prompt="p", response="r", reward=math.inf),
        Sample(step=3, when="after", prompt="p", response="r", reward=math.nan),
    )
    (first, second), _ = read_events(path)
    assert (first["reward"], second["reward"]) == ("inf", "nan")
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_an_error_of_an_older_run_is_read_with_the_names_of_today(path: Path) -> None:
    old = {"schema": 1, "seq": 0, "time": "2025-01-05T12:00:00Z", "kind": "error", "step": 3, "rank": 1, "exit_code": 4}
    path.parent.mkdir()
    path.write_text(json.dumps(old | {"message": "boom"}) + "\n", encoding="utf-8")
    (event,), _ = read_events(path)
    assert event == old | {"what": "boom"} and parse(event) == Error(step=3, rank=1, what="boom", exit_code=4)
    both = old | {"what": "new", "message": "more"}
    assert parsed(json.dumps(both).encode()) == both
    warning = {"kind": "warning", "message": "hot"}
    assert parsed(json.dumps(warning).encode()) == warning


def test_a_field_with_something_else_than_its_kind_s_is_left_out() -> None:
    """Numbers written as words stay, and so does what a newer writer has added."""
    sound = {"kind": "sample", "step": 3, "reward": "-inf", "judge_score": 2, "good": False, "prompt": "x", "new": []}
    assert parsed(json.dumps(sound).encode()) == sound
    damaged = {"step": "3", "update": 2.5, "reward": "much", "judge_score": True, "good": "yes", "prompt": ["x"]}
    assert parsed(json.dumps(sound | damaged).encode()) == {"kind": "sample", "new": []}
    assert parsed(json.dumps({"kind": "plan", "data": [1], "updates": 2**63, "own_models": {}}).encode()) == {
        "kind": "plan",
        "own_models": {},
    }
    assert parsed(b'{"kind": ["plan"]}') is None


def test_a_path_that_is_not_utf8_can_be_reported(path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")  # as os.listdir gives it
    write(path, Error(rank=0, what=name, exit_code=2))
    assert read_events(path)[0][0]["what"] == name


def test_a_reader_waits_for_a_torn_line(path: Path) -> None:
    write(path, Progress(step=1, doing="é"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-10])
    events, offset = read_events(path)
    assert len(events) == 1 and offset == len(whole)
    assert read_events(path, offset) == ([], offset)
    path.write_bytes(whole + whole)
    again, end = read_events(path, offset)
    assert [event["doing"] for event in again] == ["é"] and end == 2 * len(whole)


def test_reading_on_gives_each_line_once(path: Path) -> None:
    writer, seen, offset = EventWriter(path), [], 0
    for part in (ONE_OF_EACH[:2], [], ONE_OF_EACH[2:5], ONE_OF_EACH[5:]):
        for event in part:
            writer(event)
        lines, offset = read_events(path, offset)
        seen += [line["seq"] for line in lines]
    assert seen == list(range(9)) and offset == path.stat().st_size


def test_no_file_is_no_events_yet(path: Path) -> None:
    assert read_events(path, 7) == ([], 7)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"schema": 1, "seq": 2, "kind": "prog', "é".encode()[:1]])
def test_a_new_writer_cuts_the_torn_line_and_counts_on(path: Path, torn: bytes) -> None:
    write(path, Progress(step=1, doing="a"), Progress(step=1, doing="b"))
    _, offset = read_events(path)
    with path.open("ab") as file:
        file.write(torn)
    write(path, Progress(step=1, doing="c"))
    after, _ = read_events(path, offset)  # a reader's offset from before the crash still holds
    assert [(line["seq"], line["doing"]) for line in after] == [(2, "c")]
    assert [line["seq"] for line in read_events(path)[0]] == [0, 1, 2]


def test_a_file_of_nothing_but_a_torn_line_starts_anew(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"seq": 0')
    write(path, Progress(step=1, doing="a"))
    assert [line["seq"] for line in read_events(path)[0]] == [0]


def test_a_newer_writers_fields_are_left_out_and_its_kinds_are_named() -> None:
    assert parse({"schema": 2, "kind": "progress", "step": 1, "doing": "x", "mood": "good"}) == Progress(
        step=1, doing="x"
    )
    with pytest.raises(KeyError, match="telepathy"):
        parse({"kind": "telepathy"})


def event(kind: str, step: int | None, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **({} if step is None else {"step": step}), **fields}


STEP_1 = [
    event("plan", 1),
    event("metrics", 1, update=1),
    event("checkpoint", 1, update=1),
    event("metrics", 1, update=2),
    event("end", 1),
]
STEP_3 = [
    event("plan", 3),
    event("sample", 3, when="before"),
    event("metrics", 3, update=1),
    event("metrics", 3, update=2),
    event("metrics", 3, update=3),
    event("sample", 3, when="after"),
    event("end", 3),
]


def test_nothing_is_undone_without_a_resume() -> None:
    assert effective([*STEP_1, *STEP_3]) == [*STEP_1, *STEP_3]


def test_a_step_that_goes_on_keeps_what_came_before() -> None:
    resumed, nobodys = event("resumed", 3, from_update=2), event("warning", None, message="x")
    assert effective([*STEP_1, nobodys, *STEP_3, resumed, event("metrics", 3, update=3)]) == [
        *STEP_1,
        nobodys,
        event("plan", 3),
        event("sample", 3, when="before"),
        event("metrics", 3, update=1),
        event("metrics", 3, update=2),
        resumed,
        event("metrics", 3, update=3),
    ]


def test_a_step_that_starts_anew_keeps_nothing_and_touches_no_other() -> None:
    resumed = event("resumed", 1, from_update=0)
    assert effective([*STEP_1, *STEP_3, resumed, *STEP_1]) == [*STEP_3, resumed, *STEP_1]


def test_what_was_undone_twice_is_undone() -> None:
    first, second = event("resumed", 1, from_update=1), event("resumed", 1, from_update=1)
    start = [event("metrics", 1, update=1)]
    assert effective([*start, event("metrics", 1, update=2), first, event("metrics", 1, update=2), second]) == [
        *start,
        first,
        second,
    ]


def test_a_line_that_a_loss_of_power_has_damaged_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write = EventWriter(path)
    for step in (1, 2):
        write(Progress(step=step, doing="x"))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * 40 + b"\n" + b'{"schema": 1, "se\n' + b"17\n\n" + b"\xff\xfe\n" + second)
    events, offset = read_events(path)
    assert [event["step"] for event in events] == [1, 2] and offset == path.stat().st_size


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"17\n",
        b"[]\n",
        b'"kind"\n',
        b'{"step": 1}\n',
        b'{"kind": "pl',
        b"\xff{}",
        b"\0" * 9,
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_what_is_no_event(line: bytes) -> None:
    assert parsed(line) is None


def test_a_line_is_an_event_with_or_without_its_end() -> None:
    assert parsed(b'{"kind": "x", "n": NaN}\r\n') is not None
    assert parsed(b'{"kind": "plan", "step": 1}') == {"kind": "plan", "step": 1}


def test_answers_sampled_during_training_are_undone_where_they_are_sampled_again() -> None:
    before, early, late = (event("sample", 3, when="during", update=update) for update in (1, 2, 3))
    resumed = event("resumed", 3, from_update=2)
    assert effective([before, early, late, resumed]) == [before, resumed]
