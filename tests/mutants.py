"""This program puts one wrong line at a time into the training code, and shows which tests see it.

`python -m tests.mutants` does so with every mutant of MUTANTS, `python -m tests.mutants NAME ...`
with some. It never touches the checkout: it works in a copy. A mutant is killed if a test of its
file fails that passes without it; TESTS says which tests these are. The exit code is 1 if one lives
without a reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
OWN = ("env", "jobs", "remote", "rlhf_train", "tests")
TIMEOUT_S = 1800  # a mutant that hangs is killed
HUNG = "the tests did not end by themselves"

STEPS, UNITS = "rlhf_train/steps", "tests/rlhf_train/steps"
TWINS = "tests/integration/test_twins.py"
GROUPS = f"{TWINS}::test_step_3_without_a_critic_learns_what_its_twin_learns"
STEP_1, STEP_2, STEP_3 = (f"{TWINS}::test_step_{step}_learns_what_its_twin_learns" for step in (1, 2, 3))

# The tests that a file is held to, quickest first: the run ends with the first that fails.
TESTS: dict[str, tuple[str, ...]] = {
    f"{STEPS}/losses.py": (
        f"{UNITS}/test_losses.py",
        f"{UNITS}/test_experience.py",
        f"{UNITS}/test_advantages.py",
        STEP_2,
        STEP_3,
    ),
    f"{STEPS}/advantages.py": (f"{UNITS}/test_advantages.py", GROUPS),
    f"{STEPS}/experience.py": (f"{UNITS}/test_experience.py", STEP_3, f"{UNITS}/test_ppo.py"),
    f"{STEPS}/scoring.py": (f"{UNITS}/test_scoring.py", STEP_3),
    f"{STEPS}/ppo.py": (f"{UNITS}/test_ppo.py::test_kl_coefficient_by_hand", STEP_3, GROUPS, f"{UNITS}/test_ppo.py"),
    f"{STEPS}/ppo_setup.py": (STEP_3, f"{UNITS}/test_ppo.py"),
    f"{STEPS}/ppo_state.py": (f"{UNITS}/test_ppo_state.py", STEP_3),
    f"{STEPS}/change.py": (f"{UNITS}/test_change.py",),
    f"{STEPS}/held_out.py": (f"{UNITS}/test_held_out.py", STEP_3),
    f"{STEPS}/reward.py": (f"{UNITS}/test_held_out.py", STEP_2),
    f"{STEPS}/sft.py": (STEP_1,),
    "rlhf_train/data/sequences.py": ("tests/rlhf_train/data/test_sequences.py", TWINS),
    "rlhf_train/models/log_probs.py": ("tests/rlhf_train/models/test_log_probs.py", TWINS),
    "rlhf_train/models/networks.py": (TWINS,),
    "rlhf_train/engine/deepspeed_engine.py": ("tests/rlhf_train/engine/test_deepspeed_engine.py", TWINS),
}


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # stands once in the file
    new: str
    may_live: str = ""  # the reason, if no test can see it


def _of(file: str, *mutants: tuple[str, ...]) -> tuple[Mutant, ...]:
    return tuple(Mutant(name, file, old, new, *reason) for name, old, new, *reason in mutants)


MUTANTS: tuple[Mutant, ...] = (
    *_of(
        f"{STEPS}/ppo_setup.py",
        ("actor-has-the-critics-rate", "        spec.actor_learning_rate,\n", "        spec.critic_learning_rate,\n"),
        (
            "critic-has-the-actors-rate",
            "            spec.critic_learning_rate,\n",
            "            spec.actor_learning_rate,\n",
        ),
        (
            "critic-without-shift-and-scale",
            "for network in (setup.reward_model, *(critic.module for critic in setup.engines[1:])):",
            "for network in (setup.reward_model,):",
        ),
        ("scale-is-the-variance", "max(float(scores.std()), LEAST_SCALE)", "max(float(scores.var()), LEAST_SCALE)"),
        (
            "shift-is-left-out",
            "return float(scores.mean()), max(float(scores.std())",
            "return 0.0, max(float(scores.std())",
        ),
        ("schedule-begins-before-the-actor", "first_update=spec.critic_warmup_updates,", "first_update=0,"),
        ("rollouts-at-temperature-1", "temperature=spec.temperature,", "temperature=1.0,"),
        (
            "epochs-do-not-count",
            "spec.ppo_epochs * spec.rollout_batch // spec.global_batch",
            "spec.rollout_batch // spec.global_batch",
        ),
        ("policy-over-all-rows-of-the-head", "tokens=len(tokenizer))", "tokens=None)"),
        (
            "held-out-prompts-are-training-prompts",
            "[tokens.held_out.prompt[i] for i in tokens.held_out.step_rows[3]]",
            "[tokens.train.prompt[i] for i in tokens.train.step_rows[3]]",
        ),
    ),
    *_of(
        f"{STEPS}/ppo.py",
        (
            "value-loss-with-the-ratios-clip",
            "mask, clip_range=spec.value_clip_range",
            "mask, clip_range=spec.clip_range",
        ),
        (
            "policy-loss-with-the-values-clip",
            "            clip_range=spec.clip_range,\n",
            "            clip_range=spec.value_clip_range,\n",
        ),
        (
            "no-temperature-in-training",
            "actor(batch, temperature=spec.temperature, with_entropy",
            "actor(batch, with_entropy",
        ),
        ("each-epoch-in-the-same-order", "[context.job.seed, 3, rollout, epoch]", "[context.job.seed, 3, rollout]"),
        (
            "divided-by-the-rollouts-tokens",
            "int(experience.mask[torch.from_numpy(minibatch)].sum())",
            "int(experience.mask.sum())",
        ),
        ("gradient-through-the-targets", "values.detach(), mask, spec)", "values, mask, spec)"),
        (
            "old-policy-is-the-present-one",
            "log_probs.detach() if on_policy else micro.old_log_probs",
            "log_probs.detach()",
        ),
        (
            "gradient-through-the-old-policy",
            "log_probs.detach() if on_policy else micro.old_log_probs",
            "log_probs if on_policy else micro.old_log_probs",
        ),
        ("advantages-stay-unwhitened-on-policy", "if on_policy and spec.whiten_advantages and", "if not on_policy and"),
        (
            "clip-fraction-of-the-values-clip",
            "1 - ratio > spec.clip_range",
            "1 - ratio > spec.value_clip_range",
        ),
        ("kl-control-backwards", "kl / spec.kl_target - 1", "1 - kl / spec.kl_target"),
        ("kl-control-by-updates", "error * spec.rollout_batch", "error * spec.global_batch"),
        ("kl-control-without-a-limit", "min(max(kl / spec.kl_target - 1, -0.2), 0.2)", "kl / spec.kl_target - 1"),
        ("kl-coefficient-never-adapts", "state.kl_coef = next_kl_coef(", "next_kl_coef("),
        ("same-uniforms-in-each-rollout", "[rollout * spec.rollout_batch + int(i)", "[int(i)"),
        ("prompts-of-the-update", "rows_of_update(rollout, len(rows)", "rows_of_update(update, len(rows)"),
        ("as-many-prompts-as-answers", "len(rows), spec.prompts_per_rollout,", "len(rows), spec.rollout_batch,"),
        ("prompts-in-turn", "np.repeat(chosen, spec.samples_per_prompt)", "np.tile(chosen, spec.samples_per_prompt)"),
        ("kl-without-its-weight", "loss = loss + kl_coef * losses.kl_loss(", "loss = loss + losses.kl_loss("),
        ("kl-in-no-loss", "if spec.kl_in_loss:", "if False:"),
        ("clip-higher-is-not-read", "clip_range_high=spec.clip_range_high,", "clip_range_high=None,"),
        ("constant-is-the-batch", "limit=context.job.data.max_response_tokens,", "limit=spec.global_batch,"),
        ("first-minibatch-each-time", "spec.global_batch)[number]", "spec.global_batch)[0]"),
        (
            "critic-warms-up-too-long",
            "if update >= spec.critic_warmup_updates:",
            "if update > spec.critic_warmup_updates:",
        ),
        ("average-of-the-weights-stands-still", "            setup.ema.update()", "            pass"),
    ),
    *_of(
        f"{STEPS}/losses.py",
        ("rewards-to-go-without-gamma", "gamma=gamma, lam=1.0", "gamma=1.0, lam=1.0"),
        ("prefers-the-rejected", "-F.logsigmoid(chosen - rejected).mean()", "-F.logsigmoid(rejected - chosen).mean()"),
        (
            "pairs-weigh-by-their-tokens",
            "(per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()",
            "per_token.sum() / mask.sum()",
        ),
        ("kl-is-rewarded", "rewards = -kl_coef * (", "rewards = kl_coef * ("),
        ("score-on-the-first-token", "* mask).argmax(1, keepdim=True)", "* mask).argmin(1, keepdim=True)"),
        ("score-is-not-clipped", "scores.clamp(-reward_clip, reward_clip)", "scores"),
        ("score-is-clipped-above-only", "scores.clamp(-reward_clip, reward_clip)", "scores.clamp(max=reward_clip)"),
        ("delta-without-gamma", "deltas[:, :-1] += gamma * values[:, 1:]", "deltas[:, :-1] += values[:, 1:]"),
        ("delta-with-the-value-itself", "gamma * values[:, 1:]", "gamma * values[:, :-1]"),
        ("gae-without-gamma", "_discounted_sums(deltas, gamma * lam)", "_discounted_sums(deltas, lam)"),
        ("gae-without-lambda", "_discounted_sums(deltas, gamma * lam)", "_discounted_sums(deltas, gamma)"),
        ("gae-in-separate-pieces", "discount ** (count - time[:count])", "0.0 ** (count - time[:count])"),
        ("gae-forwards", "(time[:, None] - time)).tril()", "(time - time[:, None])).triu()"),
        ("returns-are-advantages", "return advantages, advantages + values", "return advantages, advantages"),
        ("whitening-keeps-the-other-mean", "(mean if keep_mean else 0.0)", "(0.0 if keep_mean else mean)"),
        ("whitening-by-the-variance", "torch.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
        (
            "whitening-by-the-second-moment",
            "(squares / count.clamp(min=1) - mean.square()).clamp(min=0)",
            "squares / count.clamp(min=1)",
        ),
        (
            "ratio-of-first-order",
            "(_kept(log_probs, mask) - _kept(old_log_probs, mask)).exp()",
            "1 + _kept(log_probs, mask) - _kept(old_log_probs, mask)",
        ),
        (
            "ratio-upside-down",
            "(_kept(log_probs, mask) - _kept(old_log_probs, mask))",
            "(_kept(old_log_probs, mask) - _kept(log_probs, mask))",
        ),
        ("policy-takes-the-better", "torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio"),
        (
            "ratio-is-clipped-above-only",
            "ratio.clamp(1 - clip_range, 1 + high)",
            "ratio.clamp(max=1 + high)",
        ),
        (
            "policy-loss-of-the-pass",
            "else weights)).sum() / (mask.sum() if normalizer is None else normalizer)",
            "else weights)).sum() / mask.sum()",
        ),
        (
            "value-loss-of-the-pass",
            "return 0.5 * (loss * mask).sum() / (mask.sum() if normalizer is None else normalizer)",
            "return 0.5 * (loss * mask).sum() / mask.sum()",
        ),
        ("value-loss-without-its-half", "return 0.5 * (loss", "return 1.0 * (loss"),
        ("value-takes-the-better", "torch.maximum((values - returns)", "torch.minimum((values - returns)"),
        ("value-is-clipped-around-0", "old_values + (values - old_values).clamp(", "values.clamp("),
        ("k3-of-the-other-sign", "(log_ratio.expm1() - log_ratio).sum(1)", "(log_ratio.expm1() + log_ratio).sum(1)"),
        ("k3-of-the-loss-of-k1", "((log_ratio.expm1() - log_ratio) * weights)", "(-log_ratio * weights)"),
        ("high-clip-is-the-low-one", "high = clip_range if clip_range_high is None", "high = clip_range if True"),
        ("answers-weigh-by-their-tokens", 'if loss_mean == "sequence" else mask', "if False else mask"),
        ("constant-over-tokens", '"constant": answers * limit}', '"constant": tokens * limit}'),
        ("sequences-over-tokens", '"sequence": answers,', '"sequence": tokens,'),
    ),
    *_of(
        f"{STEPS}/advantages.py",
        ("the-answer-is-in-its-own-baseline", "- groups) / (k - 1)).flatten()", ") / k).flatten()"),
        ("rloo-without-the-kl", "leave_one_out(rewards.sum(1), k)", "leave_one_out(outcomes, k)"),
        ("grpo-with-the-kl", "grouped(outcomes, k,", "grouped(rewards.sum(1), k,"),
        ("deviation-of-all-answers", "groups.std(1, keepdim=True)", "groups.std()"),
        ("deviation-is-biased", "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, unbiased=False)"),
        ("mean-of-all-answers", "centred = groups - groups.mean(1, keepdim=True)", "centred = groups - groups.mean()"),
        ("deviation-always", "    if deviation:\n", "    if True:\n"),
        ("baseline-of-the-next-group", "mean(1).repeat_interleave(k)", "mean(1).repeat(k)"),
        ("returns-without-gamma", "rewards - at_end, mask, gamma=gamma)", "rewards - at_end, mask, gamma=1.0)"),
        ("never-whitened", "keep_mean=False) if spec.whiten_advantages else", "keep_mean=False) if False else"),
    ),
    *_of(
        f"{STEPS}/experience.py",
        ("penalty-for-an-end", "* ~ended", "* ended"),
        ("penalty-is-left-out", "ref_log_probs, penalised, mask,", "ref_log_probs, scores, mask,"),
        (
            "whitened-rewards-lose-their-mean",
            "whiten(rewards, mask, keep_mean=True)",
            "whiten(rewards, mask, keep_mean=False)",
        ),
        (
            "whitened-advantages-keep-their-mean",
            'whiten(targets["advantages"], mask, keep_mean=False)',
            'whiten(targets["advantages"], mask, keep_mean=True)',
        ),
        ("gamma-is-lambda", "gamma=spec.gamma, lam=spec.lam", "gamma=spec.lam, lam=spec.gamma"),
        (
            "old-policy-by-the-rollout",
            "row.rollout_log_probs if on_policy else _trainer(row).log_probs",
            "row.rollout_log_probs",
        ),
        ("whitening-of-one-pass", "keep_mean=False, moments=of_all_ranks.to(mask.device))", "keep_mean=False)"),
        ("value-after-the-token", "critic(batch, index)[0]", "critic(batch, index + 1)[0]"),
        ("objective-of-a-token", "objectives = rewards.sum(1)", "objectives = rewards.mean(1)"),
        ("kl-of-a-token", "* self.mask).sum(1)", "* self.mask).mean(1)"),
    ),
    *_of(
        f"{STEPS}/scoring.py",
        ("reference-without-temperature", "reference(batch, temperature=temperature)", "reference(batch)"),
        ("score-before-the-end", "reward_model(read, read.last())", "reward_model(read, read.last() - 1)"),
        ("judged-before-the-end", "judge(batch, batch.last())", "judge(batch, batch.last() - 1)"),
        (
            "old-log-probs-without-temperature",
            "actor(batch, temperature=temperature, with_entropy=True)",
            "actor(batch, with_entropy=True)",
        ),
        (
            "numbers-in-sorted-order",
            "[of_row[row] for row in range(len(prompts))]",
            "[of_row[int(row)] for row in order]",
        ),
        ("entropy-over-prompt-tokens", "/ batch.response_lengths", "/ batch.lengths"),
    ),
    *_of(
        f"{STEPS}/ppo_state.py",
        ("ratio-of-an-update", 'sums["ratio"] / sums["tokens"]', 'sums["ratio"] / count'),
        ("variance-around-0", '["tokens"] - mean**2', '["tokens"]'),
        ("policy-loss-is-a-sum", 'sums["policy_loss"] / count', 'sums["policy_loss"]'),
        (
            "norms-change-places",
            "np.mean([norms[0] for norms in self.norms])",
            "np.mean([norms[-1] for norms in self.norms])",
        ),
    ),
    *_of(
        f"{STEPS}/change.py",
        ("error-of-one-sample", "dtype=float) - np.asarray(before, dtype=float))", "dtype=float))"),
        ("perplexities-apart", "((parts[0] - parts[1]) ** 2)", "(parts[0] ** 2 + parts[1] ** 2)"),
    ),
    *_of(
        f"{STEPS}/held_out.py",
        ("held-out-kl-of-a-token", "float((log_probs - ref).sum())", "float((log_probs - ref).mean())"),
    ),
    *_of(
        f"{STEPS}/reward.py",
        ("each-pass-weighs-alike", "* len(micro) / spec.global_batch", "/ len(passes)"),
        ("language-loss-of-the-pass", "-lm_log_probs.sum() / lm_tokens", "-lm_log_probs.mean() / len(passes)"),
        ("language-loss-without-its-weight", "pair_loss + spec.lm_coef * lm_loss if", "pair_loss + lm_loss if"),
        ("language-loss-of-both-answers", "lm_rows=len(batch.host_lengths) // 2", "lm_rows=len(batch.host_lengths)"),
        (
            "answers-change-places",
            "[table.chosen[i] for i in rows] + [table.rejected[i] for i in rows]",
            "[table.rejected[i] for i in rows] + [table.chosen[i] for i in rows]",
        ),
        ("the-first-difference-is-left-out", "(position >= first)", "(position > first)"),
        ("all-tokens-are-compared", "(position >= first)", "(position >= 0)"),
        ("compared-to-the-longer-end", "torch.minimum(*batch.lengths", "torch.maximum(*batch.lengths"),
        (
            "accuracy-of-the-rejected",
            '("correct", (chosen > rejected).sum())',
            '("correct", (chosen < rejected).sum())',
        ),
        ("equal-scores-are-right", "float((margins > 0).mean())", "float((margins >= 0).mean())"),
    ),
    *_of(
        f"{STEPS}/sft.py",
        ("loss-of-the-pass", "-log_probs.sum() / counted", "-log_probs.mean() / len(passes)"),
        ("loss-on-the-answer-alone", "engine(batch, from_prompt=spec.loss_on_prompt)", "engine(batch)"),
        ("first-token-is-counted", "table.before_response.lengths[rows] - 1", "table.before_response.lengths[rows]"),
        (
            "perplexity-of-repeated-rows",
            "nll[real]",
            "nll",
            "on two ranks the one repeated row is the last of all, which is not picked; it takes three ranks",
        ),
    ),
    *_of(
        "rlhf_train/data/sequences.py",
        (
            "states-after-their-tokens",
            "self._starts + self.host_prompt_lengths - 1",
            "self._starts + self.host_prompt_lengths",
        ),
        ("last-token-but-one", "self._on_device(self._ends - 1)", "self._on_device(self._ends - 2)"),
        ("each-pass-over-the-rows-alike", "(*seed, int(place // rows))", "(*seed, 0)"),
        ("all-ranks-have-the-same-rows", "[order[part, rank] for part in", "[order[part, 0] for part in"),
        ("a-token-too-many", "< self.response_lengths[:, None]", "<= self.response_lengths[:, None]"),
        (
            "packed-rows-begin-late",
            "np.cumsum(lengths) - lengths if self.is_packed",
            "np.cumsum(lengths) if self.is_packed",
        ),
        ("padding-is-a-real-row", "(np.arange(padded.size) < len(order))", "(np.arange(padded.size) >= 0)"),
    ),
    *_of(
        "rlhf_train/models/log_probs.py",
        ("gradient-without-temperature", "gradient = gradient / temperature", "gradient = gradient * 1.0"),
        ("scale-of-logits-upside-down", "temperature / transform.scale", "temperature * transform.scale"),
        ("entropy-with-another-sign", "normalizers - torch.bmm", "normalizers + torch.bmm"),
        ("a-row-of-no-token-is-drawn", "logits[:, tokens:] = NEVER", "logits[:, tokens + 1 :] = NEVER"),
    ),
    *_of(
        "rlhf_train/models/networks.py",
        ("shift-after-the-scale", "squeeze(-1) - self.shift) / self.scale", "squeeze(-1)) / self.scale - self.shift"),
        ("dropout-stays", "if is_dropout and isinstance(value, float | int):", "if is_dropout and value is None:"),
    ),
    *_of(
        "rlhf_train/engine/deepspeed_engine.py",
        ("warm-up-begins-at-0", "return (update + 1) / spec.warmup_updates", "return update / spec.warmup_updates"),
        ("schedule-never-ends", "max(1, updates - spec.warmup_updates)", "max(1, updates)"),
        (
            "schedule-is-cut-at-its-end",
            "spec.final_learning_rate + (1 - spec.final_learning_rate) * shape",
            "max(spec.final_learning_rate, shape)",
        ),
        ("eps-is-fixed", "eps=spec.eps, fused=is_fused", "eps=1e-8, fused=is_fused"),
        ("biases-and-norms-decay", '"weight_decay": 0.0}', '"weight_decay": weight_decay}'),
        ("norm-is-cut-to-1", "self.module.parameters(), self.spec.max_grad_norm)", "self.module.parameters(), 1.0)"),
        ("average-with-the-other-share", "1 - self.decay)", "self.decay)"),
    ),
)


# --- the copy ---


def place(mutant: Mutant, folder: Path) -> str:
    """Return the file's text with the wrong line.

    Raises ValueError unless the right one stands there once.
    """
    text = (folder / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has its text {count} times, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def copy_checkout(folder: Path) -> None:
    """Copy what git holds or would take."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=CHECKOUT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in {*names} - {""}:
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)


class Copy:
    """A copy of the checkout, with one wrong line at a time."""

    def __init__(self, temporary: Path) -> None:
        self.folder, self.log = temporary / "checkout", temporary / "log"
        self.passing: set[str] = set()  # tests that pass on the right code
        self.folder.mkdir()
        copy_checkout(self.folder)

    def killer(self, mutant: Mutant, text: str) -> str:
        """Return the test that fails with the mutant; "" if none does.

        text: of the file, with the wrong line. Raises RuntimeError if that test fails without it.
        """
        file = self.folder / mutant.file
        right = file.read_text(encoding="utf-8")
        file.write_text(text, encoding="utf-8")
        try:
            killer = first_failure(self.folder, TESTS[mutant.file], self.log)
        finally:
            file.write_text(right, encoding="utf-8")
        if killer in ("", HUNG) or killer in self.passing:
            return killer
        if first_failure(self.folder, [killer], self.log):
            raise RuntimeError(f"{killer} fails without any mutant: {self.log.read_text(encoding='utf-8')}")
        self.passing.add(killer)
        return killer


# --- the tests ---


def import_libraries() -> None:
    """Import what takes seconds, once: each run of the tests is a fork of this process."""
    os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    import rlhf_train.engine.deepspeed_engine  # noqa: F401 (DeepSpeed, as we import it)

    torch.set_num_threads(1)


def first_failure(folder: Path, tests: Sequence[str], log: Path) -> str:
    """Run the tests of a copy in a fork of this process, and return the first that fails.

    Returns "" if none does, HUNG if they did not end, or not by themselves. Raises RuntimeError if
    they cannot run.
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _run_tests(folder, tests, log)
        finally:
            os._exit(code)
    deadline = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return HUNG
        time.sleep(0.05)
    code, text = os.waitstatus_to_exitcode(ended[1]), log.read_text(encoding="utf-8", errors="replace")
    if code in (0, 1):
        return next(iter(re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.MULTILINE)), "") if code else ""
    if code < 0:  # a signal
        return HUNG
    raise RuntimeError(f"pytest ended with {code}:\n{text}")


def _run_tests(folder: Path, tests: Sequence[str], log: Path) -> int:
    import pytest

    output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(CHECKOUT)))]
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    import rlhf_train

    assert Path(str(rlhf_train.__file__)).is_relative_to(folder), "the tests were not those of the copy"
    sys.stdout.flush()
    return code


# --- the command line ---


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; default: all")
    names = parser.parse_args().names
    if unknown := sorted({*names} - {mutant.name for mutant in MUTANTS}):
        parser.error(f"there is no mutant {', '.join(unknown)}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]

    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Copy(Path(temporary))
        texts = {mutant.name: place(mutant, copy.folder) for mutant in chosen}
        import_libraries()
        width = max(len(mutant.name) for mutant in chosen)
        counts = {"killed": 0, "lived": 0, "lived, as it may": 0}
        for mutant in chosen:
            started = time.monotonic()
            killer = copy.killer(mutant, texts[mutant.name])
            verdict = "killed" if killer else "lived, as it may" if mutant.may_live else "lived"
            counts[verdict] += 1
            seconds = time.monotonic() - started
            print(f"{mutant.name:{width}}  {verdict}  {seconds:4.0f} s  {killer or mutant.may_live}", flush=True)
    print(f"of {len(chosen)}:", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["lived"] else 0


if __name__ == "__main__":
    sys.exit(main())
