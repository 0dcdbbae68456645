"""`python deepspeed_chat.py WORK.json` measures DeepSpeed-Chat's own classes.

benchmarks/side_by_side.py has written the work. The program prints a line of JSON an update. It
runs in an environment of its own and imports nothing of ours. The package `dschat` comes from the
checkout that the user has named. Like main.py of its step 3, this program initialises, generates
experience, and trains on it by micro batches.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
is_cuda = work["device"] == "cuda"
os.environ |= {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(work["port"]),
}
os.environ |= {} if is_cuda else {"DS_ACCELERATOR": "cpu"}
sys.path.insert(0, work["checkout"])

import deepspeed  # noqa: E402
import torch  # noqa: E402
from dschat.rlhf import rlhf_engine  # noqa: E402
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer  # noqa: E402
from dschat.utils.data.data_utils import MiniDataset  # noqa: E402
from dschat.utils.model import model_utils  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

torch.set_num_threads(work["threads"])
torch.manual_seed(work["seed"])
deepspeed.init_distributed(dist_backend="nccl" if is_cuda else "gloo")
device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")

# transformers 5 has removed this function, which the checkout needs.
model_utils.no_init_weights = getattr(model_utils, "no_init_weights", contextlib.nullcontext)
if work["dtype"] == "float32":
    # Its two configurations have only fp16 and bf16: we ask for bf16, and remove it again.
    def in_float32(make):
        return lambda *args, **kwargs: {key: value for key, value in make(*args, **kwargs).items() if key != "bfloat16"}

    rlhf_engine.get_train_ds_config = in_float32(rlhf_engine.get_train_ds_config)
    rlhf_engine.get_eval_ds_config = in_float32(rlhf_engine.get_eval_ds_config)


def reward_model_folder(folder):
    """Write a reward model as its step 2 does: the classifier's weights under its own names."""
    state = load_file(Path(work["critic"]) / "model.safetensors")
    renamed = {
        name.replace("model.", "rwtransformer.", 1) if name.startswith("model.") else "v_head.weight": value
        for name, value in state.items()
    }
    torch.save(renamed, Path(folder) / "pytorch_model.bin")
    (Path(folder) / "config.json").write_bytes((Path(work["critic"]) / "config.json").read_bytes())
    return folder


def engine_arguments():
    """Return main.py's arguments with the defaults that matter here.

    Its extras (dropout, checkpointing, LoRA) are off on all sides.
    """
    return argparse.Namespace(
        dtype={"float32": "bf16", "bfloat16": "bf16", "float16": "fp16"}[work["dtype"]],
        actor_zero_stage=0,
        critic_zero_stage=0,
        offload=False,
        offload_reference_model=False,
        offload_reward_model=False,
        enable_hybrid_engine=False,
        inference_tp_size=1,
        release_inference_cache=False,
        unpin_actor_parameters=False,
        tp_gather_partition_size=8,
        max_prompt_seq_len=work["max_prompt_tokens"],
        max_answer_seq_len=work["max_response_tokens"],
        enable_tensorboard=False,
        tensorboard_path="",
        enable_mixed_precision_lora=False,
        per_device_training_batch_size=work["micro_batch"],
        gradient_accumulation_steps=work["batch"] // work["micro_batch"],
        gradient_accumulation_steps_actor=work["batch"] // work["micro_batch"],
        actor_dropout=0.0,
        critic_dropout=0.0,
        actor_lora_dim=0,
        critic_lora_dim=0,
        actor_lora_learning_rate=work["learning_rate"],
        critic_lora_learning_rate=work["learning_rate"],
        actor_learning_rate=work["learning_rate"],
        critic_learning_rate=work["learning_rate"],
        actor_weight_decay=0.0,
        critic_weight_decay=0.0,
        lr_scheduler_type="constant",
        num_warmup_steps=0,
        enable_ema=False,
        actor_gradient_checkpointing=False,
        critic_gradient_checkpointing=False,
        num_padding_at_beginning=1,
        compute_fp32_loss=False,
        end_of_conversation_token="</s>",
        align_overflow=False,
        print_answers=False,
        local_rank=0,
    )


def now():
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


tokenizer = AutoTokenizer.from_pretrained(work["actor"], padding_side="left")
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    arguments = engine_arguments()
    engine = rlhf_engine.DeepSpeedRLHFEngine(
        work["actor"], reward_model_folder(folder), tokenizer, arguments, work["updates"]
    )
trainer = DeepSpeedPPOTrainer(engine, arguments)
# Its default is greedy; the model's generation config can ask for sampling.
settings = engine.actor.module.generation_config
settings.do_sample, settings.top_k, settings.top_p, settings.temperature = True, 0, 1.0, 1.0
settings.eos_token_id = work["eos_id"]

width = work["max_prompt_tokens"]  # its collator pads to this width, on the left
ids = torch.full((len(work["prompts"]), width), work["pad_id"])
for row, prompt in enumerate(work["prompts"]):
    ids[row, width - len(prompt) :] = torch.tensor(prompt)
ids = ids.to(device)
mask = (ids != work["pad_id"]).long()
passes = len(ids) // work["rollout_batch"]
for update in range(work["updates"]):
    began, cpu_began, generation_s, answer_tokens = now(), time.process_time(), 0.0, 0
    experiences = MiniDataset(passes, work["micro_batch"])
    for number in range(passes):
        part = slice(number * work["rollout_batch"], (number + 1) * work["rollout_batch"])
        experience = trainer.generate_experience(ids[part], mask[part], update)
        generation_s += trainer.generate_time
        answers = experience["input_ids"][:, width:]
        assert len(answers) == work["rollout_batch"], "it has dropped answers"
        is_eos = (answers == work["eos_id"]).int()
        answer_tokens += int((is_eos.cumsum(1) - is_eos == 0).sum())
        batches = experiences.add(experience)
    scored = now()
    for batch in batches:
        trainer.train_rlhf(batch)
    end = now()
    line = {
        "generation_s": generation_s,
        "scoring_s": scored - began - generation_s,
        "training_s": end - scored,
        "total_s": end - began,
        "cpu_s": time.process_time() - cpu_began,
        "prompt_tokens": int(mask.sum()),
        "answer_tokens": answer_tokens,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }
    print("RESULT " + json.dumps(line), flush=True)
