"""Step 1, supervised fine-tuning: the actor learns to write the data's responses.

Where we differ from DeepSpeed-Chat: the loss is on the response and its EOS (`sft.loss_on_prompt`
adds the prompt), padding never counts, and the perplexity is over tokens, not a mean of batches.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.events import End, Metrics
from jobs.spec import Job
from rlhf_train.data.dataset import Table
from rlhf_train.data.sequences import (
    Sequences,
    assign_passes,
    count_updates,
    evaluation_batches,
    rows_of_update,
)
from rlhf_train.engine.deepspeed_engine import Engine, trial_update
from rlhf_train.models.adapters import add_lora, describe
from rlhf_train.models.networks import (
    ActorForward,
    check_lengths,
    check_same_tokenizer,
    checkpoint_activations,
    load_causal,
    load_tokenizer,
    padding,
)
from rlhf_train.steps.change import perplexity_change_error
from rlhf_train.steps.context import Clock, StepContext, actor_tokenizer, corpus, start_checkpoints
from rlhf_train.steps.export import save_model, scores_of
from rlhf_train.steps.merged import merged
from rlhf_train.steps.own_forward import check_log_probs, example_rows, try_float32


def run(context: StepContext) -> End:
    """Train the actor on the data's responses, and save it."""
    job, spec, world = context.job, context.job.sft, context.world

    # 1. Read the rows, and count the updates.
    clock = Clock()
    plan = context.placement.batch_plan(job, 1)
    tokenizer = actor_tokenizer(context)
    tokens = corpus(context, 1, job.data, tokenizer)
    rows = tokens.train.step_rows[1]
    updates = count_updates(len(rows), spec.global_batch, spec.epochs, spec.max_updates)
    context.plan(
        1,
        plan,
        updates=updates,
        zero_stage=context.placement.actor_zero_stage,
        table=tokens.train,
    )

    if (
        isinstance(job.critic_source, str) and not job.may_score_text
    ):  # now, and not after hours of training: see model_checks.py
        check_same_tokenizer(tokenizer, load_tokenizer(job.critic_source))

    # 2. Load the actor, and give it an engine.
    context.doing(1, "loading the actor")
    model = load_causal(job.actor.model, tokenizer, context.dtype, job.seed).to(world.device)
    check_lengths(model, job.data.max_prompt_tokens, job.data.max_response_tokens)
    if job.hardware.gradient_checkpointing:
        checkpoint_activations(model)
    if job.actor.lora is not None:
        add_lora(model, job.actor.lora, job.seed)
        context.doing(1, f"LoRA adapts {describe(model)}")
    pad_id = padding(tokenizer, model)
    forward = ActorForward(model)
    examples = example_rows(context, 1, tokens.train, tokens.train.response)
    check_log_probs(context, forward, examples, pad_id)
    try_float32(context, forward, examples, pad_id)
    engine = Engine(
        forward,
        spec,
        spec.learning_rate,
        updates,
        plan,
        precision=context.placement.precision,
        zero_stage=context.placement.actor_zero_stage,
        world=world,
    )

    # 3. Show that the longest update fits. Resume from the last checkpoint, or measure the start.
    held_out = tokens.held_out.step_rows[1]
    example = tokens.held_out.example(1, tokenizer)
    row_lengths = tokens.train.before_response.lengths + tokens.train.response.lengths
    pass_tokens = plan.micro_batch * int(row_lengths[rows].max())
    checkpointer, divergence = start_checkpoints(
        context, 1, updates, {"actor": engine}, rows=tokens.train.digest(1), model_bytes=engine.model_bytes()
    )
    context.doing(1, f"trial update on the longest rows, {plan.micro_batch} in a pass")
    longest = sequences(tokens.train, rows[np.argsort(-row_lengths[rows])[: plan.micro_batch]], pad_id, world.device)
    # With the prompt's tokens: with short prompts a pass holds nearly as many response tokens.
    trial_update((engine, lambda: engine(longest, from_prompt=True)[0].sum()))
    saved = checkpointer.resume()
    start: dict[str, Any]  # what was measured before training, as a checkpoint holds it
    if saved is None:
        context.doing(1, f"perplexity of {len(held_out)} held-out responses, before")
        nll_before, counts = held_out_nll(context, engine, tokens.held_out, held_out, pad_id)
        before, error_before = perplexity_of(nll_before, counts)
        start = {"before": before, "error_before": error_before, "before_nll": nll_before.tolist()}
    else:
        clock = Clock(saved["seconds"])
        # A checkpoint of an older version has the perplexity alone.
        start = {name: saved.get(name) for name in ("before", "error_before", "before_nll")}

    def offer(update: int, measured: float) -> None:
        best, lora = ("perplexity", measured), job.actor.lora

        def save(folder: Path) -> None:
            save_model(context, 1, update, engine, tokenizer, folder, lora=lora, scores={}, example=example, best=best)

        checkpointer.offer(update, *best, lower_is_better=True, save=save)

    training = Clock(saved["elapsed_s"] if saved else 0.0)
    for update in range(engine.update, updates):
        # 4. Keep the weights that are best on held-out rows.
        if checkpointer.wants_best(update):
            with merged(model, engine.settle):
                measured, _ = perplexity_of(*held_out_nll(context, engine, tokens.held_out, held_out, pad_id))
            offer(update, measured)

        # 5. Draw the rows of the update, and assign them to ranks and passes.
        chosen = rows[rows_of_update(update, len(rows), spec.global_batch, (job.seed, 1))]
        lengths = row_lengths[chosen]
        counted = int(loss_tokens(job, tokens.train, chosen).sum())  # of the whole update, all ranks
        update_clock, loss_sum, computed = Clock(), 0.0, 0
        passes = assign_passes(lengths, plan, world.rank, pass_tokens, packed=pad_id is None)

        # 6. Run forward and backward.
        for place, micro in enumerate(passes, start=1):
            context.heartbeat.beat(f"update {update + 1}")
            batch = sequences(tokens.train, chosen[micro], pad_id, world.device)
            log_probs, _ = engine(batch, from_prompt=spec.loss_on_prompt)
            loss = -log_probs.sum() / counted
            engine.backward(loss, last=place == len(passes))
            loss_sum += loss.detach()
            computed += batch.input_ids.numel()
        total = world.sum({"loss": loss_sum, "computed": computed})

        # 7. Apply the update, or skip it if its loss is not finite.
        if math.isfinite(total["loss"]):
            (grad_norm,) = divergence.apply(engine)
            context.emit(
                Metrics(
                    step=1,
                    update=update + 1,
                    updates=updates,
                    elapsed_s=training(),
                    learning_rate=engine.current_learning_rate,
                    tokens_per_s=int(lengths.sum()) / update_clock(),
                    real_token_share=int(lengths.sum()) / total["computed"],
                    gpu_peak_bytes=world.gpu_peak_bytes(),
                    grad_norm=grad_norm,
                    loss=total["loss"],
                )
            )
        else:
            divergence.skip(update + 1, "its loss is not finite", engine)

        # 8. Save a checkpoint, if one is due.
        checkpointer.after(
            update + 1,
            {**start, "elapsed_s": training(), "seconds": clock()},
        )

    # 9. Measure again, and save the actor.
    context.doing(1, f"perplexity of {len(held_out)} held-out responses, after")
    with merged(model, engine.settle):
        nll, counts = held_out_nll(context, engine, tokens.held_out, held_out, pad_id)
    after, error_after = perplexity_of(nll, counts)
    divergence.check({"perplexity": after})
    if checkpointer.keeps_best:
        offer(updates, after)
    folder = context.run.step(1).model
    end = End(
        step=1,
        updates=updates,
        seconds=clock(),
        model=str(folder),
        held_out_rows=len(held_out),
        perplexity_before=start["before"],
        perplexity_after=after,
        perplexity_error_before=start["error_before"],
        perplexity_error_after=error_after,
        perplexity_change_error=perplexity_change_error(start["before_nll"], nll, counts),
    )
    save_model(
        context, 1, updates, engine, tokenizer, folder, lora=job.actor.lora, scores=scores_of(end), example=example
    )
    checkpointer.close()
    return end


def sequences(table: Table, rows: np.ndarray, pad_id: int | None, device: torch.device) -> Sequences:
    learned = None if table.learned is None else [table.learned[i] for i in rows]
    before = [table.before_response[i] for i in rows]
    return Sequences.of(before, [table.response[i] for i in rows], pad_id, device, learned)


def loss_tokens(job: Job, table: Table, rows: np.ndarray) -> np.ndarray:
    """Count the tokens of each row that are in the loss."""
    if job.sft.loss_on_prompt:
        return table.response.lengths[rows] + table.before_response.lengths[rows] - 1
    if table.learned is None:
        return table.response.lengths[rows]
    return table.response.lengths[rows] + np.array([table.learned[i].sum() for i in rows], dtype=np.int64)


@torch.no_grad()
def held_out_nll(
    context: StepContext, engine: Engine, table: Table, rows: np.ndarray, pad_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the negative log-likelihood in nats of each of `rows`, and its tokens in the loss."""
    lengths = table.before_response.lengths[rows] + table.response.lengths[rows]
    nlls, counts, places = [], [], []
    share = (context.placement.micro_batches[0], context.world.size, context.world.rank)
    for micro, real in evaluation_batches(lengths, *share, packed=pad_id is None):
        context.heartbeat.beat()
        context.stop_if_asked()
        batch = sequences(table, rows[micro], pad_id, context.world.device)
        log_probs, _ = engine(batch, from_prompt=context.job.sft.loss_on_prompt)
        tokens = loss_tokens(context.job, table, rows[micro])
        row_of_token = np.repeat(np.arange(len(micro)), tokens)
        nll = np.bincount(row_of_token, weights=-log_probs.double().cpu().numpy(), minlength=len(micro))
        nlls.append(nll[real])
        counts.append(tokens[real])
        places.append(micro[real])
    of_all_ranks = context.world.gather(tuple(map(np.concatenate, (nlls, counts, places))))
    of_rows, tokens, place = (np.concatenate(parts) for parts in zip(*of_all_ranks, strict=True))
    order = np.argsort(place)  # the same on any number of ranks
    return of_rows[order], tokens[order]


def perplexity_of(nll: np.ndarray, tokens: np.ndarray) -> tuple[float, float | None]:
    """Compute the perplexity of rows, and its standard error; None for fewer than two rows.

    nll: each row's negative log-likelihood in nats, summed over its `tokens`.
    With m = Σ nll / Σ tokens, in nats a token, the perplexity is exp(m), a number of tokens. A
    row's tokens depend on each other, so rows are the sample, and m is a ratio of two sums over n
    rows: se(m) = √(n/(n−1) Σ (nll − m tokens)²) / Σ tokens (Cochran 1977, Sampling Techniques, eq.
    6.13, of a large population). By the delta method the perplexity's error is exp(m) se(m).
    """
    mean = float(nll.sum() / tokens.sum())
    value = math.exp(min(mean, 700.0))
    rows = len(nll)
    if rows < 2:
        return value, None
    with np.errstate(invalid="ignore"):  # a row of probability 0: the error is not a number
        spread = math.sqrt(rows / (rows - 1) * float(((nll - mean * tokens) ** 2).sum()))
    return value, value * spread / float(tokens.sum())
