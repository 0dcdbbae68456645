"""Whole updates of the three steps give the weights that a twin in plain PyTorch gives.

Every setting has a value of its own, away from its default: unequal learning rates and clips, a
gamma, a shift, clips that bite. The twin is told the rows of each update and the sampled answers.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from jobs.events import End, Event, Metrics
from rlhf_train.data.sequences import Sequences
from rlhf_train.engine.deepspeed_engine import Engine
from rlhf_train.generation.rollout import Responses, Rollouts
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny
from tests.twin import (
    Ids,
    Row,
    TwinAdamW,
    TwinGroups,
    TwinPair,
    TwinPpo,
    text_perplexity,
    train_reward_model,
    train_text,
)

SEED, MAX_PROMPT, MAX_RESPONSE = 3, 48, 8
ROWS = 24  # one epoch: no step takes a row twice
SIZES: dict[str, dict[str, Any]] = {
    # With rows of no token, as real models have; dropout in a config is not used.
    "actor": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocabulary": 5},
    "critic": {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "vocabulary": 0},
}
MORE = {
    "num_hidden_layers": 2,
    "head_dim": 12,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
OPTIMIZER = {
    "schedule": "linear",
    "warmup_updates": 2,
    "final_learning_rate": 0.3,
    "betas": [0.7, 0.85],
    "eps": 1e-4,
    "weight_decay": 0.2,
}


@dataclass
class Recorder:
    """What a step hands its engines and gets from its rollouts: rows alone."""

    updates: dict[str, list[list[Row]]] = field(default_factory=lambda: defaultdict(list))  # by the engine's network
    rollouts: list[tuple[int, list[Row]]] = field(default_factory=list)  # with their seeds
    row_ids: list[tuple[int, int]] = field(default_factory=list)  # with their seeds: what a row's random numbers are of
    engines: dict[str, Engine] = field(default_factory=dict)
    pass_sizes: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # rows, by the engine's network

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        call, backward, step, generate = Engine.__call__, Engine.backward, Engine.step, Rollouts.generate
        latest: dict[str, list[Row]] = {}
        passes: dict[str, list[Row]] = defaultdict(list)
        is_closed: dict[str, bool] = {}

        def watched_call(engine: Engine, batch: Sequences, *args: Any, **how: Any) -> Any:
            latest[type(engine.module).__name__] = list(rows_of(batch))
            return call(engine, batch, *args, **how)

        def watched_backward(engine: Engine, loss: Tensor, *, last: bool) -> None:
            name = type(engine.module).__name__
            passes[name] = latest[name] if is_closed.get(name) else passes[name] + latest[name]
            is_closed[name], self.engines[name] = last, engine
            self.pass_sizes[name].add(len(latest[name]))
            backward(engine, loss, last=last)

        def watched_step(engine: Engine) -> float:
            self.updates[type(engine.module).__name__].append(passes[type(engine.module).__name__])
            return step(engine)

        def watched_generate(
            rollouts: Rollouts, prompts: Sequence[Any], *, seed: int, row_ids: Sequence[int], **how: Any
        ) -> Responses:
            made = generate(rollouts, prompts, seed=seed, row_ids=row_ids, **how)
            self.row_ids += [(seed, row) for row in row_ids]
            answers = zip(prompts, made.tokens, strict=True)
            self.rollouts.append((seed, [(tuple(map(int, p)), tuple(map(int, r))) for p, r in answers]))
            return made

        patch.setattr(Engine, "__call__", watched_call)
        patch.setattr(Engine, "backward", watched_backward)
        patch.setattr(Engine, "step", watched_step)
        patch.setattr(Rollouts, "generate", watched_generate)


def rows_of(batch: Sequences) -> Iterator[Row]:
    """Take a pass apart into its rows: packed one behind the other, or each in a row of its own."""
    start = 0
    for place, (prompt, response) in enumerate(
        zip(batch.host_prompt_lengths, batch.host_response_lengths, strict=True)
    ):
        ids = batch.input_ids[0 if batch.is_packed else place].tolist()
        first = start if batch.is_packed else 0
        yield tuple(ids[first : first + prompt]), tuple(ids[first + prompt : first + prompt + response])
        start += prompt + response


# --- models, data, jobs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of transformers with random weights, and rows."""
    folder = tmp_path_factory.mktemp("twins")
    tokenizer = train_tokenizer(tiny.WORDS, 300)
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    for place, (name, family, auto) in enumerate(
        (
            ("actor", "qwen3", AutoModelForCausalLM),
            ("critic", "qwen2", AutoModelForSequenceClassification),
            ("padded", "gemma", AutoModelForSequenceClassification),  # a family whose rows are padded
        )
    ):
        torch.manual_seed(place + 6)
        sizes = dict(SIZES["actor" if name == "actor" else "critic"])
        vocabulary = len(tokenizer) + sizes.pop("vocabulary")
        tied = {"tie_word_embeddings": name != "actor", "attention_dropout": 0.1, "num_labels": 1}
        config = AutoConfig.for_model(family, vocab_size=vocabulary, **sizes, **MORE, **ids, **tied)
        model = auto.from_config(config)
        with torch.no_grad():
            if name == "actor":
                model.lm_head.weight[config.eos_token_id] *= 3  # some answers end, and some do not
            else:
                model.score.weight *= 3  # scores have another standard deviation than 1
        model.save_pretrained(str(folder / name))
        tokenizer.save_pretrained(str(folder / name))
        if name == "critic":  # the same network over another tokenizer's ids, for texts
            other = train_tokenizer(tiny.WORDS, 270)
            model.resize_token_embeddings(len(other))
            model.save_pretrained(str(folder / "text"))
            other.save_pretrained(str(folder / "text"))
    write_rows(folder / "rows")
    return folder


def write_rows(folder: Path) -> None:
    """Write pairs with different prompts, whose answers begin alike or not, are short or cut."""
    numbers = random.Random(0)
    folder.mkdir()
    for name, total in (("train", ROWS), ("test", 12)):
        rows = []
        for place in range(total):
            same, one, other = (
                " ".join(numbers.choices(tiny.WORDS, k=numbers.randint(*count))) for count in ((0, 1), (1, 3), (1, 3))
            )
            prompt = f"Human: {name} {place}{' please' * numbers.randint(0, 3)}\n\nAssistant:"
            rows.append({"prompt": prompt, "chosen": f" {same} {one}", "rejected": f" {same} no {other}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def job(folder: Path, critic: str, step: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    tree = tiny.job(folder / "rows")
    tree |= {"seed": SEED, "actor": {"model": str(folder / "actor")}, "critic": {"model": str(folder / critic)}}
    if step == "ppo":
        tree["actor"]["sft_model"], tree["critic"]["reward_model"] = (str(folder / name) for name in ("actor", critic))
    tree["data"] |= {
        "split": [int(step == name) for name in ("sft", "reward", "ppo")],
        "max_prompt_tokens": MAX_PROMPT,
        "max_response_tokens": MAX_RESPONSE,
        "eval_rows": 12,
    }
    tree[step] = {**OPTIMIZER, **fields}
    tree["hardware"]["micro_batch"] = 2
    return tree


def adamw(model: Any, learning_rate: float, fields: Mapping[str, Any], updates: int) -> TwinAdamW:
    return TwinAdamW(
        model,
        learning_rate,
        betas=(0.7, 0.85),
        eps=1e-4,
        weight_decay=0.2,
        max_grad_norm=fields["max_grad_norm"],
        warmup=2,
        final=0.3,
        updates=updates,
    )


def load(auto: Any, folder: Path) -> Any:
    return auto.from_pretrained(str(folder), dtype=torch.float32).eval()


def check_weights(found: Mapping[str, Tensor], twin: Any, start: Any, learning_rate: float) -> None:
    """Compare with how far a whole update moves a weight: the learning rate.

    On average they agree to a thousandth of it. A single weight may differ by more, where its
    gradient is nearly 0 and AdamW makes a step of its rounding.
    """
    before, expected = start.state_dict(), twin.state_dict()
    for name, wanted in expected.items():
        moved = (wanted - before[name]).abs().max().item()
        assert moved > learning_rate / 5, f"{name} moved by {moved} only"
        apart = (found[name] - wanted).abs() / learning_rate
        assert apart.mean().item() < 1e-3 and apart.max().item() < 0.1, f"{name}: {apart.mean()}, {apart.max()}"


def check_metrics(events: Sequence[Event], expected: Sequence[Mapping[str, float]]) -> None:
    found = [event for event in events if isinstance(event, Metrics)]
    assert len(found) == len(expected)
    for event, numbers in zip(found, expected, strict=True):
        assert {name: getattr(event, name) for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def watched(world: World, folder: Path, tree: Mapping[str, Any], step: int) -> tuple[Recorder, End, list[Event]]:
    events: list[Event] = []
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        recorder.watch(patch)
        end = in_process.train(world, folder, tree, step, events=events)
    return recorder, end, events


def pairs_of(folder: Path, name: str = "train") -> dict[tuple[Ids, Ids], TwinPair]:
    """Return a file's pairs by prompt and chosen answer, in ids of transformers' tokenizer."""
    tokenizer, pairs = AutoTokenizer.from_pretrained(str(folder / "actor")), {}
    for line in (folder / f"rows/{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tuple(tokenizer(row["prompt"])["input_ids"])
        whole = (tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected"))
        chosen, rejected = (tuple([*ids, tokenizer.eos_token_id][len(prompt) :][:MAX_RESPONSE]) for ids in whole)
        pairs[prompt, chosen] = TwinPair(prompt, chosen, rejected)
    return pairs


# --- step 1 ---

SFT = {"global_batch": 6, "max_updates": 4, "learning_rate": 2e-3, "max_grad_norm": 0.4, "loss_on_prompt": True}


def test_step_1_learns_what_its_twin_learns(world: World, folder: Path, tmp_path: Path) -> None:
    recorder, end, events = watched(world, tmp_path / "run", job(folder, "critic", "sft", SFT), 1)
    updates = recorder.updates["ActorForward"]
    assert [len(rows) for rows in updates] == [6] * 4
    assert {row for rows in updates for row in rows} == pairs_of(folder).keys()

    twin, held_out = load(AutoModelForCausalLM, folder / "actor"), list(pairs_of(folder, "test"))
    perplexities = [text_perplexity(twin, held_out)]
    expected = train_text(twin, adamw(twin, 2e-3, SFT, 4), updates)
    perplexities.append(text_perplexity(twin, held_out))
    check_metrics(events, expected)
    assert [end.perplexity_before, end.perplexity_after] == pytest.approx(perplexities, rel=1e-4)
    assert min(numbers["grad_norm"] for numbers in expected) > 0.4
    start = load(AutoModelForCausalLM, folder / "actor")
    check_weights(recorder.engines["ActorForward"].module.model.state_dict(), twin, start, 2e-3)


# --- step 2 ---

REWARD = {"global_batch": 6, "max_updates": 4, "learning_rate": 4e-3, "max_grad_norm": 0.4}


@pytest.mark.parametrize(
    ("critic", "fields"),
    [("critic", {"loss": "last_token"}), ("padded", {"loss": "per_token", "lm_coef": 0.3})],
    ids=["last token", "per token, with a language-model loss"],
)
def test_step_2_learns_what_its_twin_learns(
    world: World, folder: Path, tmp_path: Path, critic: str, fields: dict[str, Any]
) -> None:
    tree = job(folder, critic, "reward", REWARD | fields)
    tree["hardware"]["micro_batch"] = 3
    recorder, _, events = watched(world, tmp_path / "run", tree, 2)
    if critic == "critic":  # else all have three pairs
        assert len(recorder.pass_sizes["ScoreForward"]) > 1, "passes of one size weigh alike"
    pairs, updates = pairs_of(folder), []
    for rows in recorder.updates["ScoreForward"]:
        updates.append([pairs[row] for row in rows if row in pairs])
        assert len(updates[-1]) == len(set(updates[-1])) == 6  # and of each its rejected answer:
        assert sorted(rows) == sorted(
            (pair.prompt, answer) for pair in updates[-1] for answer in (pair.chosen, pair.rejected)
        )
    assert len({pair for update in updates for pair in update}) == ROWS

    twin = load(AutoModelForSequenceClassification, folder / critic)
    expected = train_reward_model(
        twin,
        adamw(twin, 4e-3, REWARD, 4),
        updates,
        per_token=fields["loss"] == "per_token",
        lm_coef=fields.get("lm_coef", 0.0),
    )
    if "lm_coef" not in fields:
        for numbers in expected:
            del numbers["lm_loss"]
    check_metrics(events, expected)
    assert min(numbers["grad_norm"] for numbers in expected) > 0.4
    start = load(AutoModelForSequenceClassification, folder / critic)
    check_weights(recorder.engines["ScoreForward"].module.model.state_dict(), twin, start, 4e-3)
    saved = load(AutoModelForSequenceClassification, tmp_path / "run/step2/model")
    check_weights(saved.state_dict(), twin, start, 4e-3)


# --- step 3 ---

PPO: dict[str, Any] = {
    "rollout_batch": 8,
    "actor_learning_rate": 2e-3,
    "critic_learning_rate": 6e-3,
    "max_grad_norm": 0.3,
    "clip_range": 0.05,
    "value_clip_range": 0.02,
    "gamma": 0.9,
    "lam": 0.7,
    "critic_warmup_updates": 1,
    "kl_coef": 0.3,
    "kl_target": 2.0,
    "kl_horizon": 20.0,
    "temperature": 0.8,
    "reward_clip": 1.1,
    "missing_eos_penalty": 0.6,
    "ema_decay": 0.6,
}


@pytest.mark.parametrize(
    ("critic", "fields"),
    [
        # Four updates a rollout, two epochs; the second rollout is left after two.
        ("critic", {"global_batch": 4, "ppo_epochs": 2, "max_updates": 6, "whiten_rewards": True}),
        ("padded", {"global_batch": 8, "ppo_epochs": 1, "max_updates": 3, "whiten_rewards": False}),
    ],
    ids=["several updates a rollout", "one update a rollout"],
)
def test_step_3_learns_what_its_twin_learns(
    world: World, folder: Path, tmp_path: Path, critic: str, fields: dict[str, Any]
) -> None:
    settings = PPO | fields
    tree = job(folder, critic, "ppo", settings)
    recorder, end, events = watched(world, tmp_path / "run", tree, 3)
    updates, by_actor = recorder.updates["ScoreForward"], recorder.updates["ActorForward"]
    assert len(updates) == settings["max_updates"]
    # The first update warms the critic up.
    assert [sorted(rows) for rows in by_actor] == [sorted(rows) for rows in updates[1:]]
    rollouts = [rows for seed, rows in recorder.rollouts if seed == SEED]
    (reference_answers,) = (rows for seed, rows in recorder.rollouts if seed == SEED + 2**33)
    before, *_, after = (rows for seed, rows in recorder.rollouts if seed == SEED + 2**32)
    prompts = [prompt for rows in rollouts for prompt, _ in rows]
    ids = [row for seed, row in recorder.row_ids if seed == SEED]
    assert len(set(prompts)) == len(set(ids)) == len(prompts) == 8 * len(rollouts)
    per_rollout = settings["ppo_epochs"] * 8 // settings["global_batch"]

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "actor"))
    causal, classifier = (AutoModelForCausalLM, folder / "actor"), (AutoModelForSequenceClassification, folder / critic)
    twin = TwinPpo(
        load(*causal),
        load(*causal),
        load(*classifier),
        load(*classifier),
        settings,
        tokens=len(tokenizer),
        eos=tokenizer.eos_token_id,
    )
    assert {p for p, _ in before} == {p for p, _ in after} == {p for p, _ in pairs_of(folder, "test")}
    twin.normalise(reference_answers)
    assert abs(twin.shift) > 0.05 and abs(twin.scale - 1) > 0.05
    assert (end.reward_shift, end.reward_scale) == pytest.approx((twin.shift, twin.scale), rel=1e-4)
    summaries = [twin.answers(before)]
    actor = adamw(twin.actor, settings["actor_learning_rate"], settings, len(by_actor))
    value = adamw(twin.critic, settings["critic_learning_rate"], settings, len(updates))
    expected = []
    for place, rollout in enumerate(rollouts):
        parts = updates[place * per_rollout : (place + 1) * per_rollout]
        check_orders(rollout, parts, settings["global_batch"])
        expected.append(twin.learn(rollout, parts, actor, value))
    summaries.append(twin.answers(after))

    check_metrics(events, expected)
    assert [end.mean_reward_before, end.mean_reward_after] == pytest.approx([s["reward"] for s in summaries], abs=1e-3)
    assert [end.kl_before, end.kl] == pytest.approx([s["kl"] for s in summaries], abs=1e-3)
    assert expected[-1]["kl"] > 0.1 and expected[0]["kl_coef"] != expected[-1]["kl_coef"]
    assert min(numbers[name] for numbers in expected[1:] for name in ("grad_norm", "critic_grad_norm")) > 0.3
    if per_rollout > 1:
        assert all(numbers[name] > 0.02 for numbers in expected for name in ("clip_fraction", "value_clip_fraction"))
    assert 0 < sum(numbers["eos_share"] for numbers in expected) < len(expected)

    check_weights(
        recorder.engines["ActorForward"].module.model.state_dict(),
        twin.actor,
        load(*causal),
        settings["actor_learning_rate"],
    )
    check_weights(
        recorder.engines["ScoreForward"].module.model.state_dict(),
        twin.critic,
        load(*classifier),
        settings["critic_learning_rate"],
    )
    saved = load(AutoModelForCausalLM, tmp_path / "run/step3/model")
    check_weights(saved.state_dict(), twin.actor, load(*causal), settings["actor_learning_rate"])
    average = load(*causal)
    for parameter, wanted in zip(average.parameters(), twin.ema, strict=True):
        parameter.data.copy_(wanted)
    saved = load(AutoModelForCausalLM, tmp_path / "run/step3/model_ema")
    check_weights(saved.state_dict(), average, load(*causal), settings["actor_learning_rate"])


def check_orders(rollout: Sequence[Row], parts: Sequence[Sequence[Row]], size: int) -> None:
    """Each epoch takes each row once, in an order of its own."""
    assert len({prompt for prompt, _ in rollout}) == len(rollout) == 8
    epochs = [[set(part) for part in parts[start : start + 8 // size]] for start in range(0, len(parts), 8 // size)]
    for epoch in epochs:
        if len(epoch) == 8 // size:
            assert set().union(*epoch) == set(rollout)
        assert all(len(part) == size for part in epoch)
    if size < 8 and len(epochs) > 1:
        assert epochs[0] != epochs[1]


# --- step 3 without a critic ---

GROUPS: dict[str, Any] = {
    **{name: value for name, value in PPO.items() if not name.startswith(("critic_", "value_", "lam", "ema_"))},
    "samples_per_prompt": 4,
    "max_updates": 3,
    "clip_range_high": 0.09,
}
SEVERAL = {"global_batch": 4, "ppo_epochs": 2}


@pytest.mark.parametrize(
    ("critic", "fields"),
    [
        (
            "critic",
            {"advantage": "rloo", **SEVERAL, "max_updates": 6, "loss_mean": "sequence", "whiten_advantages": False},
        ),
        (
            "text",
            {"advantage": "grpo", **SEVERAL, "max_updates": 6, "loss_mean": "constant", "whiten_advantages": True},
        ),
        (
            "critic",
            {
                "advantage": "reinforce_baseline",
                "global_batch": 8,
                "max_updates": 5,
                "loss_mean": "token",
                "whiten_advantages": True,
            },
        ),
    ],
    ids=["rloo", "grpo, scored on text", "reinforce_baseline"],
)
def test_step_3_without_a_critic_learns_what_its_twin_learns(
    world: World, folder: Path, tmp_path: Path, critic: str, fields: dict[str, Any]
) -> None:
    settings = GROUPS | fields
    tree = job(folder, critic, "ppo", settings)
    recorder, _, events = watched(world, tmp_path / "run", tree, 3)
    updates = recorder.updates["ActorForward"]
    assert recorder.updates["ScoreForward"] == []  # no critic learns
    assert len(updates) == settings["max_updates"]
    rollouts = [rows for seed, rows in recorder.rollouts if seed == SEED]
    (reference_answers,) = (rows for seed, rows in recorder.rollouts if seed == SEED + 2**33)
    ids = [row for seed, row in recorder.row_ids if seed == SEED]
    assert len(set(ids)) == len(ids) == 8 * len(rollouts)  # each answer has random numbers of its own
    prompts = [prompt for rows in rollouts for prompt, _ in rows]
    assert len(set(prompts)) == len(prompts) / 4
    per_rollout = settings.get("ppo_epochs", 1) * 8 // settings["global_batch"]

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "actor"))
    causal, classifier = (
        (AutoModelForCausalLM, folder / "actor"),
        (
            AutoModelForSequenceClassification,
            folder / critic,
        ),
    )
    twin = TwinGroups(
        load(*causal),
        load(*causal),
        load(AutoModelForSequenceClassification, folder / "critic"),  # never learns
        load(*classifier),
        settings | {"whiten_rewards": False, "lam": 1.0},
        tokens=len(tokenizer),
        eos=tokenizer.eos_token_id,
        limit=MAX_RESPONSE,
        tokenizers=(tokenizer, AutoTokenizer.from_pretrained(str(folder / critic))) if critic == "text" else None,
    )
    twin.normalise(reference_answers)
    actor = adamw(twin.actor, settings["actor_learning_rate"], settings, len(updates))
    expected = []
    for place, rollout in enumerate(rollouts):
        parts = updates[place * per_rollout : (place + 1) * per_rollout]
        expected.append(twin.learn_groups(rollout, parts, actor))
    check_metrics(events, expected)
    assert all(event.value_loss is None for event in events if isinstance(event, Metrics))
    assert expected[-1]["kl"] > 0.1 and expected[0]["kl_coef"] != expected[-1]["kl_coef"]
    if per_rollout > 1:
        assert all(numbers["clip_fraction"] > 0.02 for numbers in expected)
    check_weights(
        recorder.engines["ActorForward"].module.model.state_dict(),
        twin.actor,
        load(*causal),
        settings["actor_learning_rate"],
    )
    saved = load(AutoModelForCausalLM, tmp_path / "run/step3/model")
    check_weights(saved.state_dict(), twin.actor, load(*causal), settings["actor_learning_rate"])
