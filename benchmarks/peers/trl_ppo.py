"""`python trl_ppo.py WORK.json` measures TRL's PPOTrainer.

benchmarks/side_by_side.py has written the work. The program prints a line of JSON an update. It
runs in an environment of its own and imports nothing of ours. TRL's own `train()` is timed from
outside, at the functions that it calls.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(work["threads"])
torch.manual_seed(work["seed"])
is_cuda = work["device"] == "cuda"
marks = {}  # seconds and tokens of the current update


def now():
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_generation(model, queries, *args, **kwargs):
    sequences, logits = batch_generation(model, queries, *args, **kwargs)
    answers = sequences[:, queries.shape[1] :]
    is_eos = (answers == work["eos_id"]).int()
    is_after_eos = is_eos.cumsum(1) - is_eos > 0
    generated = now()
    prompt_tokens = int((queries != work["pad_id"]).sum())
    marks.update(generated=generated, prompt_tokens=prompt_tokens, answer_tokens=int((~is_after_eos).sum()))
    return sequences, logits


def timed_forward(model, *args, **kwargs):
    if torch.is_grad_enabled():
        marks.setdefault("scored", now())
    return forward(model, *args, **kwargs)


class Report(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        marks.update(began=now(), cpu=time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        end = now()
        line = {
            "generation_s": marks["generated"] - marks["began"],
            "scoring_s": marks["scored"] - marks["generated"],
            "training_s": end - marks["scored"],
            "total_s": end - marks["began"],
            "cpu_s": time.process_time() - marks["cpu"],
            "prompt_tokens": marks["prompt_tokens"],
            "answer_tokens": marks["answer_tokens"],
            "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        }
        print("RESULT " + json.dumps(line), flush=True)
        marks.clear()
        marks.update(began=now(), cpu=time.process_time())


batch_generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward
ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

tokenizer = AutoTokenizer.from_pretrained(work["actor"], padding_side="left")
dtype = getattr(torch, work["dtype"])
actor, reference = (AutoModelForCausalLM.from_pretrained(work["actor"], dtype=dtype) for _ in range(2))
critic, reward_model = (
    AutoModelForSequenceClassification.from_pretrained(work["critic"], dtype=dtype, num_labels=1) for _ in range(2)
)
prompts = Dataset.from_list([{"input_ids": prompt} for prompt in work["prompts"]])
with tempfile.TemporaryDirectory() as folder:
    config = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=work["batch"] // work["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=work["batch"] * work["updates"],
        local_rollout_forward_batch_size=work["rollout_batch"],
        response_length=work["max_response_tokens"],
        stop_token="eos",
        temperature=1.0,
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=0.1,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not is_cuda,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=work["seed"],
    )
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=actor,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[Report()],
    ).train()
