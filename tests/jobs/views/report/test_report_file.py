from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.run_dir import RunDir
from jobs.views.report.report_file import LEAST_S, ReportFile, file_of_several
from tests.limits import small_files
from tests.raw_events import END_1, PLAN, event


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "a")
    found.path.mkdir()
    found.events.write_text("", encoding="utf-8")
    return found


def write(run: RunDir, *events: object) -> None:
    with run.events.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in events)


def test_the_page_is_renewed_every_ten_seconds_and_at_the_end(run: RunDir) -> None:
    clock, said = Clock(), list[str]()
    report = ReportFile(run, said.append, clock)
    report.renew()
    assert "the next step begins" in run.report.read_text(encoding="utf-8")
    write(run, event("plan", 1, updates=4))
    clock.now = LEAST_S - 0.01
    report.renew()
    assert "the next step begins" in run.report.read_text(encoding="utf-8")
    clock.now = LEAST_S
    report.renew()
    assert "step 1 is being trained" in run.report.read_text(encoding="utf-8")
    write(run, END_1)
    report.finish(0)
    html = run.report.read_text(encoding="utf-8")
    assert "It worked: the perplexity on held-out answers fell from 31.20 to 8.41" in html and "<dd>done</dd>" in html
    assert said == [] and sorted(path.name for path in run.path.iterdir()) == ["events.jsonl", "report.html"]


def test_pages_that_take_long_are_made_less_often(run: RunDir) -> None:
    clock = Clock()

    class Slow(Clock):
        """Each look at the clock is half a second later: a page takes half a second."""

        def __call__(self) -> float:
            clock.now += 0.5
            return clock.now

    report = ReportFile(run, lambda what: None, Slow())
    report.renew()  # begins at 1.5 and ends at 2.0, so the next is due at 52
    write(run, event("plan", 1, updates=4))
    clock.now = 51.4
    report.renew()
    assert "the next step begins" in run.report.read_text(encoding="utf-8")
    report.renew()
    assert "step 1 is being trained" in run.report.read_text(encoding="utf-8")


def test_a_run_that_crashed_or_was_stopped_says_so(run: RunDir) -> None:
    write(run, PLAN, event("error", 3, rank=0, what="rank 0 was ended by SIGKILL", exit_code=4))
    ReportFile(run, lambda what: None).finish(4)
    assert "it failed in step 3, rank 0 was ended by SIGKILL" in run.report.read_text(encoding="utf-8")
    write(run, event("resumed", 3, from_update=0))
    ReportFile(run, lambda what: None).finish(75)
    html = run.report.read_text(encoding="utf-8")
    assert "step 3 was stopped" in html and "the same command resumes it" in html


def test_the_name_of_a_page_of_many_runs_has_room_in_a_folder() -> None:
    assert file_of_several(["a", "gpu-box/b"]) == "report-a-gpu-box-b.html"
    many = [f"{number}{'é' * 63}" for number in range(6)]
    name = file_of_several(many)
    assert name.startswith("report-0" + 49 * "é" + "-") and len(name.encode()) < 130  # 99 bytes: é has two
    assert file_of_several([*many[:5], "x"]) != name  # the rest counts, too


def test_a_full_disk_is_one_warning_and_leaves_the_old_page(run: RunDir) -> None:
    run.report.write_text("old", encoding="utf-8")
    clock, said = Clock(), list[str]()
    report = ReportFile(run, said.append, clock)
    with small_files(4096):  # a write fails as on a full disk
        for clock.now in (0.0, 100.0, 200.0):
            report.renew()
        report.finish(0)
    assert len(said) == 1 and said[0].startswith("the report could not be written: [Errno 27]")
    assert [path.read_text(encoding="utf-8") for path in run.path.iterdir() if path != run.events] == ["old"]


def test_a_page_leaves_half_of_the_room_to_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    report = ReportFile(run, said.append)
    report.finish(0)
    old = run.report.read_bytes()
    free = len(old) * 2 + 1000  # the next page has 1 kB more
    write(run, event("plan", 1, updates=4), END_1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    report.finish(0)
    assert said == [f"the report could not be written: [Errno 28] No space left on device: {str(run.report)!r}"]
    assert run.report.read_bytes() == old
    free *= 2
    report.finish(0)
    assert run.report.read_bytes() != old


def test_a_folder_that_is_gone_is_not_made_again(run: RunDir) -> None:
    said: list[str] = []
    report = ReportFile(run, said.append)
    run.events.unlink()
    run.path.rmdir()
    report.renew()
    report.finish(4)
    assert len(said) == 1 and not run.path.exists()


def test_a_place_that_is_taken_is_one_warning(run: RunDir) -> None:
    run.report.mkdir()
    said: list[str] = []
    report = ReportFile(run, said.append)
    report.renew()
    report.finish(0)
    assert len(said) == 1 and "report.html" in said[0]
