"""What came home from the tiny job, loaded as anybody would load it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def check_models(run: Path) -> None:
    """run: a folder with all three steps."""
    for step in (1, 3):
        folder = run / f"step{step}/model"
        actor, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("\n\nHuman: red cat\n\nAssistant:", return_tensors="pt")
        answer = actor.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > prompt["input_ids"].shape[1]
    reward_model = AutoModelForSequenceClassification.from_pretrained(run / "step2/model")
    assert reward_model.config.num_labels == 1
    assert all(torch.isfinite(parameter).all() for parameter in reward_model.parameters())
