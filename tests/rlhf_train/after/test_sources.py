"""Test which model a word names: runs, steps, folders, names of the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from jobs.errors import ToolkitError
from jobs.run_dir import RunDir
from rlhf_train.after.sources import Source, find_source, find_sources
from tests import tiny
from tests.raw_events import event

pytestmark = pytest.mark.pinned


def make_run(runs: Path, name: str, *complete: int, best: int = 0, at: float = 0.0) -> RunDir:
    """A run whose steps `complete` are so, and whose step `best` has only its best so far."""
    run = RunDir(runs / name)
    run.path.mkdir(parents=True)
    run.events.touch()
    for step in complete:
        run.step(step).model.mkdir(parents=True)
        run.step(step).complete.write_text("{}")
    if best:
        run.step(best).best.mkdir(parents=True)
        (run.step(best).best / "config.json").write_text("{}")
    for file in (run.events, *run.path.glob("step*/complete.json")):
        os.utime(file, (at, at))
    return run


@pytest.mark.parametrize(
    ("complete", "best", "expected"),
    [
        ((1, 2, 3), 0, "step3/model"),
        ((1, 2), 0, "step1/model"),
        ((1, 2), 3, "step3/best"),
        ((), 1, "step1/best"),
        ((1, 3), 0, "step3/model"),
    ],
)
def test_a_run_is_its_newest_model(tmp_path: Path, complete: tuple[int, ...], best: int, expected: str) -> None:
    run = make_run(tmp_path, "demo", *complete, best=best)
    for word in ("demo", str(run.path)):
        assert find_source(word, tmp_path).model == str(run.path / expected)
    assert find_source("demo", tmp_path).title.startswith("demo, step ")


def test_without_a_word_it_is_the_newest_run_with_a_model(tmp_path: Path) -> None:
    make_run(tmp_path, "old", 1, 2, 3, at=100)
    new = make_run(tmp_path, "new", 1, at=200)
    make_run(tmp_path, "empty", 2, at=300)
    assert find_source(None, tmp_path).model == str(new.step(1).model)


def test_runs_that_were_fetched_from_a_box(tmp_path: Path) -> None:
    """They lie one level deeper. Inside a run, no other is looked for."""
    make_run(tmp_path, "demo", 1, at=200)
    fetched = make_run(tmp_path, "gpu-box/demo", 1, 2, 3, at=100)
    make_run(tmp_path, "demo/copy", 1, at=400)
    assert find_source("gpu-box/demo", tmp_path).model == str(fetched.step(3).model)
    assert find_source(None, tmp_path).model == str(tmp_path / "demo/step1/model")
    (tmp_path / "a file").touch()
    newer = make_run(tmp_path, "second-box/kl 05", 1, at=300)
    assert find_source(None, tmp_path).run == newer
    with pytest.raises(ToolkitError, match="no run `kl`") as caught:
        find_source("kl", tmp_path)
    assert caught.value.why.endswith(": demo, gpu-box/demo, second-box/kl 05")


def test_a_run_without_a_model_says_how_far_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, "young")
    with pytest.raises(ToolkitError, match="`young` has no model") as caught:
        find_source("young", tmp_path)
    assert caught.value.why == "none of its steps has begun"
    lines = [event("plan", 1, updates=400), event("metrics", 1, update=40)]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ToolkitError) as caught:
        find_source("young", tmp_path)
    assert caught.value.why == "step 1 (supervised fine-tuning) is at update 40 of 400"


def test_no_run_and_no_model(tmp_path: Path) -> None:
    make_run(tmp_path, "demo", 1)
    with pytest.raises(ToolkitError, match="no run `deno`") as caught:
        find_source("deno", tmp_path)
    assert caught.value.why.endswith(": demo")
    with pytest.raises(ToolkitError, match="no model to talk to") as caught:
        find_source(None, tmp_path / "nowhere")
    assert "make demo" in caught.value.hint


@pytest.mark.parametrize("word", ["", " "])
def test_an_empty_word_is_not_the_working_directory(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "demo", 1)
    monkeypatch.chdir(tmp_path / "demo")
    with pytest.raises(ToolkitError, match="the model has no name"):
        find_source(word, tmp_path)


def test_folders_and_names_of_the_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", 1, 2, 3)
    inside = find_source(str(run.step(1).model), tmp_path)
    assert (inside.model, inside.run) == (str(run.step(1).model), run)
    other = tmp_path / "other"
    other.mkdir()
    assert find_source(str(other), tmp_path).run is None
    assert find_source("facebook/opt-350m", tmp_path) == Source("facebook/opt-350m", "facebook/opt-350m")


def test_two_to_compare(tmp_path: Path) -> None:
    run = make_run(tmp_path, "demo", 1, 2, 3)
    make_run(tmp_path, "kl05", 1)
    base = find_source("demo", tmp_path)
    chosen = find_sources("step1, step3", base, tmp_path)
    assert [source.model for source in chosen] == [str(run.step(1).model), str(run.step(3).model)]
    assert [source.run and source.run.name for source in find_sources("step3,kl05", base, tmp_path)] == ["demo", "kl05"]
    for words, reason in (("step1", "two models"), ("step1,step2", "makes no model that answers"),
                          ("step1,step9", "makes no model that answers")):  # fmt: skip
        with pytest.raises(ToolkitError, match=reason):
            find_sources(words, base, tmp_path)
    with pytest.raises(ToolkitError, match="of which run"):
        find_sources("step1,step3", Source("x", "x"), tmp_path)
    with pytest.raises(ToolkitError, match="has no model yet"):
        find_sources("step1,step3", find_source("kl05", tmp_path), tmp_path)


def test_a_model_of_ones_own_in_place_of_step_1(tmp_path: Path) -> None:
    run = make_run(tmp_path, "own", 3)
    job = tiny.job(Path("rows")) | {"critic": {"model": "facebook/opt-125m"}}
    job["actor"] = {"model": "facebook/opt-125m", "sft_model": "facebook/opt-350m"}
    run.job_file.write_text(yaml.safe_dump(job))
    first, _ = find_sources("step1,step3", find_source("own", tmp_path), tmp_path)
    assert first.model == "facebook/opt-350m" and first.run == run
