from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from jobs.errors import ExitCode, ToolkitError
from jobs.events import End, EventWriter
from jobs.run_dir import RunDir
from jobs.spec import Job, load_job, steps_of
from rlhf_train import completion, launch
from rlhf_train.__main__ import VERSION, chat_command, main, parser, settings_of
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.plan import machine
from rlhf_train.plan.placement import Machine, Placement
from tests import tiny

CHECKOUT = Path(__file__).parents[2]

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder that is not the checkout, and nothing of the developer's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_RUNS", raising=False)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


def job_of(*arguments: str) -> Job:
    args = parser().parse_args(arguments)
    return load_job(args.job, settings_of(args))


# --- words ---


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], [1, 2, 3]),
        (["--step", "all"], [1, 2, 3]),
        (["--step", "3"], [3]),
        (["--step", "1", "3"], [1, 3]),
        (["--step", "1,3"], [1, 3]),
        (["--step", "3", "1", "1"], [1, 3]),
        (["--step", "2,", ",1"], [1, 2]),
        (["--step", "1,all"], [1, 2, 3]),
    ],
)
def test_steps(words: list[str], steps: list[int]) -> None:
    assert steps_of(parser().parse_args(words).step) == steps


@pytest.mark.parametrize("words", [["4"], ["0"], ["1", "two"], ["1-3"], [""], [","], ["ALL"], ["1 3"]])
def test_what_is_no_step(words: list[str]) -> None:
    with pytest.raises(ToolkitError, match="is not a step\n\nhint: use 1, 2, 3"):
        steps_of(words)


def test_deepspeed_chats_words() -> None:
    models = ["--actor-model", "facebook/opt-2.7b", "--reward-model", "facebook/opt-125m"]
    stages = ["--actor-zero-stage", "3", "--reward-zero-stage", "0"]
    job = job_of("--step", "1", "2", "3", "--deployment-type", "single_gpu", *models, *stages, "--output-dir", "out")
    assert (job.actor.model, job.critic.model, job.hardware.ranks) == ("facebook/opt-2.7b", "facebook/opt-125m", 1)
    assert (job.hardware.actor_zero_stage, job.hardware.critic_zero_stage) == (3, 0)
    assert job_of("--deployment-type", "single_node", "--job", "opt-1.3b-lora").hardware.ranks == "auto"


def test_sizes_are_opts() -> None:
    job = job_of("--actor-model", "6.7b", "--reward-model", "125m")
    assert (job.actor.model, job.critic.model) == ("facebook/opt-6.7b", "facebook/opt-125m")


@pytest.mark.parametrize(
    "name", ["actor", "./my model", "[1", "a: b", "3", "1.3b-tuned", "null", "{x}", 'say "hi"', "modèle", "#x", "'"]
)
def test_a_model_is_a_name_whatever_it_looks_like(name: str) -> None:
    assert job_of("--reward-model", name).critic.model == name


def test_without_a_models_step_the_flag_takes_its_place(capsys: Said) -> None:
    """Of a run that has no steps yet; one that began with the model is named again."""
    flags = ["--job", "demo", "--actor-model", "./my sft", "--reward-model", "./my rm", "--dry-run"]
    assert main([*flags, "--step", "3"]) == 2  # it is not there, and is looked for
    said = capsys.readouterr().err
    assert "1. there is no folder ./my sft\n" in said and "2. there is no folder ./my rm\n" in said
    completion.begin_step(job_of("--job", "demo", "--reward-model", "./my rm"), RunDir(Path("runs/demo")), 2)
    assert main([*flags, "--step", "3"]) == 2
    assert "error: step 3 (PPO) needs the model of step 2 (reward model)\n" in capsys.readouterr().err


def test_set_wins_over_flags() -> None:
    assert job_of("--set", "hardware.ranks=4", "--deployment-type", "single_gpu").hardware.ranks == 4


def test_multi_node_is_refused_clearly(capsys: Said) -> None:
    assert main(["--deployment-type", "multi_node"]) == 2
    assert capsys.readouterr().err == (
        "error: --deployment-type multi_node is not supported yet\n"
        "  why: rented containers open no ports to each other\n\n"
        "hint: use single_node: all GPUs of one machine\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--step"],
        ["--stepp", "1"],
        ["--dry"],
        ["--deployment-type", "cluster"],
        ["--set"],
        ["--run"],
        ["--redo=yes"],
        ["report", "demo", "--price", "-3"],
        ["report", "demo", "--price", "nan"],
    ],
)
def test_argparses_own_errors_end_with_2(words: list[str], capsys: Said) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_word_that_is_no_verb_is_told_the_verbs(capsys: Said) -> None:
    assert main(["stauts", "demo"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no verb `stauts`\n"
        "  why: the verbs are chat, report, status, logs; without one it trains\n\n"
        "hint: rlhf-train --job NAME trains; rlhf-train --help\n"
    )
    with pytest.raises(SystemExit):
        main(["--stepp"])
    assert "rlhf-train chat|report|status|logs ..." in capsys.readouterr().err


# --- mistakes: one error, nothing written ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--job", "dmeo"],
            "error: there is no job `dmeo`\n  why: neither a file of that name nor one of: demo, llama-3.2-1b,",
        ),
        (["--job", ""], "error: there is no job ``\n"),
        (["--job", "x" * 300], "error: there is no job `xxx"),
        (["--job", "caf\udce9.yaml"], "error: there is no job `caf\\udce9.yaml`\n"),
        (
            ["--run", "../x"],
            "error: `../x` cannot name a run\n\nhint: use letters, digits, dots, dashes and underscores, 64 at most\n",
        ),
        (["--run", "a b"], "error: `a b` cannot name a run\n"),
        (["--run", ""], "error: `` cannot name a run\n"),
        (["--run", "."], "error: `.` cannot name a run\n"),
        (["--run=-x"], "error: `-x` cannot name a run\n"),
        (["--run", "x\n"], "error: `x\n` cannot name a run\n"),
        (["--run", "\x1b[2J"], "error: `\\x1b[2J` cannot name a run\n"),
        (["--run", "x" * 65], f"error: `{'x' * 65}` cannot name a run\n"),
        (["--from", "../x"], "error: `../x` cannot name a run\n"),
        (["--from", ""], "error: `` cannot name a run\n"),
        (["--from", "other"], "error: there is no run `other`\n  why: runs/other does not exist\n"),
        (["--step", "4"], "error: --step 4 is not a step\n"),
        (["--actor-zero-stage", "5"], "  why: hardware.actor_zero_stage: 'auto', 0, 1, 2 or 3, not 5\n"),
        (["--actor-zero-stage", "two"], "  why: hardware.actor_zero_stage: 'auto', 0, 1, 2 or 3, not 'two'\n"),
        (["--set", "sft"], "error: --set sft is not of the form a.b=value\n"),
        (["--set", "name=caf\udce9"], "error: --set name=caf\\udce9 is not valid YAML\n"),
        (["--set", "sft.epochs=" + "[" * 500], " cannot be read\n  why: it is nested too deeply\n"),
        (["--set", "seed=" + "9" * 5000], "`99999999999999999999` cannot be read as int\n"),
        (
            ["--set", "data.split=[0, 1, 1]"],
            "error: step 1 (supervised fine-tuning) has no data\n  why: data.split is 0, 1, 1\n",
        ),
        (
            ["--set", "ppo.rule=nowhere:f"],
            "error: ppo.rule nowhere:f cannot be imported\n  why: ModuleNotFoundError: No module named 'nowhere'\n",
        ),
        (
            ["--set", "ppo.rule=json:nothing"],
            "error: ppo.rule json:nothing cannot be imported\n  why: AttributeError: ",
        ),
        (["--set", "ppo.rule=json:__name__"], "error: ppo.rule json:__name__ is not a function\n  why: it is str\n"),
        (
            ["--set", "sft.global_batch=3", "--set", "hardware={device: cpu, ranks: 2}"],
            "error: sft.global_batch 3 cannot be shared by 2 ranks\n",
        ),
        (
            ["--step", "3"],
            "error: step 3 (PPO) needs the model of step 1 (supervised fine-tuning) and step 2 (reward model)\n",
        ),
        (["--step", "3"], "hint: run `--step 1 2 3` (or `--step all`),\n"),
        (
            ["--dry-run", "--set", "actor.model={config: {model_type: opt, num_attention_heads: 5}}"],
            "  why: ValueError: embed_dim must be divisible",
        ),
        (
            ["--dry-run", "--set", "actor.model={config: {model_type: opt, hidden_size: 0}}"],
            "error: transformers cannot make a model from a config",
        ),
        (
            ["--dry-run", "--set", "actor.model={config: {model_type: optt}}"],
            "  why: ValueError: Unrecognized model identifier: optt",
        ),
    ],
)
def test_a_mistake_is_one_error_and_leaves_nothing(words: list[str], said: str, capsys: Said, tmp_path: Path) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""
    assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    (tmp_path / "broken_rule.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--set", "ppo.rule=broken_rule:good"]) == 2
    assert "  why: ZeroDivisionError: division by zero\n" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: Said, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["--job", "demo", "--set", "track=[trackio]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the job's field `track` names trackio, which this Python has not\n")
    assert "-m pip install trackio, or --set 'track=[]'" in said
    monkeypatch.setenv("RLHF_FLAVOUR", "cu130")  # where locked packages are not to be replaced
    assert main(["--job", "demo", "--set", "track=[wandb, trackio]"]) == 2
    said = capsys.readouterr().err
    assert "  why: flavour cu130 is made without it\n\nhint: --set 'track=[wandb]'\n" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--download"], ["--dry-run"], []])
def test_a_job_of_another_flavour(
    monkeypatch: pytest.MonkeyPatch, capsys: Said, tmp_path: Path, words: list[str]
) -> None:
    """Refused before the hub is asked for anything: it would say so of Qwen3, whose name it is."""
    monkeypatch.setenv("RLHF_FLAVOUR", "cu118")
    for setting, why in (
        ("flavours=[cu130]", "the job names cu130 alone"),
        ("critic.model=Qwen/Qwen3-0.6B", "its transformers has no Qwen 3"),
    ):
        assert main([*words, "--job", "opt-1.3b", "--set", setting]) == ExitCode.UNFIT
        said = capsys.readouterr().err
        assert said.startswith("error: `opt-1.3b` does not run in flavour cu118, which this stack has\n")
        assert f"  why: {why}\n" in said and "`FLAVOUR=cu130 docker compose run --rm train ...`" in said
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_is_unfit(capsys: Said, tmp_path: Path) -> None:
    assert main(["--job", "demo", "--set", "hardware.precision=float16"]) == 3
    assert capsys.readouterr().err.startswith("error: hardware.precision is float16, but this runs on CPU\n")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be(tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["--job", "demo", "--output-dir", "file/runs"]) == 3
    assert capsys.readouterr().err == (
        "error: this machine is not fit for the job\n"
        "  why: the folder file/runs cannot be made, since file is a file: "
        "choose another --output-dir, or mend the path\n"
    )


# A PyTorch for CUDA on a machine without a GPU, whatever this one has.
BLIND = Machine(cores=2, cuda="11.8")
NO_GPU = (
    "PyTorch sees no GPU, and no NVIDIA driver is loaded: "
    "take a box on which `nvidia-smi` lists a card, or install the driver"
)
ON_AUTO = ["--job", "demo", "--set", "hardware={device: auto, micro_batch: 16, precision: float32}"]


@pytest.fixture
def blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """-> where the launcher is called: (device, ranks)"""
    launched: list[tuple[str, int]] = []

    def launch_nothing(
        _job: Job, _run: RunDir, _steps: object, placement: Placement, *_: object, **__: object
    ) -> ExitCode:
        launched.append((placement.device, placement.ranks))
        return ExitCode.OK

    monkeypatch.setattr(machine, "DRIVER", tmp_path / "nowhere")
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (None, None))
    monkeypatch.setattr(Machine, "look", lambda gpus: BLIND)
    monkeypatch.setattr(launch, "launch", launch_nothing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return launched


def test_cuda_without_a_gpu_is_not_the_cpu(tmp_path: Path, capsys: Said, blind: list[tuple[str, int]]) -> None:
    (tmp_path / "runs").write_text("", encoding="utf-8")
    assert main(ON_AUTO) == 3
    assert capsys.readouterr().err == (
        "error: this machine is not fit for the job\n"
        f"  why: {NO_GPU}; to train on the CPU on purpose, --set hardware.device=cpu\n"
        "       the folder runs cannot be made, since runs is a file: choose another --output-dir, or mend the path\n"
    )
    assert blind == []


def test_a_driver_that_is_too_old_is_said_instead(tmp_path: Path, capsys: Said, blind: list[tuple[str, int]]) -> None:
    (tmp_path / "nowhere").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  440.118.02  Wed\n", encoding="utf-8"
    )
    assert main(ON_AUTO) == 3
    (_, line) = capsys.readouterr().err.splitlines()
    assert line.startswith("  why: the NVIDIA driver 440.118.02 is too old for CUDA 11.8: install driver ")
    assert blind == []


@pytest.mark.parametrize(
    ("visible", "words"),
    [("", ON_AUTO), ("-1", ON_AUTO), (None, ["--job", "demo"]), (None, [*ON_AUTO, "--set", "hardware.device=cpu"])],
)
def test_the_cpu_on_purpose(
    monkeypatch: pytest.MonkeyPatch, capsys: Said, blind: list[tuple[str, int]], visible: str | None, words: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main(words) == 0
    assert blind == [("cpu", 1)] and "error: " not in capsys.readouterr().err


@pytest.mark.parametrize(("device", "looked"), [("cpu", False), ("auto", True)])
def test_a_job_for_the_cpu_does_not_touch_the_gpus(
    monkeypatch: pytest.MonkeyPatch, blind: list[tuple[str, int]], device: str, looked: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(Machine, "look", lambda gpus: asked.append(gpus) or Machine(cores=1))
    assert main([*ON_AUTO, "--set", f"hardware.device={device}"]) == 0
    assert asked == [looked] and blind == [("cpu", 1)]


def test_a_run_folder_has_its_format_number(tmp_path: Path, blind: list[tuple[str, int]], capsys: Said) -> None:
    file = tmp_path / "runs" / "demo" / "format"
    assert main(["--job", "demo"]) == 0 and file.read_text(encoding="utf-8") == "2\n"
    file.write_text("3\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["--job", "demo"]) == 2 and blind == [("cpu", 1)]
    output = capsys.readouterr().err
    assert "--redo" in output and "--run NEW" in output and file.read_text(encoding="utf-8") == "3\n"
    assert main(["--job", "demo", "--redo", "--dry-run"]) == 0 and file.read_text(encoding="utf-8") == "3\n"
    assert main(["--job", "demo", "--redo"]) == 0 and blind == [("cpu", 1)] * 2
    assert file.read_text(encoding="utf-8") == "2\n"


def test_a_dry_run_says_it_and_continues(tmp_path: Path, capsys: Said, blind: list[tuple[str, int]]) -> None:
    assert main([*ON_AUTO, "--dry-run"]) == 3
    printed = capsys.readouterr()
    assert printed.err == f"unfit: {NO_GPU}; to train on the CPU on purpose, --set hardware.device=cpu\n"
    assert "\ndevice: cpu (PyTorch " in printed.out and blind == [] and list(tmp_path.iterdir()) == []


def test_a_warning_stops_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Said, blind: list[tuple[str, int]]) -> None:
    monkeypatch.setattr(machine, "prebuilt_operators", lambda: ("cpu_adam",))
    monkeypatch.setattr(machine, "cpu_flags", lambda _: ())
    assert main(["--job", "demo"]) == 0
    assert capsys.readouterr().err.startswith("warning: this CPU lacks abm, avx, ") and blind == [("cpu", 1)]


def test_two_geforce_cards(monkeypatch: pytest.MonkeyPatch, blind: list[tuple[str, int]]) -> None:
    """What is known of the cards reaches the launcher."""
    cards = Machine(
        cores=2,
        gpus=("NVIDIA GeForce RTX 3090",) * 2,
        gpu_bytes=24 * 2**30,
        bfloat16=True,
        capabilities=("8.6",) * 2,
        peer_access=False,
        cuda="11.8",
    )
    settings: list[dict[str, str]] = []
    monkeypatch.setattr(Machine, "look", lambda gpus: cards)
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(
        launch, "launch", lambda *given, **options: settings.append(launch.nccl_settings(given[3], {})) or ExitCode.OK
    )
    assert main(ON_AUTO) == 0
    assert settings == [{"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}]


def test_taking_over_steps_needs_no_gpu(
    capsys: Said, blind: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete("one", 1)
    assert main([*ON_AUTO, "--run", "two", "--from", "one", "--step", "1"]) == 0
    taken, talk = capsys.readouterr().err.splitlines()
    assert taken == "from run one: step 1" and talk.startswith("talk to it: ") and blind == []
    monkeypatch.setenv("RLHF_REQUEST", "req-1")  # on a box: `fab train` says it, with the box's name
    assert main([*ON_AUTO, "--run", "three", "--from", "one", "--step", "1"]) == 0
    assert capsys.readouterr().err.splitlines() == ["from run one: step 1"]


def test_quiet_says_nothing_of_what_goes_well(capsys: Said, blind: list[tuple[str, int]]) -> None:
    """Neither of a model of one's own, nor of steps taken over, nor how to talk to the model."""
    complete("one", 1)
    words = [*ON_AUTO, "--run", "two", "--from", "one", "--step", "1", "2", "--set", "critic.reward_model=mine"]
    for _ in range(2):  # the second time it is complete
        assert main([*words, "--quiet"]) == 0
        printed = capsys.readouterr()
        assert printed.err == "" and "perplexity" in printed.out
    assert main(words) == 0
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "step 2 (reward model) is left out",
        "step 1 (supervised fine-tuning) is complete",
        "talk to it",
    ]


def test_ctrl_c_while_it_starts(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "steps_to_do", interrupted)
    assert main(["--job", "demo"]) == 130
    assert capsys.readouterr().err == ""


# --- --dry-run ---


OPT = (
    "{model_type: opt, hidden_size: 96, word_embed_proj_dim: 96, num_hidden_layers: 3, ffn_dim: 384, "
    "max_position_embeddings: 128}"
)


def test_dry_run_of_the_demo(tmp_path: Path, capsys: Said) -> None:
    settings = [
        f"actor.model.config={OPT}",
        "actor.tokenizer_vocabulary=768",
        "sft.global_batch=32",
        "hardware={device: cpu, micro_batch: 16}",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["--job", "demo", "--dry-run", "--run", "try", *words]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:3] == [
        "run: runs/try",
        "device: cpu (the job file says so), 1 rank, float32",
        "data: rlhf_train/demo/data: pairs of text, 20000 to learn from, 512 held out",
    ]
    assert lines[3].startswith(
        "step 1 (supervised fine-tuning): to do; global batch 32 = 16 micro batch x 2 accumulation x 1 rank"
    )
    # 10 epochs at most, and the recipe's most updates.
    for rows, updates in (("3996 rows", 500), ("13995 pairs", 900), ("2009 prompts", 400)):
        assert any(line.startswith(f"  {rows}, {updates} updates; about ") for line in lines), rows
    # OPT of 3 layers, 96 wide, feed-forward 384, 768 tokens and 128 + 2 positions, counted by hand:
    layer = 4 * (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96) + 2 * (96 + 96)
    count = 768 * 96 + 130 * 96 + 3 * layer + (96 + 96)
    amount = f"{count / 1e6:.1f} M"
    assert f"parameters: actor {amount} ({amount} trained), critic {amount}" in lines
    # In step 3: two models, and two checkpoints of actor and critic with two moments each.
    needed = f"{(2 * 4 + 2 * 2 * 12) * count / 2**20:.1f} MiB"
    assert any(line.startswith(f"disk: {needed} for models and checkpoints, of ") for line in lines)
    assert lines[-1].startswith("time: about ") and lines[-1].endswith(" in all")
    assert printed.err == "" and list(tmp_path.iterdir()) == []


def test_verbose_shows_the_whole_job(capsys: Said) -> None:
    assert main(["--job", "demo", "--dry-run", "--verbose", "--set", "sft.epochs=3.0"]) == 0
    resolved, facts = capsys.readouterr().out.split("\n\n")
    assert Job.model_validate(yaml.safe_load(resolved)) == load_job("demo", ["sft.epochs=3.0"])
    assert facts.startswith("run: runs/demo\n")


LLAMA_7B = (
    "{model_type: llama, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32}"
)


def test_dry_run_on_another_card(capsys: Said) -> None:
    large = ["--set", f"actor.model.config={LLAMA_7B}", "--set", "actor.tokenizer_vocabulary=32000"]
    large += ["--set", "hardware.precision=auto"]
    assert main(["--job", "demo", "--dry-run", "--step", "1", "--gpu", "rtx-4090", *large]) == 3
    printed = capsys.readouterr().out
    # 6.7 billion weights of 2 bytes, and 12 bytes of AdamW's for each.
    assert "device: cuda (--gpu rtx-4090), 1 rank, " in printed
    assert "parameters: actor 6738.4 M (6738.4 M trained)" in printed
    assert " a GPU, of 23.3 GiB (weights 12.6 GiB, optimizer 75.3 GiB" in printed and "  does not fit: " in printed
    assert printed.splitlines()[-1].endswith(" in all (estimate: nobody has measured rtx-4090)")
    assert main(["--job", "demo", "--dry-run", "--step", "1", "--gpu", "h200"]) == 0
    assert "estimate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what", "why"),
    [
        (["--dry-run", "--gpu", "rtx-5"], "--gpu rtx-5 is not known", "env/cards.toml has h200, h100"),
        (["--gpu", "h200"], "--gpu is for --dry-run", ""),
        (["--dry-run", "--set", "data.datasets=[./nothere.jsonl]"], "there is no data set `./nothere.jsonl`", "no "),
    ],
)
def test_what_a_dry_run_refuses(words: list[str], what: str, why: str, capsys: Said) -> None:
    assert main(["--job", "demo", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {what}\n") and why in printed


def test_a_dry_run_says_all_mistakes_together(capsys: Said) -> None:
    wrong = ["sft.global_batch=33", "reward.global_batch=31", "data.datasets=[./nothere.jsonl]"]
    words = [word for setting in wrong for word in ("--set", setting)]
    assert main(["--job", "demo", "--dry-run", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: 3 mistakes\n") and "mend them all; nothing was begun" in printed
    for part in (
        "1. sft.global_batch 33 over 1 rank is 33, not a multiple of micro_batch 16",
        "2. reward.global_batch 31 over 1 rank is 31",
        "3. there is no data set `./nothere.jsonl`",
    ):
        assert part in printed


def test_a_mistake_of_ppo_hides_no_other(capsys: Said) -> None:
    wrong = ["ppo.gamma=7", "ppo.global_batch=48"]
    words = [word for setting in wrong for word in ("--set", setting)]
    assert main(["--job", "demo", "--dry-run", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: 2 mistakes in ") and "ppo.gamma: 1 or below, not 7" in printed
    assert printed.count("ppo: rollout_batch 64 is not a multiple of global_batch 48") == 1


def test_prompts_that_are_all_too_long_are_warned_of(capsys: Said) -> None:
    assert main(["--job", "demo", "--dry-run", "--step", "1", "--set", "data.max_prompt_tokens=1"]) == 0
    warning = "warning: step 1: all its prompts seem longer than data.max_prompt_tokens (1), and would be left out"
    assert capsys.readouterr().out.startswith(f"{warning}\n")


def test_dry_run_says_what_is_complete(capsys: Said) -> None:
    complete("one", 1, 2)
    assert main(["--job", "demo", "--run", "one", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "step 2 (reward model): complete; " in printed and "step 3 (PPO): to do; " in printed
    assert printed.count("  memory, at the peak: ") == 1


def test_dry_run_looks_at_another_run_too(tmp_path: Path, capsys: Said) -> None:
    complete("one", 1, 2)
    words = ["--job", "demo", "--dry-run", "--step", "3", "--run", "two", "--set", "ppo.kl_coef=0.5"]
    assert main(words) == 2
    assert main([*words, "--from", "one"]) == 0
    assert "step 3 (PPO): to do" in capsys.readouterr().out
    assert not (tmp_path / "runs/two").exists()


def test_dry_run_names_models_of_ones_own(tmp_path: Path, capsys: Said) -> None:
    tokenizer = train_tokenizer(["some words"], 280)
    for name, kind in (("sft", OPTForCausalLM), ("rm", OPTForSequenceClassification)):
        config = OPTConfig(**{key: value for key, value in tiny.OPT.items() if key != "model_type"}, vocab_size=280)
        config.num_labels, config.max_position_embeddings = 1, 1024
        kind(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(str(tmp_path / name))
    words = ["--job", "demo", "--dry-run", "--actor-model", "./sft", "--reward-model"]
    assert main([*words, "./rm", "--step", "3"]) == 0
    facts = capsys.readouterr().out
    assert "step 1 (supervised fine-tuning): left out, ./sft takes its place\n" in facts
    assert "step 2 (reward model): left out, ./rm takes its place\n" in facts and "step 3 (PPO): to do" in facts
    assert main([*words, "./sft", "--step", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: ./sft is no reward model\n  why: it has no head")
    # A step whose place is taken is not done, even where it is asked for.
    own = ["--set", "actor.sft_model=./sft", "--set", "critic.model=actor"]
    assert main(["--job", "demo", "--dry-run", *own]) == 0
    printed = capsys.readouterr()
    assert printed.err == "step 1 (supervised fine-tuning) is left out: ./sft takes its place\n"
    assert printed.out.count("  memory, at the peak: ") == 2


def command(*words: str, cwd: Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    program = [sys.executable, "-m", "rlhf_train", *words]
    return subprocess.run(
        program, cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )


def test_dry_run_without_the_hub(tmp_path: Path) -> None:
    done = command("--dry-run", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 2
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: what this job takes is not known without the configs of its models\n")
    assert "cannot load facebook/opt-1.3b from the hub" in error and "unset HF_HUB_OFFLINE" in error
    # A batch that cannot be hides nothing of the models.
    done = command("--dry-run", "--set", "hardware={device: cpu, micro_batch: 5}", cwd=tmp_path)
    assert done.returncode == 2 and "4. what this job takes is not known without the configs" in done.stderr


# --- a run that is complete ---

# What is not in PATH is named by its whole path, unless it lies below the folder of the call.
CHAT = f"{'rlhf-train' if shutil.which('rlhf-train') else Path(sys.executable).with_name('rlhf-train')} chat"


def complete(name: str, *steps: int) -> RunDir:
    """A run of the demo in ./runs whose steps look complete."""
    run = RunDir(Path("runs") / name)
    for step in steps:
        completion.begin_step(load_job("demo"), run, step)
        run.step(step).model.mkdir()
        end = End(
            step=step,
            updates=4,
            seconds=90,
            model=str(run.step(step).model),
            perplexity_after=2.5 if step == 1 else None,
        )
        EventWriter(run.events)(end)
        completion.complete_step(run, step, asdict(end))
    return run


def test_a_complete_run_is_reported_without_torch(tmp_path: Path) -> None:
    complete("demo", 1, 2, 3)
    code = (
        "import sys; from rlhf_train.__main__ import main; code = main(['--job', 'demo']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (
        0,
        "step 1 (supervised fine-tuning) is complete: runs/demo/step1/model\n"
        "step 2 (reward model) is complete: runs/demo/step2/model\n"
        "step 3 (PPO) is complete: runs/demo/step3/model\n"
        f"talk to it: {CHAT} demo\n",
    )
    assert "perplexity" in done.stdout and "2.50" in done.stdout


@pytest.mark.parametrize(
    ("folder", "environ", "expected"),
    [
        ("runs", {}, f"{CHAT} demo"),
        ("elsewhere", {}, f"{CHAT} demo --output-dir elsewhere"),
        ("runs", {"RLHF_HOST_RUNS": "runs"}, "docker compose run --rm chat demo"),
    ],
)
def test_the_command_that_talks_to_a_run(folder: str, environ: dict[str, str], expected: str) -> None:
    assert chat_command(RunDir(Path(folder) / "demo"), Path("runs"), environ) == expected


def test_the_version_is_the_projects(capsys: Said) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"rlhf-box {VERSION}\n"
    assert f'version = "{VERSION}"\n' in (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    complete("demo", 1, 2, 3)
    reader, writer = os.pipe()
    os.close(reader)
    done = command("--job", "demo", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert len(done.stderr.splitlines()) == 3  # the three steps, as above, and nothing after the table


def test_a_changed_field_is_refused(capsys: Said) -> None:
    complete("demo", 1, 2, 3)
    assert main(["--job", "demo", "--set", "ppo.kl_horizon=5"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: run `demo` did step 3 with other settings\n  why: ppo.kl_horizon: 10000.0 -> 5.0\n"
    )


def test_steps_of_another_run_are_taken_over(tmp_path: Path, capsys: Said) -> None:
    complete("one", 1, 2, 3)
    words = ["--job", "demo", "--run", "two", "--from", "one", "--step", "1", "2", "--set", "ppo.kl_coef=0.5"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert (
        printed.err == f"from run one: step 1, step 2\ntalk to it: {CHAT} two\n"
        and "runs/two/step1/model" in printed.out
    )
    assert main(words) == 0  # again: nothing to do
    assert capsys.readouterr().err.startswith("step 1 (supervised fine-tuning) is complete: runs/two/step1/model\n")


def test_report_is_a_verb_that_writes_a_page_of_one_run_or_of_several(tmp_path: Path, capsys: Said) -> None:
    for name, perplexity in (("a", 8.0), ("b", 40.0)):
        run = RunDir(tmp_path / "runs" / name)
        end = End(step=1, updates=4, seconds=3600.0, model="m", perplexity_before=31.0, perplexity_after=perplexity)
        EventWriter(run.events)(end)
    assert main(["report", "a", "--price", "1.5"]) == ExitCode.OK
    assert capsys.readouterr().out == "runs/a/report.html\n"
    html = Path("runs/a/report.html").read_text(encoding="utf-8")
    assert (
        "It worked: the perplexity on held-out answers fell from 31.00 to 8.00, without an error" in html
        and "<dd>1.50</dd>" in html
    )
    assert main(["report", "a", "./runs/b"]) == ExitCode.OK
    assert capsys.readouterr().out == "runs/report-a-b.html\n"
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "gpu-box" / "a")
    assert main(["report", "a", "gpu-box/a"]) == ExitCode.OK
    assert capsys.readouterr().out == "runs/report-runs-a-gpu-box-a.html\n"
    html = Path("runs/report-runs-a-gpu-box-a.html").read_text(encoding="utf-8")
    assert all(html.count(f">{name}</h2>") == html.count(f"</i>{name}</li>") == 1 for name in ("runs/a", "gpu-box/a"))
    assert main(["report", "a", "--output", "none/page.html"]) == ExitCode.UNFIT
    assert capsys.readouterr().err == (
        "error: cannot use none/page.html\n  why: No such file or directory\n\n"
        "hint: make room, or name another place with --output\n"
    )
    assert main(["report", "c"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "error: there is no run `c`\n  why: no runs/c/events.jsonl\n\nhint: runs of runs: a, b\n"
    )
    (tmp_path / "runs" / "folder" / "events.jsonl").mkdir(parents=True)
    assert main(["report", "folder"]) == main(["logs", "folder"]) == ExitCode.UNFIT
    said = "error: cannot use runs/folder/events.jsonl\n  why: Is a directory\n\nhint: make room or mend the path\n"
    assert capsys.readouterr().err == said * 2
    for number in range(6):
        shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / (str(number) * 64))
    assert main(["report", *(str(number) * 64 for number in range(6))]) == ExitCode.OK
    path = Path(capsys.readouterr().out.strip())
    assert path.is_file() and path.name.startswith(f"report-{'0' * 64}-1")
