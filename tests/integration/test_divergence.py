"""Training that has gone to NaN ends with an error, never with a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.run_dir import RunDir
from tests import launcher, tiny

WILD = {
    1: ["sft.learning_rate=1e30", "sft.max_grad_norm=1e30"],
    2: ["reward.learning_rate=1e30", "reward.max_grad_norm=1e30"],
    3: ["ppo.actor_learning_rate=1e30", "ppo.critic_learning_rate=1e30", "ppo.max_grad_norm=1e30"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps 1 and 2 went well."""
    folder = tmp_path_factory.mktemp("divergence")
    tiny.train(folder, "well", steps=["1", "2"])
    return folder


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_diverged_step_stops_with_the_update_and_the_knobs_and_leaves_no_model(
    folder: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--job", str(folder / "job.yaml"), "--step", str(step), "--run", f"wild-{step}"]
    words += ["--from", "well"] if step > 1 else []
    assert launcher.train(tiny.words_of(folder, words, WILD[step]), folder / "cache") == 4
    error = capsys.readouterr().err
    assert f"step {step} diverged at update " in error
    assert "learning rate" in error
    run = RunDir(folder / "runs" / f"wild-{step}")
    assert not run.step(step).model.exists()
    assert not run.step(step).complete.exists()
