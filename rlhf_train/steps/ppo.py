"""Step 3, PPO: the actor learns to write what the reward model likes, and stays near the reference.

Where we differ from DeepSpeed-Chat: answers are sampled, not greedy; masks come from lengths, so the EOS is an action;
rewards are normalised on the reference's answers; advantages are whitened over all ranks; losses are divided by the
tokens of the whole update; before the first update the trainer, the rollout and the reference must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from jobs.errors import ExitCode, ToolkitError
from jobs.events import End, Metrics, Progress, Warning
from jobs.spec import Lora, Ppo
from rlhf_train.data.sequences import Sequences, count_updates, deal, rows_of_update
from rlhf_train.disk import write_json
from rlhf_train.engine.deepspeed_engine import Ema, Engine, copy_weights, rehearse
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.networks import (
    ActorForward,
    ScoreForward,
    add_lora,
    check_lengths,
    check_same_tokenizer,
    checkpoint_activations,
    load_causal,
    load_scorer,
    load_tokenizer,
    padding,
)
from rlhf_train.plan import memory_fit
from rlhf_train.steps import losses
from rlhf_train.steps.context import Clock, Session, corpus, start_checkpoints
from rlhf_train.steps.experience import Experience, Pass, Scored, response_values, targets_of, whiten_update
from rlhf_train.steps.export import eval_model, save_model, scores_of
from rlhf_train.steps.held_out import HeldOut, Summary
from rlhf_train.steps.rule import load_rule
from rlhf_train.steps.scoring import Judges, WithoutAdapters, mean_entropies

SUMS = ("policy_loss", "value_loss", "ratio", "clipped", "value_clipped", "entropy", "tokens", "trained", "computed")  # over a rollout's updates
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
    on_policy = updates_per_rollout == 1  # what is trained is what has sampled: see experience.py
    rollouts = count_updates(len(rows), spec.rollout_batch, spec.epochs, None)
    updates = min(rollouts * updates_per_rollout, spec.max_updates or rollouts * updates_per_rollout)
    session.plan(3, plan, updates=updates, rows=len(rows), zero_stage=where.actor_zero_stage, fates=tokens.train.fates)

    session.doing(3, "loading actor, reference, critic and reward model")
    reward_model = ScoreForward(eval_model(load_scorer(critic_source, tokenizer, session.dtype, job.seed).to(world.device)))
    actor_model = load_causal(actor_source, tokenizer, session.dtype, job.seed).to(world.device)
    for model in (actor_model, reward_model.model):
        check_lengths(model, job.data.max_prompt_tokens, job.data.max_response_tokens)
    reference, twin = frozen_copies(actor_model, job.actor.lora, where.actor_zero_stage)
    if job.actor.lora is not None and isinstance(reference, ActorForward):
        session.doing(3, "the reference is a copy of the actor, not the actor with its adapters off: ZeRO 3 has no whole weights")
    if job.hardware.gradient_checkpointing:
        checkpoint_activations(actor_model)
    if job.actor.lora is not None:
        add_lora(actor_model, job.actor.lora, job.seed)
    critic_model = load_scorer(critic_source, tokenizer, session.dtype, job.seed).to(world.device)
    if job.hardware.gradient_checkpointing:
        checkpoint_activations(critic_model)
    pad_id = padding(tokenizer, actor_model, critic_model, reference.model, reward_model.model)
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
        ScoreForward(critic_model),
        spec,
        spec.critic_learning_rate,
        updates,
        plan,
        precision=where.precision,
        zero_stage=where.critic_zero_stage,
        world=world,
    )
    ema = Ema(actor.module, spec.ema_decay) if spec.ema_decay else None

    def refresh() -> None:
        if twin is not None:
            copy_weights(actor, twin, job.actor.lora)

    sampling = Rollouts(
        twin.model if twin is not None else actor_model,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_tokens=job.data.max_response_tokens,
        max_prompt_tokens=job.data.max_prompt_tokens,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        batch=where.rollout_micro_batch,
        device=world.device,
        warn=lambda message: session.emit(Warning(step=3, message=message)),
        beat=session.pulse.beat,
        is_asked_to_stop=lambda: session.stop.asked_at is not None,
    )
    held_out = HeldOut(
        session, [tokens.held_out.prompt[i] for i in tokens.held_out.step_rows[3]], tokenizer, load_rule(spec.rule), seed=job.seed + EVALUATION_SEED
    )
    parts = {"actor": actor, "critic": critic} | ({"ema": ema} if ema is not None else {})
    checkpointer, divergence = start_checkpoints(
        session, 3, updates, parts, rows=tokens.train.digest(3), model_bytes=actor.model_bytes() * (2 if ema else 1)
    )
    session.doing(3, f"trying the longest sequences, {plan.micro_batch} at once")
    prompt = max((tokens.train.prompt[i] for i in rows), key=len)
    answer = np.full(job.data.max_response_tokens, tokenizer.eos_token_id)
    longest = Sequences.of([prompt] * plan.micro_batch, [answer] * plan.micro_batch, pad_id, world.device)
    pass_tokens = plan.micro_batch * (len(prompt) + len(answer))
    judges = Judges(session, reference, reward_model, pad_id, pass_tokens)
    rehearse(
        # All tokens asked of: short prompts leave a pass nearly as many of answers.
        (actor, lambda: actor(longest, from_prompt=True, temperature=spec.temperature)[0].sum()),
        (critic, lambda: critic(longest)[0].sum()),
    )
    saved = checkpointer.resume()
    if saved is not None:
        reward_model.shift, reward_model.scale = saved["shift"], saved["scale"]
    elif spec.normalize_rewards:
        session.doing(3, f"scale of the rewards on {min(NORMALIZATION_PROMPTS, len(rows))} answers of the reference")
        view = HeldOut(session, [tokens.train.prompt[i] for i in rows[:NORMALIZATION_PROMPTS]], tokenizer, None, seed=job.seed + NORMALIZATION_SEED)
        refresh()  # the actor has learned nothing yet: its answers are the reference's
        scores = np.array([answer.score for answer in view.answers(sampling, judges)])
        reward_model.shift, reward_model.scale = float(scores.mean()), max(float(scores.std()), LEAST_SCALE)
    critic.module.shift, critic.module.scale = reward_model.shift, reward_model.scale  # type: ignore[assignment]
    if spec.normalize_rewards and world.is_main:  # the scale belongs to the reward model: every reward of this run is (logit - shift) / scale
        numbers = {"shift": reward_model.shift, "scale": reward_model.scale, "reward": "(logit - shift) / scale"}
        write_json(session.run.step(2).reward_scale, numbers)
    if saved is None:
        session.doing(3, f"answers to {len(held_out.prompts)} held-out prompts, before")
        refresh()
        answers = held_out.answers(sampling, judges)
        held_out.show(answers, "before")
        before, kl_coef = held_out.summary(answers), spec.kl_coef
    else:
        before, kl_coef, clock = Summary(**saved["before"]), saved["kl_coef"], Clock(saved["seconds"])

    training = Clock(saved["elapsed_s"] if saved else 0.0)
    tally = Tally(**saved["tally"]) if saved else Tally()
    experience, rollout_micro_batch = None, where.rollout_micro_batch
    if tally.updates:  # stopped between two updates of one rollout
        experience = Experience.from_tensors(checkpointer.loop_tensors)
    for update in range(actor.update, updates):
        if checkpointer.wants_best(update):
            refresh()
            best = ("mean_reward", held_out.summary(held_out.answers(sampling, judges)).reward)
            checkpointer.offer(
                update,
                *best,
                lower_is_better=False,
                save=lambda folder, update=update, best=best: save_model(  # type: ignore[misc]
                    session, 3, update, actor, tokenizer, folder, lora=job.actor.lora, scores={}, best=best
                ),
            )
        rollout, place = divmod(update, updates_per_rollout)
        if experience is None:
            tally = Tally()
            rollout_clock = Clock()
            session.pulse.beat(f"update {update + 1}, rollout")
            chosen = rows[rows_of_update(rollout, len(rows), spec.rollout_batch, (job.seed, 3))]
            prompts = [tokens.train.prompt[i] for i in chosen]
            mine = np.argsort([len(p) for p in prompts], kind="stable")[world.rank :: world.size]
            refresh()
            responses = sampling.generate([prompts[i] for i in mine], seed=job.seed, row_ids=[rollout * spec.rollout_batch + int(i) for i in mine])
            session.stop_if_asked()
            rollout_micro_batch = use_the_smallest_batch(session, sampling, rollout_micro_batch)
            tally.rollout_s, score_clock = rollout_clock(), Clock()

            session.pulse.beat(f"update {update + 1}, scoring")
            ask_trainer = not on_policy or update == 0  # on-policy for the self-test alone
            scored, computed = judges.score([prompts[i] for i in mine], responses, (actor, critic) if ask_trainer else None)
            parts_of_ranks = world.gather((list(zip(mine, scored, strict=True)), computed))
            by_place = {int(row): one for part, _ in parts_of_ranks for row, one in part}
            everyone = [by_place[row] for row in range(spec.rollout_batch)]
            experience = Experience.of(everyone, spec, kl_coef, on_policy=on_policy)
            tally.scored, tally.scored_computed = int(experience.lengths.sum()), sum(count for _, count in parts_of_ranks)
            tally.entropy = None if on_policy else float(np.mean([row.trainer.entropy for row in everyone if row.trainer is not None]))
            tally.score_s = score_clock()
            if update == 0:
                self_test(session, everyone, actor, pad_id)
            warn_of_odd_answers(session, experience, job.data.max_response_tokens)
            kl = float(experience.kl.mean())
            if kl > spec.max_kl:  # nothing is learned of it, which a checkpoint would then hold
                session.emit(tally.metrics(experience, update=update + 1, updates=updates, elapsed_s=training(), kl_coef=kl_coef, engine=actor))
                raise exploded(session, kl, update + 1, checkpointer.last_good())

        train_clock = Clock()
        epoch, number = divmod(place, spec.rollout_batch // spec.global_batch)
        shuffled = np.random.RandomState([job.seed, 3, rollout, epoch]).permutation(spec.rollout_batch)
        minibatch = shuffled.reshape(-1, spec.global_batch)[number]
        session.pulse.beat(f"update {update + 1}")
        dealt = deal(experience.lengths[minibatch], plan, world.rank, pass_tokens, packed=pad_id is None)
        passes = [experience.cut(minibatch[micro], pad_id, world.device) for micro in dealt]
        response_tokens = int(experience.mask[torch.from_numpy(minibatch)].sum())  # of the whole update, all ranks
        total = accumulate_gradients(session, passes, response_tokens, on_policy=on_policy, actor=actor, critic=critic)
        if math.isfinite(total["policy_loss"] + total["value_loss"]):
            norms = divergence.apply(actor, critic)
            if ema is not None:
                ema.update()
            if divergence.skips.in_a_row == 0:
                tally.add(total, norms)
        else:
            divergence.skip(update + 1, "its loss is not finite", actor, critic)
        tally.updates += 1
        tally.train_s += train_clock()

        if place == updates_per_rollout - 1 or update == updates - 1:
            if tally.trained_updates:
                session.emit(tally.metrics(experience, update=update + 1, updates=updates, elapsed_s=training(), kl_coef=kl_coef, engine=actor))
            kl_coef = next_kl_coef(spec, kl_coef, float(experience.kl.mean()))
            experience, tally = None, Tally()
        loop = {"before": asdict(before), "kl_coef": kl_coef, "shift": reward_model.shift, "scale": reward_model.scale, "tally": asdict(tally)}
        loop |= {"elapsed_s": training(), "seconds": clock()}
        checkpointer.after(update + 1, loop, experience.tensors() if experience is not None else {})

    session.doing(3, f"answers to {len(held_out.prompts)} held-out prompts, after")
    refresh()
    answers = held_out.answers(sampling, judges)
    held_out.show(answers, "after")
    folder, after = session.run.step(3).model, held_out.summary(answers)
    divergence.check({"mean reward": after.reward, "KL": after.kl})
    end = End(
        step=3,
        updates=updates,
        seconds=clock(),
        model=str(folder),
        mean_reward_before=before.reward,
        mean_reward_after=after.reward,
        good_share_before=before.good,
        good_share_after=after.good,
        kl_before=before.kl,
        kl=after.kl,
        response_length_before=before.length,
        response_length_after=after.length,
        eos_share_before=before.ended,
        eos_share_after=after.ended,
        reward_shift=reward_model.shift,
        reward_scale=reward_model.scale,
    )
    save_model(session, 3, updates, actor, tokenizer, folder, lora=job.actor.lora, scores=scores_of(end))
    if ema is not None:
        with ema.applied():
            save_model(session, 3, updates, actor, tokenizer, session.run.step(3).model_ema, lora=job.actor.lora, scores={})
    checkpointer.close()
    return end


@dataclass
class Tally:
    """One rollout's updates so far. Sums over all ranks; plain values, since a checkpoint between two updates holds them."""

    updates: int = 0  # also those left out
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    norms: list[list[float]] = field(default_factory=list)  # of actor and critic, an update each
    entropy: float | None = None  # mean over responses; on-policy known once it is trained on
    scored: int = 0  # tokens that went through scoring passes, and all that these computed
    scored_computed: int = 0
    rollout_s: float = 0.0
    score_s: float = 0.0
    train_s: float = 0.0

    @property
    def trained_updates(self) -> int:
        return len(self.norms)

    def add(self, sums: Mapping[str, float], norms: Sequence[float]) -> None:
        self.sums = {name: self.sums[name] + value for name, value in sums.items()}
        self.norms.append(list(norms))

    def metrics(self, experience: Experience, *, update: int, updates: int, elapsed_s: float, kl_coef: float, engine: Engine) -> Metrics:
        """The rollout's numbers; those of training too, if there was any."""
        rollout = Metrics(
            step=3,
            update=update,
            updates=updates,
            elapsed_s=elapsed_s,
            learning_rate=engine.current_learning_rate,
            tokens_per_s=0.0,
            real_token_share=0.0,
            gpu_peak_bytes=engine.world.gpu_peak_bytes(),
            grad_norm=0.0,
            mean_reward=float(experience.scores.mean()),
            kl=float(experience.kl.mean()),
            kl_coef=kl_coef,
            entropy=self.entropy,
            response_length=float(experience.mask.sum(1).float().mean()),
            eos_share=float(experience.ended.float().mean()),
            rollout_s=self.rollout_s,
            score_s=self.score_s,
        )
        count, sums = self.trained_updates, self.sums
        if not count:
            return rollout
        return replace(
            rollout,
            tokens_per_s=sums["trained"] / (self.rollout_s + self.score_s + self.train_s),
            real_token_share=(sums["trained"] + self.scored) / (sums["computed"] + self.scored_computed),
            grad_norm=float(np.mean([actor for actor, _ in self.norms])),
            critic_grad_norm=float(np.mean([critic for _, critic in self.norms])),
            policy_loss=sums["policy_loss"] / count,
            value_loss=sums["value_loss"] / count,
            ratio=sums["ratio"] / sums["tokens"],
            clip_fraction=sums["clipped"] / sums["tokens"],
            value_clip_fraction=sums["value_clipped"] / sums["tokens"],
            entropy=self.entropy if self.entropy is not None else sums["entropy"] / len(experience.prompts),
            train_s=self.train_s,
        )


def frozen_copies(actor_model: Any, lora: Lora | None, zero_stage: int) -> tuple[ActorForward | WithoutAdapters, ActorForward | None]:
    """Of the actor as it was loaded, before adapters: the reference, and what rollouts read where the engine will not hold plain, whole
    weights (ZeRO-3 has parts, LoRA has adapters beside them): filled by `copy_weights` once a rollout.

    LoRA learns beside weights that stay: the reference is the actor with its adapters off, and the copy has memory of its own only for
    what adapters change. ZeRO-3 would have to gather them all, layer by layer, for each batch; there both are whole copies.
    """
    if lora is None or zero_stage == 3:
        reference, *rollouts = (ActorForward(eval_model(copy.deepcopy(actor_model))) for _ in range(2 if zero_stage == 3 else 1))
        return reference, rollouts[0] if rollouts else None
    adapted = tuple(f".{target}.weight" for target in lora.target_modules)
    kept = {id(parameter): parameter for name, parameter in actor_model.named_parameters() if not f".{name}".endswith(adapted)}
    return WithoutAdapters(ActorForward(actor_model)), ActorForward(eval_model(copy.deepcopy(actor_model, kept)))


def use_the_smallest_batch(session: Session, sampling: Rollouts, known: int) -> int:
    """Where a rank had no memory for `known` prompts at once, all ranks generate fewer from now on, and the run remembers it."""
    sampling.batch = min(session.world.gather(sampling.batch))
    if sampling.batch < known and session.world.is_main:
        memory_fit.remember(session.job, session.run, replace(session.placement, rollout_micro_batch=sampling.batch))
        message = f"out of memory in a rollout with {known} prompts at once: goes on with {sampling.batch}"
        session.emit(Warning(step=3, message=message, hint="the answers stay the same; set hardware.rollout_micro_batch to spare the try"))
    return sampling.batch


def warn_of_odd_answers(session: Session, experience: Experience, limit: int) -> None:
    """A rollout whose answers are all empty, or all cut, teaches little: said each time, with what it usually comes from."""
    lengths = experience.mask.sum(1)
    if bool((experience.ended & (lengths == 1)).all()):
        session.emit(
            Warning(
                step=3,
                message=f"all {len(lengths)} answers of this rollout are empty: the first token is the EOS",
                hint="step 1's responses may be empty, or the reward model likes silence: look at its pairs; raise ppo.kl_coef",
            )
        )
    if bool((~experience.ended & (lengths == limit)).all()):
        session.emit(
            Warning(
                step=3,
                message=f"all {len(lengths)} answers of this rollout ran to the limit of {limit} tokens: none ended with an EOS",
                hint="raise data.max_response_tokens if step 1's responses are longer; train step 1 longer; raise ppo.missing_eos_penalty",
            )
        )


def exploded(session: Session, kl: float, update: int, last_good: str) -> ToolkitError:
    return ToolkitError(
        f"step 3's KL to the reference exploded: {kl:.4g} nats a response before update {update}",
        why=f"ppo.max_kl is {session.job.ppo.max_kl:g}: the actor no longer writes what the reference could have written",
        hint="lower ppo.actor_learning_rate, raise ppo.kl_coef, or set ppo.kl_target, in a run of its own:\n"
        f"`--run NEW --from {session.run.name}`; {last_good}",
        code=ExitCode.TRAINING,
    )


def next_kl_coef(spec: Ppo, kl_coef: float, kl: float) -> float:
    """Fixed, or after Ziegler et al. 2019, section 2.2: proportional control of the KL to `kl_target`, clipped at 20 %."""
    if spec.kl_target is None:
        return kl_coef
    error = min(max(kl / spec.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * spec.rollout_batch / spec.kl_horizon)


def accumulate_gradients(
    session: Session, passes: Sequence[Pass], response_tokens: int, *, on_policy: bool, actor: Engine, critic: Engine
) -> dict[str, float]:
    """Forward and backward of one update's passes, in both engines -> SUMS over passes and ranks.

    The critic goes first: on-policy the advantages are made of its values, and whitened over all passes before the actor sees one.
    """
    spec = session.job.ppo
    sums: dict[str, torch.Tensor | float] = dict.fromkeys(SUMS, 0.0)

    def add(**numbers: torch.Tensor | float) -> None:
        for name, value in numbers.items():
            sums[name] = sums[name] + value

    for one in passes:
        session.pulse.beat()
        batch, mask = one.batch, one.mask
        values = response_values(critic, batch)
        if on_policy:
            one.targets = targets_of(one.targets["rewards"], values.detach(), mask, spec)
        old_values = one.targets["values"]
        loss = losses.value_loss(values, old_values, one.targets["returns"], mask, clip_range=spec.value_clip_range, normalizer=response_tokens)
        critic.backward(loss, last=one is passes[-1])
        value_clipped = (((values.detach() - old_values).abs() > spec.value_clip_range) & mask).sum()
        add(value_loss=loss.detach(), value_clipped=value_clipped)

    if on_policy and spec.whiten_advantages:
        whiten_update(passes, session.world)

    for one in passes:
        session.pulse.beat()
        batch, mask = one.batch, one.mask
        flat, entropies = actor(batch, temperature=spec.temperature, with_entropy=on_policy)
        log_probs = batch.spread(flat)
        old_log_probs = log_probs.detach() if on_policy else one.old_log_probs
        loss = losses.policy_loss(log_probs, old_log_probs, one.targets["advantages"], mask, clip_range=spec.clip_range, normalizer=response_tokens)
        actor.backward(loss, last=one is passes[-1])
        # Against the policy that sampled; on-policy as the rollout saw it, so that a rollout gone astray shows.
        ratio = ((log_probs.detach() - one.old_log_probs) * mask).exp()
        add(policy_loss=loss.detach(), ratio=(ratio * mask).sum(), clipped=(((ratio - 1).abs() > spec.clip_range) & mask).sum())
        if entropies is not None:
            add(entropy=mean_entropies(entropies, batch).sum())
        add(tokens=mask.sum(), trained=batch.lengths.sum(), computed=batch.input_ids.numel())
    return session.world.sum(sums)


def self_test(session: Session, rows: Sequence[Scored], actor: Engine, pad_id: int | None) -> None:
    """Before the first update: ratio 1, KL 0, and the rollout's log-probs are the trainer's. Raises ToolkitError."""
    batch_rows = rows[: session.placement.micro_batches[2]]
    batch = Sequences.of([r.prompt for r in batch_rows], [r.response for r in batch_rows], pad_id, session.world.device)
    log_probs = batch.spread(actor(batch, temperature=session.job.ppo.temperature)[0]).detach().float().cpu().numpy()
    again = [log_probs[place, : len(row.response)] for place, row in enumerate(batch_rows)]
    limit = SELF_TEST_TOLERANCE[session.placement.precision]
    old = [row.trainer.log_probs for row in rows if row.trainer is not None]
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
