"""Results over a real sshd: whole or not there, whatever happens on the way."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from jobs.run_dir import RunDir
from remote.results import transfer as fetching
from remote.results.manifest import silent
from remote.results.run_contents import recall
from remote.results.transfer import Fetched, FetchSelection, fetch
from tests.remote.box_folder import HOSTILE, BoxFolder, content, files_of

if TYPE_CHECKING:
    from tests.remote.conftest import Sshd

EVERYTHING = FetchSelection(checkpoints=True)
MODEL = {"config.json", "model.safetensors", "sub/empty"}


class Laptop:
    """Where results go, and the line that they come over."""

    def __init__(self, folder: Path, sshd: Sshd, box: BoxFolder) -> None:
        self.sshd, self.box, self.state, self.runs = sshd, box, folder / "state", folder / "my runs" / "gpu-box"

    def fetch(
        self,
        run: str = "tiny",
        what: FetchSelection = EVERYTHING,
        *,
        root: str = "",
        dry_run: bool = False,
        progress: object = silent,
    ) -> Fetched:
        with self.sshd.connection(self.state, dry_run=dry_run) as connection:
            return fetch(
                connection,
                root or str(self.box.root),
                run,
                self.runs / run,
                state=self.state,
                what=what,
                progress=progress,
            )  # type: ignore[arg-type]

    def refused(self, *arguments: object, **options: object) -> ToolkitError:
        with pytest.raises(ToolkitError) as caught:
            self.fetch(*arguments, **options)  # type: ignore[arg-type]
        return caught.value

    @property
    def here(self) -> dict[str, bytes]:
        return files_of(self.runs / "tiny")

    @property
    def on_the_way(self) -> list[Path]:
        return [*self.runs.glob(".*.fetch/*")]


@pytest.fixture
def box(tmp_path: Path) -> BoxFolder:
    return BoxFolder(tmp_path / "box" / "rlhf-box")


@pytest.fixture
def run(box: BoxFolder) -> RunDir:
    return box.run()


@pytest.fixture
def laptop(tmp_path: Path, sshd: Sshd, box: BoxFolder) -> Laptop:
    return Laptop(tmp_path / "laptop", sshd, box)


@pytest.fixture
def fragile(tmp_path: Path, own_sshd: Sshd, box: BoxFolder) -> Laptop:
    """One whose line is to be broken."""
    return Laptop(tmp_path / "laptop", own_sshd, box)


def test_all_that_is_complete_comes_home_and_is_remembered(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.step(run, 1, models=("model", "best"))
    box.checkpoint(run, 2, 40)
    (run.step(3).path / "model").mkdir(parents=True)  # a model that is not marked complete
    (run.step(3).path / "model" / "model.safetensors").write_bytes(b"half")
    (run.path / "job" / "pid").write_text("1")
    fetched = laptop.fetch()
    there = files_of(run.path)
    wanted = {name: data for name, data in there.items() if not name.startswith(("step3", "job/"))}
    assert (
        laptop.here == wanted
        and {"step1/best/sub/empty", "step2/checkpoints/update-40/tensors-002.safetensors"} <= wanted.keys()
    )
    assert fetched.steps == (1,) and fetched.left == () and fetched.moved_bytes > 1_000_000 and laptop.on_the_way == []
    assert fetched.placed[-1] == "step2/fields.json" and fetched.placed.index("step1/model") < fetched.placed.index(
        "step1/complete.json"
    )
    known = recall(laptop.state, "gpu-box")["tiny"]
    assert (
        known.steps.keys() == {1}
        and known.checkpoints[2].update == 40
        and known.events_bytes == run.events.stat().st_size
    )
    again = laptop.fetch()
    assert (again.placed, again.moved_bytes) == ((), 0) and set(again.same) == set(fetched.placed)
    assert recall(laptop.state, "gpu-box")["tiny"].steps == known.steps


def test_what_was_not_asked_for_is_named(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.step(run, 1)
    box.checkpoint(run, 2, 7)
    fetched = laptop.fetch(what=FetchSelection())
    assert not any("checkpoints" in name for name in laptop.here) and "step1/model/config.json" in laptop.here
    assert [text.partition(",")[0] for text in fetched.left] == [
        "the checkpoint of step 2"
    ] and "--checkpoints" in fetched.left[0]
    assert recall(laptop.state, "gpu-box")["tiny"].checkpoints == {}
    events = laptop.fetch(what=FetchSelection(models=False))
    assert events.left[-1] == "the models of step 1: they were not asked for" and events.steps == ()


def test_that_there_is_no_checkpoint_yet_is_said(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.checkpoint(run, 1, 10, complete=False)
    assert laptop.fetch().left == laptop.fetch(dry_run=True).left == ("there is no checkpoint yet",)
    assert laptop.fetch(what=FetchSelection()).left == ()
    box.step(run, 1)
    assert laptop.fetch().left == ("there is no checkpoint now: a complete step keeps none",)
    box.checkpoint(run, 2, 10)
    assert laptop.fetch().left == ()


@pytest.mark.parametrize("number", ["1\n", "2\n"])  # of today, and of a version to come
def test_the_format_number_of_a_run_comes_along(laptop: Laptop, box: BoxFolder, run: RunDir, number: str) -> None:
    box.step(run, 1)
    run.format.write_text(number)
    fetched = laptop.fetch()
    assert "format" in fetched.placed and fetched.steps == (1,) and laptop.here["format"] == number.encode()
    assert laptop.here == {name: data for name, data in files_of(run.path).items() if not name.startswith("job/")}


def test_saved_chats_come_along(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    run.chats.mkdir()
    (run.chats / "my talk.json").write_text("[]\n")
    (run.path / "notes.json").write_text("{}\n")
    assert "chats/my talk.json" in laptop.fetch(what=FetchSelection()).placed
    assert laptop.here["chats/my talk.json"] == b"[]\n" and "notes.json" not in laptop.here


def test_a_file_that_grows_comes_in_pieces_and_never_torn(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    run.id.write_text("0123456789abcdef\n")
    run.log.write_bytes(content("log", 400_000))
    box.event(run, "progress", end="")
    laptop.fetch()
    assert laptop.here["events.jsonl"] == b'{"schema": 1, "kind": "plan"}\n' and laptop.here["train.log"] == content(
        "log", 400_000
    )
    box.event(run, "", end="\n")
    with run.log.open("ab") as log:
        log.write(b"more\n")
    fetched = laptop.fetch()
    assert set(fetched.placed) == {"events.jsonl", "train.log"} and fetched.moved_bytes < 200
    assert laptop.here == {name: data for name, data in files_of(run.path).items() if not name.startswith("job/")}
    run.events.write_text('{"schema": 1, "kind": "other"}\n' * 3)  # written from scratch, and longer
    run.log.write_text("anew\n")
    laptop.fetch()
    assert (laptop.here["events.jsonl"], laptop.here["train.log"]) == (run.events.read_bytes(), b"anew\n")


def test_a_checkpoint_that_is_replaced_on_the_way(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    """The second file of the old one is gone when its turn comes: the newer one is taken."""
    box.checkpoint(run, 1, 10, shards=5, size=3_000_000)

    def replace(done: int, total: int, what: str) -> None:
        if done and not run.step(1).checkpoint(20).exists():
            box.checkpoint(run, 1, 20)

    fetched = laptop.fetch(progress=replace)
    names = {name.split("/")[2] for name in laptop.here if "checkpoints" in name}
    assert names == {"update-20"} and "step1/checkpoints/update-20" in fetched.placed and laptop.on_the_way == []
    box.checkpoint(run, 1, 30)
    laptop.fetch()
    assert {name.split("/")[2] for name in laptop.here if "checkpoints" in name} == {"update-30"}
    box.step(run, 1)  # complete: nothing resumes from a checkpoint
    laptop.fetch()
    assert (
        not (laptop.runs / "tiny" / "step1" / "checkpoints").exists()
        and recall(laptop.state, "gpu-box")["tiny"].checkpoints == {}
    )


def test_checkpoints_that_are_replaced_faster_than_they_come(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.checkpoint(run, 1, 1, size=3_000_000)
    box.step(run, 2, size=1000)

    def replace(done: int, total: int, what: str) -> None:
        newest = max(run.step(1).checkpoints.iterdir(), key=lambda path: int(path.name[7:]))
        if "update" in what and newest.name in what:
            box.checkpoint(run, 1, int(newest.name[7:]) + 1, size=3_000_000)

    error = laptop.refused(progress=replace)
    assert error.exit_code == ExitCode.BUSY and "faster than" in error.what and "checkpoint.every_minutes" in error.hint
    assert "step2/complete.json" in laptop.here and not any("checkpoints" in name for name in laptop.here)


def test_a_step_that_goes_away_while_it_comes(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    """Half of its models are here by then, and nothing here says that it is complete.

    Its mark is the last file to be removed on the box.
    """
    box.step(run, 3, models=("best", "model", "model_ema"), size=3_000_000)

    def remove(done: int, total: int, what: str) -> None:
        if done and "best/model" in what:
            shutil.rmtree(run.step(3).model, ignore_errors=True)

    fetched = laptop.fetch(progress=remove)
    assert fetched.steps == () and "step3/complete.json" not in laptop.here and "step3/best/config.json" in laptop.here
    assert recall(laptop.state, "gpu-box")["tiny"].steps == {}


def test_the_mark_of_an_earlier_training_goes_first(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.step(run, 1, models=("best", "model"))
    laptop.fetch()
    box.step(run, 1, models=("best", "model"), seed="again", size=3_000_000)

    def stop(done: int, total: int, what: str) -> None:
        if done and "/model/model" in what:
            raise InterruptedError("stopped")

    laptop.refused(progress=stop)
    assert laptop.here["step1/best/model.safetensors"] == content((1, "best", "again"), 3_000_000)
    assert "step1/complete.json" not in laptop.here and "step1/model/model.safetensors" not in laptop.here
    (kept,) = (laptop.runs / "tiny").glob("step1.earlier-*")
    assert (kept / "model/model.safetensors").read_bytes() == content((1, "model", ""), 300_000)


def test_the_line_is_cut_in_the_middle(fragile: Laptop, box: BoxFolder, run: RunDir) -> None:
    """Once: it resumes by itself.

    For good: a clear error, and the next call resumes at the byte.
    """
    box.step(run, 1, size=30_000_000)
    cuts: list[int] = []

    def cut(done: int, total: int, what: str) -> None:
        if done > 10_000_000 and not cuts:
            cuts.append(done)
            fragile.sshd.cut()

    fetched = fragile.fetch(progress=cut)
    assert cuts and fragile.here["step1/model/model.safetensors"] == content((1, "model", ""), 30_000_000)
    assert fetched.moved_bytes < 31_000_000

    box.step(run, 1, size=30_000_000, seed="again")
    before = fragile.here

    def stop(done: int, total: int, what: str) -> None:
        if done > 20_000_000:
            fragile.sshd.stop()

    error = fragile.refused(progress=stop)
    assert error.exit_code == ExitCode.UNREACHABLE and "resumes at that byte" in error.hint and "refused" in error.why
    assert fragile.here == before  # the old model stands until the new one is whole
    fragile.sshd.start()
    assert 0 < fragile.fetch().moved_bytes < 12_000_000
    assert fragile.here["step1/model/model.safetensors"] == content((1, "model", "again"), 30_000_000)


def test_a_fetch_that_is_killed_goes_on(laptop: Laptop, box: BoxFolder, run: RunDir, tmp_path: Path) -> None:
    box.step(run, 1, size=40_000_000)
    ready = tmp_path / "ready"
    code = f"""
import sys, time
from pathlib import Path
from remote.results.transfer import fetch
from remote.ssh.connection import BoxConnection
from remote.inventory import Box
def wait(done, total, what):
    if done > 15_000_000:
        Path({str(ready)!r}).touch()
        time.sleep(60)
box = Box.model_validate_json({laptop.sshd.box().model_dump_json()!r})
with BoxConnection(box, Path({str(laptop.state)!r}), ssh_config=Path({str(laptop.sshd.folder / "config")!r})) as line:
    target, state = Path({str(laptop.runs / "tiny")!r}), Path({str(laptop.state)!r})
    fetch(line, {str(box.root)!r}, "tiny", target, state=state, progress=wait)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    until = time.monotonic() + 30
    while not ready.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    other = laptop.refused()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert other.exit_code == ExitCode.BUSY
    assert not any(name.startswith("step1/model") for name in laptop.here) and "step1/complete.json" not in laptop.here
    assert laptop.fetch().moved_bytes < 26_000_000 and laptop.here["step1/model/model.safetensors"] == content(
        (1, "model", ""), 40_000_000
    )


def test_stopped_between_two_renames(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    """The old model was moved away, and the new one is not in place: the old one returns first."""
    box.step(run, 1)
    laptop.fetch()
    staging = laptop.runs / ".tiny.fetch"
    staging.mkdir()
    shutil.move(laptop.runs / "tiny" / "step1" / "model", staging / "old-step1%2Fmodel")
    shutil.move(box.root / "runs", box.root / "gone")
    assert laptop.refused().exit_code == ExitCode.LOST
    assert {name.removeprefix("step1/model/") for name in laptop.here if "/model/" in name} == MODEL


def test_a_beginning_that_is_none(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    """What lies on the way from an earlier call has a wrong byte."""
    box.step(run, 1, size=2_000_000)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done > 1_000_000:
            raise Stop

    with pytest.raises(Stop):
        laptop.fetch(progress=stop)
    (part,) = [path for path in laptop.on_the_way if path.stat().st_size > 500_000]
    data = bytearray(part.read_bytes())
    data[17] ^= 1
    part.write_bytes(data)
    laptop.fetch()
    assert laptop.here["step1/model/model.safetensors"] == content((1, "model", ""), 2_000_000)


def test_damage_on_the_box_is_not_taken_for_a_checkpoint(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    folder = box.checkpoint(run, 1, 5)
    box.step(run, 2)
    shard = folder / "tensors-001.safetensors"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    error = laptop.refused()
    assert error.exit_code == ExitCode.UNFIT and "step1/checkpoints/update-5/tensors-001.safetensors" in error.why
    assert not any("checkpoints" in name for name in laptop.here) and "step2/complete.json" in laptop.here
    known = recall(laptop.state, "gpu-box")["tiny"]
    assert known.steps.keys() == {2} and known.checkpoints == {}
    (folder / "complete.json").write_text("{}")  # it names no file
    assert "whose names or marks" in laptop.fetch().left[0]


def test_a_step_that_was_trained_again_comes_next_to_the_fetched_one(
    laptop: Laptop, box: BoxFolder, run: RunDir
) -> None:
    box.step(run, 3, models=("model", "model_ema"))
    before = files_of(run.step(3).path)
    laptop.fetch()
    first = recall(laptop.state, "gpu-box")["tiny"].steps[3]
    box.step(run, 3, seed="again")
    again = laptop.fetch()
    assert "step3/model" in again.placed and again.aside == (f"step3.earlier-{first.complete[:8]}",)
    assert files_of(laptop.runs / "tiny" / again.aside[0]) == before
    here = {name: data for name, data in laptop.here.items() if not name.startswith(again.aside[0])}
    assert here == {name: data for name, data in files_of(run.path).items() if not name.startswith("job/")}
    assert laptop.fetch().aside == ()
    second = recall(laptop.state, "gpu-box")["tiny"].steps[3]
    assert first.complete != second.complete and first.models != second.models


def test_nothing_of_somebody_else_is_overwritten(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.step(run, 1)
    mine = laptop.runs / "tiny" / "step1" / "model" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    error = laptop.refused()
    assert str(mine) in error.what and mine.read_text() == "mine" and "move it away" in error.hint
    mine.unlink()
    laptop.fetch()
    (laptop.runs / "tiny" / "job.yaml").write_text("changed by hand")
    run.job_file.write_text("name: other\n")
    assert "job.yaml" in laptop.refused().what and laptop.here["job.yaml"] == b"changed by hand"
    (laptop.runs / "tiny" / "job.yaml").unlink()
    (laptop.runs / "tiny" / "job.yaml").symlink_to(mine)
    assert "job.yaml" in laptop.refused().what and not mine.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    folder = tmp_path / "laptop"

    def make(size: int) -> Path:
        folder.mkdir()
        said = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if said.returncode:
            pytest.skip(f"needs to mount a tmpfs: {said.stderr.strip()}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_disk_here_is_full(small_disk: Callable[[int], Path], sshd: Sshd, box: BoxFolder, run: RunDir) -> None:
    """Known before; or somebody else fills it meanwhile."""
    folder = small_disk(80_000_000)
    laptop = Laptop(folder, sshd, box)
    box.step(run, 1, size=40_000_000)
    error = laptop.refused()
    assert "too small" in error.what and "40 MB are to come" in error.why and "make room" in error.hint
    subprocess.run(["mount", "-o", "remount,size=120m", folder], check=True)
    filler = folder / "filler"

    def fill(done: int, total: int, what: str) -> None:
        if done > 10_000_000 and not filler.exists():
            filler.write_bytes(bytes(95_000_000))

    error = laptop.refused(progress=fill)
    assert "disk is full" in error.what and not any("/model/" in name for name in laptop.here)
    filler.unlink()
    assert laptop.fetch().moved_bytes < 31_000_000 and "step1/complete.json" in laptop.here


def test_the_folder_or_the_run_is_gone(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    error = laptop.refused("other")
    assert error.exit_code == ExitCode.USAGE and "it has: tiny" in error.why
    error = laptop.refused(root=f"{box.root}-2")
    assert error.exit_code == ExitCode.LOST and "not mounted" in error.why
    for name in ("", "..", ".", "a/b", "../../etc", "a\nb"):
        assert "cannot name a run" in laptop.refused(name).what


def test_hostile_names_go_through(sshd: Sshd, tmp_path: Path) -> None:
    """Of the folder, of files, and of runs."""
    box = BoxFolder(tmp_path.joinpath(*HOSTILE) / "rlhf-box")
    laptop = Laptop(tmp_path / "laptop", sshd, box)
    for name in HOSTILE[1:4]:
        run = box.run(name)
        box.step(run, 1, size=1000)
        for each in (*HOSTILE, "line\nbreak"):
            (run.step(1).model / each).write_text(each)
        fetched = laptop.fetch(name)
        assert {each: (laptop.runs / name / "step1" / "model" / each).read_text() for each in HOSTILE} == {
            each: each for each in HOSTILE
        }
        assert fetched.left[1:] == ("1 file whose names or marks are not those of a run",) and not list(
            tmp_path.rglob("pwned")
        )
        assert recall(laptop.state, "gpu-box")[name].steps.keys() == {1}


def test_a_login_that_says_something(
    make_sshd: Callable[..., Sshd], tmp_path: Path, box: BoxFolder, run: RunDir
) -> None:
    box.step(run, 1)
    laptop = Laptop(
        tmp_path / "laptop",
        make_sshd("ForceCommand printf 'Welcome!\\nbytes 0 9'; eval \"$SSH_ORIGINAL_COMMAND\""),
        box,
    )
    assert laptop.fetch().steps == (1,) and "step1/complete.json" in laptop.here


def test_a_dry_run_asks_and_changes_nothing(
    laptop: Laptop, box: BoxFolder, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    box.step(run, 1)
    fetched = laptop.fetch(dry_run=True)
    assert fetched.would == (
        "events.jsonl",
        "job.yaml",
        "train.log",
        "step1/fields.json",
        "step1/model",
        "step1/complete.json",
    )
    assert (
        not laptop.runs.exists() and not (laptop.state / "fetched").exists() and "manifest" in capsys.readouterr().err
    )


def test_progress_ends_with_all_of_it(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    box.step(run, 1, size=5_000_000)
    said: list[tuple[int, int, str]] = []
    laptop.fetch(progress=lambda *now: said.append(now))
    assert (0, 0, "step1/model/model.safetensors") in said  # hashed there
    moved = [(done, total) for done, total, _ in said if total]
    assert moved[-1][0] == moved[-1][1] and moved == sorted(moved) and len({total for _, total in moved}) == 1
    said.clear()
    laptop.fetch(progress=lambda *now: said.append(now))
    assert said == []  # the box remembers its hashes


def test_many_files_take_several_commands(
    laptop: Laptop, box: BoxFolder, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.step(run, 1, size=10)
    lengths: list[int] = []
    said = fetching._answer_stream

    def measured(line: Any, argv: Sequence[str]) -> Any:
        lengths.append(len(shlex.join(argv[6:])))
        return said(line, argv)

    monkeypatch.setattr(fetching, "MOST_ARGUMENTS", 150)
    monkeypatch.setattr(fetching, "_answer_stream", measured)
    laptop.fetch()
    assert "step1/complete.json" in laptop.here and len(lengths) > 2 and max(lengths) <= 150


def test_the_notes_of_fetch_are_lost(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    """What is equal is taken as it stands."""
    box.step(run, 1)
    laptop.fetch()
    (laptop.runs / "tiny" / ".fetched.json").write_text("{")
    shutil.rmtree(laptop.state / "fetched")
    assert laptop.fetch().moved_bytes == 0 and recall(laptop.state, "gpu-box")["tiny"].steps.keys() == {1}
    assert json.loads(Path(laptop.state / "fetched" / "gpu-box.json").read_text())["schema"] == 1
    assert (laptop.runs / "tiny" / "step1" / "model" / "config.json").stat().st_mode & 0o777 == 0o644


# --- a run's identity ---


def made_anew(box: BoxFolder, run_id: str, *, began: str = "") -> RunDir:
    """The run of the same name on a box that was set up again."""
    shutil.rmtree(box.root / "runs" / "tiny", ignore_errors=True)
    run = box.run()
    if run_id:
        run.id.write_text(f"{run_id}\n")
    run.events.write_text(json.dumps({"schema": 1, "kind": "plan", "time": began}) + "\n")
    box.step(run, 1, seed=(run_id, began))
    return run


@pytest.mark.parametrize(
    ("here", "there", "refused"),
    [
        (("aaaa", "1"), ("bbbb", "1"), True),  # the ids decide, where both are there
        (("aaaa", "1"), ("aaaa", "1"), False),
        (("", "1"), ("", "2"), True),  # two of older versions: their first events tell them apart
        (("", "1"), ("", "1"), False),
        (("", "1"), ("bbbb", "1"), False),  # a run of an older version that a newer one resumed
        (("", "1"), ("bbbb", "2"), True),
        (("aaaa", "1"), ("", "2"), True),
    ],
)
def test_results_of_two_runs_are_never_mixed(
    laptop: Laptop, box: BoxFolder, here: tuple[str, str], there: tuple[str, str], refused: bool
) -> None:
    made_anew(box, here[0], began=here[1])
    assert laptop.fetch().id == here[0]
    before = laptop.here
    made_anew(box, there[0], began=there[1])
    for dry_run in (True, False):
        if not refused:
            assert laptop.fetch(dry_run=dry_run).id == there[0]
            continue
        error = laptop.refused(dry_run=dry_run)
        assert error.what == f"{laptop.runs / 'tiny'} holds the results of another run"
        assert error.hint == (
            f"fab fetch --host gpu-box --run tiny --to {shlex.quote(str(laptop.runs / 'tiny-2'))} --checkpoints"
        )
        assert laptop.here == before and laptop.on_the_way == []
        report = laptop.refused(what=FetchSelection(models=False), dry_run=dry_run)  # as `fab report` calls it
        assert report.hint == f"fab report --host gpu-box --run tiny --to {shlex.quote(str(laptop.runs / 'tiny-2'))}"


def test_the_name_that_is_offered_is_free_or_this_runs(laptop: Laptop, box: BoxFolder, run: RunDir) -> None:
    made_anew(box, "aaaa")
    laptop.fetch()
    made_anew(box, "bbbb")
    (laptop.runs / "tiny-2").mkdir()
    assert "tiny-3" in laptop.refused().hint
    (laptop.runs / "tiny-2" / "id").write_text("bbbb\n")
    assert "tiny-2" in laptop.refused().hint


def test_one_folder_takes_one_fetch_at_a_time(laptop: Laptop, box: BoxFolder, run: RunDir, tmp_path: Path) -> None:
    """Two boxes have locks of their own, so the folder has one, too."""
    linked = tmp_path / "linked"
    laptop.runs.mkdir(parents=True)
    linked.symlink_to(laptop.runs)
    place = fetching.target_file(laptop.state, linked / "tiny")
    with fetching._lock(place, "taken"), pytest.raises(ToolkitError, match=r"another `fab fetch` into .* is running"):
        laptop.fetch()
