from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from jobs.events import End, EventWriter, Resumed, Sample, read_events
from jobs.run_dir import FORMAT, RunDir
from jobs.spec import Job, load_job
from rlhf_train import completion
from rlhf_train.completion import (
    begin_redo,
    begin_run,
    begin_step,
    complete_step,
    inputs_of,
    is_complete,
    needed_by,
    own_steps,
    steps_to_do,
    steps_to_take_over,
    take_over,
    update_to_resume_from,
)
from rlhf_train.disk import read_json, write_json

ALL = [1, 2, 3]


def job(*settings: str) -> Job:
    return load_job("opt-1.3b", settings)


def do(spec: Job, run: RunDir, step: int) -> None:
    """What a worker does of `step`, but for the training."""
    begin_step(spec, run, step)
    run.step(step).model.mkdir()
    (run.step(step).model / "model.safetensors").write_text(f"weights of step {step} in {run.name}", encoding="utf-8")
    end = End(step=step, updates=4, seconds=1.5, model=str(run.step(step).model))
    EventWriter(run.events)(end)
    complete_step(run, step, asdict(end))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "one")


def refused(spec: Job, run: RunDir, wanted: list[int], *, redo: bool = False) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        steps_to_do(spec, run, wanted, redo=redo)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


# --- which steps ---


def test_which_steps_a_step_needs() -> None:
    assert [needed_by(job(), step) for step in ALL] == [[], [], [1, 2]]
    assert [needed_by(job("critic.model=actor"), step) for step in ALL] == [[], [1], [1, 2]]


OWN = ("actor.sft_model=my/sft", "critic.reward_model=my/rm")


def test_models_of_ones_own_need_no_step(run: RunDir) -> None:
    assert needed_by(job(*OWN), 3) == [] and steps_to_do(job(*OWN), run, [3], redo=False) == [3]
    assert needed_by(job("critic.model=actor", OWN[0]), 2) == []
    # The other of the two comes from the run.
    assert needed_by(job(OWN[0]), 3) == [2] and needed_by(job(OWN[1]), 3) == [1]
    assert "needs the model of step 1 (supervised fine-tuning)\n" in str(refused(job(OWN[1]), run, [3]))
    do(job(), run, 1)
    assert steps_to_do(job(OWN[1]), run, [3], redo=False) == [3]


def test_another_model_of_ones_own_is_a_changed_field(run: RunDir) -> None:
    do(job(*OWN), run, 3)
    assert steps_to_do(job(*OWN), run, [3], redo=False) == []
    why = refused(job(OWN[0], "critic.reward_model=other/rm"), run, [3]).why
    assert why == "critic.reward_model: my/rm -> other/rm"
    assert "actor.sft_model: my/sft -> not set" in refused(job(OWN[1]), run, [3]).why


def test_a_result_counts_that_was_made_before_a_model_took_a_steps_place(run: RunDir, tmp_path: Path) -> None:
    """Step 2 began from step 1's model. Step 3 may have its result, but step 2 does not resume."""
    plain, own = job("critic.model=actor"), job("critic.model=actor", OWN[0])
    do(plain, run, 1)
    do(plain, run, 2)
    assert steps_to_do(own, run, [3], redo=False) == [3]
    assert "actor.sft_model: not set -> my/sft" in refused(own, run, [2, 3]).why
    assert "reward.epochs: 1.0 -> 2.0" in refused(job("critic.model=actor", OWN[0], "reward.epochs=2"), run, [3]).why
    new = RunDir(tmp_path / "runs" / "new")
    assert steps_to_take_over(own, run, new) == [2]  # and not step 1, which nothing needs
    begin_step(plain, new, 2)
    assert not begin_step(own, new, 2)


def test_whose_place_the_models_of_the_flags_take(run: RunDir) -> None:
    flags = {1: "facebook/opt-1.3b", 2: "my/rm"}
    assert own_steps(flags, [3], [run]) == [1, 2] and own_steps(flags, [2, 3], [run]) == [1]
    assert own_steps(flags, ALL, [run]) == own_steps(flags, [1], [run]) == own_steps({1: "actor"}, [3], [run]) == []
    # A call for each step, all with the same flags: a step that began with a model is named again.
    begin_step(job(), run, 1)
    assert own_steps(flags, [3], [run]) == [2] and own_steps(flags, [3], [RunDir(run.path / "other"), run]) == [2]
    assert own_steps({1: "my/sft"}, [3], [run]) == [1]


def test_an_empty_run_has_all_to_do_and_is_not_made(run: RunDir) -> None:
    assert steps_to_do(job(), run, ALL, redo=False) == ALL
    assert steps_to_do(job(), run, [2], redo=False) == [2]
    assert not run.path.exists()


def test_complete_steps_are_skipped(run: RunDir) -> None:
    do(job(), run, 1)
    assert steps_to_do(job(), run, ALL, redo=False) == [2, 3]
    do(job(), run, 2)
    assert steps_to_do(job(), run, [3], redo=False) == [3]
    do(job(), run, 3)
    assert steps_to_do(job(), run, ALL, redo=False) == []


def newer(run: RunDir, number: object = FORMAT + 1) -> None:
    """Make it a folder of a version to come, which has written other things into its files."""
    write_json(run.format, number)
    for step in ALL:
        if run.step(step).path.exists():
            write_json(run.step(step).fields, [step])


def test_a_run_that_begins_has_a_format_number(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    begin_run(run)
    assert run.format.read_text(encoding="utf-8") == "2\n" and FORMAT == 2
    begin_run(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["format", "id"]


def test_a_run_keeps_its_id_and_another_one_has_another(run: RunDir) -> None:
    ids = []
    for other in (run, RunDir(run.path.with_name("other"))):
        other.path.mkdir(parents=True)
        begin_run(other)
        ids.append(other.id.read_text(encoding="utf-8"))
        do(job(), other, 1)
        begin_redo(other, [1])
        begin_run(other)
        assert other.id.read_text(encoding="utf-8") == ids[-1]
    assert ids[0] != ids[1] and all(re.fullmatch(r"[0-9a-f]{16}\n", each) for each in ids)


@pytest.mark.parametrize("number", [None, 1])
def test_a_run_of_format_1_keeps_its_results_and_does_not_resume_a_step(run: RunDir, number: int | None) -> None:
    do(job(), run, 1)
    begin_step(job(), run, 2)
    if number is not None:
        write_json(run.format, number)
    assert steps_to_do(job(), run, ALL, redo=False) == [2, 3]  # nothing was learned in step 2
    half = run.step(2).checkpoint(4)
    half.mkdir(parents=True)
    (half / "complete.json").touch()
    error = refused(job(), run, ALL)
    assert error.what == "run `one` began step 2 with an older version, which learned otherwise"
    assert "`--redo --step 2`" in error.hint and "`--run NEW`" in error.hint
    assert steps_to_do(job(), run, [2], redo=True) == [2]
    begin_run(run)
    assert read_json(run.format) == FORMAT and is_complete(run, 1) and begin_step(job(), run, 2)
    assert steps_to_do(job(), run, ALL, redo=False) == [2, 3]


def test_a_result_counts_that_was_made_before_a_field_was_there(run: RunDir) -> None:
    do(job(), run, 1)
    do(job(), run, 3)
    for step in (1, 3):
        fields = read_json(run.step(step).fields)
        new = {name for name in fields if name.endswith((".eps", ".critic_warmup_updates"))}
        assert "sft.eps" in new
        write_json(run.step(step).fields, {name: value for name, value in fields.items() if name not in new})
    assert steps_to_do(job(), run, [1], redo=False) == []
    assert refused(job(), run, [3]).why == "ppo.eps: 1e-08 -> 1e-05"
    assert steps_to_do(job("ppo.eps=1e-8"), run, [3], redo=False) == []


@pytest.mark.parametrize("number", [3, 99, 0, "new", [1]])
def test_a_run_of_an_unknown_format_is_refused(run: RunDir, number: object) -> None:
    do(job(), run, 1)
    newer(run, number)
    error = refused(job(), run, [2, 3])
    assert error.what == "run `one` was written by a newer version"
    assert error.why == f"{run.format} says format {number}; this version knows formats up to 2"
    assert "`--run NEW`" in error.hint and "`--redo --step 1,2,3`" in error.hint
    assert refused(job(), run, [2, 3], redo=True).what == error.what  # step 1 would stay as it is


def test_to_do_all_of_a_newer_run_again_leaves_nothing_of_it(run: RunDir) -> None:
    do(job(), run, 1)
    begin_step(job(), run, 2)
    run.step(2).checkpoint(4).mkdir(parents=True)
    run.tokenizer.mkdir()
    begin_redo(run, ALL)
    write_json(run.redo, {"all": True})
    newer(run)
    assert steps_to_do(job(), run, ALL, redo=True) == ALL
    assert is_complete(run, 1) and run.step(2).checkpoint(4).exists()  # only looked at
    begin_run(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["events.jsonl", "format", "id", "job"]
    assert read_json(run.format) == FORMAT
    assert list((run.path / "job").iterdir()) == [] and steps_to_do(job(), run, ALL, redo=True) == ALL


def test_nothing_is_taken_over_from_a_newer_run(run: RunDir, tmp_path: Path) -> None:
    do(job(), run, 1)
    newer(run)
    with pytest.raises(ToolkitError, match="newer version") as caught:
        steps_to_take_over(job(), run, RunDir(tmp_path / "runs" / "two"))
    assert caught.value.exit_code == ExitCode.USAGE and "without --from" in caught.value.hint


def test_redo_does_what_is_wanted_and_nothing_else(run: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    assert steps_to_do(job(), run, [2], redo=True) == [2]
    assert steps_to_do(job(), run, ALL, redo=True) == ALL


def test_a_step_that_was_begun_is_not_complete(run: RunDir) -> None:
    begin_step(job(), run, 1)
    assert not is_complete(run, 1)
    run.step(1).model.mkdir()
    assert not is_complete(run, 1)
    complete_step(run, 1, {})
    assert is_complete(run, 1)
    shutil.rmtree(run.step(1).model)
    assert not is_complete(run, 1)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 1', b"\0\0\0\0", b"\xff\xfe"])
def test_a_torn_mark_is_no_mark(run: RunDir, torn: bytes) -> None:
    do(job(), run, 1)
    run.step(1).complete.write_bytes(torn)
    assert not is_complete(run, 1)
    assert steps_to_do(job(), run, [1], redo=False) == [1]


def test_settings_that_are_torn_count_only_for_a_step_that_is_complete(run: RunDir) -> None:
    do(job(), run, 1)
    run.step(1).fields.write_bytes(b"")
    assert refused(job(), run, ALL).why == f"{run.step(1).fields} cannot be read"
    run.step(1).complete.unlink()
    assert steps_to_do(job(), run, ALL, redo=False) == ALL


def test_to_begin_forgets_the_result_and_the_tokenizer_of_the_old_rows(run: RunDir) -> None:
    do(job(), run, 1)
    do(job(), run, 2)
    run.tokenizer.mkdir()
    begin_step(job(), run, 2)
    assert run.tokenizer.exists() and not is_complete(run, 2) and is_complete(run, 1)
    begin_step(job(), run, 1)
    assert not run.tokenizer.exists() and not is_complete(run, 1)
    assert sorted(path.name for path in run.step(1).path.iterdir()) == ["fields.json"]


def test_a_step_that_was_stopped_resumes(run: RunDir) -> None:
    assert not begin_step(job(), run, 1)
    half = run.step(1).checkpoint(4)
    half.mkdir(parents=True)
    run.tokenizer.mkdir()
    assert update_to_resume_from(run, 1) == 0
    for update in (4, 12):
        run.step(1).checkpoint(update).mkdir(parents=True, exist_ok=True)
        (run.step(1).checkpoint(update) / "complete.json").touch()
    assert update_to_resume_from(run, 1) == 12
    assert begin_step(job(), run, 1)
    assert half.exists() and run.tokenizer.exists()
    run.step(1).model.mkdir()
    complete_step(run, 1, {})
    assert not run.step(1).checkpoints.exists()
    assert not begin_step(job(), run, 1)  # a redo


@pytest.mark.parametrize("settings", ["seed=7", "sft.epochs=2"])
def test_a_step_that_was_stopped_does_not_go_on_with_other_settings(run: RunDir, settings: str) -> None:
    begin_step(job(), run, 1)
    run.step(1).checkpoint(4).mkdir(parents=True)
    assert not begin_step(job(settings), run, 1)
    assert not run.step(1).checkpoints.exists()


def test_a_step_whose_settings_are_torn_starts_anew(run: RunDir) -> None:
    begin_step(job(), run, 1)
    run.step(1).fields.write_bytes(b"")
    run.step(1).checkpoint(4).mkdir(parents=True)
    assert not begin_step(job(), run, 1)
    assert not run.step(1).checkpoints.exists()


def test_how_and_when_it_is_saved_is_no_change(run: RunDir) -> None:
    begin_step(job(), run, 1)
    assert begin_step(job("checkpoint.every_minutes=5", "hardware.ranks=2", "hardware.micro_batch=1"), run, 1)


def test_what_a_step_starts_from_is_told_apart(run: RunDir) -> None:
    do(job(), run, 1)
    do(job(), run, 2)
    assert inputs_of(job(), run, 1) == inputs_of(job(), run, 2) == {}
    before = inputs_of(job(), run, 3)
    assert sorted(before) == ["1", "2"] and before["1"] != before["2"]
    do(job(), run, 2)
    assert inputs_of(job(), run, 3) == before
    write_json(run.step(2).complete, {"seconds": 2.0})  # done again: it took another time
    assert inputs_of(job(), run, 3) != before


def test_a_redo_that_was_stopped_resumes(run: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    begin_redo(run, [1, 2, 3])
    assert steps_to_do(job(), run, ALL, redo=True) == ALL
    do(job(), run, 1)
    assert steps_to_do(job(), run, ALL, redo=True) == [2, 3]  # also if the launcher is killed now
    begin_step(job(), run, 2)
    assert steps_to_do(job(), run, ALL, redo=True) == [2, 3]
    for step in (2, 3):
        do(job(), run, step)
    assert not run.redo.exists()
    assert steps_to_do(job(), run, ALL, redo=True) == ALL  # a new one


def test_a_redo_that_is_killed_while_a_step_is_marked_has_that_step_to_end(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint, of the last update, is still there."""
    for step in ALL:
        do(job(), run, step)
    begin_redo(run, [1, 2])

    def killed(path: Path, value: Any) -> None:
        if path.name == run.step(1).complete.name:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(completion, "write_json", killed)
        do(job(), run, 1)
    assert steps_to_do(job(), run, [1, 2], redo=True) == [1, 2] and begin_step(job(), run, 1)
    complete_step(run, 1, {})
    assert steps_to_do(job(), run, [1, 2], redo=True) == [2]


# --- changed settings ---


def test_a_changed_field_is_refused_with_the_difference(run: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    error = refused(job("sft.epochs=2", "sft.max_updates=7", "ppo.kl_coef=0.5", "hardware.ranks=2"), run, ALL)
    assert str(error) == (
        "error: run `one` did step 1 with other settings\n"
        "  why: sft.epochs: 1.0 -> 2.0\n"
        "       sft.max_updates: not set -> 7\n"
        "\n"
        "hint: resume with the old settings; or `--run NEW --from one` for a run of its own;\n"
        "      or `--redo --step 1,3` to do it again here"
    )
    assert refused(job("ppo.kl_coef=0.5"), run, ALL).why == "ppo.kl_coef: 0.1 -> 0.5"


def test_a_changed_field_of_a_step_that_is_needed_is_refused_too(run: RunDir) -> None:
    do(job(), run, 1)
    do(job(), run, 2)
    assert refused(job("sft.epochs=2"), run, [3]).what == "run `one` did step 1 with other settings"
    assert steps_to_do(job("ppo.kl_coef=0.5"), run, [3], redo=False) == [3]


def test_a_changed_field_of_a_step_that_is_not_wanted_does_not_matter(run: RunDir) -> None:
    do(job(), run, 1)
    assert steps_to_do(job("sft.epochs=2"), run, [2], redo=False) == [2]


def test_a_step_that_was_begun_with_other_settings_is_refused(run: RunDir) -> None:
    begin_step(job(), run, 1)
    assert refused(job("seed=7"), run, [1]).why == "seed: 1234 -> 7"


def test_redo_takes_the_new_settings_for_the_steps_it_does(run: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    assert steps_to_do(job("sft.epochs=2"), run, [1, 3], redo=True) == [1, 3]
    assert refused(job("sft.epochs=2"), run, [3], redo=True).what == "run `one` did step 1 with other settings"


# --- what is missing ---


def test_step_3_says_what_is_missing_and_how_to_get_it(run: RunDir) -> None:
    assert str(refused(job(), run, [3])) == (
        "error: step 3 (PPO) needs the model of step 1 (supervised fine-tuning) and step 2 (reward model)\n"
        f"  why: {run.path}/step1/model is not there\n"
        f"       {run.path}/step2/model is not there\n"
        "\n"
        "hint: run `--step 1 2 3` (or `--step all`),\n"
        "      or take them over from another run with `--run NEW --from RUN`,\n"
        "      or start from models of your own: actor.sft_model, critic.reward_model"
    )
    do(job(), run, 1)
    error = refused(job(), run, [3])
    assert error.what == "step 3 (PPO) needs the model of step 2 (reward model)" and "`--step 2 3`" in error.hint


def test_a_critic_from_the_actor_needs_step_1(run: RunDir) -> None:
    error = refused(job("critic.model=actor"), run, [2])
    assert error.what == "step 2 (reward model) needs the model of step 1 (supervised fine-tuning)"
    assert steps_to_do(job("critic.model=actor"), run, [1, 2], redo=False) == [1, 2]


def test_a_step_without_a_share_of_the_data_is_refused(run: RunDir) -> None:
    spec = job("data.split=[0, 5, 0.5]")
    error = refused(spec, run, ALL)
    assert (error.what, error.why) == ("step 1 (supervised fine-tuning) has no data", "data.split is 0, 5, 0.5")
    assert steps_to_do(spec, run, [2], redo=False) == [2]


# --- another run's steps ---


@pytest.fixture
def new(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "two")


def weights(run: RunDir, step: int) -> Path:
    return run.step(step).model / "model.safetensors"


def test_steps_with_the_same_settings_are_taken_over_as_links(run: RunDir, new: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    run.tokenizer.mkdir()
    spec = job("ppo.kl_coef=0.5")
    assert steps_to_take_over(spec, run, new) == [1, 2]
    assert not new.path.exists()  # asked, not done
    assert steps_to_do(spec, new, ALL, redo=False, taken=[1, 2]) == [3]
    take_over(run, new, [1, 2])
    assert [is_complete(new, step) for step in ALL] == [True, True, False]
    assert weights(new, 2).samefile(weights(run, 2)) and new.tokenizer.is_dir()
    assert steps_to_do(spec, new, ALL, redo=False) == [3]
    assert steps_to_take_over(spec, run, new) == []


def test_links_leave_the_source_as_it_was(run: RunDir, new: RunDir) -> None:
    do(job(), run, 1)
    take_over(run, new, [1])
    do(job("seed=7"), new, 1)
    assert weights(run, 1).read_text(encoding="utf-8") == "weights of step 1 in one"
    assert steps_to_do(job(), run, [1], redo=False) == []


def test_across_file_systems_files_are_copied(run: RunDir, new: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link", source)

    do(job(), run, 1)
    monkeypatch.setattr(os, "link", link)
    take_over(run, new, [1])
    assert is_complete(new, 1) and not weights(new, 1).samefile(weights(run, 1))
    assert weights(new, 1).read_text(encoding="utf-8") == weights(run, 1).read_text(encoding="utf-8")


def test_a_copy_that_breaks_off_is_no_complete_step(run: RunDir, new: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    do(job(), run, 1)
    real = os.link

    def link(source: str, target: str) -> None:
        if source.endswith("model.safetensors"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(KeyboardInterrupt):
            take_over(run, new, [1])
    assert not new.step(1).path.exists()
    assert steps_to_take_over(job(), run, new) == [1]
    take_over(run, new, [1])
    assert is_complete(new, 1) and sorted(path.name for path in new.path.iterdir()) == ["events.jsonl", "step1"]


def test_the_events_that_still_hold_come_along_and_name_the_new_model(run: RunDir, new: RunDir) -> None:
    write = EventWriter(run.events)
    write(Sample(step=3, when="before", prompt="p", response="undone", reward=0.0))
    write(Resumed(step=3, from_update=0))
    write(Sample(step=3, when="before", prompt="p", response="kept", reward=0.0))
    for step in ALL:
        do(job(), run, step)
    take_over(run, new, [1, 3])
    lines, _ = read_events(new.events)
    assert [(line["kind"], line["step"], line.get("response")) for line in lines] == [
        ("sample", 3, "kept"),
        ("end", 1, None),
        ("end", 3, None),
    ]
    assert [line["model"] for line in lines[1:]] == [str(new.step(1).model), str(new.step(3).model)]
    assert [line["seq"] for line in lines] == [0, 1, 2]


def test_own_steps_stay(run: RunDir, new: RunDir) -> None:
    for step in ALL:
        do(job(), run, step)
    do(job(), new, 1)
    begin_step(job(), new, 2)
    assert steps_to_take_over(job(), run, new) == [3]
    take_over(run, new, [3])
    assert weights(new, 1).read_text(encoding="utf-8") == "weights of step 1 in two"


def test_no_such_run(run: RunDir, new: RunDir) -> None:
    with pytest.raises(ToolkitError) as caught:
        steps_to_take_over(job(), run, new)
    assert caught.value.what == "there is no run `one`" and str(run.path) in caught.value.why


def test_nothing_to_take_over(run: RunDir, new: RunDir) -> None:
    do(job(), run, 1)
    with pytest.raises(ToolkitError, match="nothing of run `one` can be taken over"):
        steps_to_take_over(job("seed=7"), run, new)
    do(job("seed=7"), new, 1)  # once it has steps of its own, the same command resumes
    assert steps_to_take_over(job("seed=7"), run, new) == []


def test_writing_over_a_link_leaves_the_other_run_alone(tmp_path: Path) -> None:
    linked, written = tmp_path / "linked.json", tmp_path / "written.json"
    write_json(linked, {"shift": 1.0})
    written.hardlink_to(linked)
    write_json(written, {"shift": 2.0})
    assert (json.loads(linked.read_text()), json.loads(written.read_text())) == ({"shift": 1.0}, {"shift": 2.0})
