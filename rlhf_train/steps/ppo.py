"""Step 3, PPO: the actor learns to write what the reward model scores high, near the reference.

Where we differ from DeepSpeed-Chat: answers are sampled, not greedy; masks come from lengths, so
the EOS is an action; rewards are normalised on the reference's answers; advantages are whitened
over all ranks; losses are divided by the tokens of the whole update; before the first update the
trainer, the rollout and the reference must agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jobs.errors import ExitCode, ToolkitError
from jobs.events import End, Warning
from jobs.spec import Ppo
from rlhf_train.data.sequences import assign_passes, rows_of_update
from rlhf_train.disk import read_json
from rlhf_train.engine.checkpointer import Checkpointer
from rlhf_train.engine.deepspeed_engine import Engine
from rlhf_train.engine.divergence import Divergence
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.plan import memory_fit
from rlhf_train.steps import losses
from rlhf_train.steps.chance import warning_of_chance
from rlhf_train.steps.change import mean_change_error, share_of_both
from rlhf_train.steps.context import Clock, StepContext, start_checkpoints
from rlhf_train.steps.experience import Experience, Pass, response_values, targets_of, whiten_update
from rlhf_train.steps.export import save_model, scores_of
from rlhf_train.steps.held_out import Summary
from rlhf_train.steps.ppo_setup import Setup, measure_reward_scale, set_reward_scale, set_up, try_the_longest
from rlhf_train.steps.ppo_state import SUMS, LoopState
from rlhf_train.steps.scoring import mean_entropies
from rlhf_train.steps.self_test import check_frozen, self_test


def run(context: StepContext) -> End:
    """Train the actor, and the critic if the method has one, and save the actor."""
    spec = context.job.ppo

    # 1. Load the networks, and what samples, scores and measures with them.
    clock = Clock()
    setup = set_up(context)
    actor, updates = setup.actor, setup.updates

    # 2. Show that the longest update fits, and resume from the last checkpoint, if there is one.
    rows, model_bytes = setup.tokens.train.digest(3), setup.model_bytes
    checkpointer, divergence = start_checkpoints(context, 3, updates, setup.parts, rows=rows, model_bytes=model_bytes)
    warn_of_chance(context)
    try_the_longest(context, setup)
    saved = checkpointer.resume()
    if saved is not None:
        state = LoopState.read(saved, checkpointer.loop_tensors, context.placement.rollout_micro_batch)
        check_frozen(state.reference, setup.frozen_digest, setup.frozen_folders)
        set_reward_scale(context, setup, state.shift, state.scale)
    else:
        state = start(context, setup, clock)

    samples = sampled_updates(updates, setup.updates_per_rollout, spec.samples_every_updates)
    for update in range(actor.update, updates):
        # 3. Keep the weights that are best on held-out prompts. Show a few answers now and then.
        if checkpointer.wants_best(update):
            offer_best(context, setup, checkpointer, update, setup.held_out.summary(setup.held_out_answers()))
        if update in samples:
            setup.held_out.show(setup.few_answers(), "during", update)

        # 4. Collect a rollout, unless the last one still has updates to learn from it.
        if state.experience is None:
            collect(context, setup, state, update)
            end_if_exploded(context, setup, state, checkpointer, update)

        # 5. Learn from a part of the rollout: one update.
        learn(context, setup, state, divergence, update)

        # 6. After the rollout's last update, emit its numbers and adapt the KL coefficient.
        if (update + 1) % setup.updates_per_rollout == 0 or update == updates - 1:
            if state.tally.trained_updates:
                emit_metrics(context, setup, state, update)
            state.kl_coef = next_kl_coef(spec, state.kl_coef, mean_kl(state))
            state.end_rollout()

        # 7. Save a checkpoint, if one is due.
        checkpointer.after(update + 1, state.numbers(), state.tensors())

    # 8. Measure on the held-out prompts again, and save the actor.
    after = measure(context, setup, "after")
    divergence.check({"mean reward": after.reward, "KL": after.kl})
    if checkpointer.keeps_best:
        offer_best(context, setup, checkpointer, updates, after)
    folder = context.run.step(3).model
    end = result(context, setup, state, after)
    save_actor(context, setup, updates, folder, scores=scores_of(end))
    if setup.ema is not None:
        folder = context.run.step(3).model_ema
        with setup.ema.applied():
            save_actor(context, setup, updates, folder)
    checkpointer.close()
    return end


def start(context: StepContext, setup: Setup, clock: Clock) -> LoopState:
    """Set the scale of the rewards, and measure the actor before it learns.

    clock: of the whole step.
    """
    spec, reward_model = context.job.ppo, setup.reward_model
    shift, scale = reward_model.shift, reward_model.scale
    if spec.normalize_rewards:
        shift, scale = measure_reward_scale(context, setup)
    set_reward_scale(context, setup, shift, scale)
    before = measure(context, setup, "before")
    return LoopState(
        before=before,
        kl_coef=spec.kl_coef,
        shift=shift,
        scale=scale,
        clock=clock,
        training=Clock(),
        rollout_micro_batch=context.placement.rollout_micro_batch,
        reference=setup.frozen_digest,
    )


def warn_of_chance(context: StepContext) -> None:
    """Warn of a reward model of this run that ranked pairs no better than a guess."""
    ended = read_json(context.run.step(2).complete) if context.job.critic.reward_model is None else None
    if ended is not None and ended.get("held_out_rows"):
        warning = warning_of_chance(3, ended["reward_accuracy"], ended["held_out_rows"])
        if warning is not None:
            context.emit(warning)


def measure(context: StepContext, setup: Setup, when: str) -> Summary:
    """Answer the held-out prompts and show a few of the answers. when: before or after training."""
    context.doing(3, f"answers to {len(setup.held_out.prompts)} held-out prompts, {when}")
    answers = setup.held_out_answers()
    setup.held_out.show(answers, when)
    return setup.held_out.summary(answers)


def sampled_updates(updates: int, updates_per_rollout: int, every: int | None) -> set[int]:
    """Return the updates before which answers are shown.

    They come `every` so many updates; None: a quarter, half and three quarters through. Each is put
    off to the first update of a rollout.
    """
    wanted = [updates * quarter / 4 for quarter in (1, 2, 3)] if every is None else range(every, updates, every)
    first = (math.ceil(update / updates_per_rollout) * updates_per_rollout for update in wanted)
    return {update for update in first if 0 < update < updates}


def offer_best(context: StepContext, setup: Setup, checkpointer: Checkpointer, update: int, measured: Summary) -> None:
    """Keep the weights of `update` if their objective on held-out prompts is the best so far."""
    best = ("objective", measured.objective)
    checkpointer.offer(
        update,
        *best,
        lower_is_better=False,
        save=lambda folder: save_actor(context, setup, update, folder, best=best),
    )


def save_actor(
    context: StepContext,
    setup: Setup,
    update: int,
    folder: Path,
    *,
    scores: Mapping[str, float] | None = None,
    best: tuple[str, float] | None = None,
) -> None:
    """Save the actor as it is now, as `save_model` takes it."""
    save_model(
        context,
        3,
        update,
        setup.actor,
        setup.tokenizer,
        folder,
        lora=setup.lora,
        scores=scores or {},
        example=setup.tokens.held_out.example(3, setup.tokenizer),
        best=best,
    )


def collect(context: StepContext, setup: Setup, state: LoopState, update: int) -> None:
    """Sample and score the rollout that begins with `update`, and leave it in `state`.

    All ranks share the work, and each gets the complete rollout. Raises ToolkitError if the
    self-test before the first update fails.
    """
    spec, world, rows, tally = context.job.ppo, context.world, setup.rows, state.tally

    # 1. Sample a response to each prompt of this rank; one of k answers stands there k times.
    rollout_clock = Clock()
    context.heartbeat.beat(f"update {update + 1}, rollout")
    rollout = update // setup.updates_per_rollout
    chosen = rows[rows_of_update(rollout, len(rows), spec.prompts_per_rollout, (context.job.seed, 3))]
    chosen = np.repeat(chosen, spec.samples_per_prompt)
    prompts = [setup.tokens.train.prompt[i] for i in chosen]
    places = np.argsort([len(p) for p in prompts], kind="stable")[world.rank :: world.size]
    own_prompts = [prompts[i] for i in places]
    row_ids = [rollout * spec.rollout_batch + int(i) for i in places]
    setup.refresh_rollouts()
    responses = setup.rollouts.generate(own_prompts, seed=context.job.seed, row_ids=row_ids)
    context.stop_if_asked()
    state.rollout_micro_batch = use_the_smallest_batch(context, setup.rollouts, state.rollout_micro_batch)
    tally.rollout_s = rollout_clock()

    # 2. Score the responses. On-policy, actor and critic score for the self-test only.
    score_clock = Clock()
    context.heartbeat.beat(f"update {update + 1}, scoring")
    trainer = (setup.actor, setup.critic) if not setup.on_policy or not state.is_tested else None
    scored, computed = setup.scorer.score_rollout(own_prompts, responses, trainer)

    # 3. Put the rows of all ranks in the order of the prompts, and compute the rewards.
    shares = world.gather((list(zip(places, scored, strict=True)), computed))
    by_place = {int(place): row for share, _ in shares for place, row in share}
    scored = [by_place[place] for place in range(spec.rollout_batch)]
    experience = Experience.of(scored, spec, state.kl_coef, on_policy=setup.on_policy)
    tally.scored = int(experience.lengths.sum())
    tally.scored_computed = sum(count for _, count in shares)
    if not setup.on_policy:
        tally.entropy = float(np.mean([row.trainer.entropy for row in scored if row.trainer is not None]))
    judged = [row.judge_score for row in scored if row.judge_score is not None]
    tally.judge_score = float(np.mean(judged)) if judged else None
    tally.score_s = score_clock()
    state.experience = experience

    # 4. Check the networks against each other, and warn of odd answers.
    if not state.is_tested:
        self_test(context, scored, setup.actor, setup.pad_id, with_reference=update == 0)
        state.is_tested = True
    warn_of_odd_answers(context, experience, context.job.data.max_response_tokens)


def learn(context: StepContext, setup: Setup, state: LoopState, divergence: Divergence, update: int) -> None:
    """Make one update of actor and critic, on one minibatch of the rollout."""
    spec, world, actor = context.job.ppo, context.world, setup.actor
    experience, tally = state.experience, state.tally
    assert experience is not None, "a rollout is collected before anything is learned from it"

    # 1. Draw the minibatch: each epoch shuffles the rollout again, the same way on all ranks.
    train_clock = Clock()
    rollout, place = divmod(update, setup.updates_per_rollout)
    epoch, number = divmod(place, spec.rollout_batch // spec.global_batch)
    shuffled = np.random.RandomState([context.job.seed, 3, rollout, epoch]).permutation(spec.rollout_batch)
    minibatch = shuffled.reshape(-1, spec.global_batch)[number]

    # 2. Assign it to ranks and passes.
    context.heartbeat.beat(f"update {update + 1}")
    lengths, packed = experience.lengths[minibatch], setup.pad_id is None
    assigned = assign_passes(lengths, setup.plan, world.rank, setup.pass_tokens, packed=packed)
    passes = [experience.make_pass(minibatch[micro], setup.pad_id, world.device) for micro in assigned]
    response_tokens = int(experience.mask[torch.from_numpy(minibatch)].sum())  # of the whole update, all ranks

    # 3. Run forward and backward through the networks.
    total = accumulate_gradients(
        context,
        passes,
        response_tokens,
        on_policy=setup.on_policy,
        actor=actor,
        critic=setup.critic,
        kl_coef=state.kl_coef,
        actor_learns=update >= spec.critic_warmup_updates,
    )

    # 4. Apply the update, or skip it if its losses are not finite.
    if math.isfinite(total["policy_loss"] + total["value_loss"]):
        if update >= spec.critic_warmup_updates:
            norms = divergence.apply(*setup.engines)
        else:
            norms = [0.0, *divergence.apply(*setup.engines[1:])]
            actor.skip()
        if setup.ema is not None:
            setup.ema.update()
        if divergence.skips.in_a_row == 0:
            tally.add(total, norms)
    else:
        divergence.skip(update + 1, "its loss is not finite", *setup.engines)
    tally.updates += 1
    tally.train_s += train_clock()


def mean_kl(state: LoopState) -> float:
    """Return the rollout's mean KL to the reference, in nats a response."""
    assert state.experience is not None
    return float(state.experience.kl.mean())


def emit_metrics(context: StepContext, setup: Setup, state: LoopState, update: int) -> None:
    """Emit the numbers of the rollout and of its updates, up to `update`."""
    assert state.experience is not None
    metrics = state.tally.metrics(
        state.experience,
        update=update + 1,
        updates=setup.updates,
        elapsed_s=state.training(),
        kl_coef=state.kl_coef,
        actor=setup.actor,
        critic=setup.critic,
    )
    context.emit(metrics)


def end_if_exploded(
    context: StepContext,
    setup: Setup,
    state: LoopState,
    checkpointer: Checkpointer,
    update: int,
) -> None:
    """Raise ToolkitError if the rollout's KL is over its limit.

    Nothing is learned from that rollout, so no checkpoint holds it.
    """
    kl = mean_kl(state)
    if kl > context.job.ppo.max_kl:
        emit_metrics(context, setup, state, update)
        raise exploded(context, kl, update + 1, checkpointer.last_good())


def result(context: StepContext, setup: Setup, state: LoopState, after: Summary) -> End:
    """Return the step's end event, with the held-out numbers before and after training."""
    before = state.before
    return End(
        step=3,
        updates=setup.updates,
        seconds=state.clock(),
        model=str(context.run.step(3).model),
        own_models=context.job.own_models_of(3) or None,
        held_out_rows=len(setup.held_out.prompts),
        mean_reward_before=before.reward,
        mean_reward_after=after.reward,
        mean_reward_error_before=before.reward_error,
        mean_reward_error_after=after.reward_error,
        mean_reward_change_error=mean_change_error(before.rewards, after.rewards),
        judge_score_before=before.judge_score,
        judge_score_after=after.judge_score,
        judge_score_error_before=before.judge_error,
        judge_score_error_after=after.judge_error,
        judge_score_change_error=mean_change_error(before.judge_scores, after.judge_scores),
        good_share_before=before.good,
        good_share_after=after.good,
        good_share_both=share_of_both(before.goods, after.goods),
        objective_before=before.objective,
        objective_after=after.objective,
        kl_before=before.kl,
        kl=after.kl,
        kl_k3_before=before.kl_k3,
        kl_k3=after.kl_k3,
        response_length_before=before.length,
        response_length_after=after.length,
        eos_share_before=before.ended,
        eos_share_after=after.ended,
        reward_shift=state.shift,
        reward_scale=state.scale,
    )


def use_the_smallest_batch(context: StepContext, rollouts: Rollouts, known: int) -> int:
    """Give all ranks the rollout batch of the rank with least memory, and return it.

    If it is smaller than `known`, the run remembers it.
    """
    rollouts.batch = min(context.world.gather(rollouts.batch))
    if rollouts.batch < known and context.world.is_main:
        memory_fit.remember(context.job, context.run, replace(context.placement, rollout_micro_batch=rollouts.batch))
        message = f"out of memory in a rollout with {known} concurrent prompts: continues with {rollouts.batch}"
        hint = "the answers stay the same; set hardware.rollout_micro_batch to avoid the failed attempt"
        context.emit(Warning(step=3, message=message, hint=hint))
    return rollouts.batch


def warn_of_odd_answers(context: StepContext, experience: Experience, limit: int) -> None:
    """Warn of a rollout that teaches little: its answers are all empty, or all cut.

    The hint names the usual causes.
    """
    lengths = experience.mask.sum(1)
    answers = f"all {len(lengths)} answers of this rollout"
    if bool((experience.ended & (lengths == 1)).all()):
        hint = (
            "step 1's responses may be empty, or the reward model prefers empty answers: look at its pairs; "
            "raise ppo.kl_coef"
        )
        context.emit(Warning(step=3, message=f"{answers} are empty: the first token is the EOS", hint=hint))
    if bool((~experience.ended & (lengths == limit)).all()):
        message = f"{answers} ran to the limit of {limit} tokens: none ended with an EOS"
        hint = (
            "raise data.max_response_tokens if step 1's responses are longer; train step 1 longer; "
            "raise ppo.missing_eos_penalty"
        )
        context.emit(Warning(step=3, message=message, hint=hint))


def exploded(context: StepContext, kl: float, update: int, last_good: str) -> ToolkitError:
    return ToolkitError(
        f"step 3's KL to the reference exploded: {kl:.4g} nats a response before update {update}",
        why=f"ppo.max_kl is {context.job.ppo.max_kl:g}: "
        "the actor no longer writes what the reference could have written",
        hint="lower ppo.actor_learning_rate, raise ppo.kl_coef, or set ppo.kl_target, in a run of its own:\n"
        f"`--run NEW --from {context.run.name}`; {last_good}",
        exit_code=ExitCode.TRAINING,
    )


def next_kl_coef(spec: Ppo, kl_coef: float, kl: float) -> float:
    """Adapt the KL coefficient to `kl_target`, or leave it if there is no target.

    Proportional control of the KL, clipped at 20 %: Ziegler et al. 2019, arXiv:1909.08593, section
    2.2.
    """
    if spec.kl_target is None:
        return kl_coef
    error = min(max(kl / spec.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * spec.rollout_batch / spec.kl_horizon)


def accumulate_gradients(
    context: StepContext,
    passes: Sequence[Pass],
    response_tokens: int,
    *,
    on_policy: bool,
    actor: Engine,
    critic: Engine | None,
    kl_coef: float,
    actor_learns: bool = True,
) -> dict[str, float]:
    """Run forward and backward over one update's passes; return SUMS over passes and ranks.

    critic: None if the method has none. kl_coef: of the KL in the loss, where the method has it
    there. actor_learns: whether the actor gets gradients; its numbers are computed anyway.

    The critic runs first: on-policy the advantages come from its values, and are whitened over all
    passes before the actor's first pass.
    """
    spec = context.job.ppo
    high = spec.clip_range if spec.clip_range_high is None else spec.clip_range_high
    normalizer = losses.loss_normalizer(
        spec.loss_mean,
        tokens=response_tokens,
        answers=spec.global_batch,
        limit=context.job.data.max_response_tokens,
    )
    sums: dict[str, torch.Tensor | float] = dict.fromkeys(SUMS, 0.0)

    def add(**numbers: torch.Tensor | float) -> None:
        for name, value in numbers.items():
            sums[name] = sums[name] + value

    for micro in passes if critic is not None else ():
        assert critic is not None
        context.heartbeat.beat()
        batch, mask = micro.batch, micro.mask
        values = response_values(critic, batch)
        if on_policy:
            micro.targets = targets_of(micro.targets["rewards"], values.detach(), mask, spec)
        old_values, returns = micro.targets["values"], micro.targets["returns"]
        to_go = micro.targets["rewards_to_go"].double()
        loss = losses.value_loss(
            values, old_values, returns, mask, clip_range=spec.value_clip_range, normalizer=response_tokens
        )
        critic.backward(loss, last=micro is passes[-1])
        value_clipped = (((values.detach() - old_values).abs() > spec.value_clip_range) & mask).sum()
        add(
            value_loss=loss.detach(),
            value_clipped=value_clipped,
            value_error=((to_go - old_values) * mask).square().sum(),
            to_go=(to_go * mask).sum(),
            to_go_squared=(to_go * mask).square().sum(),
        )

    if on_policy and spec.whiten_advantages and critic is not None:  # else experience.py has done it
        whiten_update(passes, context.world)

    for micro in passes:
        context.heartbeat.beat()
        batch, mask, advantages = micro.batch, micro.mask, micro.targets["advantages"]
        with torch.set_grad_enabled(actor_learns):
            flat, entropies = actor(batch, temperature=spec.temperature, with_entropy=on_policy)
        log_probs = batch.spread(flat)
        old_log_probs = log_probs.detach() if on_policy else micro.old_log_probs
        weights = losses.token_weights(mask, spec.loss_mean)
        loss = losses.policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            clip_range=spec.clip_range,
            clip_range_high=spec.clip_range_high,
            weights=weights,
            normalizer=normalizer,
        )
        if spec.kl_in_loss:
            loss = loss + kl_coef * losses.kl_loss(
                log_probs, micro.ref_log_probs, mask, weights=weights, normalizer=normalizer
            )
        if actor_learns:
            actor.backward(loss, last=micro is passes[-1])
        # Against the policy that sampled; on-policy against the rollout's own log-probs, so that a
        # rollout that went wrong shows.
        ratio = ((log_probs.detach() - micro.old_log_probs) * mask).exp()
        add(
            policy_loss=loss.detach(),
            ratio=(ratio * mask).sum(),
            clipped=(((ratio - 1 > high) | (1 - ratio > spec.clip_range)) & mask).sum(),
        )
        if entropies is not None:
            add(entropy=mean_entropies(entropies, batch).sum())
        add(tokens=mask.sum(), trained=batch.lengths.sum(), computed=batch.input_ids.numel())
    return context.world.sum(sums)
