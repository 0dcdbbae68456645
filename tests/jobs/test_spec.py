from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import JOBS_FOLDER, Job, Scratch, difference, load_job, parse_job, save_job

pytestmark = pytest.mark.pinned

ROOT = Path(__file__).parents[2]

SMALL = """
name: small
actor: {model: a/b}
critic: {model: c/d}
data: {datasets: [rows.jsonl]}
sft: {global_batch: 8, learning_rate: 1e-5}
reward: {global_batch: 8, learning_rate: 1e-5}
ppo: {rollout_batch: 8, global_batch: 8, actor_learning_rate: 1e-5, critic_learning_rate: 1e-5}
"""


def small(*settings: str) -> Job:
    return parse_job(SMALL, "small.yaml", settings)


CHAT_MODELS = ("llama-3.2-1b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-1.7b", "smollm2-135m")
SHIPPED = sorted(["demo", *(name + ending for name in ("opt-1.3b", *CHAT_MODELS) for ending in ("", "-lora"))])


def mistakes(*settings: str, text: str = SMALL) -> list[str]:
    with pytest.raises(ToolkitError) as caught:
        parse_job(text, "small.yaml", settings)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.why.splitlines()


# --- the jobs that are shipped --------------------------------------------------------------------


def test_opt_1_3b_is_deepspeed_chats_single_node() -> None:
    job = load_job("opt-1.3b")
    assert (job.name, job.actor.model, job.critic.model, job.data.datasets) == (
        "opt-1.3b", "facebook/opt-1.3b", "facebook/opt-350m", ("Dahoas/rm-static",),
    )  # fmt: skip
    # shared/reference/algorithms.md, 1.7
    assert (job.sft.global_batch, job.reward.global_batch, job.ppo.global_batch, job.ppo.rollout_batch) == (
        128,
        64,
        64,
        64,
    )
    assert (job.sft.epochs, job.reward.epochs, job.ppo.epochs, job.ppo.ppo_epochs) == (1, 1, 1, 1)
    assert (job.sft.learning_rate, job.reward.learning_rate) == (9.65e-6, 5e-5)
    assert (job.ppo.actor_learning_rate, job.ppo.critic_learning_rate, job.ppo.warmup_updates) == (9.65e-6, 5e-6, 100)
    assert (job.sft.weight_decay, job.reward.weight_decay, job.ppo.weight_decay) == (0, 0.1, 0)
    assert (job.data.max_prompt_tokens, job.data.max_response_tokens, job.data.split, job.data.seed) == (
        256,
        256,
        (2, 4, 4),
        1234,
    )
    assert [part.schedule for part in (job.sft, job.reward, job.ppo)] == ["cosine"] * 3
    assert job.actor.lora is None and job.hardware.ranks == "auto"


def test_opt_1_3b_lora_differs_where_lora_and_two_small_cards_ask_for_it() -> None:
    full, lora = load_job("opt-1.3b"), load_job("opt-1.3b-lora")
    assert lora.actor.lora is not None
    assert (lora.actor.lora.rank, lora.sft.learning_rate, lora.hardware.ranks) == (128, 5e-4, 2)
    changed = {line.split(":")[0] for line in difference(full.fields_of_step(3), lora.fields_of_step(3))}
    assert changed == {
        "actor.lora.rank",
        "actor.lora.alpha",
        "actor.lora.target_modules",
        "sft.learning_rate",
        "ppo.actor_learning_rate",
    }


def test_demo_needs_no_hub_and_no_gpu() -> None:
    job = load_job("demo")
    assert isinstance(job.actor.model, Scratch) and job.critic.model == "actor"
    assert (ROOT / job.data.datasets[0]).is_dir()
    assert (job.hardware.device, job.hardware.precision) == ("cpu", "float32")


def test_every_shipped_job_is_named_as_its_file() -> None:
    assert sorted(path.stem for path in JOBS_FOLDER.glob("*.yaml")) == SHIPPED
    assert [load_job(name).name for name in SHIPPED] == SHIPPED


@pytest.mark.parametrize("name", [name for name in SHIPPED if f"{name}-lora" in SHIPPED and name != "opt-1.3b"])
def test_lora_changes_rates_and_nothing_else_that_is_learned(name: str) -> None:
    full, lora = load_job(name), load_job(f"{name}-lora")
    assert lora.ppo.actor_learning_rate == pytest.approx(10 * full.ppo.actor_learning_rate)
    changed = {line.split(":")[0] for step in (1, 2, 3) for line in difference(*fields_of_both(full, lora, step))}
    adapters = {f"actor.lora.{field}" for field in ("rank", "alpha", "target_modules")}
    assert changed == {*adapters, "sft.learning_rate", "ppo.actor_learning_rate"}


def fields_of_both(one: Job, other: Job, step: int) -> tuple[Any, Any]:
    return one.fields_of_step(step), other.fields_of_step(step)


# --- strictness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "mistake"),
    [
        ("sft.global_batch=1.5", "sft.global_batch: an integer, not 1.5"),
        ("sft.global_batch='3'", "sft.global_batch: an integer, not '3'"),
        ("sft.global_batch=true", "sft.global_batch: an integer, not True"),
        ("sft.global_batch=8.0", "sft.global_batch: an integer, not 8.0"),
        ("sft.global_batch=0x10", "sft.global_batch: an integer, not '0x10'"),
        ("sft.global_batch=0", "sft.global_batch: above 0, not 0"),
        ("sft.max_updates=-1", "sft.max_updates: above 0, not -1"),
        ("sft.warmup_updates=-1", "sft.warmup_updates: 0 or above, not -1"),
        ("sft.learning_rate='1e-5'", "sft.learning_rate: a number, not '1e-5'"),
        ("sft.learning_rate=false", "sft.learning_rate: a number, not False"),
        ("sft.learning_rate=.nan", "sft.learning_rate: a finite number, not nan"),
        ("sft.learning_rate=1e999", "sft.learning_rate: a finite number, not inf"),
        ("sft.learning_rate=", "sft.learning_rate: a number, not nothing"),
        ("sft.loss_on_prompt=1", "sft.loss_on_prompt: true or false, not 1"),
        ("sft.loss_on_prompt=on", "sft.loss_on_prompt: true or false, not 'on'"),
        ("sft.betas=[0.9]", "sft.betas: a list of 2 numbers, not [0.9]"),
        ("sft.betas=[0.9, 1.5]", "sft.betas.1: 1 or below, not 1.5"),
        ("sft.betas=[0.9, true]", "sft.betas.1: a number, not True"),
        ("sft.schedule=cosin", "sft.schedule: 'cosine', 'linear' or 'constant', not 'cosin'"),
        ("sft=", "sft: fields, not nothing"),
        ("ppo.ema_decay=1", "ppo.ema_decay: below 1, not 1"),
        ("ppo.rollout_batch=12", "ppo: rollout_batch 12 is not a multiple of global_batch 8"),
        ("ppo.samples_per_prompt=3", "ppo: rollout_batch 8 is not a multiple of samples_per_prompt 3"),
        ("ppo.advantage=dpo", "ppo.advantage: 'gae', 'rloo', 'grpo' or 'reinforce_baseline', not 'dpo'"),
        (
            "ppo.advantage=rloo",
            "ppo: samples_per_prompt: 2 or more with advantage: rloo, which compares a prompt's answers",
        ),
        ("ppo.critic_learning_rate=null", "ppo: critic_learning_rate: this field is required with advantage: gae"),
        ("ppo.rule=is_good", "ppo.rule: module:function, not 'is_good'"),
        ("ppo.rule=.a:b", "ppo.rule: module:function, not '.a:b'"),
        ("ppo.rule=a.b:c\\n", "ppo.rule: module:function, not 'a.b:c\\\\n'"),
        ("seed=4294967296", "seed: below 4294967296, not 4294967296"),
        ("data.split=[1, 2]", "data.split: a list of 3 shares, not [1, 2]"),
        ("data.split=[1, 2, '3']", "data.split.2: a number, not '3'"),
        ("data.split=[1, 2, -3]", "data.split.2: 0 or above, not -3"),
        ("data.split=[0, 0, 0]", "data: split needs at least one share above 0"),
        ("data.datasets=rows.jsonl", "data.datasets: a list of at least one name, not 'rows.jsonl'"),
        ("data.datasets=[]", "data.datasets: a list of at least one name, not []"),
        ("data.datasets=[3]", "data.datasets.0: text, not 3"),
        ("data.datasets=['']", "data.datasets.0: text that is not empty, not ''"),
        ("flavours=cu130", "flavours: a list, of cu118 and cu130, each once, not 'cu130'"),
        ("flavours=[cu118, cu121]", "flavours: a list, of cu118 and cu130, each once, not ['cu118', 'cu121']"),
        ("flavours=[cu130, cu130]", "flavours: a list, of cu118 and cu130, each once, not ['cu130', 'cu130']"),
        ("flavours=", "flavours: a list, of cu118 and cu130, each once, not nothing"),
        ("data.datasets=[{split: train}]", "data.datasets.0.name: this field is required"),
        ("data.datasets=[{name: a, weight: 0}]", "data.datasets.0.weight: above 0, not 0"),
        ("data.datasets=[{name: a, weight: -1.5}]", "data.datasets.0.weight: above 0, not -1.5"),
        (
            "data.datasets=[{name: a, wieght: 2}]",
            "data.datasets.0.wieght: unknown field; did you mean weight? "
            "valid here: name, split, config, columns, steps, weight",
        ),
        (
            "data.datasets=[b, {name: a, steps: [4]}]",
            "data.datasets.1.steps: a list of steps, of 1, 2 and 3, each once, not [4]",
        ),
        (
            "data.datasets=[{name: a, columns: {question: prompt}}]",
            "data.datasets.0.columns.question: 'prompt', 'chosen', 'rejected', 'response', 'completion', 'messages', "
            "'conversations', 'conversation', 'instruction', 'input', 'output', 'system', 'history' or 'label', "
            "not 'question'",
        ),
        ("data.system=keep", "data.system: 'merge' or 'drop', not 'keep'"),
        ("track=wandb", "track: a list, of wandb and trackio, each once, not 'wandb'"),
        ("track=[wandb, mlflow]", "track.1: wandb or trackio, not 'mlflow'"),
        ("track=[wandb, wandb]", "track: a list, of wandb and trackio, each once, not ['wandb', 'wandb']"),
        ("track=[3]", "track.0: wandb or trackio, not 3"),
        ("hardware.ranks=0", "hardware.ranks: 'auto' or an integer above 0, not 0"),
        ("hardware.ranks=1.5", "hardware.ranks: 'auto' or an integer above 0, not 1.5"),
        ("hardware.ranks=Auto", "hardware.ranks: 'auto' or an integer above 0, not 'Auto'"),
        ("hardware.micro_batch=true", "hardware.micro_batch: 'auto' or an integer above 0, not True"),
        ("hardware.actor_zero_stage=4", "hardware.actor_zero_stage: 'auto', 0, 1, 2 or 3, not 4"),
        ("hardware.actor_zero_stage=true", "hardware.actor_zero_stage: 'auto', 0, 1, 2 or 3, not True"),
        ("hardware.actor_zero_stage='2'", "hardware.actor_zero_stage: 'auto', 0, 1, 2 or 3, not '2'"),
        ("hardware.precision=fp16", "hardware.precision: did you mean float16? not 'fp16'"),
        ("hardware.precision=double", "hardware.precision: 'auto', 'float32', 'bfloat16' or 'float16', not 'double'"),
        ("actor.lora=true", "actor.lora: fields, not True; `lora: {}` takes the defaults"),
        (
            "actor.lora.target_modules=[]",
            "actor.lora.target_modules: 'all-linear' or a list of at least one name, not []",
        ),
        ("hardware=fast", "hardware: fields, not 'fast'"),
        ("actor.model=", "actor.model: a model's name, a folder or a config, not nothing"),
        ("actor.model=3", "actor.model: a model's name, a folder or a config, not 3"),
        ("actor.model=''", "actor.model: a model's name, a folder or a config, not ''"),
        ("actor.model={}", "actor.model.config: this field is required"),
        ("actor.model={config: opt}", "actor.model.config: fields, not 'opt'"),
        ("actor.model={config: {hidden_size: 8}}", "actor.model: config needs a model_type, e.g. opt"),
        ("actor.lora=8", "actor.lora: fields, not 8"),
        ("name=../up", "name: letters, digits, dots, dashes and underscores, 64 at most, not '../up'"),
        ("name=a b", "name: letters, digits, dots, dashes and underscores, 64 at most, not 'a b'"),
        ('name="a\\n"', "name: letters, digits, dots, dashes and underscores, 64 at most, not 'a\\n'"),
        ("name=1e5", "name: letters, digits, dots, dashes and underscores, 64 at most, not 100000.0"),
    ],
)
def test_a_mistake_is_one_line(setting: str, mistake: str) -> None:
    assert mistakes(setting) == [mistake]


GROUPS = ("ppo.advantage=grpo", "ppo.samples_per_prompt=4")


def test_without_a_critic_its_fields_are_named_or_refused() -> None:
    job = small(*GROUPS, "ppo.lam=0.9", "ppo.gamma=0.9")
    assert job.ppo.unread == ["critic_learning_rate", "lam", "gamma"]  # SMALL has the first
    assert small(*GROUPS, "ppo.advantage=reinforce_baseline", "ppo.gamma=0.9").ppo.unread == ["critic_learning_rate"]
    assert small("ppo.lam=0.9").ppo.unread == []
    assert small(*GROUPS, "ppo.critic_learning_rate=null").ppo.critic_learning_rate is None
    assert mistakes(*GROUPS, "ppo.critic_warmup_updates=2") == [
        "ppo: critic_warmup_updates: advantage: grpo has no critic; leave the field out"
    ]
    assert mistakes(*GROUPS, "ppo.whiten_rewards=true") == ["ppo: whiten_rewards: only with advantage: gae, not grpo"]


def test_step_3_alone_loses_its_critic() -> None:
    assert [small().networks_of(step) for step in (1, 2, 3)] == [("actor",), ("critic",), ("actor", "critic")]
    assert [small(*GROUPS).networks_of(step) for step in (1, 2, 3)] == [("actor",), ("critic",), ("actor",)]


def test_an_integer_is_a_number() -> None:
    assert small("sft.epochs=2").sft.epochs == 2.0


def test_a_long_value_is_cut() -> None:
    assert mistakes(f"data.split={'x' * 500}") == ["data.split: a list of 3 shares, not '" + "x" * 59 + "..."]


@pytest.mark.parametrize(
    ("setting", "mistake"),
    [
        (
            "sftt.epochs=1",
            "sftt: unknown field; did you mean sft? valid here: name, flavours, seed, actor, critic, data, sft, "
            "reward, ppo, hardware, checkpoint, track",
        ),
        (
            "actor.lora.alpah=1",
            "actor.lora.alpah: unknown field; did you mean alpha? valid here: rank, alpha, target_modules",
        ),
        (
            "actor.lora.lr=1",
            "actor.lora.lr: unknown field; valid here: rank, alpha, target_modules",
        ),
        (
            "dataset=x",
            "dataset: unknown field; did you mean data.datasets? valid here: name, flavours, seed, actor, critic, "
            "data, sft, reward, ppo, hardware, checkpoint, track",
        ),
        (
            "model=x",
            "model: unknown field; did you mean actor.model? valid here: name, flavours, seed, actor, critic, data, "
            "sft, reward, ppo, hardware, checkpoint, track",
        ),
        ("critic.name=x", "critic.name: unknown field; valid here: model, reward_model"),
        ("critic.config=x", "critic.config: unknown field; valid here: model, reward_model"),
        (
            "actor.model={config: {model_type: opt}, cofnig: 1}",
            "actor.model.cofnig: unknown field; did you mean config? valid here: config",
        ),
    ],
)
def test_an_unknown_field_is_told_the_names_there(setting: str, mistake: str) -> None:
    assert mistakes(setting) == [mistake]


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("sft.lr", "learning_rate"),
        ("reward.batch_size", "global_batch"),
        ("ppo.lr", "actor_learning_rate"),
        ("ppo.beta", "kl_coef"),
        ("ppo.cliprange", "clip_range"),
        ("hardware.fp16", "precision"),
        ("sft.num_train_epochs", "epochs"),
    ],
)
def test_words_of_other_toolkits_are_known(field: str, meant: str) -> None:
    [mistake] = mistakes(f"{field}=1")
    assert mistake.startswith(f"{field}: unknown field; did you mean {meant}? valid here: ")


def test_all_mistakes_at_once() -> None:
    text = SMALL.replace("name: small\n", "").replace("learning_rate: 1e-5}\nreward", "lerning_rate: 1e-5}\nreward")
    assert mistakes("ppo.lam=2", "hardware.ranks=no", "hardware.device=gpu", text=text) == [
        "name: this field is required",
        "sft.learning_rate: this field is required",
        "sft.lerning_rate: unknown field; did you mean learning_rate? valid here: epochs, max_updates, schedule, "
        "final_learning_rate, "
        "warmup_updates, betas, eps, weight_decay, max_grad_norm, global_batch, learning_rate, loss_on_prompt",
        "ppo.lam: 1 or below, not 2",
        "hardware.ranks: 'auto' or an integer above 0, not 'no'",
        "hardware.device: 'auto', 'cpu' or 'cuda', not 'gpu'",
    ]


def test_what_a_person_sees() -> None:
    with pytest.raises(ToolkitError) as caught:
        small("seed=-1", "data.eval_rows=0")
    assert str(caught.value) == (
        "error: 2 mistakes in small.yaml with --set\n"
        "  why: seed: 0 or above, not -1\n"
        "       data.eval_rows: above 0, not 0\n"
        "\n"
        "hint: docs/job-file.md explains every field"
    )
    with pytest.raises(ToolkitError, match=r"^error: one mistake in small.yaml\n"):
        parse_job(SMALL + "seed: x\n", "small.yaml")


@pytest.mark.parametrize(("text", "what"), [("", "NoneType"), ("- a", "list"), ("3", "int"), ("name", "str")])
def test_a_file_that_is_no_mapping(text: str, what: str) -> None:
    assert mistakes(text=text) == [f"it holds {what}, not a mapping of fields"]


# --- --set ----------------------------------------------------------------------------------------


def test_set_reads_yaml_and_the_last_one_wins() -> None:
    job = small(
        "ppo.kl_coef=1e-2",
        "sft.epochs=3",
        "data.datasets=[a/b, c]",
        " seed =7",
        "sft.epochs=0.5",
        "actor.model={config: {model_type: opt}}",
    )
    assert (job.ppo.kl_coef, job.sft.epochs, job.data.datasets, job.seed) == (0.01, 0.5, ("a/b", "c"), 7)
    assert job.actor.model == Scratch(config={"model_type": "opt"})
    assert small("critic.model=a=b").critic.model == "a=b"


def test_set_creates_fields_in_fields() -> None:
    lora = small("actor.lora.rank=8").actor.lora
    assert lora is not None and (lora.rank, lora.alpha) == (8, 64.0)
    assert small("hardware.ranks=2").hardware.ranks == 2
    assert (
        load_job("demo", ["actor.model.config.hidden_size=64"]).dump()["actor"]["model"]["config"]["hidden_size"] == 64
    )


@pytest.mark.parametrize("setting", ["", "seed", "=3", ".=3", "sft..epochs=1", "sft.=1"])
def test_set_needs_a_path_and_a_value(setting: str) -> None:
    with pytest.raises(ToolkitError, match=r"is not of the form a\.b=value"):
        small(setting)


def test_set_does_not_go_below_a_value() -> None:
    with pytest.raises(ToolkitError) as caught:
        small("actor.model.config.hidden_size=64")
    assert caught.value.what == "--set actor.model.config.hidden_size=64: actor.model is a value, it has no fields"


def test_set_names_itself_when_its_value_is_no_yaml() -> None:
    with pytest.raises(ToolkitError, match=r"--set data\.split=\[1 is not valid YAML"):
        small("data.split=[1")


# --- files ----------------------------------------------------------------------------------------


def test_a_job_is_a_name_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(SMALL, encoding="utf-8")
    (tmp_path / "demo").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert [
        load_job(name).name for name in ("own.yaml", "./own.yaml", str(tmp_path / "own.yaml"), "./demo", "demo")
    ] == ["small"] * 4 + ["demo"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "own", "missing.yaml", "/", "jobs/", "a/../../b", "x" * 300, "x" * 300 + ".yaml", "a\nb"]
)
def test_an_unknown_job_is_told_the_known_ones(name: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        load_job(name)
    assert caught.value.what == f"there is no job `{name}`"
    assert caught.value.why == f"neither a file of that name nor one of: {', '.join(SHIPPED)}"


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(SMALL.encode() + b"# caf\xe9\n")
    with pytest.raises(ToolkitError, match=r"cannot read .*latin\.yaml"):
        load_job(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize("name", ["demo", "opt-1.3b", "qwen2.5-1.5b-lora"])
def test_a_saved_job_reads_back_the_same(name: str, tmp_path: Path) -> None:
    job = load_job(
        name,
        [
            "sft.learning_rate=1e-6",
            "name='1e5'",
            "data.datasets=['010', 'on', '22:22', 'é ''x', '3']",
            "ppo.kl_target=6",
        ],
    )
    save_job(job, tmp_path / "new" / "job.yaml")
    again = load_job(str(tmp_path / "new" / "job.yaml"))
    assert again == job and again.dump() == job.dump()
    assert [again.fields_of_step(step) for step in (1, 2, 3)] == [job.fields_of_step(step) for step in (1, 2, 3)]


def test_a_job_travels_as_json() -> None:
    job = load_job("opt-1.3b-lora")
    assert Job.model_validate(json.loads(json.dumps(job.dump()))) == job


# --- what a step depends on -----------------------------------------------------------------------


def steps_changed(setting: str, *before: str) -> list[int]:
    old, new = small(*before), small(*before, setting)
    return [step for step in (1, 2, 3) if difference(old.fields_of_step(step), new.fields_of_step(step))]


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ("name=other", []),
        ("seed=7", [1, 2, 3]),
        ("actor.model=x/y", [1, 3]),
        ("actor.lora.rank=64", [1, 3]),
        ("critic.model=x/y", [2, 3]),
        ("critic.model=actor", [2, 3]),
        ("data.datasets=[other]", [1, 2, 3]),
        ("data.system=drop", [1, 2, 3]),
        ("data.chat_template_kwargs={enable_thinking: false}", [1, 2, 3]),
        ("data.eval_rows=7", []),  # it decides what is measured, not what is learned
        ("sft.epochs=2", [1, 3]),
        ("reward.loss=per_token", [2, 3]),
        ("ppo.kl_coef=0.2", [3]),
        ("ppo.rule=a:b", [3]),
        ("hardware.precision=float32", [1, 2, 3]),
        ("hardware.ranks=2", []),
        ("hardware.device=cpu", []),
        ("hardware.actor_zero_stage=3", []),
        ("hardware.critic_zero_stage=0", []),
        ("hardware.micro_batch=2", []),
        ("hardware.rollout_micro_batch=2", []),
        ("hardware.gradient_checkpointing=true", []),
        ("hardware.cpu_threads=1", []),
        ("sft.epochs=1.0", []),  # its default
    ],
)
def test_which_steps_a_field_changes(setting: str, steps: list[int]) -> None:
    assert steps_changed(setting) == steps


def test_a_critic_from_the_actor_depends_on_step_1() -> None:
    assert steps_changed("sft.epochs=2", "critic.model=actor") == [1, 2, 3]
    assert steps_changed("actor.lora.rank=8", "critic.model=actor") == [1, 2, 3]


def test_a_critic_from_a_config_reads_with_the_actors_tokenizer() -> None:
    scratch = "critic.model={config: {model_type: opt}}"
    assert steps_changed("actor.tokenizer_vocabulary=99", scratch) == [1, 2, 3]
    assert steps_changed("sft.epochs=2", scratch) == [1, 3]


def test_fields_are_json_by_dotted_path() -> None:
    fields = small("actor.model={config: {model_type: opt, pad: null}}", "actor.lora.rank=8").fields_of_step(1)
    assert json.loads(json.dumps(fields)) == fields
    expected = {
        "seed": 1234,
        "actor.model.config.model_type": "opt",
        "actor.model.config.pad": None,
        "actor.lora.rank": 8,
        "data.split": [2, 4, 4],
    }
    assert fields.items() >= expected.items()
    assert "sft.max_updates" not in fields  # not set


def test_the_difference_is_one_line_a_field() -> None:
    old, new = small(), small("sft.epochs=2", "sft.max_updates=5", "data.split=[1, 1, 1]", "seed=1")
    assert difference(old.fields_of_step(1), new.fields_of_step(1)) == [
        "data.split: [2.0, 4.0, 4.0] -> [1.0, 1.0, 1.0]",
        "seed: 1234 -> 1",
        "sft.epochs: 1.0 -> 2.0",
        "sft.max_updates: not set -> 5",
    ]
    assert difference(new.fields_of_step(1), old.fields_of_step(1))[-1] == "sft.max_updates: 5 -> not set"


# --- every field has a reader ---------------------------------------------------------------------

Types = dict[
    str, set[type[BaseModel]]
]  # a variable, or a path like `self.spec` -> the parts of the job that it may hold
Reads = set[tuple[type[BaseModel], str]]


def models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The model and those in its fields: (path, model)."""
    yield "", model
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from ((f"{name}.{path}".rstrip("."), each) for path, each in models(inner))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]


IN_FULL = {"entries": "datasets"}  # properties that give what a field says in short


class Reader(ast.NodeVisitor):
    """Finds attributes that are read from a variable that holds the job, or a part of it.

    A variable is known by its annotation, by what is assigned to it, or by the name `job`.
    `job.dump()` reads no field.
    """

    def __init__(self, job: type[BaseModel]) -> None:
        self.job = job
        self.named = {
            each.__name__: each for _, model in models(job) for each in model.__mro__ if issubclass(each, BaseModel)
        }
        self.known: Types = {}
        self.reads: Reads = set()

    def types(self, node: ast.AST | None) -> set[type[BaseModel]]:
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in self.known:
            return self.known[ast.unparse(node)]
        if isinstance(node, ast.Tuple | ast.List):
            return set().union(*(self.types(each) for each in node.elts))
        if isinstance(node, ast.Attribute):
            field = IN_FULL.get(node.attr, node.attr)
            owners = {owner for owner in self.types(node.value) if field in owner.model_fields}
            self.reads |= {(owner, field) for owner in owners} if isinstance(node.ctx, ast.Load) else set()
            inside = {model for owner in owners for model in models_in(owner.model_fields[field].annotation)}
            return inside | ({self.job} if node.attr == "job" else set())
        return {self.job} if isinstance(node, ast.Name) and node.id == "job" else set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.types(node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = dict(self.known)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.annotate(argument.arg, argument.annotation)
        self.generic_visit(node)
        self.known = outside | {name: types for name, types in self.known.items() if name.startswith("self.")}

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotate(ast.unparse(node.target), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        for part in node.generators:  # before the element, which uses what they bind
            self.visit(part)
        self.visit(node.elt)

    def annotate(self, name: str, annotation: ast.expr | None) -> None:
        nodes = list(ast.walk(annotation)) if annotation else []
        words = {each.id for each in nodes if isinstance(each, ast.Name)} | {
            each.attr for each in nodes if isinstance(each, ast.Attribute)
        }
        self.known[name] = {self.named[word] for word in words & self.named.keys()}

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=False):
                self.assign(each, its)
        elif isinstance(target, ast.Name | ast.Attribute):
            self.known[ast.unparse(target)] = self.types(value)


@cache
def reads_of(job: type[BaseModel], source: str) -> Reads:
    """Cached: the package's files are looked through by several tests, which takes seconds."""
    reader = Reader(job)
    reader.visit(ast.parse(source))
    return reader.reads


def unread(job: type[BaseModel], sources: Iterable[str]) -> list[str]:
    """Paths of the fields that no source reads.

    A field of a shared base is read where the base's is.
    """
    reads: Reads = set()
    for source in sources:
        reads |= reads_of(job, source)
    return [
        f"{path}.{name}".lstrip(".")
        for path, model in models(job)
        for name in model.model_fields
        if not any(attribute == name and issubclass(model, owner) for owner, attribute in reads)
    ]


def sources() -> list[str]:
    readers = [*(ROOT / "rlhf_train").rglob("*.py"), *(ROOT / "remote").rglob("*.py"), ROOT / "jobs/flavours.py"]
    return [path.read_text(encoding="utf-8") for path in sorted(readers)]


def test_every_field_has_a_reader() -> None:
    assert unread(Job, sources()) == []


def test_a_field_without_a_reader_is_found() -> None:
    class Knobs(BaseModel):
        dummy: int = 0
        also: int = 0

    class WithDummies(Job):
        dummy: int = 0
        knobs: Knobs = Knobs()

    assert unread(WithDummies, sources()) == ["dummy", "knobs", "knobs.dummy", "knobs.also"]
    assert unread(WithDummies, [*sources(), "print(job.knobs.dummy)"]) == ["dummy", "knobs.also"]


@pytest.mark.parametrize(
    ("source", "is_reading"),
    [
        ("job.sft.epochs", True),
        ("def f(spec: Sft): return spec.epochs", True),
        ("def f(spec: Optimization): return spec.epochs", True),
        ("def f(spec: Sft | None): return g(spec.epochs + 1)", True),
        ("def f(part: spec.Sft): return part.epochs", True),
        ("spec = session.job.sft\nspec.epochs", True),
        ("spec, other = self.job.sft, 1\nprint(spec.epochs)", True),
        ("sum(part.epochs for part in (job.reward, job.sft))", True),
        ("class A:\n  def __init__(self, spec: Sft): self.spec = spec\n  def f(self): return self.spec.epochs", True),
        ("job.dump()['sft']['epochs']", False),
        ("getattr(job.sft, 'epochs')", False),
        ("Sft.epochs", False),
        ("job.sft.epochs = 3", False),
        ("job.reward.epochs", False),
        ("other.epochs", False),
        ("def f(spec: Sft): pass\ndef g(spec): return spec.epochs", False),
        ("spec = job.sft\nspec = other\nspec.epochs", False),
    ],
)
def test_what_counts_as_reading(source: str, is_reading: bool) -> None:
    assert ("sft.epochs" not in unread(Job, [source])) == is_reading


def test_models_of_ones_own_take_the_place_of_steps() -> None:
    small = ["actor.model=some/base", "critic.model=actor"]
    both = load_job("demo", [*small, "actor.sft_model=my/sft", "critic.reward_model=my/rm"])
    assert both.own_models == {1: "my/sft", 2: "my/rm"}
    assert (both.actor_source, both.critic_source) == ("my/sft", "my/rm")
    assert both.own_models_of(3) == {"actor.sft_model": "my/sft", "critic.reward_model": "my/rm"}
    # `critic.model: actor` is the model of step 1, or what takes its place; another one is itself.
    sft = load_job("demo", [*small, "actor.sft_model=my/sft"])
    assert (sft.critic_source, sft.own_models_of(2)) == ("my/sft", {"actor.sft_model": "my/sft"})
    other = load_job("demo", [*small, "actor.sft_model=my/sft", "critic.model=some/critic"])
    assert (other.critic_source, other.own_models_of(2)) == ("some/critic", {})
    assert load_job("demo", small).own_models == {} and load_job("demo", small).critic_source == "some/base"


@pytest.mark.parametrize(
    ("settings", "steps", "whole", "tokenizers"),
    [
        ([], [1, 2, 3], ["a/b", "c/d"], []),
        ([], [1], ["a/b"], ["c/d"]),  # step 1 compares the tokenizers
        ([], [2], ["c/d"], []),
        ([], [3], [], []),  # what steps 1 and 2 have made
        (["critic.model=actor"], [1, 2, 3], ["a/b"], []),
        (["critic.model=a/b"], [1, 2, 3], ["a/b"], []),
        (["critic.model={config: {model_type: opt}}"], [1, 2, 3], ["a/b"], []),
        (["critic.model={config: {model_type: opt}}"], [2], [], ["a/b"]),  # which it reads with
        (["actor.model={config: {model_type: opt}}"], [1, 2, 3], ["c/d"], []),
        (["actor.sft_model=my/sft"], [1, 2, 3], ["my/sft", "c/d"], []),
        (["actor.sft_model=my/sft"], [1, 2], ["c/d"], []),  # step 1 is left out, and step 2 starts from its own
        (["actor.sft_model=my/sft", "critic.model=actor"], [2], ["my/sft"], []),
        (["critic.reward_model=my/rm"], [1, 2, 3], ["a/b", "my/rm"], []),
        (["critic.reward_model=my/rm"], [1, 2], ["a/b"], ["my/rm"]),
        (["actor.sft_model=my/sft", "critic.reward_model=my/rm"], [1, 2, 3], ["my/sft", "my/rm"], []),
        (["actor.sft_model=my/sft", "critic.reward_model=my/rm"], [1, 2], [], []),
        (["ppo.judge_model=my/judge"], [1, 2, 3], ["a/b", "c/d", "my/judge"], []),
        (["ppo.judge_model=my/judge"], [1, 2], ["a/b", "c/d"], []),
    ],
)
def test_the_models_that_steps_read(
    settings: list[str], steps: list[int], whole: list[str], tokenizers: list[str]
) -> None:
    assert small(*settings).models_read(steps) == (whole, tokenizers)


@pytest.mark.parametrize(
    ("setting", "is_changed"),
    [
        ("sft.epochs=3", False),
        ("reward.epochs=3", False),
        ("actor.model=some/base", False),
        ("critic.model=some/critic", False),
        ("actor.lora.rank=4", True),
        ("ppo.epochs=3", True),
        ("actor.sft_model=other/sft", True),
        ("critic.reward_model=other/rm", True),
    ],
)
def test_what_step_3_depends_on_after_models_of_ones_own(setting: str, *, is_changed: bool) -> None:
    own = ("actor.sft_model=my/sft", "critic.reward_model=my/rm")
    assert (3 in steps_changed(setting, *own)) == is_changed


def test_a_reward_model_that_begins_as_the_actor_depends_on_ones_own() -> None:
    assert 2 in steps_changed("actor.sft_model=my/sft", "critic.model=actor")
    assert 2 not in steps_changed("actor.sft_model=my/sft", "critic.model=some/critic")


@pytest.mark.parametrize("value", ["actor", "''", "3", "[x]", "{config: {model_type: opt}}"])
def test_ones_own_model_is_a_name(value: str) -> None:
    with pytest.raises(ToolkitError, match=r"actor\.sft_model: a model's name or a folder, not "):
        load_job("demo", [f"actor.sft_model={value}"])


def test_the_saved_job_is_plain_yaml(tmp_path: Path) -> None:
    """For eyes and for other tools: no tags, every field, those at their default too."""
    save_job(load_job("demo"), tmp_path / "job.yaml")
    text = (tmp_path / "job.yaml").read_text(encoding="utf-8")
    plain = yaml.safe_load(text)
    assert "!" not in text and plain["sft"]["learning_rate"] == 0.003
    assert plain["ppo"]["clip_range"] == 0.2 and plain["hardware"]["ranks"] == 1
