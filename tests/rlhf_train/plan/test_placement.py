from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Job, load_job
from rlhf_train.plan.placement import GIB, Machine, Placement, place

CPU = Machine(cores=4)
H200 = Machine(cores=16, gpus=("NVIDIA H200",), gpu_bytes=140 * GIB, bfloat16=True)
RTX_4090 = Machine(cores=16, gpus=("NVIDIA GeForce RTX 4090",), gpu_bytes=24 * GIB, bfloat16=True)
TWO_4090 = Machine(cores=32, gpus=("NVIDIA GeForce RTX 4090",) * 2, gpu_bytes=24 * GIB, bfloat16=True)
V100 = Machine(cores=8, gpus=("Tesla V100-SXM2-32GB",), gpu_bytes=32 * GIB, bfloat16=False)


def opt(*settings: str) -> Job:
    return load_job("opt-1.3b", settings)


def refused(job: Job, machine: Machine) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        place(job, machine)
    return caught.value


def test_a_cpu() -> None:
    found = place(opt(), CPU)
    assert found.device_reason.startswith("PyTorch ") and found.device_reason.endswith(" sees no GPU")
    assert found == Placement(
        device="cpu", device_reason=found.device_reason, ranks=1, precision="float32", actor_zero_stage=0,
        critic_zero_stage=0, micro_batches=(8, 8, 8), rollout_micro_batch=64, cpu_threads=4, notes=(),
    )  # fmt: skip


def test_a_card_of_24_gb() -> None:
    found = place(opt(), RTX_4090)
    assert found == Placement(
        # 16 bit is never trained at ZeRO 0: placement.py says why
        device="cuda", device_reason="PyTorch sees 1 x NVIDIA GeForce RTX 4090", ranks=1, precision="bfloat16",
        actor_zero_stage=1, critic_zero_stage=1, micro_batches=(8, 8, 8), rollout_micro_batch=64, cpu_threads=16,
        notes=(),
    )  # fmt: skip
    assert str(found.batch_plan(opt(), 1)).startswith("128 = 8 micro batch x 16 accumulation x 1 rank")


@pytest.mark.parametrize(("gpu_gib", "micro_batch"), [(140, 64), (79, 32), (47, 16), (24, 8)])
def test_a_large_card_takes_larger_micro_batches(gpu_gib: int, micro_batch: int) -> None:
    assert place(opt(), replace(H200, gpu_bytes=gpu_gib * 2**30)).micro_batches == (micro_batch,) * 3


def test_a_gpu_generates_a_whole_rollout_at_once() -> None:
    more = ("ppo.rollout_batch=256", "ppo.global_batch=256")
    assert [place(opt(*more), machine).rollout_micro_batch for machine in (H200, TWO_4090, CPU)] == [256, 128, 64]


def test_two_cards_share_the_optimizer() -> None:
    found = place(opt(), TWO_4090)
    assert (found.ranks, found.actor_zero_stage, found.critic_zero_stage, found.cpu_threads) == (2, 1, 1, 16)
    assert found.device_reason == "PyTorch sees 2 x NVIDIA GeForce RTX 4090"
    plans = [found.batch_plan(opt(), step) for step in (1, 2, 3)]
    assert [(p.micro_batch, p.gradient_accumulation, p.world_size) for p in plans] == [(8, 8, 2), (8, 4, 2), (8, 4, 2)]


def test_the_lora_job_on_two_cards() -> None:
    found = place(load_job("opt-1.3b-lora"), TWO_4090)
    assert (found.ranks, found.micro_batches, found.notes) == (2, (4, 4, 4), ())
    assert (found.actor_zero_stage, found.critic_zero_stage) == (1, 1)
    # Adapters are too few to be worth sharing out.
    assert place(load_job("opt-1.3b-lora", ["hardware.precision=float32"]), TWO_4090).actor_zero_stage == 0


def test_a_card_without_bfloat16() -> None:
    found = place(opt(), V100)
    assert (found.device, found.precision, found.micro_batches) == ("cuda", "float16", (8, 8, 8))


def test_the_jobs_word_wins() -> None:
    job = opt(
        "hardware={ranks: 1, device: cuda, precision: float32, actor_zero_stage: 3, "
        "critic_zero_stage: 0, micro_batch: 32, rollout_micro_batch: 7, cpu_threads: 3}"
    )
    assert place(job, TWO_4090) == Placement(
        device="cuda", device_reason="PyTorch sees 2 x NVIDIA GeForce RTX 4090", ranks=1, precision="float32",
        actor_zero_stage=3, critic_zero_stage=0, micro_batches=(32, 32, 32), rollout_micro_batch=7, cpu_threads=3,
        notes=(),
    )  # fmt: skip
    on_cpu = place(opt("hardware.device=cpu"), TWO_4090)
    assert (on_cpu.device, on_cpu.device_reason) == ("cpu", "the job file says so")
    assert (on_cpu.ranks, on_cpu.precision) == (1, "float32")


def test_cpu_ranks_share_the_cores() -> None:
    found = place(opt("hardware.ranks=2"), CPU)
    assert (found.ranks, found.cpu_threads, found.micro_batches, found.actor_zero_stage) == (2, 2, (8, 8, 8), 0)
    assert place(opt("hardware.ranks=8"), CPU).cpu_threads == 1


def test_no_core_has_two_threads_of_a_rank() -> None:
    wished = {cores: place(load_job("demo"), replace(CPU, cores=cores)).cpu_threads for cores in (1, 2, 4)}
    assert wished == {1: 1, 2: 2, 4: 2}


def test_zero_0_in_16_bit_is_noted() -> None:
    found = place(opt("hardware.actor_zero_stage=0", "hardware.critic_zero_stage=2"), TWO_4090)
    assert (found.actor_zero_stage, found.critic_zero_stage) == (1, 2)
    assert found.notes == ("actor: ZeRO 0 is run as ZeRO 1 in bfloat16",)
    both = place(opt("hardware.actor_zero_stage=0", "hardware.critic_zero_stage=0", "hardware.precision=bfloat16"), CPU)
    assert (both.actor_zero_stage, both.critic_zero_stage, len(both.notes)) == (1, 1, 2)
    assert place(opt("hardware.actor_zero_stage=0", "hardware.precision=float32"), TWO_4090).notes == ()


def test_micro_batches_divide_the_batch() -> None:
    job = opt("sft.global_batch=90", "reward.global_batch=14", "ppo.global_batch=6", "ppo.rollout_batch=12")
    assert place(job, CPU).micro_batches == (6, 7, 6)  # at most 8
    assert place(job, TWO_4090).micro_batches == (5, 7, 3)  # at most 8, of 45, 7 and 3 a rank


def test_more_ranks_than_gpus() -> None:
    error = refused(opt("hardware.ranks=2"), RTX_4090)
    assert (error.what, error.exit_code) == ("hardware.ranks is 2, but PyTorch sees 1 GPU", ExitCode.UNFIT)
    assert refused(opt("hardware.ranks=4"), TWO_4090).what == "hardware.ranks is 4, but PyTorch sees 2 GPUs"


def test_cuda_without_a_gpu() -> None:
    error = refused(opt("hardware.device=cuda"), CPU)
    assert (error.what, error.exit_code) == ("hardware.device is cuda, but PyTorch sees no GPU", ExitCode.UNFIT)
    assert "nvidia-smi" in error.hint


def test_float16_on_a_cpu() -> None:
    error = refused(opt("hardware.precision=float16"), CPU)
    assert (error.what, error.exit_code) == ("hardware.precision is float16, but this runs on CPU", ExitCode.UNFIT)


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        (
            ["sft.global_batch=127"],
            "sft.global_batch 127 cannot be shared by 2 ranks",
            "use a multiple of 2, or hardware.ranks with one of [1, 127]",
        ),
        (["reward.global_batch=9"], "reward.global_batch 9 cannot be shared by 2 ranks", "one of [1, 3, 9]"),
        (
            ["ppo.rollout_batch=9", "ppo.global_batch=9"],
            "ppo.rollout_batch 9 cannot be shared by 2 ranks",
            "use a multiple of 2",
        ),
        (
            ["hardware.micro_batch=5"],
            "sft.global_batch 128 over 2 ranks is 64, not a multiple of micro_batch 5",
            "[1, 2, 4, 8, 16, 32, 64]",
        ),
    ],
)
def test_batches_that_do_not_divide(settings: list[str], what: str, hint: str) -> None:
    error = refused(opt(*settings), TWO_4090)
    said = error.parts or [error]
    assert error.exit_code == ExitCode.USAGE and [hint in part.hint for part in said if part.what == what] == [True]


def test_all_batches_that_do_not_divide_are_said() -> None:
    error = refused(opt("hardware.micro_batch=5"), TWO_4090)
    assert error.what == "3 mistakes" and [part.what.split()[0] for part in error.parts] == [
        "sft.global_batch",
        "reward.global_batch",
        "ppo.global_batch",
    ]


def test_a_placement_travels_as_json() -> None:
    found = place(opt("hardware.actor_zero_stage=0"), TWO_4090)
    again = Placement(**json.loads(json.dumps(asdict(found))))
    assert list(again.micro_batches) == [8, 8, 8] and list(again.notes) == list(found.notes)
    assert again.batch_plan(opt(), 2) == found.batch_plan(opt(), 2)


@pytest.mark.parametrize(
    ("settings", "machine", "kept"),
    [
        ([], TWO_4090, True),
        ([], RTX_4090, False),
        (["hardware.ranks=1"], TWO_4090, False),
        (["hardware.device=cpu", "hardware.ranks=2"], TWO_4090, False),
    ],
)
def test_peer_access_matters_to_several_gpus(settings: list[str], machine: Machine, kept: bool) -> None:
    assert place(opt(*settings), machine, "no way").no_peer_access == ("no way" if kept else "")
    assert place(opt(*settings), machine).no_peer_access == ""


def test_this_machine() -> None:
    machine = Machine.look()
    assert machine.cores >= 1 and (machine.gpu_bytes > 0) == bool(machine.gpus) and machine.cuda == torch.version.cuda
    assert len(machine.capabilities) == len(machine.gpus) and (machine.peer_access is None) == (len(machine.gpus) < 2)


def two_cards(monkeypatch: pytest.MonkeyPatch, reached: set[tuple[int, int]]) -> None:
    cards = [SimpleNamespace(name=f"card {major}", total_memory=major * GIB, major=major, minor=6) for major in (8, 7)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) in reached)


@pytest.mark.parametrize(("reached", "found"), [(set(), False), ({(1, 0)}, True), ({(0, 0), (1, 1)}, False)])
def test_a_machine_with_two_cards(monkeypatch: pytest.MonkeyPatch, reached: set[tuple[int, int]], found: bool) -> None:
    two_cards(monkeypatch, reached)
    machine = Machine.look()
    assert machine == Machine(
        machine.cores, ("card 8", "card 7"), 7 * GIB, False, ("8.6", "7.6"), found, torch.version.cuda
    )


def test_why_pytorch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 10010).\nPlease",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    warnings.simplefilter("ignore")  # as PYTHONWARNINGS=ignore does; pytest puts it back
    for _ in range(2):  # Python shows a warning once, unless told otherwise
        error = "CUDA initialization: The NVIDIA driver on your system is too old (found version 10010)."
        assert Machine.look().gpu_error == error
    assert list(recwarn) == []  # said in the finding


def test_a_job_on_the_cpu_leaves_the_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for GPUs"))
    assert Machine.look(gpus=False) == Machine(Machine.look(gpus=False).cores)
