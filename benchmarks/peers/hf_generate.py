"""`python hf_generate.py WORK.json` measures Hugging Face's generate.

benchmarks/side_by_side.py has written the work. The program prints a line of JSON a repeat. It runs
in an environment of its own and imports nothing of ours. work["cache"]: dynamic or static.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(work["threads"])
torch.manual_seed(work["seed"])
device = torch.device(work["device"])
model = AutoModelForCausalLM.from_pretrained(work["actor"], dtype=getattr(torch, work["dtype"])).to(device).eval()
extra = {"cache_implementation": "static"} if work["cache"] == "static" else {}
if device.type == "cpu":
    extra |= {"disable_compile": True} if extra else {}


def now():
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


width = max(len(prompt) for prompt in work["prompts"])
ids = torch.full((len(work["prompts"]), width), work["pad_id"])
for row, prompt in enumerate(work["prompts"]):
    ids[row, width - len(prompt) :] = torch.tensor(prompt)
ids = ids.to(device)
mask = (ids != work["pad_id"]).long()
for _ in range(work["updates"]):
    began, cpu_began, answer_tokens = now(), time.process_time(), 0
    for start in range(0, len(ids), work["rollout_batch"]):
        part = slice(start, start + work["rollout_batch"])
        with torch.no_grad():
            made = model.generate(
                ids[part],
                attention_mask=mask[part],
                max_new_tokens=work["max_response_tokens"],
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=work["pad_id"],
                eos_token_id=work["eos_id"],
                **extra,
            )[:, width:]
        is_eos = (made == work["eos_id"]).int()
        answer_tokens += int((is_eos.cumsum(1) - is_eos == 0).sum())
    times = {"generation_s": now() - began, "cpu_s": time.process_time() - cpu_began}
    line = {**times, "prompt_tokens": int(mask.sum()), "answer_tokens": answer_tokens}
    print("RESULT " + json.dumps(line), flush=True)
