"""Step 2, the reward model: it learns from pairs to score a whole answer.

Where we differ from DeepSpeed-Chat: the model is transformers' own classifier with one label,
`last_token` is the Bradley-Terry loss, `per_token` is DeepSpeed-Chat's loss without the padding,
and `lm_coef` keeps the model able to read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.events import End, Metrics
from jobs.spec import Reward
from rlhf_train.data.dataset import Table
from rlhf_train.data.sequences import (
    Sequences,
    assign_passes,
    count_updates,
    evaluation_batches,
    rows_of_update,
)
from rlhf_train.engine.deepspeed_engine import Engine, trial_update
from rlhf_train.models.networks import (
    ScoreForward,
    check_lengths,
    checkpoint_activations,
    language_transform,
    last_scores,
    load_scorer,
    load_tokenizer,
    padding,
)
from rlhf_train.steps.chance import warning_of_chance
from rlhf_train.steps.change import share_of_both
from rlhf_train.steps.context import Clock, StepContext, actor_tokenizer, corpus, start_checkpoints
from rlhf_train.steps.export import save_model, scores_of
from rlhf_train.steps.losses import preference_loss, preference_loss_per_token
from rlhf_train.steps.own_forward import check_scores, example_rows

HISTOGRAM_BARS = 40  # of the margins on held-out pairs


def run(context: StepContext) -> End:
    """Train the reward model on the data's pairs, and save it."""
    job, spec, world = context.job, context.job.reward, context.world

    # 1. Read the pairs, and count the updates.
    clock = Clock()
    plan = context.placement.batch_plan(job, 2)
    source = context.model_of(1) if job.critic.model == "actor" else job.critic.model
    tokenizer = load_tokenizer(source) if isinstance(source, str) else actor_tokenizer(context)
    tokens = corpus(context, 2, job.data, tokenizer)
    rows = tokens.train.step_rows[2]
    updates = count_updates(len(rows), spec.global_batch, spec.epochs, spec.max_updates)
    context.plan(
        2,
        plan,
        updates=updates,
        zero_stage=context.placement.critic_zero_stage,
        table=tokens.train,
    )

    # 2. Load the reward model, and give it an engine.
    context.doing(2, "loading the reward model")
    model = load_scorer(source, tokenizer, context.dtype, job.seed).to(world.device)
    check_lengths(model, job.data.max_prompt_tokens, job.data.max_response_tokens)
    if spec.lm_coef:
        model.logit_transform = language_transform(model)
    if job.hardware.gradient_checkpointing:
        checkpoint_activations(model)
    pad_id = padding(tokenizer, model)
    forward = ScoreForward(model, with_lm=spec.lm_coef > 0)
    check_scores(context, forward, example_rows(context, 2, tokens.train, tokens.train.chosen), pad_id)
    engine = Engine(
        forward,
        spec,
        spec.learning_rate,
        updates,
        plan,
        precision=context.placement.precision,
        zero_stage=context.placement.critic_zero_stage,
        world=world,
    )

    # 3. Show that the longest update fits. Resume from the last checkpoint, or measure the start.
    held_out = tokens.held_out.step_rows[2]
    example = tokens.held_out.example(2, tokenizer)
    row_lengths = pair_lengths(tokens.train)
    pass_tokens = plan.micro_batch * int(row_lengths[rows].max())  # of the chosen; as many of the rejected
    checkpointer, divergence = start_checkpoints(
        context, 2, updates, {"reward_model": engine}, rows=tokens.train.digest(2), model_bytes=engine.model_bytes()
    )
    context.doing(2, f"trial update on the longest pairs, {plan.micro_batch} in a pass")
    longest = pairs(tokens.train, rows[np.argsort(-row_lengths[rows])[: plan.micro_batch]], pad_id, world.device)

    def longest_pass() -> Tensor:
        scores, _, lm_log_probs = score_pairs(engine, spec, longest)
        return scores.sum() if lm_log_probs is None else scores.sum() + lm_log_probs.sum()

    trial_update((engine, longest_pass))
    saved = checkpointer.resume()
    start: dict[str, Any]  # what was measured before training, as a checkpoint holds it
    if saved is None:
        context.doing(2, f"accuracy on {len(held_out)} held-out pairs, before")
        margins_before = held_out_margins(context, engine, tokens.held_out, held_out, pad_id)
        start = {
            "before": accuracy(margins_before),
            "margins_before": histogram(margins_before),
            "right_before": (margins_before > 0).tolist(),
        }
    else:
        clock = Clock(saved["seconds"])
        # A checkpoint of an older version has the accuracy alone.
        start = {name: saved.get(name) for name in ("before", "margins_before", "right_before")}

    def offer(update: int, measured: float) -> None:
        best = ("reward_accuracy", measured)

        def save(folder: Path) -> None:
            save_model(context, 2, update, engine, tokenizer, folder, lora=None, scores={}, example=example, best=best)

        checkpointer.offer(update, *best, lower_is_better=False, save=save)

    training = Clock(saved["elapsed_s"] if saved else 0.0)
    for update in range(engine.update, updates):
        # 4. Keep the weights that are best on held-out pairs.
        if checkpointer.wants_best(update):
            offer(update, accuracy(held_out_margins(context, engine, tokens.held_out, held_out, pad_id)))

        # 5. Draw the pairs of the update, and assign them to ranks and passes.
        picked = rows[rows_of_update(update, len(rows), spec.global_batch, (job.seed, 2))]
        lengths = row_lengths[picked]
        lm_tokens = int(tokens.train.chosen.lengths[picked].sum())  # of the whole update, all ranks
        answer_lengths = tokens.train.chosen.lengths + tokens.train.rejected.lengths
        real_tokens = int((2 * tokens.train.prompt.lengths + answer_lengths)[picked].sum())
        update_clock = Clock()
        sums: dict[str, Tensor | float] = dict.fromkeys(("loss", "lm_loss", "correct", "margin", "computed"), 0.0)
        passes = assign_passes(lengths, plan, world.rank, pass_tokens, packed=pad_id is None)

        # 6. Run forward and backward.
        for place, micro in enumerate(passes, start=1):
            context.heartbeat.beat(f"update {update + 1}")
            batch = pairs(tokens.train, picked[micro], pad_id, world.device)
            scores, end_scores, lm_log_probs = score_pairs(engine, spec, batch)
            pair_loss = preference(spec, scores, end_scores, batch) * len(micro) / spec.global_batch
            lm_loss = -lm_log_probs.sum() / lm_tokens if lm_log_probs is not None else torch.zeros(())
            last = place == len(passes)
            engine.backward(pair_loss + spec.lm_coef * lm_loss if spec.lm_coef else pair_loss, last=last)
            chosen, rejected = end_scores.detach().chunk(2)
            for name, value in (
                ("loss", pair_loss),
                ("lm_loss", lm_loss),
                ("correct", (chosen > rejected).sum()),
                ("margin", (chosen - rejected).sum()),
            ):
                sums[name] = sums[name] + value.detach()
            sums["computed"] += batch.input_ids.numel()
        total = world.sum(sums)

        # 7. Apply the update, or skip it if its loss is not finite.
        if math.isfinite(total["loss"] + total["lm_loss"]):
            (grad_norm,) = divergence.apply(engine)
            context.emit(
                Metrics(
                    step=2,
                    update=update + 1,
                    updates=updates,
                    elapsed_s=training(),
                    learning_rate=engine.current_learning_rate,
                    tokens_per_s=real_tokens / update_clock(),
                    real_token_share=real_tokens / total["computed"],
                    gpu_peak_bytes=world.gpu_peak_bytes(),
                    grad_norm=grad_norm,
                    loss=total["loss"],
                    lm_loss=total["lm_loss"] if spec.lm_coef else None,
                    accuracy=total["correct"] / spec.global_batch,
                    margin=total["margin"] / spec.global_batch,
                )
            )
        else:
            divergence.skip(update + 1, "its loss is not finite", engine)

        # 8. Save a checkpoint, if one is due.
        checkpointer.after(
            update + 1,
            {**start, "elapsed_s": training(), "seconds": clock()},
        )

    # 9. Measure again, and save the reward model.
    context.doing(2, f"accuracy on {len(held_out)} held-out pairs, after")
    margins = held_out_margins(context, engine, tokens.held_out, held_out, pad_id)
    after = accuracy(margins)
    divergence.check({"accuracy": after})
    warning = warning_of_chance(2, after, len(held_out))
    if warning is not None:
        context.emit(warning)
    if checkpointer.keeps_best:
        offer(updates, after)
    folder = context.run.step(2).model
    end = End(
        step=2,
        updates=updates,
        seconds=clock(),
        model=str(folder),
        own_models=job.own_models_of(2) or None,
        held_out_rows=len(held_out),
        reward_accuracy_before=start["before"],
        reward_accuracy=after,
        reward_accuracy_both=share_of_both(start["right_before"], (margins > 0).tolist()),
        margins_before=start["margins_before"],
        margins=histogram(margins),
    )
    save_model(context, 2, updates, engine, tokenizer, folder, lora=None, scores=scores_of(end), example=example)
    checkpointer.close()
    return end


def pair_lengths(table: Table) -> np.ndarray:
    """Return the length of the longer sequence of each pair of the table, in tokens."""
    return table.prompt.lengths + np.maximum(table.chosen.lengths, table.rejected.lengths)


def pairs(table: Table, rows: np.ndarray, pad_id: int | None, device: torch.device) -> Sequences:
    """Make 2n sequences: the n chosen, then the n rejected."""
    answers = [table.chosen[i] for i in rows] + [table.rejected[i] for i in rows]
    return Sequences.of([table.prompt[i] for i in rows] * 2, answers, pad_id, device)


def score_pairs(engine: Engine, spec: Reward, batch: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the scores that the loss needs, the scores at the end, and log-probs.

    The scores at the end: (2n,), after the last token of each sequence. The log-probs: those of the
    chosen answers, for `lm_coef`; else None.
    """
    if spec.loss == "last_token" and not spec.lm_coef:
        end_scores, _ = engine(batch, batch.last())
        return end_scores, end_scores, None
    scores, lm_log_probs = engine(batch, lm_rows=len(batch.host_lengths) // 2 if spec.lm_coef else 0)
    return scores, last_scores(scores, batch), lm_log_probs


def preference(spec: Reward, scores: Tensor, end_scores: Tensor, batch: Sequences) -> Tensor:
    """Return the pair loss that the job chooses, mean over the pairs of this batch.

    scores, end_scores: as `score_pairs` returns them.
    """
    if spec.loss == "last_token":
        return preference_loss(*end_scores.chunk(2))
    chosen, rejected = batch.by_row(scores).chunk(2)
    return preference_loss_per_token(chosen, rejected, divergence_mask(batch))


def divergence_mask(batch: Sequences) -> Tensor:
    """Mark where the two sequences of each pair may be compared.

    (n, T): true from the first token that differs to the end of the shorter sequence of the pair.
    """
    chosen, rejected = batch.by_row(batch.input_ids.flatten()).chunk(2)
    position = torch.arange(chosen.shape[1], device=chosen.device)
    first = (chosen != rejected).int().argmax(1, keepdim=True)
    return (position >= first) & (position < torch.minimum(*batch.lengths.chunk(2)).unsqueeze(1))


@torch.no_grad()
def held_out_margins(
    context: StepContext, engine: Engine, table: Table, rows: np.ndarray, pad_id: int | None
) -> np.ndarray:
    """Return the margin of each of `rows`, in order, on all ranks: chosen score - rejected score.

    The scores are those at the last token. It is NaN where a score is not finite.
    """
    found: list[tuple[int, float]] = []
    share = (context.placement.micro_batches[1], context.world.size, context.world.rank)
    for micro, real in evaluation_batches(pair_lengths(table)[rows], *share, packed=pad_id is None):
        context.heartbeat.beat()
        context.stop_if_asked()
        batch = pairs(table, rows[micro], pad_id, context.world.device)
        scores, _ = engine(batch, batch.last())
        chosen, rejected = scores.double().chunk(2)
        is_finite = torch.isfinite(chosen) & torch.isfinite(rejected)
        margins = torch.where(is_finite, chosen - rejected, math.nan)
        found += zip(micro[real].tolist(), margins.cpu().numpy()[real].tolist(), strict=True)
    of_all_ranks = sorted(pair for of_rank in context.world.gather(found) for pair in of_rank)
    return np.array([margin for _, margin in of_all_ranks])


def accuracy(margins: np.ndarray) -> float:
    """Return the share of pairs whose chosen answer scores higher; NaN if a margin is NaN."""
    return float((margins > 0).mean()) if np.isfinite(margins).all() else math.nan


def histogram(margins: np.ndarray) -> dict[str, Any] | None:
    """Count the margins in bars of equal width, from lowest to highest; None if one is NaN."""
    if not np.isfinite(margins).all():
        return None
    counts, edges = np.histogram(margins, HISTOGRAM_BARS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
