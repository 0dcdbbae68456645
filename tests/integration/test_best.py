"""Test `checkpoint.best_every_updates`: the weights that did best on held-out data are kept too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny import Trained, train

SETTINGS = [
    "checkpoint.best_every_updates=2",
    "sft.max_updates=8",
    "reward.max_updates=8",
    "ppo.max_updates=8",
    "ppo.ppo_epochs=2",
]
METRICS = {1: "perplexity", 2: "reward_accuracy", 3: "objective"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("best"), "best", SETTINGS)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_best_of_all_that_was_measured_is_kept(run: Trained, step: int) -> None:
    kept = [(e["update"], e["value"]) for e in run.events("checkpoint", step) if "metric" in e]
    assert {e["metric"] for e in run.events("checkpoint", step) if "metric" in e} == {METRICS[step]}
    output = [
        re.fullmatch(r"held-out ([a-z ]+) at update (\d+): (\S+) \(best: \S+ at update \d+\)", e["doing"])
        for e in run.events("progress", step)
    ]
    others = [(int(words[2]), float(words[3])) for words in output if words]
    measured = dict([*kept, *others])
    assert sorted(measured) == [2, 4, 6, 8]  # the last weights too
    best = min(measured.values()) if step == 1 else max(measured.values())
    assert kept[-1][1] == pytest.approx(best, rel=1e-5)
    found, last = run.weights(step, "best"), run.weights(step)
    is_last = all(found[key].equal(tensor) for key, tensor in last.items())
    assert found.keys() == last.keys() and is_last == (kept[-1][0] == 8)
    assert {file.name for file in run.dir.step(step).best.iterdir()} == {
        file.name for file in run.dir.step(step).model.iterdir()
    } - {"reward_scale.json"}


def test_measuring_changes_nothing(run: Trained, tmp_path: Path) -> None:
    plain = train(tmp_path, "plain", SETTINGS[1:])
    for step in (1, 2, 3):
        assert all(plain.weights(step)[key].equal(tensor) for key, tensor in run.weights(step).items())
