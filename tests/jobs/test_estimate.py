"""Estimates against what was measured: docs/speed.md, and the events of runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from env.settings import Cards
from jobs.estimate import (
    GIB,
    Models,
    Passes,
    StepRows,
    card_speed,
    disk_bytes,
    fit_step,
    memory_of,
    rollout_seconds,
    slots_of,
    step_time,
    update_seconds,
    updates_of,
)
from jobs.model_shape import Kept, Shape, Work, shape_of
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


def test_a_judge_takes_its_weights_and_a_forward_pass_of_each_rollout() -> None:
    """OPT-1.3b as a second reward model: 1.3e9 parameters of 2 bytes, read in step 3 alone."""
    judged, place = replace(MODELS, judge=MODELS.actor), Place()
    for step in (1, 2):
        assert memory_of(job(), step, judged, place, FULL) == memory_of(job(), step, MODELS, place, FULL)
    held = [memory_of(job(), 3, models, place, FULL).held["frozen"] for models in (judged, MODELS)]
    assert (held[0] - held[1]) / 2 == pytest.approx(1.3157e9, rel=0.01)  # without the head, which is tied
    seconds = [update_seconds(job(), 3, models, place, FULL, H200) for models in (judged, MODELS)]
    # 256 rows of 512 tokens, 2 operations a token and parameter of a layer, 0.83 of the rate.
    assert seconds[0] - seconds[1] == pytest.approx(2 * 1.21e9 * 256 * 512 / (0.83 * H200.matmul), rel=0.05)


def test_without_a_critic_step_3_lacks_all_that_trains_it() -> None:
    """OPT-350m as critic: 331e6 parameters, in bfloat16 2 bytes of weights and 12 of AdamW."""
    place, groups = Place(), job("ppo.advantage=rloo", "ppo.samples_per_prompt=4")
    for step in (1, 2):
        assert memory_of(groups, step, MODELS, place, FULL) == memory_of(job(), step, MODELS, place, FULL)
    with_critic, without = (memory_of(each, 3, MODELS, place, FULL).held for each in (job(), groups))
    assert with_critic["weights"] - without["weights"] == pytest.approx(2 * 331e6, rel=0.01)
    assert with_critic["optimizer"] - without["optimizer"] == pytest.approx(12 * 331e6, rel=0.01)
    assert with_critic["frozen"] == without["frozen"]  # the reward model scores still
    seconds = [update_seconds(each, 3, MODELS, place, FULL, H200) for each in (job(), groups)]
    assert seconds[1] < seconds[0]
    saved = [disk_bytes(each, [3], MODELS, "bfloat16") for each in (job(), groups)]
    assert saved[0] - saved[1] == pytest.approx(2 * 12 * 331e6, rel=0.01)  # two checkpoints


def test_short_answers_on_an_h200() -> None:
    """256 prompts and answers of 130 and 48 tokens in the mean took 1.84 s: docs/speed.md."""
    assert update_seconds(job(), 3, MODELS, Place(), REAL, H200) == pytest.approx(1.84, rel=0.25)


LLAMA = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 8192}
QWEN2 = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2 |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 8192}


# What a layer kept and did when these were measured (docs/estimates.md): transformers' own forward,
# Qwen's rows padded. Today's layers are compared in tests/rlhf_train/plan/test_model_shape.py.
OWN_FORWARD = {
    "llama": (Kept(), Work(40, 73, attention=40, key_value=12)),
    "qwen2": (Kept(), Work()),
    "qwen3": (
        Kept(attention=4, key_value=4, half_attention=1.5),
        Work(54, 103, attention=22, key_value=22, float_attention=37),
    ),
}


def as_measured(fields: dict[str, object]) -> Shape:
    shape = shape_of(fields)
    kept, work = OWN_FORWARD[shape.family]
    family = "llama" if shape.family == "llama" else "padded"
    return replace(shape, family=family, block=replace(shape.block, kept=kept, work=work))


FASTER_HOST = replace(H200, kernel=18e-6)  # it started Qwen2's kernels in so many seconds


# Seconds of an update, least and most, 32 rows of real lengths on an H200: docs/estimates.md.
@pytest.mark.parametrize(
    ("step", "fields", "settings", "padded", "least", "most"),
    [
        (1, LLAMA, [], None, 0.136, 0.136),
        (1, LLAMA, [CHECKPOINTING], None, 0.18, 0.24),
        (1, LLAMA, ["actor.lora={rank: 16}"], None, 0.15, 0.20),
        (2, QWEN2, [], Passes(5, 7040), 0.22, 0.30),  # padded to 1.1 times 32 x 200 tokens
    ],
)
def test_other_families_on_an_h200(
    step: int, fields: dict[str, object], settings: list[str], padded: Passes | None, least: float, most: float
) -> None:
    shape = as_measured(fields)
    what, place = job(*settings, batches=(32, 32, 256)), Place(micro_batches=(32, 32, 64))
    seconds = update_seconds(what, step, Models(shape, shape), place, REAL, FASTER_HOST, padded)
    assert 0.8 * least < seconds < 1.2 * most


def test_a_host_that_is_slow_leaves_a_gpu_idle() -> None:
    """A tiny model on a card: 22 layers start 112 kernels each and 35 more once an update."""
    tiny = shape_of({**LLAMA, "hidden_size": 64, "intermediate_size": 176})
    said = update_seconds(job(), 1, Models(tiny, tiny), Place(), REAL, replace(H200, kernel=1e-3))
    assert said == pytest.approx(22 * (112 + 35) * 1e-3, rel=0.01)


SMOLLM2 = {"model_type": "llama", "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15}
SMOLLM2 |= {"num_key_value_heads": 5, "intermediate_size": 2560, "vocab_size": 49152, "tie_word_embeddings": True}
QWEN25 = {**QWEN2, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3 |= {"num_key_value_heads": 8, "intermediate_size": 3072, "head_dim": 128}
QWEN3 |= {"vocab_size": 151936, "tie_word_embeddings": True}
PYTHIA = {"model_type": "gpt_neox", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
PYTHIA |= {"intermediate_size": 4096, "vocab_size": 50304}
# Tokens of every sixteenth part of the rows of steps 1 and 2, from the shortest to the longest.
SFT_LENGTHS = (25, 69, 84, 99, 112, 132, 147, 161, 175, 189, 203, 215, 227, 240, 259, 281, 445)
PAIR_LENGTHS = (28, 85, 106, 131, 143, 161, 173, 193, 208, 220, 234, 249, 269, 282, 305, 335, 460)
SFT, PAIRS = StepRows(204, 130, 47, 445, SFT_LENGTHS), StepRows(410, 134, 52, 460, PAIR_LENGTHS)


# GiB in use at the peak, and seconds of an update: docs/estimates.md, "One H200".
@pytest.mark.parametrize(
    ("fields", "step", "answer", "gib", "seconds"),
    [
        (SMOLLM2, 1, 0.0, 21.39, 0.141),
        (SMOLLM2, 2, 0.0, 34.49, 0.162),
        (SMOLLM2, 3, 162.9, 65.99, 9.16),
        (QWEN25, 1, 0.0, 32.61, 0.342),
        (QWEN25, 2, 0.0, 49.05, 0.407),
        (QWEN25, 3, 185.6, 65.39, 9.01),
        (QWEN3, 1, 0.0, 40.32, 0.478),
        (QWEN3, 2, 0.0, 70.33, 0.698),
        (QWEN3, 3, 175.8, 87.06, 15.61),
    ],
)
def test_three_families_on_an_h200(
    fields: dict[str, object], step: int, answer: float, gib: float, seconds: float
) -> None:
    # Step 3 was measured when only OPT had a static decoder.
    shape, what = replace(as_measured(fields), is_static=False), job(batches=(32, 32, 128))
    place = Place(micro_batches=(32, 32, 64), rollout_micro_batch=128)
    rows = {1: SFT, 2: PAIRS, 3: StepRows(410, 128, answer, 512)}[step]
    padded = {1: Passes(4, 6523), 2: Passes(5, 7431), 3: Passes(9, 24800)}[step]
    assert memory_of(what, step, Models(shape, shape), place, rows).peak / GIB == pytest.approx(gib, rel=0.12)
    said = update_seconds(what, step, Models(shape, shape), place, rows, H200, padded)
    assert said == pytest.approx(seconds, rel=0.2)


def gated(
    family: str, width: int, layers: int, heads: int, groups: int, feed: int, vocabulary: int
) -> dict[str, object]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = dict(zip(names, (width, layers, heads, groups, feed), strict=True))
    return {"model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": True, **sizes}


# Seconds of a rollout of 16, 64 and 256 answers of 256 tokens on an H200, by the static decoder:
# docs/speed.md. No constant was fitted to them.
@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        (gated("qwen2", 1536, 28, 12, 2, 8960, 151936), (0.473, 0.598, 1.154)),
        (gated("llama", 2048, 16, 32, 8, 8192, 128256), (0.317, 0.407, 0.878)),
        ({**gated("qwen3", 1024, 28, 16, 8, 3072, 151936), "head_dim": 128}, (0.381, 0.607, 1.391)),
        (gated("llama", 576, 30, 9, 3, 1536, 49152), (0.255, 0.297, 0.490)),
    ],
    ids=["Qwen2.5-1.5B", "Llama-3.2-1B", "Qwen3-0.6B", "SmolLM2-135M"],
)
def test_rollouts_that_nothing_was_fitted_to(fields: dict[str, object], seconds: tuple[float, ...]) -> None:
    shape, rows = shape_of(fields), StepRows(410, 256, 256, 512)
    for answers, taken in zip((16, 64, 256), seconds, strict=True):
        place = Place(micro_batches=(32, 32, answers), rollout_micro_batch=answers)
        said = rollout_seconds(job(batches=(32, 32, answers)), shape, place, rows, H200)
        assert said == pytest.approx(taken, rel=0.25)


@pytest.mark.parametrize(
    ("fields", "batch", "tokens"),
    [
        (SMOLLM2, 2, 30 + 40),  # packed: the longest two rows
        (SMOLLM2, 3, 75),  # an update of three: 25 in the mean
        (SMOLLM2, 12, 2 * 40),  # no pass of an update has more than two rows would have if padded
        (PYTHIA, 2, 2 * 40),  # padded
    ],
)
def test_the_largest_pass_by_hand(fields: dict[str, object], batch: int, tokens: int) -> None:
    shape, what, place = shape_of(fields), job(batches=(batch, 16, 256)), Place(micro_batches=(2, 16, 64))
    rows = StepRows(4, 15.0, 10.0, 40, (10, 20, 30, 40))
    taken = memory_of(what, 1, Models(shape, shape), place, rows).phases["a pass"]
    if batch > 2:  # gradients of the passes before
        taken -= 2 * shape.causal
    of_layers = shape.layers * shape.kept_by_layer(40, is_half=True) * 1.03
    assert taken == pytest.approx(tokens * 2 * (of_layers + shape.vocabulary))


def test_the_own_forward_holds_its_cache_in_rollouts_alone() -> None:
    """1024 answers of 512 tokens, and 28 layers of 8 heads of 128 numbers: 56 GiB."""
    static, what = shape_of(QWEN3), job(batches=(32, 32, 1024))
    shape = replace(static, is_static=False)
    memory = memory_of(what, 3, Models(shape, shape), Place(rollout_micro_batch=1024), FULL)
    gradients = 2 * (shape.causal + shape.scorer)
    assert memory.held["cache"] == 0
    assert memory.phases["a rollout"] == gradients + 1024 * 512 * 28 * 2 * 8 * 128 * 2
    kept = memory_of(what, 3, Models(static, static), Place(rollout_micro_batch=1024), FULL)
    assert kept.held["cache"] == 1024 * 512 * 28 * 2 * 8 * 128 * 2  # the static decoder keeps its own, of key heads
    assert "a rollout" not in kept.phases


def test_the_table_says_whose_answers_come_from_the_static_decoder() -> None:
    assert [shape_of(fields).is_static for fields in (OPT_13B, QWEN3, {**QWEN3, "model_type": "gemma"})] == [
        True, True, False
    ]  # fmt: skip


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
        # 64 prompts a rollout of 256 answers.
        (3, ["ppo.advantage=rloo", "ppo.samples_per_prompt=4"], 300, 5),
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
