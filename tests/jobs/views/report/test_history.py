import math
from pathlib import Path

from jobs.events import RawEvent
from jobs.views.report.history import METRICS, MOST_LISTED, EventReader, RunHistory
from tests.raw_events import event


def fed(*events: RawEvent) -> RunHistory:
    history = RunHistory("a")
    for each in events:
        history.feed(each)
    return history


def line(update: int, **numbers: object) -> RawEvent:
    return event("metrics", 3, update=update, updates=9, elapsed_s=float(update), **numbers)


def test_every_metric_is_kept_also_those_that_no_panel_shows() -> None:
    assert {"loss", "kl", "critic_grad_norm", "rollout_s"} <= METRICS.keys()
    assert not {"step", "update", "updates", "elapsed_s"} & METRICS.keys()


def test_series_are_as_long_as_their_last_line_and_nan_where_a_line_lacks_them() -> None:
    step = fed(line(1, kl=0.5), line(2, mean_reward="nan"), line(3, kl="x", loss=1)).steps[3]
    updates, values = step.curve("kl")
    assert list(updates) == [1, 2, 3] and values[0] == 0.5 and all(map(math.isnan, values[1:]))
    assert [len(step.curve(name)[1]) for name in ("mean_reward", "loss", "entropy")] == [2, 3, 0]
    assert step.elapsed_s == 3.0 and step.last_update == 3


def test_a_resume_drops_what_came_after_its_update() -> None:
    before, after = event("sample", 3, when="before"), event("sample", 3, when="after")
    during = [event("sample", 3, when="during", update=update) for update in (1, 2)]
    lines = [line(update, kl=float(update)) for update in (1, 2, 3)]
    history = fed(before, lines[0], during[0], lines[1], during[1], lines[2], after, event("end", 3))
    history.feed(event("resumed", 3, from_update=2))
    step = history.steps[3]
    assert list(step.curve("kl")[1]) == [1.0, 2.0] and step.end is None
    assert step.samples == [before, during[0]]  # those of update 2 are sampled again
    history.feed(line(3, kl=9.0))
    assert list(step.curve("kl")[1]) == [1.0, 2.0, 9.0]
    history.feed(event("resumed", 3, from_update=0))
    assert not step.updates and not step.samples
    assert [note["kind"] for note in history.notes] == ["resumed", "resumed"]


def test_a_damaged_event_is_left_out_and_the_next_one_counts() -> None:
    history = fed(event("plan", 1, updates="many"), event("plan", 1, updates=4), event("end", [1]))
    assert history.steps[1].planned_updates == 4


def test_of_many_notes_the_first_and_the_last_are_kept() -> None:
    history = fed(*(event("warning", 1, message=str(number)) for number in range(MOST_LISTED + 50)))
    messages = [note["message"] for note in history.notes]
    assert len(messages) == MOST_LISTED and history.left_out == 50
    assert (messages[0], messages[-1]) == ("0", str(MOST_LISTED + 49))


def test_a_file_is_read_as_it_grows_without_its_torn_last_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    reader = EventReader(file)
    assert list(reader.new_events()) == []
    file.write_bytes(b'{"kind": "metrics", "kl": 0.5}\nnot json\n{"kind": "metrics", "at": "\\ud800"}\n{"kind": "wa')
    assert list(reader.new_events()) == [{"kind": "metrics", "kl": 0.5}, {"kind": "metrics", "at": "\ud800"}]
    with file.open("ab") as more:
        more.write(b'rning", "message": "a \\"kind\\": \\"metrics\\" b"}\n')
    assert [each["kind"] for each in reader.new_events()] == ["warning"]
    assert list(reader.new_events()) == []
