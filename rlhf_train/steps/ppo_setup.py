"""Set up step 3: load its networks, and build what trains, samples, scores and measures."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jobs.events import Warning
from jobs.spec import Lora, Ppo
from rlhf_train.data import hub
from rlhf_train.data.chat import stop_ids
from rlhf_train.data.dataset import Corpus
from rlhf_train.data.sequences import BatchPlan, Sequences, count_updates
from rlhf_train.disk import write_json
from rlhf_train.engine.checkpointer import Stateful
from rlhf_train.engine.deepspeed_engine import Ema, Engine, copy_weights, trial_update
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.adapters import add_lora, describe
from rlhf_train.models.networks import (
    ActorForward,
    ScoreForward,
    check_lengths,
    check_same_tokenizer,
    checkpoint_activations,
    load_causal,
    load_scorer,
    load_tokenizer,
    padding,
    reads_alike,
)
from rlhf_train.plan.few_rows import check_critic_warmup
from rlhf_train.steps.context import StepContext, corpus
from rlhf_train.steps.export import eval_model
from rlhf_train.steps.held_out import SAMPLES, Answer, HeldOut
from rlhf_train.steps.own_forward import check_scores, example_rows, try_float32
from rlhf_train.steps.rule import load_rule
from rlhf_train.steps.scoring import Scorer, TextScoring, WithoutAdapters
from rlhf_train.steps.self_test import weights_digest
from rlhf_train.steps.text_reading import TextReader

LEAST_SCALE = 1e-6  # a reward model that scores all answers alike must not divide by 0
NORMALIZATION_PROMPTS = 256  # answers of the reference that set the scale of the rewards
# Seeds of the rollouts that are not training, apart from the job's own (below 2^32).
EVALUATION_SEED, NORMALIZATION_SEED = 2**32, 2**33


@dataclass(frozen=True)
class Setup:
    """What step 3 works with. Made once; only the networks in it change."""

    tokenizer: Any
    lora: Lora | None  # of the actor
    tokens: Corpus
    plan: BatchPlan
    updates: int
    updates_per_rollout: int
    pad_id: int | None  # None: rows are packed
    pass_tokens: int  # computed by a training pass, at most
    actor: Engine
    critic: Engine | None  # None: the answers to a prompt are compared with each other
    reference: ActorForward | WithoutAdapters
    reward_model: ScoreForward
    ema: Ema | None  # of the actor's weights
    rollout_copy: ActorForward | None  # what rollouts read if the engine has no plain, whole weights
    rollouts: Rollouts
    scorer: Scorer
    held_out: HeldOut
    longest: Sequences  # one micro batch
    frozen_folders: tuple[str, ...]  # of the frozen networks: the reward model's only if no step of this run made it
    frozen_digest: str  # sha256 of the weights in them

    @property
    def rows(self) -> np.ndarray:
        """Return the training rows of step 3."""
        return self.tokens.train.step_rows[3]

    @property
    def on_policy(self) -> bool:
        """Return whether a rollout gets one update: then the policy that learns also sampled.

        See experience.py.
        """
        return self.updates_per_rollout == 1

    @property
    def engines(self) -> list[Engine]:
        return [self.actor] if self.critic is None else [self.actor, self.critic]

    @property
    def parts(self) -> dict[str, Stateful]:
        """Return the objects whose state a checkpoint must hold."""
        parts: dict[str, Stateful] = {"actor": self.actor}
        if self.critic is not None:
            parts["critic"] = self.critic
        if self.ema is not None:
            parts["ema"] = self.ema
        return parts

    @property
    def model_bytes(self) -> int:
        """Return the size of the models that the step saves at its end."""
        return self.actor.model_bytes() * (2 if self.ema else 1)

    def refresh_rollouts(self) -> None:
        """Let rollouts read the actor's weights as they are now."""
        if self.rollout_copy is not None:
            copy_weights(self.actor, self.rollout_copy)

    def held_out_answers(self) -> list[Answer]:
        """Answer the held-out prompts with the actor as it is now."""
        self.refresh_rollouts()
        return self.held_out.answers(self.rollouts, self.scorer)

    def few_answers(self) -> list[Answer]:
        """Answer the few held-out prompts whose answers are shown, one a rank at least."""
        self.refresh_rollouts()
        return self.held_out.answers(self.rollouts, self.scorer, max(SAMPLES, self.held_out.context.world.size))


def set_up(context: StepContext) -> Setup:
    """Load and build all that step 3 works with.

    Raises ToolkitError if parts of it do not fit together.
    """
    job, spec, world, where = context.job, context.job.ppo, context.world, context.placement

    # 1. Read the prompts, and count the updates.
    actor_source, critic_source = context.model_of(1), context.model_of(2)
    tokenizer = load_tokenizer(actor_source)
    scorer_tokenizer = load_tokenizer(critic_source)
    is_text = job.may_score_text and not reads_alike(tokenizer, scorer_tokenizer)
    if is_text:
        context.doing(3, f"{critic_source} has another tokenizer than the actor, and reads the answers as text")
    else:
        check_same_tokenizer(tokenizer, scorer_tokenizer)
        scorer_tokenizer = tokenizer
    tokens = corpus(context, 3, job.data, tokenizer)
    rows = tokens.train.step_rows[3]
    plan = where.batch_plan(job, 3)
    updates_per_rollout = spec.ppo_epochs * spec.rollout_batch // spec.global_batch
    possible = count_updates(len(rows), spec.prompts_per_rollout, spec.epochs, None) * updates_per_rollout
    updates = min(possible, spec.max_updates or possible)
    check_critic_warmup(spec, updates)
    context.plan(3, plan, updates=updates, zero_stage=where.actor_zero_stage, table=tokens.train)

    # 2. Load the networks: actor and its frozen copies, critic, reward model, judge.
    if not spec.has_critic:
        context.doing(3, without_critic(spec))
    context.doing(3, f"loading actor, reference, {'critic and ' if spec.has_critic else ''}reward model")
    scorer_model = load_scorer(critic_source, scorer_tokenizer, context.dtype, job.seed, needs_head=True)
    reward_model = ScoreForward(eval_model(scorer_model.to(world.device)))
    actor_model = load_causal(actor_source, tokenizer, context.dtype, job.seed).to(world.device)
    # The policy is one over the tokenizer's ids. Step 1 learns, as the saved model, over all rows.
    actor_model.logit_transform = replace(actor_model.logit_transform, tokens=len(tokenizer))
    judge = load_judge(context, tokenizer, spec.judge_model) if spec.judge_model is not None else None
    judges = [judge.model] if judge is not None else []
    for model in (actor_model, *([] if is_text else [reward_model.model]), *judges):
        check_lengths(model, job.data.max_prompt_tokens, job.data.max_response_tokens)
    reference, rollout_copy = frozen_copies(actor_model, job.actor.lora, where.actor_zero_stage, job.seed)
    if job.actor.lora is not None and isinstance(reference, ActorForward):
        why = "ZeRO 3 has no whole weights"
        context.doing(3, f"the reference is a copy of the actor, not the actor with its adapters off: {why}")
    if job.hardware.gradient_checkpointing:
        checkpoint_activations(actor_model)
    if job.actor.lora is not None:
        add_lora(actor_model, job.actor.lora, job.seed)
        context.doing(3, f"LoRA adapts {describe(actor_model)}")
    critics = []
    if spec.has_critic:
        critics.append(load_scorer(critic_source, tokenizer, context.dtype, job.seed).to(world.device))
        if job.hardware.gradient_checkpointing:
            checkpoint_activations(critics[0])
    of_actor = [actor_model, *critics, reference.model, *judges]
    pad_id = padding(tokenizer, *of_actor, *([] if is_text else [reward_model.model]))
    text_scoring = None
    if is_text:
        positions = getattr(reward_model.model.config, "max_position_embeddings", None)
        reader = TextReader(tokenizer, scorer_tokenizer, positions)
        text_scoring = TextScoring(reader, padding(scorer_tokenizer, reward_model.model))

    # The actor's log-probs are checked by the self-test, on the first rollout.
    examples = example_rows(context, 3, tokens.train, tokens.train.some_answer)
    if text_scoring is None:
        check_scores(context, reward_model, examples, pad_id)
    else:
        read = text_scoring.read(*zip(*examples, strict=True))
        check_scores(context, reward_model, list(zip(*read, strict=True)), text_scoring.pad_id)
    if judge is not None:
        check_scores(context, judge, examples, pad_id)
    try_float32(context, ActorForward(actor_model), examples, pad_id)

    # 3. Give actor and critic an engine each.
    actor = Engine(
        ActorForward(actor_model),
        spec,
        spec.actor_learning_rate,
        updates,
        plan,
        precision=where.precision,
        zero_stage=where.actor_zero_stage,
        world=world,
        first_update=spec.critic_warmup_updates,
    )
    critic = None
    if spec.critic_learning_rate is not None and critics:
        critic = Engine(
            ScoreForward(critics[0]),
            spec,
            spec.critic_learning_rate,
            updates,
            plan,
            precision=where.precision,
            zero_stage=where.critic_zero_stage,
            world=world,
        )
    ema = Ema(actor.module, spec.ema_decay) if spec.ema_decay else None

    # 4. Sample with the actor, or with its copy.
    rollouts = Rollouts(
        rollout_copy.model if rollout_copy is not None else actor_model,
        stop_ids=stop_ids(tokenizer, getattr(actor_model, "generation_config", None)),
        pad_id=tokenizer.pad_token_id,
        max_tokens=job.data.max_response_tokens,
        max_prompt_tokens=job.data.max_prompt_tokens,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        batch=where.rollout_micro_batch,
        device=world.device,
        warn=lambda message: context.emit(Warning(step=3, message=message)),
        beat=context.heartbeat.beat,
        is_asked_to_stop=lambda: context.stop.asked_at is not None,
    )

    # 5. Score with the frozen networks, in passes as large as the longest of training.
    prompt = max((tokens.train.prompt[i] for i in rows), key=len)
    response = np.full(job.data.max_response_tokens, tokenizer.eos_token_id)
    longest = Sequences.of([prompt] * plan.micro_batch, [response] * plan.micro_batch, pad_id, world.device)
    pass_tokens = plan.micro_batch * (len(prompt) + len(response))
    scorer = Scorer(context, reference, reward_model, pad_id, pass_tokens, judge, text_scoring)

    # 6. Measure on prompts that are not trained on.
    prompts = [tokens.held_out.prompt[i] for i in tokens.held_out.step_rows[3]]
    held_out = HeldOut(context, prompts, tokenizer, load_rule(spec.rule), seed=job.seed + EVALUATION_SEED)
    frozen = [actor_source, *filter(None, (job.critic.reward_model, spec.judge_model))]
    folders = tuple(hub.model(source, hub.model_files) for source in frozen)
    return Setup(
        tokenizer=tokenizer,
        lora=job.actor.lora,
        tokens=tokens,
        plan=plan,
        updates=updates,
        updates_per_rollout=updates_per_rollout,
        pad_id=pad_id,
        pass_tokens=pass_tokens,
        actor=actor,
        critic=critic,
        reference=reference,
        reward_model=reward_model,
        ema=ema,
        rollout_copy=rollout_copy,
        rollouts=rollouts,
        scorer=scorer,
        held_out=held_out,
        longest=longest,
        frozen_folders=folders,
        frozen_digest=weights_digest(folders),
    )


def without_critic(spec: Ppo) -> str:
    """Say what takes the critic's place, where the KL is paid for, and what is not read."""
    compared = f"{spec.advantage}: {spec.samples_per_prompt} answers to each prompt are compared, without a critic"
    kl = "the KL penalty is a term of the loss (k3)" if spec.kl_in_loss else "the KL penalty is in the rewards (k1)"
    fields = ", ".join(f"ppo.{name}" for name in spec.unread)
    return f"{compared}; {kl}" + (f"; not read: {fields}" if fields else "")


def load_judge(context: StepContext, tokenizer: Any, source: str) -> ScoreForward:
    """Load `ppo.judge_model`. Raises ToolkitError if it does not read the actor's tokens."""
    context.doing(3, "loading the judge")
    check_same_tokenizer(tokenizer, load_tokenizer(source), "judge")
    model = load_scorer(source, tokenizer, context.dtype, context.job.seed, needs_head=True)
    return ScoreForward(eval_model(model.to(context.world.device)))


def frozen_copies(
    actor_model: Any, lora: Lora | None, zero_stage: int, seed: int
) -> tuple[ActorForward | WithoutAdapters, ActorForward | None]:
    """Copy the loaded actor, before it gets adapters, as the reference and for rollouts.

    Rollouts read the actor itself, with its adapters, if its weights are whole. ZeRO-3 has parts of
    them: there rollouts have a copy, which `copy_weights` fills once a rollout.

    LoRA leaves the actor's own weights as they are. So the reference is the actor with its adapters
    off. Under ZeRO-3 that would gather all weights, layer by layer, for each batch; there it is a
    copy, too.
    """
    if zero_stage != 3 and lora is not None:
        return WithoutAdapters(ActorForward(actor_model)), None
    reference = ActorForward(eval_model(copy.deepcopy(actor_model)))
    if zero_stage != 3:
        return reference, None
    rollouts = copy.deepcopy(actor_model)
    if lora is not None:
        add_lora(rollouts, lora, seed)
    return reference, ActorForward(eval_model(rollouts))


def try_the_longest(context: StepContext, setup: Setup) -> None:
    """Make trial updates on the longest sequences, which prove that training fits into memory."""
    actor, temperature = setup.actor, context.job.ppo.temperature
    context.doing(3, f"trial update on the longest sequences, {setup.plan.micro_batch} in a pass")
    trial_update(
        # With the prompts' tokens: with short prompts a pass holds nearly as many response tokens.
        (actor, lambda: actor(setup.longest, from_prompt=True, temperature=temperature)[0].sum()),
        *((critic, lambda critic=critic: critic(setup.longest)[0].sum()) for critic in setup.engines[1:]),
    )


def measure_reward_scale(context: StepContext, setup: Setup) -> tuple[float, float]:
    """Return the mean and the standard deviation of the scores of the reference's answers.

    Call it before the actor has learned anything: its answers are the reference's then.
    """
    rows = setup.rows[:NORMALIZATION_PROMPTS]
    context.doing(3, f"measuring the scale of the rewards on {len(rows)} answers of the reference")
    prompts = [setup.tokens.train.prompt[i] for i in rows]
    view = HeldOut(context, prompts, setup.tokenizer, None, seed=context.job.seed + NORMALIZATION_SEED)
    setup.refresh_rollouts()
    scores = np.array([answer.score for answer in view.answers(setup.rollouts, setup.scorer)])
    return float(scores.mean()), max(float(scores.std()), LEAST_SCALE)


def set_reward_scale(context: StepContext, setup: Setup, shift: float, scale: float) -> None:
    """Make every reward of this run (logit - shift) / scale. The critic learns to predict these."""
    for network in (setup.reward_model, *(critic.module for critic in setup.engines[1:])):
        network.shift, network.scale = shift, scale  # type: ignore[assignment]
    # The scale belongs to the reward model. The folder of one's own model stays as it is.
    is_own = context.job.critic.reward_model is not None
    if context.job.ppo.normalize_rewards and context.world.is_main and not is_own:
        numbers = {"shift": shift, "scale": scale, "reward": "(logit - shift) / scale"}
        write_json(context.run.step(2).reward_scale, numbers)
