"""Save a step's result in plain Hugging Face format.

It has safetensors, config, the complete tokenizer, generation config and a model card.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig

from jobs.events import Checkpoint, End
from jobs.spec import Job, Lora
from rlhf_train.data.chat import saved_template, stop_ids
from rlhf_train.data.dataset import Example
from rlhf_train.disk import read_json, rename, size_of, sync_files, write_json
from rlhf_train.engine.deepspeed_engine import Engine, full_state
from rlhf_train.models import spellings
from rlhf_train.models.adapters import merge_lora, save_adapter
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.model_card import model_card

ADAPTER = "adapter"  # in a model's folder: LoRA's adapters by themselves, a PEFT folder


def save_model(
    context: StepContext,
    step: int,
    update: int,
    engine: Engine,
    tokenizer: Any,
    folder: Path,
    *,
    lora: Lora | None,
    scores: Mapping[str, float],
    example: Example,
    best: tuple[str, float] | None = None,
) -> None:
    """Save an engine's model in `folder`; all ranks take part, and rank 0 writes.

    The folder is written under another name, synced and renamed, so it is complete or missing.
    scores, example (a prompt and an answer of the data): for the model card. best: the metric for
    which these weights are kept, and its value.
    """
    start = time.perf_counter()
    context.heartbeat.is_patient = True  # transformers writes without a heartbeat in between
    context.doing(step, f"saving {folder}")
    engine.settle()
    model: Any = engine.module.model
    state = full_state(model, keep=context.world.is_main)
    if context.world.is_main:
        adapted_state = state
        if lora is not None:
            state = merge_lora(state, model)
        # Before save_pretrained, which empties the state while it writes.
        dtype = next(value.dtype for value in state.values() if value.is_floating_point())
        partial = folder.with_name(folder.name + ".partial")
        for old in (partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        # Without its parents: if a disk is no longer mounted, they must not be made in its mount
        # point.
        partial.mkdir()
        model.save_pretrained(str(partial), state_dict=state, safe_serialization=True)
        tokenizer.chat_template = saved_template(tokenizer, context.job.data)
        tokenizer.save_pretrained(str(partial))
        # The dtype of the file, which may be float32 after a merge; transformers wrote that of the
        # model in memory.
        spellings.write_both(partial, dtype=str(dtype).removeprefix("torch."), padding_side=tokenizer.padding_side)
        if lora is not None:
            save_adapter(adapted_state, model, lora, origin(context.job, model), partial / ADAPTER)
            sync_files(partial / ADAPTER)
        sampling = generation_config(context.job, tokenizer, getattr(model, "generation_config", None))
        sampling.save_pretrained(str(partial))
        _write_out(sampling, partial / "generation_config.json")
        card = model_card(context.job, step, tokenizer, example=example, scores=scores)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _share_as_umask_says(partial)
        sync_files(partial)
        rename(partial, folder)
        metric, value = best or (None, None)
        size_bytes, seconds = size_of(folder), time.perf_counter() - start
        context.emit(
            Checkpoint(
                step=step,
                update=update,
                path=str(folder),
                size_bytes=size_bytes,
                seconds=seconds,
                metric=metric,
                value=value,
            )
        )
    context.world.barrier()
    context.heartbeat.is_patient = False


def _share_as_umask_says(folder: Path) -> None:
    """Let others read the weights as they may read the config: safetensors writes for us alone."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def _write_out(sampling: GenerationConfig, file: Path) -> None:
    """Write out how answers are sampled and where they end, where a default was left out.

    Each version of transformers leaves out its own defaults.
    """
    names = ("do_sample", "temperature", "top_k", "top_p", "bos_token_id", "eos_token_id", "pad_token_id")
    write_json(file, read_json(file) | {name: getattr(sampling, name) for name in names})


def origin(job: Job, model: Any) -> str:
    """Name the model whose weights the adapters belong to."""
    return model.name_or_path or f"random weights (seed {job.seed})"


def generation_config(job: Job, tokenizer: Any, source: GenerationConfig | None = None) -> GenerationConfig:
    """Return the generation config that samples as the rollouts did.

    source: that of the model that training started from. Its EOS tokens end an answer here, too,
    and so does what closes a turn in the chat template.
    """
    ends = stop_ids(tokenizer, source)
    return GenerationConfig(
        do_sample=True,
        temperature=job.ppo.temperature,
        top_k=job.ppo.top_k or 0,
        top_p=job.ppo.top_p or 1.0,
        max_new_tokens=job.data.max_response_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def scores_of(end: End) -> dict[str, float]:
    """Return what a step measured on held-out data, without the errors, which its report shows."""
    numbers = {name: value for name, value in asdict(end).items() if isinstance(value, int | float)}
    return {
        name: value
        for name, value in numbers.items()
        if name not in {"step", "updates", "seconds", "held_out_rows"} and not {"error", "both"} & {*name.split("_")}
    }


def eval_model(module: nn.Module) -> nn.Module:
    """Freeze a module, set it to evaluation mode, and return it."""
    return module.eval().requires_grad_(False)
