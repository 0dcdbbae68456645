"""The facts that an estimate starts from: rows, models, and this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from env.settings import Cards
from jobs.errors import ExitCode, ToolkitError
from jobs.estimate import Models, Passes, StepRows
from jobs.model_shape import shape_of
from jobs.spec import JOBS_FOLDER, Job, load_job
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.plan.estimate import (
    cpu_speed,
    estimate,
    expected_times,
    known_models,
    models_of,
    named_card,
    padded_passes,
    relief,
    rows_of_table,
    rows_of_texts,
)
from rlhf_train.plan.placement import Placement, place

PLACE = Placement("cpu", "", 1, "float32", 0, 0, (16, 16, 16), 64, 1)


def config(family: str, width: int, feed: int, layers: int, heads: int, groups: int, tokens: int) -> dict[str, object]:
    sizes = {"hidden_size": width, "intermediate_size": feed, "num_hidden_layers": layers, "vocab_size": tokens}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": groups}
    return {"model_type": family, **sizes, **heads_of, "tie_word_embeddings": True}


# The sizes in the models' config.json.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": config("qwen2", 896, 4864, 24, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": config("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen3-0.6B": {**config("qwen3", 1024, 3072, 28, 16, 8, 151936), "head_dim": 128},
    "Qwen/Qwen3-1.7B": {**config("qwen3", 2048, 6144, 28, 16, 8, 151936), "head_dim": 128},
    "meta-llama/Llama-3.2-1B-Instruct": {**config("llama", 2048, 8192, 16, 32, 8, 128256), "head_dim": 64},
    "HuggingFaceTB/SmolLM2-135M-Instruct": config("llama", 576, 1536, 30, 9, 3, 49152),
}
# Parameters as the models' pages say them.
SAID = {"0.5B": 0.49e9, "1.5B": 1.54e9, "0.6B": 0.6e9, "1.7B": 1.7e9, "3.2-1B": 1.23e9, "135M": 135e6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_are_those_of_the_models_pages(name: str) -> None:
    (said,) = (number for part, number in SAID.items() if part in name)
    assert shape_of(PUBLISHED[name]).causal == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("file", [file for file in JOBS_FOLDER.glob("*.yaml") if "--gpu" in file.read_text("utf-8")])
def test_a_job_fits_the_card_that_its_file_names(file: Path) -> None:
    """Without a second trial with smaller passes, at the longest rows that the job allows."""
    job, card = load_job(file.stem), str(re.findall(r"--gpu ([\w-]+)", file.read_text("utf-8"))[0])
    machine, target = named_card(card, 1, Cards.load())
    sources = (job.actor_source, job.critic_source)
    models = Models(*(shape_of(PUBLISHED[source]) for source in sources if isinstance(source, str)))
    made = estimate(job, (1, 2, 3), place(job, machine), models, dict.fromkeys((1, 2, 3), StepRows.unread(job)), target)
    assert [(fit.fits, fit.is_smaller) for fit in made.fits.values()] == [(True, False)] * 3


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
    assert rows_of_table(table(), demo(), 1) == StepRows(2, 15.0, 6.0, 28, (14, 28))
    assert rows_of_table(table(), demo(), 2) == StepRows(2, 25.0, (7 + 9 + 6 + 12) / 4, 42, (27, 42))
    assert rows_of_table(table(), demo(), 3) == StepRows(1, 30.0, 9.0, 30 + 36, (39,))  # answers may get as long


def test_padded_rows_are_cut_as_the_run_cuts_them() -> None:
    """Eight rows of 100 and eight of 900 tokens: in one pass 6400 more would be padding."""
    job = demo("sft.global_batch=16", "hardware.micro_batch=16")
    rows = StepRows(64, 60.0, 40.0, 900, (100,) * 32 + (900,) * 32)
    place = replace(PLACE, micro_batches=(16, 16, 16))
    assert padded_passes(job, 1, place, rows) == Passes(2, 8 * 100 + 8 * 900)
    assert padded_passes(job, 1, place, replace(rows, lengths=(100,) * 7)) == Passes(1, 16 * 100)
    assert padded_passes(job, 1, place, replace(rows, lengths=())) is None


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
    found, recognised = rows_of_texts(demo(f"data.datasets=[{tmp_path}]", "data.split=[1,1,2]"))
    assert [found[step].count for step in (1, 2, 3)] == [25, 25, 50]
    assert found[1].answer == pytest.approx(69 / 3.5 + 1) and 34 / 3.5 < found[1].prompt < 135 / 3.5 + 1
    assert found[2].answer == pytest.approx((69 + 1) / 2 / 3.5 + 1)
    assert recognised == [f"{tmp_path}: pairs of text, 100 to learn from, 2 held out"]
    unread, recognised = rows_of_texts(demo("data.datasets=[some/hub-name]"))
    assert (unread[1], recognised) == (StepRows(None, 64, 36, 100), [])


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
    speed = cpu_speed(PLACE)
    assert 1e8 < speed.matmul < 1e13 and 1e8 < speed.bandwidth < 1e13 and 1e-8 < speed.kernel < 1e-2
