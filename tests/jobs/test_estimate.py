"""Estimates against what was measured: docs/speed.md, and the events of runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from env.settings import Cards
from jobs.estimate import (
    GIB,
    Models,
    StepRows,
    card_speed,
    disk_bytes,
    fit_step,
    memory_of,
    slots_of,
    step_time,
    update_seconds,
    updates_of,
)
from jobs.model_shape import shape_of
from jobs.spec import Job, load_job

OPT_13B = {"model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24}
OPT_13B |= {"num_attention_heads": 32, "word_embed_proj_dim": 2048, "vocab_size": 50272}
OPT_350M = {"model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24}
OPT_350M |= {"num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False, "vocab_size": 50272}
MODELS = Models(shape_of(OPT_13B), shape_of(OPT_350M))
FULL = StepRows(2048, 256, 256, 512)
REAL = StepRows(2048, 130, 48, 507)
H200, _ = card_speed(Cards.load(), "h200")


@dataclass(frozen=True)
class Place:
    """A placement, without PyTorch."""

    ranks: int = 1
    micro_batches: tuple[int, int, int] = (32, 16, 64)
    actor_zero_stage: int = 1
    critic_zero_stage: int = 1
    rollout_micro_batch: int = 256
    precision: str = "bfloat16"
    device: str = "cuda"


def job(*settings: str, batches: tuple[int, int, int] = (32, 16, 256)) -> Job:
    sft, reward, ppo = batches
    sizes = [f"sft.global_batch={sft}", f"reward.global_batch={reward}", f"ppo.global_batch={ppo}"]
    return load_job("opt-1.3b", [*sizes, f"ppo.rollout_batch={ppo}", "data.eval_rows=8", *settings])


LORA = "actor.lora={rank: 128}"
CHECKPOINTING = "hardware.gradient_checkpointing=true"
TWO = Place(2, (16, 8, 64))


# GiB of tensors at the peak, and seconds of an update: docs/speed.md, "Two GPUs of one box".
@pytest.mark.parametrize(
    ("step", "what", "place", "gib", "seconds"),
    [
        (1, job(), Place(), 37.3, 0.243),
        (2, job(), Place(), 13.4, 0.082),
        (3, job(), Place(), 89.5, 4.90),
        (1, job(), TWO, 20.0, 0.137),
        (1, job(batches=(64, 16, 256)), replace(TWO, micro_batches=(32, 16, 64)), 30.0, 0.245),
        (2, job(), TWO, 7.1, 0.063),
        (2, job(batches=(32, 32, 256)), replace(TWO, micro_batches=(32, 16, 64)), 11.6, 0.082),
        (3, job(), TWO, 68.0, 2.66),
        (3, job(batches=(32, 16, 512)), TWO, 80.0, 4.95),
        (1, job(), replace(TWO, actor_zero_stage=2), 20.4, 0.142),
        (1, job(), replace(TWO, actor_zero_stage=3), 23.0, 0.370),
        (2, job(), replace(TWO, critic_zero_stage=2), 8.0, None),  # 0.077 to 0.141 s
        (2, job(), replace(TWO, critic_zero_stage=3), 8.6, 0.331),
        (1, job(LORA), Place(), 24.4, 0.219),
        (3, job(LORA), Place(), 74.7, 4.99),
        (1, job(LORA), replace(TWO, actor_zero_stage=0), 13.6, None),  # 0.150 s; 0.108 s are said
    ],
)
def test_one_and_two_h200(step: int, what: Job, place: Place, gib: float, seconds: float | None) -> None:
    memory = memory_of(what, step, MODELS, place, FULL)
    assert (memory.peak - memory.held["CUDA"]) / GIB == pytest.approx(gib, rel=0.1)
    if seconds is not None:
        assert update_seconds(what, step, MODELS, place, FULL, H200) == pytest.approx(seconds, rel=0.25)


def test_short_answers_on_an_h200() -> None:
    """256 prompts and answers of 130 and 48 tokens in the mean took 1.84 s: docs/speed.md."""
    assert update_seconds(job(), 3, MODELS, Place(), REAL, H200) == pytest.approx(1.84, rel=0.25)


# GiB in use on each of two cards, with contexts and buffers: docs/speed.md, "Two cards of 24 GB".
@pytest.mark.parametrize(
    ("step", "settings", "micro_batch", "gib"),
    [
        (1, [], 8, 22.0),
        (2, [], 8, 10.5),
        (1, [LORA, CHECKPOINTING], 4, 6.3),
        (3, [LORA, CHECKPOINTING], 4, 16.3),
    ],
)
def test_two_cards_of_24_gb(step: int, settings: list[str], micro_batch: int, gib: float) -> None:
    place = Place(2, (micro_batch,) * 3, rollout_micro_batch=64)
    memory = memory_of(job(*settings, batches=(128, 64, 64)), step, MODELS, place, FULL)
    assert memory.peak / GIB == pytest.approx(gib, rel=0.1)


CPU = Place(1, (16, 16, 16), 0, 0, 64, "float32", "cpu")


# MiB of all processes together at the peak of a run on a CPU: docs/estimates.md.
@pytest.mark.parametrize(
    ("step", "width", "layers", "longest", "mib"),
    [(1, 96, 3, 75, 615), (2, 96, 3, 62, 616), (3, 96, 3, 75, 661), (1, 512, 8, 75, 1891)],
)
def test_all_processes_of_a_cpu(step: int, width: int, layers: int, longest: int, mib: int) -> None:
    fields = {"model_type": "opt", "hidden_size": width, "num_hidden_layers": layers, "ffn_dim": 4 * width}
    fields |= {"word_embed_proj_dim": width, "max_position_embeddings": 128, "vocab_size": 768 if width == 96 else 600}
    shape, sizes = shape_of({**fields, "num_attention_heads": 4}), ["sft.global_batch=32", "data.eval_rows=16"]
    what, rows = load_job("demo", sizes), StepRows(162, 24.0, 18.0, longest)
    assert memory_of(what, step, Models(shape, shape), CPU, rows).peak / 2**20 == pytest.approx(mib, rel=0.2)


def test_what_does_not_fit_is_tried_smaller_as_the_run_does() -> None:
    """Step 3 of the full recipe ran out of memory on two cards of 24 GB, 64 answers at once."""
    what, place = job(batches=(128, 64, 64)), Place(2, (8, 8, 8), rollout_micro_batch=64)
    assert memory_of(what, 3, MODELS, place, FULL).peak > 24 * GIB
    fit = fit_step(what, 3, MODELS, place, FULL, 24 * GIB)
    assert fit.is_smaller and (fit.micro_batch, fit.slots) != (8, 64)
    assert not fit_step(what, 3, MODELS, place, FULL, 8 * GIB).fits
    whole = fit_step(what, 3, MODELS, place, FULL, 80 * GIB)
    assert (whole.micro_batch, whole.slots, whole.fits, whole.is_smaller) == (8, 64, True, False)


def test_the_cache_is_no_larger_than_the_prompts_at_once() -> None:
    place = Place(2, rollout_micro_batch=256)
    # 256 answers set the scale of the rewards, 128 of each rank; a rollout has 32 of each.
    assert slots_of(job(batches=(128, 64, 64)), place, FULL) == 128
    assert slots_of(job(batches=(128, 64, 64)), place, replace(FULL, count=40)) == 32


@pytest.mark.parametrize(
    ("step", "settings", "rows", "updates"),
    [
        (1, [], 100, 4),  # 100 rows in batches of 32
        (1, ["sft.epochs=2.5"], 100, 8),
        (1, ["sft.max_updates=3"], 100, 3),
        (2, [], 3, 1),
        # 2 rollouts of 256 for 300 prompts; each has 2 epochs of 256 / 64 updates.
        (3, ["ppo.global_batch=64", "ppo.ppo_epochs=2"], 300, 16),
        (3, ["ppo.global_batch=64", "ppo.max_updates=5"], 300, 5),
        (3, [], None, None),
    ],
)
def test_updates(step: int, settings: list[str], rows: int | None, updates: int | None) -> None:
    assert updates_of(job(*settings), step, rows) == updates


def test_a_step_takes_its_updates_and_its_start() -> None:
    known = step_time(job(), 1, MODELS, Place(), FULL, H200)
    assert known.updates == 64 and known.seconds == known.fixed_s + 64 * known.update_s
    assert step_time(job(), 1, MODELS, Place(), replace(FULL, count=None), H200).seconds is None


def test_disk_by_hand() -> None:
    """In step 3: two models, and two checkpoints of actor and critic with two moments each."""
    fields = {"model_type": "opt", "hidden_size": 96, "word_embed_proj_dim": 96, "num_hidden_layers": 3}
    shape = shape_of({**fields, "ffn_dim": 384, "max_position_embeddings": 128, "vocab_size": 768})
    layer = 4 * (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96) + 2 * (96 + 96)
    count = 768 * 96 + 130 * 96 + 3 * layer + (96 + 96)
    needed = count * 4 + (count + 96) * 4 + 2 * 12 * (count + count + 96)
    assert disk_bytes(load_job("demo"), [1, 2, 3], Models(shape, shape), "float32") == needed


def test_a_card_that_nobody_measured_is_said_to_be_so() -> None:
    cards = Cards.load()
    measured = {name for name in cards.cards if card_speed(cards, name)[0].is_measured}
    assert measured == {"h200"}
    speed, memory = card_speed(cards, "rtx-4090")
    assert speed.matmul == pytest.approx(0.68 * 165.2e12) and memory / GIB == pytest.approx(0.97 * 24)


def test_a_smaller_micro_batch_takes_what_it_would_take_if_it_were_planned() -> None:
    """Of 64 rows a rank: 7, 6 and 5 do not divide them, so 4 comes after 8."""
    what, planned = job(batches=(128, 64, 64)), Place(2, (8, 8, 8))
    room = memory_of(what, 1, MODELS, Place(2, (4, 8, 8)), FULL).peak
    fit = fit_step(what, 1, MODELS, planned, FULL, room)
    assert (fit.micro_batch, fit.memory.peak, fit.fits, fit.is_smaller) == (4, room, True, True)
