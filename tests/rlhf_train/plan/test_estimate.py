"""The facts that an estimate starts from: rows, models, and this machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import ExitCode, ToolkitError
from jobs.estimate import StepRows
from jobs.spec import Job, load_job
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.plan.estimate import (
    cpu_speed,
    expected_times,
    known_models,
    models_of,
    relief,
    rows_of_table,
    rows_of_texts,
)
from rlhf_train.plan.placement import Placement

PLACE = Placement("cpu", "", 1, "float32", 0, 0, (16, 16, 16), 64, 1)


def ragged(*lengths: int) -> Ragged:
    return Ragged.of([[7] * length for length in lengths])


def table() -> Table:
    """Three rows; step 1 has the first two, step 2 the last two, step 3 the last."""
    prompt, chosen, rejected = ragged(10, 20, 30), ragged(5, 7, 9), ragged(6, 6, 12)
    orders = {1: np.array([0, 1]), 2: np.array([1, 2]), 3: np.array([2])}
    return Table(prompt, ragged(4, 8, 1), chosen, rejected, orders, {"rows": 3})


def demo(*settings: str) -> Job:
    return load_job("demo", [*settings, "data.max_response_tokens=36"])


def test_the_rows_of_a_table() -> None:
    assert rows_of_table(table(), demo(), 1) == StepRows(2, 15.0, 6.0, 28)
    assert rows_of_table(table(), demo(), 2) == StepRows(2, 25.0, (7 + 9 + 6 + 12) / 4, 42)
    assert rows_of_table(table(), demo(), 3) == StepRows(1, 30.0, 9.0, 30 + 36)  # answers may get as long


def test_a_plan_s_estimate_has_the_steps_to_come() -> None:
    found = expected_times(demo(), [1, 3], PLACE, table())
    # 10 epochs of 2 rows are one batch of 32; 10 of a prompt one rollout, learned from 4 times.
    assert found is not None and [found[step]["updates"] for step in ("1", "3")] == [1, 4]
    assert all(numbers[name] > 0 for numbers in found.values() for name in ("update_s", "fixed_s"))
    assert "2" not in found and json.loads(json.dumps(found)) == found


def test_the_rows_of_texts_are_split_as_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "p" * (34 + n), "chosen": "c" * 69, "rejected": "r"} for n in range(100)]
    for name, part in (("train", rows), ("test", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    found = rows_of_texts(demo(f"data.datasets=[{tmp_path}]", "data.split=[1,1,2]"))
    assert [found[step].count for step in (1, 2, 3)] == [25, 25, 50]
    assert found[1].answer == pytest.approx(69 / 3.5 + 1) and 34 / 3.5 < found[1].prompt < 135 / 3.5 + 1
    assert found[2].answer == pytest.approx((69 + 1) / 2 / 3.5 + 1)
    unread = rows_of_texts(demo("data.datasets=[some/hub-name]"))
    assert unread[1] == StepRows(None, 64, 36, 100)


@pytest.mark.parametrize("name", ["./no-config", "./nothing"])
def test_without_a_config_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-config").mkdir()
    with pytest.raises(ToolkitError) as caught:
        known_models(demo(f"actor.model={name}"))
    assert caught.value.exit_code == ExitCode.USAGE and caught.value.hint
    assert "without the configs of its models" in caught.value.what and name in caught.value.why


def test_a_folder_s_config_is_read(tmp_path: Path) -> None:
    fields = {"model_type": "opt", "hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "vocab_size": 11}), encoding="utf-8")
    models = models_of(demo(f"actor.model={tmp_path}"))
    # Embeddings of 11 tokens and 2048 + 2 positions, one layer, the last norm.
    layer = 4 * (8 * 8 + 8) + 2 * 8 * 16 + 16 + 8 + 2 * 16
    assert models.actor.causal == models.critic.causal == (11 + 2050) * 8 + layer + 16


def test_what_would_help_is_said_with_numbers() -> None:
    config = "actor.model={config: {model_type: opt, hidden_size: 2048, ffn_dim: 8192, num_hidden_layers: 24}}"
    text = relief(demo(config, "actor.tokenizer_vocabulary=50272"), 1, PLACE)
    assert text.startswith("weights, gradients and optimizer states take 19.6 GiB a rank, ")  # 16 bytes each
    assert "\nactor.lora: {}, " in text and ": 19.6 GiB -> " in text
    # On 2 GPUs at ZeRO 3 each has half of all.
    assert "hardware.actor_zero_stage: 3 on 2 GPUs: 19.6 GiB -> 9.8 GiB" in text


def test_the_rate_of_this_cpu_is_measured() -> None:
    assert 1e8 < cpu_speed(PLACE).matmul < 1e13
