import re
from pathlib import Path

from jobs.events import RawEvent
from jobs.run_dir import RunDir
from jobs.views.report.checkpoints import folders_here, saved_weights
from jobs.views.report.history import RunHistory
from jobs.views.report.page import page
from jobs.views.report.run_page import RunPage
from tests.raw_events import event


def saved(folder: str, update: int, step: int = 2, **fields: object) -> RawEvent:
    return event("checkpoint", step, path=f"/box/runs/a/{folder}", update=update, size_bytes=2_000_000, seconds=1.0,
                 **fields)  # fmt: skip


def history_of(*events: RawEvent) -> RunHistory:
    history = RunHistory("a")
    for each in events:
        history.feed(each)
    return history


RUN = [
    saved("step2/best", 2, metric="reward_accuracy", value=0.75),
    saved("step2/checkpoints/update-3", 3),
    saved("step2/best", 4, metric="reward_accuracy", value=0.8125),
    saved("step2/checkpoints/update-5", 5),
    saved("step2/model", 6),
]


def test_the_best_with_its_value_then_the_last_then_the_model() -> None:
    found = saved_weights(history_of(*RUN), frozenset({"step2/best", "step2/model"}))
    assert [(each.folder, each.what, each.update, each.is_here) for each in found] == [
        ("step2/best", "the best so far, by accuracy 81.2%", 4, True),
        ("step2/checkpoints/update-5", "the last checkpoint, to resume from", 5, False),
        ("step2/model", "the step's model", 6, True),
    ]


def test_a_resume_takes_back_what_came_after_it() -> None:
    found = saved_weights(history_of(*RUN, event("resumed", 2, from_update=3)), frozenset())
    assert [(each.folder, each.update) for each in found] == [("step2/best", 2)]
    assert saved_weights(history_of(*RUN, event("resumed", 2, from_update=0)), frozenset()) == []


def test_only_what_is_whole_on_disk_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for folder, mark in (
        (run.step(1).model, "config.json"),
        (run.step(2).best, "config.json"),
        (run.step(2).checkpoint(5), "complete.json"),
        (run.step(2).checkpoint(9), "state.json"),
        (run.step(3).model, "half"),
    ):
        folder.mkdir(parents=True)
        (folder / mark).touch()
    assert folders_here(run) == {"step1/model", "step2/best", "step2/checkpoints/update-5"}


def test_the_page_lists_them() -> None:
    html = page([RunPage(history_of(*RUN), {}, "done", folders=frozenset({"step2/best"}))], now=0.0)
    seen = " ".join(re.sub(r"<[^>]*>", " ", html.split("Checkpoints and models</h2>")[1]).split())
    assert "step2/best the best so far, by accuracy 81.2% 4 2 MB yes step2/checkpoints/update-5 the last" in seen
    assert "Checkpoints" not in page([RunPage(history_of(event("plan", 1, updates=4)), {}, "running")], now=0.0)
