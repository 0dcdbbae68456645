"""Test that a step's folders load with the same logits in a process without our code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from jobs.events import Checkpoint, End, Event
from jobs.run_dir import RunDir
from jobs.spec import Job, Lora, Scratch
from rlhf_train.data.dataset import Example
from rlhf_train.data.sequences import BatchPlan, Sequences
from rlhf_train.engine.deepspeed_engine import DTYPES, Ema, Engine, full_state
from rlhf_train.models.adapters import ADAPTER_FILES, add_lora
from rlhf_train.models.networks import (
    ActorForward,
    ScoreForward,
    last_scores,
    load_causal,
    load_scorer,
    load_tokenizer,
    train_tokenizer,
)
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.export import generation_config, save_model, scores_of
from tests import tiny
from tests.ranks import on_ranks

pytestmark = pytest.mark.pinned_gloo


@dataclass(frozen=True)
class Kind:
    """A way in which a model can come to be."""

    step: int
    zero_stage: int
    precision: str = "float32"
    lora: bool = False
    ema: bool = False


KINDS = {
    "actor": Kind(1, 0),
    "actor-zero2": Kind(1, 2),
    "actor-zero3": Kind(1, 3),
    "lora": Kind(1, 0, lora=True),
    "lora-zero3": Kind(1, 3, lora=True),
    "ema": Kind(3, 0, ema=True),
    "ema-zero3": Kind(3, 3, ema=True),
    "ema-lora-zero3": Kind(3, 3, lora=True, ema=True),
    "actor-bfloat16": Kind(1, 1, "bfloat16"),
    "lora-bfloat16": Kind(1, 1, "bfloat16", lora=True),
    "reward": Kind(2, 0),
    "reward-zero3": Kind(2, 3),
    "reward-bfloat16": Kind(2, 1, "bfloat16"),
}
LORA = Lora(rank=4, alpha=8.0)
DECAY, UPDATES = 0.6, 3
NUMBERS = {"perplexity_after": 12.345678}
EXAMPLE = Example('\n\nHuman: say "cat"\\ Grüße\n\nAssistant:', " cat")


# --- the trainer's side, on two ranks -----------------------------------------------------------


def make_all(world: World, folder: Path) -> None:
    """Train and save a model of each kind, and next to it (`.pt`) what the trainer's model gave."""
    for name, kind in KINDS.items():
        make(world, folder, name, kind)


def make(world: World, folder: Path, name: str, kind: Kind) -> None:
    job = Job.model_validate(tiny.job(folder / "rows"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    load = load_scorer if kind.step == 2 else load_causal
    model = load(Scratch(config=tiny.OPT), tokenizer, DTYPES[kind.precision], 3)
    start = full_state(model, keep=True)
    if kind.lora:
        add_lora(model, LORA, 3)
    module = ScoreForward(model) if kind.step == 2 else ActorForward(model)
    plan = BatchPlan(2, 1, world.size)
    engine = Engine(
        module, job.sft, 1e-2, UPDATES, plan, precision=kind.precision, zero_stage=kind.zero_stage, world=world
    )
    ema = Ema(engine.module, DECAY) if kind.ema else None

    averages = {key: value.double() for key, value in full_state(model, keep=True).items()}
    for update in range(UPDATES):
        out = engine(rows(10 * update + world.rank))[0]
        engine.backward(
            (last_scores(out, rows(10 * update + world.rank)) if kind.step == 2 else out).mean() / world.size, last=True
        )
        engine.step()
        if ema is not None:
            ema.update()
        for key, value in full_state(model, keep=True).items():
            averages[key] = DECAY * averages[key] + (1 - DECAY) * value.double()

    batch = rows(99)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    seen = {
        "logits": logits,
        "ids": batch.input_ids,
        "mask": batch.attention_mask,
        "averages": averages,
        "start": start,
    }
    placement = Placement("cpu", "", world.size, kind.precision, kind.zero_stage, kind.zero_stage, (2, 2, 2), 8, 1)
    events: list[Event] = []
    context = StepContext(job, RunDir(folder), world, placement, folder, events.append)

    def save(target: Path) -> None:
        save_model(
            context,
            kind.step,
            UPDATES,
            engine,
            tokenizer,
            target,
            lora=LORA if kind.lora else None,
            scores=NUMBERS,
            example=EXAMPLE,
        )

    if ema is None:
        save(folder / name)
    else:
        with ema.applied():
            save(folder / name)
        save(folder / f"{name}-live")  # the average was taken off again
    if world.is_main:
        (checkpoint,) = (
            event for event in events if isinstance(event, Checkpoint) and event.path == str(folder / name)
        )
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        assert checkpoint.size_bytes == sum(file.stat().st_size for file in files)
        torch.save(seen, folder / f"{name}.pt")


def rows(seed: int) -> Sequences:
    """Two prompts with answers, of different lengths."""
    numbers = torch.Generator().manual_seed(seed)
    prompts, answers = (
        [torch.randint(4, 260, (n,), generator=numbers).numpy() for n in lengths] for lengths in ((7, 3), (5, 6))
    )
    return Sequences.of(prompts, answers, 1, torch.device("cpu"))


# --- the stranger's side ------------------------------------------------------------------------

STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

for folder in sys.argv[1:]:
    causal = "CausalLM" in json.load(open(folder + "/config.json"))["architectures"][0]
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = torch.load(folder.removesuffix("-live") + ".pt")
    with torch.no_grad():
        found = {"logits": model(input_ids=wanted["ids"], attention_mask=wanted["mask"]).logits}
        if causal:
            prompts = ["\\n\\nHuman: cat\\n\\nAssistant:", "\\n\\nHuman: red cat dog\\n\\nAssistant:"]
            prompt = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
            torch.manual_seed(0)
            found |= {"prompt": prompt["input_ids"], "generated": model.generate(**prompt)}
    found["loading"] = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
    found["config"] = model.config.to_dict()
    found["tokens"] = {name: getattr(tokenizer, name + "_token_id") for name in ("bos", "eos", "pad")}
    found["tokens"]["count"] = len(tokenizer)
    torch.save(found, folder + "-loaded.pt")
assert not {"rlhf_train", "jobs", "deepspeed", "peft"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds, made by two ranks and loaded by a stranger."""
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer([f"\n\nHuman: {word}\n\nAssistant: {word}" for word in tiny.WORDS], 320).save_pretrained(
        str(folder / "tokenizer")
    )
    on_ranks(2, make_all, folder)
    models = sorted(str(file.parent) for file in folder.glob("*/model.safetensors"))
    assert len(models) == len(KINDS) + sum(kind.ema for kind in KINDS.values())
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *models], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


def seen(folder: Path, name: str) -> dict[str, Any]:
    numbers: dict[str, Any] = torch.load(folder / f"{name}.pt")
    return numbers


@pytest.mark.parametrize("name", KINDS)
def test_a_stranger_gets_the_trainers_logits(folder: Path, name: str) -> None:
    ours, theirs = seen(folder, name), seen(folder, f"{name}{'-live' if KINDS[name].ema else ''}-loaded")
    real = ours["mask"].bool() if KINDS[name].step != 2 else torch.ones(2, dtype=torch.bool)
    expected, found = (side["logits"].float()[real] for side in (ours, theirs))
    # bfloat16 has 8 bits: the last of the largest logit, or the two before it, where threads add up
    # in another order.
    tolerance = 1e-5 if KINDS[name].precision == "float32" else 2**-6 * float(expected.abs().max())
    assert (found - expected).abs().max() < tolerance
    assert expected.std() > 0.01  # they are not all alike


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_missing_and_nothing_too_much(folder: Path, name: str) -> None:
    assert seen(folder, f"{name}-loaded")["loading"] == {}
    output = (folder / "said").read_text(encoding="utf-8")
    assert not re.search("MISSING|UNEXPECTED|MISMATCH|warn|not initialized", output, re.IGNORECASE), output


@pytest.mark.parametrize("name", KINDS)
def test_training_moved_what_was_saved(folder: Path, name: str) -> None:
    """And LoRA only what it may: the linear layers of the blocks."""
    start, saved = seen(folder, name)["start"], load(folder / name)
    moved = {key for key, value in saved.items() if not value.equal(start[key])}
    wanted = {
        key
        for key in saved
        if not KINDS[name].lora or re.search(r"layers\.\d\.(self_attn\.\w+_proj|fc[12])\.weight", key)
    }
    # A constant added to every key changes no attention, and one added to every state no difference
    # of scores.
    blind = {key for key in saved if key.endswith(("k_proj.bias", "embed_positions.weight", "embed_tokens.weight"))}
    assert moved - blind == wanted - blind


def load(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.ema])
def test_the_ema_is_the_recurrence_by_hand(folder: Path, name: str) -> None:
    averages, saved = seen(folder, name)["averages"], load(folder / name)
    for key, value in saved.items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in averages:
            a, b = (averages[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            expected = averages[f"{layer}.base_layer.weight"] + LORA.alpha / LORA.rank * b @ a
        else:
            expected = averages[key if key in averages else key.replace(".bias", ".base_layer.bias")]
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    live = load(folder / f"{name}-live")
    # The average is not the model itself.
    assert max(float((live[key] - value).abs().max()) for key, value in saved.items()) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_holds_a_model_and_nothing_else(folder: Path, name: str) -> None:
    files = {file.name for file in (folder / name).iterdir()}
    needed = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    }
    more = {"special_tokens_map.json", "vocab.json", "merges.txt"}  # transformers 4 writes these, too
    if KINDS[name].lora:
        needed |= {"adapter"}
        assert {file.name for file in (folder / name / "adapter").iterdir()} == set(ADAPTER_FILES)
    assert needed <= files <= needed | more
    kind, config = KINDS[name], json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["OPTForSequenceClassification" if kind.step == 2 else "OPTForCausalLM"]
    assert {key: value for key, value in config.items() if "drop" in key and value} == {}
    dtype = DTYPES[kind.precision]
    assert {value.dtype for value in load(folder / name).values()} == {dtype}
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    found = seen(folder, f"{name}-loaded")
    assert found["tokens"] == {"bos": 2, "eos": 2, "pad": 1, "count": found["config"]["vocab_size"]}
    assert (found["config"]["pad_token_id"], found["config"]["eos_token_id"]) == (1, 2)
    if kind.step == 2:
        assert len(found["config"]["id2label"]) == 1


@pytest.mark.parametrize("name", ["actor", "lora"])
def test_who_may_read_the_config_may_read_the_weights(folder: Path, name: str) -> None:
    """safetensors makes files for their owner alone; the umask of another process decides here."""
    modes = {file.stat().st_mode & 0o777 for file in (folder / name).rglob("*") if file.is_file()}
    umask = subprocess.run(["sh", "-c", "umask"], capture_output=True, text=True, check=True).stdout
    assert modes == {0o666 & ~int(umask, 8)}


@pytest.mark.parametrize(
    ("settings", "source_eos", "expected"),
    [
        ({}, None, {"top_k": 0, "top_p": 1.0, "eos_token_id": 2}),
        ({"top_k": 1, "top_p": 0.5}, 2, {"top_k": 1, "top_p": 0.5, "eos_token_id": 2}),
        ({"temperature": 0.7}, [9, 2, 5], {"temperature": 0.7, "eos_token_id": [2, 5, 9]}),
    ],
)
def test_the_generation_config_is_how_rollouts_sampled(
    folder: Path, settings: dict[str, Any], source_eos: Any, expected: dict[str, Any]
) -> None:
    tree = tiny.job(folder / "rows")
    job = Job.model_validate(tree | {"ppo": tree["ppo"] | settings})
    source = None if source_eos is None else GenerationConfig(eos_token_id=source_eos)
    found = generation_config(job, load_tokenizer(str(folder / "tokenizer")), source)
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_card_says_what_it_is(folder: Path) -> None:
    actor, reward = ((folder / name / "README.md").read_text(encoding="utf-8") for name in ("actor", "reward"))
    for card in (actor, reward):
        assert "# tiny: " in card and str(folder / "rows") in card and "| perplexity_after | 12.3457 |" in card
    assert "AutoModelForCausalLM" in actor and "AutoModelForSequenceClassification" in reward


def snippet(folder: Path, name: str) -> str:
    """Move a saved folder elsewhere, run there what its card prints, and return its output."""
    moved = folder / f"{name} elsewhere"
    (folder / name).rename(moved)
    (code,) = re.findall(r"```python\n(.*?)```", (moved / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=moved, capture_output=True, text=True, check=False)
    moved.rename(folder / name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reward_models_card_has_a_snippet_that_runs_as_printed(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    # As step 2 reads it: the tokens in front, prompt, answer, EOS.
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in EXAMPLE[:2]]
    ids = [2, *parts[0], *parts[1], 2]
    expected = float(model(torch.tensor([ids])).logits)
    assert float(snippet(folder, "reward")) == pytest.approx(expected, abs=1e-6)


def test_the_actors_card_has_a_snippet_that_runs_as_printed(folder: Path) -> None:
    """With greedy answers, as in the folder of a job that samples with top_k 1."""
    file = folder / "actor" / "generation_config.json"
    sampling = file.read_text(encoding="utf-8")
    file.write_text(json.dumps(json.loads(sampling) | {"top_k": 1}), encoding="utf-8")
    said = snippet(folder, "actor")
    file.write_text(sampling, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "actor")
    model = AutoModelForCausalLM.from_pretrained(folder / "actor")
    prompt = ids = torch.tensor([[2, *tokenizer(EXAMPLE[0], add_special_tokens=False)["input_ids"]]])
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 2:
            break
    assert said.removesuffix("\n") == tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.step != 2])
def test_generate_samples_and_stops(folder: Path, name: str) -> None:
    """With the generation config that lies there: 12 tokens at most, then padding after an EOS."""
    config = json.loads((folder / name / "generation_config.json").read_text(encoding="utf-8"))
    assert (config["do_sample"], config["max_new_tokens"], config["eos_token_id"], config["pad_token_id"]) == (
        True,
        12,
        2,
        1,
    )
    # Written out, since the two transformers leave out other defaults.
    assert (config["temperature"], config["top_k"], config["top_p"]) == (1.0, 0, 1.0)
    found = seen(folder, f"{name}-loaded")
    prompt, new = found["prompt"].shape[1], found["generated"][:, found["prompt"].shape[1] :]
    assert found["generated"][:, :prompt].equal(found["prompt"])
    assert 1 <= new.shape[1] <= 12
    for row in new.tolist():
        assert 2 in row or len(row) == 12
        assert set(row[row.index(2) + 1 :]) <= {1} if 2 in row else True


def test_a_card_has_the_numbers_and_not_their_errors() -> None:
    """Nor the share of rows that are right twice, which only an interval needs."""
    errors = {"mean_reward_error_before": 0.1, "mean_reward_error_after": 0.1, "mean_reward_change_error": 0.1}
    measured = {"mean_reward_before": 0.0, "mean_reward_after": 1.0, "good_share_after": 0.5, "reward_accuracy": 0.9}
    shares = {"good_share_both": 0.4, "reward_accuracy_both": 0.4}
    end = End(step=3, updates=4, seconds=9.0, model="m", held_out_rows=8, **measured, **errors, **shares)
    assert scores_of(end) == measured
