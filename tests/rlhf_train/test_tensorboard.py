"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.events import RawEvent
from jobs.run_dir import RunDir
from rlhf_train.tensorboard import TensorBoardFile
from tests.raw_events import PPO, SFT, event, sample


def written(folder: Path, events: Sequence[RawEvent]) -> list[str]:
    """Write events as the launcher does, and return what was said."""
    said: list[str] = []
    board = TensorBoardFile(RunDir(folder), said.append)
    for each in events:
        board.feed(each)
    board.close()
    return said


def read(folder: Path, step: int) -> Any:
    found = EventAccumulator(
        str(RunDir(folder).tensorboard / f"step{step}"), size_guidance={"scalars": 0, "tensors": 0}
    )
    return found.Reload()


def scalars(folder: Path, step: int, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in read(folder, step).Scalars(name)]


def losses(*points: tuple[int, float]) -> list[RawEvent]:
    return [SFT | {"update": update, "loss": loss} for update, loss in points]


def test_each_metric_is_a_scalar_of_its_step(tmp_path: Path) -> None:
    assert (
        written(tmp_path, [*losses((1, 3.5), (2, 2.25)), PPO, event("progress", 3, doing="x"), event("new", 9)]) == []
    )
    assert scalars(tmp_path, 1, "loss") == [(1, 3.5), (2, 2.25)]
    assert scalars(tmp_path, 1, "grad_norm") == [(1, 1.25), (2, 1.25)]
    assert scalars(tmp_path, 3, "kl") == [(120, pytest.approx(0.0321))]
    assert scalars(tmp_path, 3, "kl_coef") == [(120, pytest.approx(0.1))]  # which the panel does not show
    assert "loss" not in read(tmp_path, 3).Tags()["scalars"]
    (at,) = {round(each.wall_time) for each in read(tmp_path, 1).Scalars("loss")}
    assert at == 1736078400  # 2025-01-05T12:00:00Z


def test_what_is_not_finite_stays(tmp_path: Path) -> None:
    written(tmp_path, [SFT | {"loss": "inf"}])
    assert scalars(tmp_path, 1, "loss") == [(1, float("inf"))]


def test_a_resume_replaces_what_it_makes_again_in_its_step_alone(tmp_path: Path) -> None:
    written(tmp_path, [PPO, *losses((1, 5.0), (2, 4.0), (3, 3.0))])
    written(tmp_path, [event("resumed", 1, from_update=1), *losses((2, 4.5), (3, 3.5), (4, 2.5))])
    assert scalars(tmp_path, 1, "loss") == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.5)]
    assert scalars(tmp_path, 3, "kl") == [(120, pytest.approx(0.0321))]


def test_an_answer_is_a_text_that_stays_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, [sample("after", "# no title <b>\n你好", reward=1.5, place=2)])
    (text,) = read(tmp_path, 3).Tensors("answers after/2")
    shown = text.tensor_proto.string_val[0].decode()
    assert "    # no title <b>\n    你好" in shown and "reward 1.50" in shown and "    Human: hi" in shown
    assert all(line.startswith("    ") for line in shown.split("\n"))


def test_it_never_harms_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    (said,) = written(tmp_path, losses((1, 1.0), (2, 1.0)))
    assert said.startswith("TensorBoard's file could not be written: ")
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    (said,) = written(tmp_path / "other", losses((1, 1.0), (2, 1.0)))
    assert "record_writer" in said


def test_a_step_s_first_event_puts_all_that_came_before_on_disk(tmp_path: Path) -> None:
    """The file is not closed: the launcher closes it at the end of the last step alone."""
    board = TensorBoardFile(RunDir(tmp_path), lambda what: None)
    for each in losses((1, 3.0), (2, 2.0)):
        board.feed(each)
    assert scalars(tmp_path, 1, "loss") == [(1, 3.0)]
    board.feed(PPO)
    assert scalars(tmp_path, 1, "loss") == [(1, 3.0), (2, 2.0)]
    assert scalars(tmp_path, 3, "kl_coef") == [(120, pytest.approx(0.1))]


def test_a_damaged_event_is_left_out(tmp_path: Path) -> None:
    assert len(written(tmp_path, [*losses((1, 2.0)), SFT | {"loss": "much"}, *losses((3, 1.0))])) == 1
    assert scalars(tmp_path, 1, "loss") == [(1, 2.0), (3, 1.0)]


def test_the_composed_command_serves_the_runs(tmp_path: Path) -> None:
    """The command of docker-compose.yml, but for folder, address and port."""
    written(tmp_path / "demo", losses((1, 3.5), (2, 2.25)))
    compose = (Path(__file__).parents[2] / "docker-compose.yml").read_text(encoding="utf-8")
    (words,) = re.findall(r"entrypoint: \[/opt/entrypoint, (tensorboard, .*)\]", compose)
    program, *arguments = words.replace('"', "").split(", ")
    ours = {"/app/runs": str(tmp_path), "0.0.0.0": "127.0.0.1", "6006": "0"}
    assert ours.keys() <= {*arguments}
    command = [str(Path(sys.executable).with_name(program)), *(ours.get(word, word) for word in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            urls = (re.search(r"http://127\.0\.0\.1:[0-9]+/", line) for line in server.stdout)
            url = next(found[0] for found in urls if found)
            run = "demo/tensorboard/step1"
            points = answer(f"{url}data/plugin/scalars/scalars?run={run}&tag=loss")
            assert [point[1:] for point in points] == [[1, 3.5], [2, 2.25]]
            assert "loss" in answer(f"{url}data/plugin/scalars/tags")[run]
        finally:
            server.kill()


def test_the_command_for_a_box_with_docker_is_the_composed_one() -> None:
    """But for the programs around it: the image is called without compose and its variables."""
    root = Path(__file__).parents[2]
    compose = (root / "docker-compose.yml").read_text(encoding="utf-8")
    (words,) = re.findall(r"entrypoint: \[/opt/entrypoint, (tensorboard, .*)\]", compose)
    program, *arguments = words.replace('"', "").split(", ")
    text = (root / "docs/after-training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^(docker run .*)$", text, re.MULTILINE)
    said = shlex.split(line)
    assert said[-len(arguments) :] == arguments and said[said.index("--entrypoint") + 1] == program
    assert "/opt/venv/bin:$PATH" in (root / "docker/Dockerfile").read_text(encoding="utf-8")  # where the program is
    (image,) = re.findall(r"docker images -q ([a-z-]+) ", line)
    assert f"image: {image}:${{RLHF_TAG" in compose
    assert {"-v", "$PWD/runs:/app/runs:ro", "-p", "127.0.0.1:6006:6006", "$(id -u):$(id -g)"} <= {*said}


def answer(url: str) -> Any:
    """Return what TensorBoard answers, which reads its files in the background."""
    for attempt in range(200):
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            assert error.code in (404, 400) and attempt < 199, error.read()
            time.sleep(0.1)
    raise AssertionError
