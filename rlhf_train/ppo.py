"""Step 3, PPO: the actor learns to write what the reward model likes, and stays near the reference.

Where we differ from DeepSpeed-Chat: answers are sampled, not greedy; masks come from lengths, so the EOS is an action;
rewards are normalised on the reference's answers; advantages are whitened over all ranks; losses are divided by the
tokens of the whole update; before the first update the trainer, the rollout and the reference must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from jobs.errors import ExitCode, ToolkitError
from jobs.events import End, Metrics, Progress
from jobs.spec import Ppo
from rlhf_train import losses, runs
from rlhf_train.batch import Sequences, count_updates, deal, evaluation_batches, rows_of_update
from rlhf_train.engine import Ema, Engine, copy_weights
from rlhf_train.experience import Experience, Scored, judge, response_values, trainer_view
from rlhf_train.export import eval_model, save_model, scores_of
from rlhf_train.held_out import HeldOut
from rlhf_train.models import (
    ActorForward,
    ScoreForward,
    add_lora,
    check_lengths,
    check_same_tokenizer,
    checkpoint_activations,
    load_causal,
    load_scorer,
    load_tokenizer,
)
from rlhf_train.rollout import Responses, Rollouts
from rlhf_train.rule import load_rule
from rlhf_train.session import Clock, Session, corpus, stop_if_not_finite

LEAST_SCALE = 1e-6  # a reward model that scores all answers alike must not divide by 0
NORMALIZATION_PROMPTS = 256  # answers of the reference that set the scale of the rewards
# Seeds of the rollouts that are not training, apart from the job's own (below 2^32).
EVALUATION_SEED, NORMALIZATION_SEED = 2**32, 2**33
# Self-test: the worst row's mean absolute difference of log-probs, in nats. float32 differs by the order of summation;
# bfloat16 has 8 bits, and other batches pad differently.
SELF_TEST_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}


def run(session: Session) -> End:
    job, spec, world, where = session.job, session.job.ppo, session.world, session.placement
    clock = Clock()
    plan = where.batch_plan(job, 3)
    actor_source, critic_source = str(session.run.step(1).model), str(session.run.step(2).model)
    tokenizer = load_tokenizer(actor_source)
    check_same_tokenizer(tokenizer, load_tokenizer(critic_source))
    tokens = corpus(session, 3, job.data, tokenizer)
    rows = tokens.train.step_rows[3]
    updates_per_rollout = spec.ppo_epochs * spec.rollout_batch // spec.global_batch
    rollouts = count_updates(len(rows), spec.rollout_batch, spec.epochs, None)
    updates = min(rollouts * updates_per_rollout, spec.max_updates or rollouts * updates_per_rollout)
    session.plan(3, plan, updates=updates, rows=len(rows), zero_stage=where.actor_zero_stage, fates=tokens.train.fates)

    session.doing(3, "loading actor, reference, critic and reward model")
    reference = ActorForward(eval_model(load_causal(actor_source, tokenizer, session.dtype, job.seed).to(world.device)))
    reward_model = ScoreForward(eval_model(load_scorer(critic_source, tokenizer, session.dtype, job.seed).to(world.device)))
    for frozen in (reference, reward_model):
        check_lengths(frozen.model, job.data.max_prompt_tokens, job.data.max_response_tokens)

    def sampler(model: Any) -> Rollouts:
        ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
        batch = where.rollout_micro_batch
        return Rollouts(model, **ids, max_tokens=job.data.max_response_tokens, temperature=spec.temperature, batch=batch, device=world.device)

    if spec.normalize_rewards:
        session.doing(3, f"scale of the rewards on {min(NORMALIZATION_PROMPTS, len(rows))} answers of the reference")
        prompts = [tokens.train.prompt[i] for i in rows[:NORMALIZATION_PROMPTS]]
        view = HeldOut(session, prompts, tokenizer, None, seed=job.seed + NORMALIZATION_SEED)
        scores = np.array([answer.score for answer in view.answers(sampler(reference.model), reference, reward_model)])
        reward_model.shift, reward_model.scale = float(scores.mean()), max(float(scores.std()), LEAST_SCALE)
        if world.is_main:  # the scale belongs to the reward model: every reward of this run is (logit - shift) / scale
            numbers = {"shift": reward_model.shift, "scale": reward_model.scale, "reward": "(logit - shift) / scale"}
            runs.write_json(session.run.step(2).reward_scale, numbers)

    actor_model = load_causal(actor_source, tokenizer, session.dtype, job.seed).to(world.device)
    critic_model = load_scorer(critic_source, tokenizer, session.dtype, job.seed).to(world.device)
    if job.hardware.gradient_checkpointing:
        for model in (actor_model, critic_model):
            checkpoint_activations(model)
    if job.actor.lora is not None:
        add_lora(actor_model, job.actor.lora, job.seed)
    # ZeRO-3 holds no whole weights: rollouts get a copy, filled once a rollout.
    twin = eval_model(ActorForward(copy.deepcopy(actor_model))) if where.actor_zero_stage == 3 else None
    actor = Engine(
        ActorForward(actor_model),
        spec,
        spec.actor_learning_rate,
        updates,
        plan,
        precision=where.precision,
        zero_stage=where.actor_zero_stage,
        world=world,
    )
    critic = Engine(
        ScoreForward(critic_model, shift=reward_model.shift, scale=reward_model.scale),
        spec,
        spec.critic_learning_rate,
        updates,
        plan,
        precision=where.precision,
        zero_stage=where.critic_zero_stage,
        world=world,
    )
    ema = Ema(actor.module, spec.ema_decay) if spec.ema_decay else None
    sampling = sampler(twin.model if twin is not None else actor_model)

    def refresh() -> None:
        if twin is not None:
            copy_weights(actor, twin)

    held_out = HeldOut(
        session, [tokens.held_out.prompt[i] for i in tokens.held_out.step_rows[3]], tokenizer, load_rule(spec.rule), seed=job.seed + EVALUATION_SEED
    )
    session.doing(3, f"answers to {len(held_out.prompts)} held-out prompts, before")
    refresh()
    before = held_out.answers(sampling, reference, reward_model)
    held_out.show(before, "before")

    training, kl_coef = Clock(), spec.kl_coef
    for rollout in range(rollouts):
        if actor.update >= updates:
            break
        rollout_clock = Clock()
        chosen = rows[rows_of_update(rollout, len(rows), spec.rollout_batch, (job.seed, 3))]
        prompts = [tokens.train.prompt[i] for i in chosen]
        mine = np.argsort([len(p) for p in prompts], kind="stable")[world.rank :: world.size]
        refresh()
        responses = sampling.generate([prompts[i] for i in mine], seed=job.seed, row_ids=[rollout * spec.rollout_batch + int(i) for i in mine])
        rollout_s, score_clock = rollout_clock(), Clock()

        scored = score_rollout(
            session,
            [prompts[i] for i in mine],
            responses,
            tokenizer.pad_token_id,
            actor=actor,
            critic=critic,
            reference=reference,
            reward_model=reward_model,
        )
        by_place = {int(place): row for part in world.gather(list(zip(mine, scored, strict=True))) for place, row in part}
        everyone = [by_place[place] for place in range(spec.rollout_batch)]
        experience = Experience.of(everyone, spec, kl_coef)
        score_s, train_clock = score_clock(), Clock()
        if rollout == 0:
            self_test(session, everyone, actor, tokenizer.pad_token_id)

        stats: dict[str, torch.Tensor | float] = dict.fromkeys(
            ("policy_loss", "value_loss", "ratio", "clipped", "value_clipped", "tokens", "trained", "computed"), 0.0
        )
        norms: list[tuple[float, float]] = []
        for epoch in range(spec.ppo_epochs):
            shuffled = np.random.RandomState([job.seed, 3, rollout, epoch]).permutation(spec.rollout_batch)
            for minibatch in shuffled.reshape(-1, spec.global_batch):
                if actor.update >= updates:
                    break
                response_tokens = int(experience.mask[torch.from_numpy(minibatch)].sum())  # of the whole update, all ranks
                actor_norm = critic_norm = None
                for micro in deal(experience.lengths[minibatch], plan, world.rank):
                    batch, mask, old = experience.cut(minibatch[micro], tokenizer.pad_token_id, world.device)
                    log_probs = batch.spread(actor(batch, temperature=spec.temperature)[0])
                    policy_loss = losses.policy_loss(
                        log_probs, old["old_log_probs"], old["advantages"], mask, clip_range=spec.clip_range, normalizer=response_tokens
                    )
                    actor.backward(policy_loss)
                    actor_norm = actor.step()

                    values = response_values(critic(batch)[0], batch)
                    value_loss = losses.value_loss(
                        values, old["values"], old["returns"], mask, clip_range=spec.value_clip_range, normalizer=response_tokens
                    )
                    critic.backward(value_loss)
                    critic_norm = critic.step()

                    with torch.no_grad():
                        ratio = ((log_probs - old["old_log_probs"]) * mask).exp()
                        for name, value in (
                            ("policy_loss", policy_loss),
                            ("value_loss", value_loss),
                            ("ratio", (ratio * mask).sum()),
                            ("clipped", (((ratio - 1).abs() > spec.clip_range) & mask).sum()),
                            ("value_clipped", (((values - old["values"]).abs() > spec.value_clip_range) & mask).sum()),
                            ("tokens", mask.sum()),
                            ("trained", batch.lengths.sum()),
                            ("computed", batch.input_ids.numel()),
                        ):
                            stats[name] = stats[name] + value
                norms.append((actor_norm or 0.0, critic_norm or 0.0))
                if ema is not None:
                    ema.update()
        total = world.sum(stats)
        train_s = train_clock()
        kl = float(experience.kl.mean())
        losses_now = {name: total[name] / len(norms) for name in ("policy_loss", "value_loss")}
        stop_if_not_finite(3, actor.update, {**losses_now, "kl": kl})

        mask = experience.mask
        session.emit(
            Metrics(
                step=3,
                update=actor.update,
                updates=updates,
                elapsed_s=training(),
                learning_rate=actor.current_learning_rate,
                tokens_per_s=total["trained"] / rollout_clock(),
                real_token_share=total["trained"] / total["computed"],
                gpu_peak_bytes=world.gpu_peak_bytes(),
                grad_norm=float(np.mean([a for a, _ in norms])),
                critic_grad_norm=float(np.mean([c for _, c in norms])),
                policy_loss=losses_now["policy_loss"],
                value_loss=losses_now["value_loss"],
                mean_reward=float(experience.scores.mean()),
                kl=kl,
                kl_coef=kl_coef,
                entropy=float(experience.entropy.mean()),
                ratio=total["ratio"] / total["tokens"],
                clip_fraction=total["clipped"] / total["tokens"],
                value_clip_fraction=total["value_clipped"] / total["tokens"],
                response_length=float(mask.sum(1).float().mean()),
                eos_share=float(experience.ended.float().mean()),
                rollout_s=rollout_s,
                score_s=score_s,
                train_s=train_s,
            )
        )
        kl_coef = next_kl_coef(spec, kl_coef, kl)

    session.doing(3, f"answers to {len(held_out.prompts)} held-out prompts, after")
    refresh()
    after = held_out.answers(sampling, reference, reward_model)
    held_out.show(after, "after")
    folder = session.run.step(3).model
    first, last = held_out.summary(before), held_out.summary(after)
    stop_if_not_finite(3, updates, {"mean_reward": last.reward, "kl": last.kl})
    end = End(
        step=3,
        updates=updates,
        seconds=clock(),
        model=str(folder),
        mean_reward_before=first.reward,
        mean_reward_after=last.reward,
        good_share_before=first.good,
        good_share_after=last.good,
        kl_before=first.kl,
        kl=last.kl,
        response_length_before=first.length,
        response_length_after=last.length,
        eos_share_before=first.ended,
        eos_share_after=last.ended,
        reward_shift=reward_model.shift,
        reward_scale=reward_model.scale,
    )
    save_model(session, 3, updates, actor, tokenizer, folder, lora=job.actor.lora, scores=scores_of(end))
    if ema is not None:
        with ema.applied():
            save_model(session, 3, updates, actor, tokenizer, session.run.step(3).model_ema, lora=job.actor.lora, scores={})
    return end


def next_kl_coef(spec: Ppo, kl_coef: float, kl: float) -> float:
    """Fixed, or after Ziegler et al. 2019, section 2.2: proportional control of the KL to `kl_target`, clipped at 20 %."""
    if spec.kl_target is None:
        return kl_coef
    error = min(max(kl / spec.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * spec.rollout_batch / spec.kl_horizon)


def score_rollout(
    session: Session,
    prompts: Sequence[np.ndarray],
    responses: Responses,
    pad_id: int,
    *,
    actor: Engine,
    critic: Engine,
    reference: nn.Module,
    reward_model: nn.Module,
) -> list[Scored]:
    """This rank's responses with all four networks' numbers, in their order."""
    lengths = np.array([len(p) for p in prompts]) + responses.lengths
    temperature = session.job.ppo.temperature
    scored: dict[int, Scored] = {}
    for rows, _ in evaluation_batches(lengths, session.placement.micro_batches[2], 1, 0):
        batch = Sequences.of([prompts[i] for i in rows], [responses.tokens[i] for i in rows], pad_id, session.world.device)
        numbers = judge(batch, reference=reference, reward_model=reward_model, temperature=temperature)
        numbers |= trainer_view(batch, actor=actor, critic=critic, temperature=temperature)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in numbers.items()}
        for place, row in enumerate(rows):
            count = len(responses.tokens[row])
            scored[int(row)] = Scored(
                prompt=prompts[row],
                response=responses.tokens[row],
                ended=bool(responses.ended[row]),
                rollout_log_probs=responses.log_probs[row],
                log_probs=arrays["log_probs"][place, :count],
                ref_log_probs=arrays["ref_log_probs"][place, :count],
                values=arrays["values"][place, :count],
                entropy=float(arrays["entropy"][place]),
                score=float(arrays["score"][place]),
            )
    return [scored[row] for row in range(len(prompts))]


def self_test(session: Session, rows: Sequence[Scored], actor: Engine, pad_id: int) -> None:
    """Before the first update: ratio 1, KL 0, and the rollout's log-probs are the trainer's. Raises ToolkitError."""
    batch_rows = rows[: session.placement.micro_batches[2]]
    batch = Sequences.of([r.prompt for r in batch_rows], [r.response for r in batch_rows], pad_id, session.world.device)
    log_probs = batch.spread(actor(batch, temperature=session.job.ppo.temperature)[0]).detach().float().cpu().numpy()
    again = [log_probs[place, : len(row.response)] for place, row in enumerate(batch_rows)]
    limit = SELF_TEST_TOLERANCE[session.placement.precision]
    old = [row.log_probs for row in rows]
    checks = {
        "the ratio of new to old log-probs is not 1": (old[: len(again)], again),
        "the actor is not the reference": (old, [row.ref_log_probs for row in rows]),
        "the rollout and the trainer see different log-probs": (old, [row.rollout_log_probs for row in rows]),
    }
    causes = (
        "dropout or another source of randomness in the actor's forward pass",
        "the two were loaded from different weights, or an adapter does not start at zero",
        "positions or masks of left-padded prompts, a stale key-value cache, or another temperature",
    )
    # np.max, not max: it does not pass over a NaN.
    worst = [float(np.max([np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)])) for ours, theirs in checks.values()]
    for what, cause, difference in zip(checks, causes, worst, strict=True):
        if not difference <= limit:
            raise ToolkitError(
                f"step 3's self-test failed before the first update: {what}",
                why=f"they differ by {difference:.3g} nats a token in the worst response; {limit:g} is allowed in {session.placement.precision}",
                hint=f"the likely cause: {cause}",
                code=ExitCode.TRAINING,
            )
    session.emit(
        Progress(step=3, doing="self-test passed: " + ", ".join(f"{name} {d:.1e}" for name, d in zip(("ratio", "KL", "rollout"), worst, strict=True)))
    )
