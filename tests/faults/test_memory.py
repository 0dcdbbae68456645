"""Test ranks that run out of memory: training continues with smaller passes and the same curve."""

from __future__ import annotations

import pytest

from jobs.run_dir import RunDir
from rlhf_train.disk import read_json
from tests.faults.scene import Scene, curve, error_of, events, fault, warnings
from tests.tiny import Trained

Said = pytest.CaptureFixture[str]

# Step 1 of the tiny job: 4 updates of 8 rows. With a micro batch of 4 and one rank, passes 1 and 2
# are the trial update, 3 and 4 update 1. Other micro batches sum up in another order: float32 then
# differs in its last digits.
SAME = 1e-5


def micro_batches(scene: Scene, name: str) -> list[tuple[int, int]]:
    """(micro batch, global batch) of each start."""
    return [(plan["micro_batch"], plan["global_batch"]) for plan in events(scene.run(name), "plan")]


def test_the_trial_update_finds_it_before_the_first_update(base: Scene, untroubled: Trained) -> None:
    run, met = base.run("rehearsed"), fault("no memory", rows=4)
    assert base.train("rehearsed", "hardware.micro_batch=auto", met=met) == 0
    assert micro_batches(base, "rehearsed") == [(8, 8), (4, 8)]
    message = "out of memory with a micro batch of 8: continues with 4, from update 0"
    assert warnings(run) == [message]
    assert [event["from_update"] for event in events(run, "resumed")] == [0]
    assert read_json(run.fitted)["micro_batches"] == [4, 8, 8]  # of the steps; the other steps have not tried yet
    assert curve(run) == pytest.approx(curve(untroubled.dir), rel=SAME)

    # The next call begins with the size that fitted; 8 rows would fail and warn again.
    assert base.train("rehearsed", "hardware.micro_batch=auto", met=met, more=("--redo",)) == 0
    assert micro_batches(base, "rehearsed")[2:] == [(4, 8)]
    assert warnings(run) == [message]


def test_in_the_midst_of_an_update_no_update_is_lost(base: Scene, untroubled: Trained) -> None:
    run = base.run("amid")
    assert base.train("amid", met=fault("no memory", rows=2, first=8)) == 0  # the second pass of update 3
    assert micro_batches(base, "amid") == [(4, 8), (2, 8)]
    assert warnings(run) == ["out of memory with a micro batch of 4: continues with 2, from update 2"]
    assert [event["from_update"] for event in events(run, "resumed")] == [2]
    assert [event["update"] for event in events(run, "metrics")] == [1, 2, 3, 4]  # none twice
    assert curve(run) == pytest.approx(curve(untroubled.dir), rel=SAME)
    end = Trained(run).end(1)
    assert end["perplexity_before"] == pytest.approx(untroubled.end(1)["perplexity_before"], rel=SAME)
    assert end["perplexity_after"] == pytest.approx(untroubled.end(1)["perplexity_after"], rel=1e-4)
    assert not run.step(1).checkpoints.exists()


def test_once_more_while_it_saves(base: Scene, untroubled: Trained) -> None:
    """What was not saved is done again; the run does not end for it."""
    run = base.run("amid-and-saving")
    assert base.train(run.name, met=fault("no memory", rows=2, first=8, saving_too=True)) == 0
    assert warnings(run) == ["out of memory with a micro batch of 4: continues with 2, from update 0"]
    assert events(run, "error") == []
    assert curve(run) == pytest.approx(curve(untroubled.dir), rel=SAME)


def test_one_rank_of_two(base: Scene, untroubled: Trained) -> None:
    """The other waits for it in a collective and cannot save: both resume from a checkpoint."""
    run, settings = base.run("one-of-two"), ["hardware.ranks=2", "checkpoint.every_updates=1"]
    in_update_3 = fault("no memory", rows=2, rank=1, first=5)  # an update is one pass
    assert base.train("one-of-two", *settings, met=in_update_3) == 0
    assert micro_batches(base, "one-of-two") == [(4, 8), (2, 8)]
    (resumed,) = events(run, "resumed")
    assert resumed["from_update"] in (1, 2)  # the checkpoint of update 2 was being written
    assert warnings(run) == [
        f"out of memory with a micro batch of 4: continues with 2, from update {resumed['from_update']}"
    ]
    assert events(run, "error") == []
    assert curve(run) == pytest.approx(curve(untroubled.dir), rel=SAME)


def test_not_even_one_row(base: Scene, capsys: Said) -> None:
    """Told with what would help.

    By hand: the model has P = 1,687,040 parameters, which take 16 bytes each in float32, with
    gradients and AdamW's moments: 25.7 MiB. With LoRA of rank 64 the A = 589,824 of the adapters
    take 16, and P only 4: 15.4 MiB. Two halves: 12.9 MiB.
    """
    wider = [
        f"actor.model.config.{field}={value}"
        for field, value in (("hidden_size", 256), ("word_embed_proj_dim", 256), ("ffn_dim", 1024))
    ]
    assert base.train("none", "hardware.micro_batch=1", *wider, met=fault("no memory", rows=0)) == 4
    output = capsys.readouterr().err
    assert error_of(output) == (
        "error: out of memory in step 1 with a micro batch of 1\n"
        "  why: CUDA out of memory. Tried to allocate 2.00 GiB for 1 rows (injected)\n\n"
        "hint: weights, gradients and optimizer states take 25.7 MiB a rank, "
        "and activations of one sequence the rest; cheapest first:\n"
        "      hardware.gradient_checkpointing: true, "
        "which keeps activations of one layer at a time and takes about a third more computing\n"
        "      actor.lora: {}, with learning rates as in jobs/opt-1.3b-lora.yaml: 25.7 MiB -> 15.4 MiB\n"
        "      hardware.actor_zero_stage: 3 on 2 GPUs: 25.7 MiB -> 12.9 MiB, with more traffic between them\n"
        "      smaller data.max_prompt_tokens and data.max_response_tokens (their sum is 76), or a smaller model\n"
    )
    assert "Traceback" not in output
    (error,) = events(base.run("none"), "error")
    assert (error["what"], error["exit_code"]) == ("out of memory in step 1 with a micro batch of 1", 4)
    assert warnings(base.run("none")) == [] and not base.run("none").fitted.exists()


def samples(run: RunDir) -> list[tuple[str, str, str]]:
    return [(event["when"], event["prompt"], event["response"]) for event in events(run, "sample", 3)]


def test_in_a_rollout_the_answers_stay_the_same(base: Scene, untroubled: Trained) -> None:
    run, plenty = base.run("short-rollouts"), base.run("rollouts")
    assert base.train(plenty.name, step="3", more=("--from", "untroubled")) == 0
    no_memory = fault("no memory", "generating", rows=10)
    assert base.train(run.name, step="3", met=no_memory, more=("--from", "untroubled")) == 0
    # 64 are allowed. They are halved until they fit, in the first rollout, which sets the scale of
    # the rewards.
    of_memory = [message for message in warnings(run, 3) if not message.startswith("the reward model ranks")]
    assert of_memory == ["out of memory in a rollout with 64 concurrent prompts: continues with 8"]
    assert events(run, "resumed", 3) == [] and len(events(run, "plan", 3)) == 1  # in place
    assert read_json(run.fitted)["rollout_micro_batch"] == 8
    # Twelve prompts, before, halfway and after.
    assert len(samples(run)) == 36 and samples(run) == samples(plenty)
    for name in ("mean_reward", "kl", "entropy", "policy_loss", "value_loss", "response_length", "grad_norm"):
        wanted = [event[name] for event in events(plenty, "metrics", 3)]
        assert [event[name] for event in events(run, "metrics", 3)] == pytest.approx(wanted, rel=1e-4, abs=1e-6), name
