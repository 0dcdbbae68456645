"""Compare LLaMA-like models in the static decoder with their own forward, and with generate.

In float32 all three give the same tokens. The table of families says which have a description.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jobs.spec import Lora
from rlhf_train.generation.families.llama_like import network
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.adapters import add_lora
from rlhf_train.models.head import find_transform

pytestmark = pytest.mark.pinned

PAD, EOS, STOP, VOCABULARY, POSITIONS = 1, 2, 5, 70, 64
BODY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.25,
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0}
# By what is special: the family, and what differs from BODY.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups of 1, biases": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "groups of 2, llama3": ("llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA_3, "rope_theta": 5e5}),
    "groups of 4, linear": (
        "llama",
        {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "groups of 3": ("qwen2", {"hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": True}),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "norms, wide heads": ("qwen3", {"head_dim": 16, "rope_scaling": YARN}),
    "window": ("mistral", {"sliding_window": 6}),
    "no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "no positions": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
    "factors": ("granite", GRANITE),
}
PRESENT = [name for name, (family, _) in MODELS.items() if family in CONFIG_MAPPING]


def make(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BODY | more)).eval()
    numbers = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms start at 0 and 1, which would hide a lost one
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=numbers)
    model.logit_transform = find_transform(model)
    return model


@pytest.fixture(scope="module", params=PRESENT)
def model(request: pytest.FixtureRequest) -> Any:
    family, more = MODELS[request.param]
    return make(family, **more)


def some_prompts(count: int = 6) -> list[np.ndarray]:
    dice = np.random.RandomState(0)
    return [dice.randint(6, VOCABULARY, length) for length in dice.randint(1, 14, count)]


def rollouts(model: Any, **more: Any) -> Rollouts:
    arguments = {"stop_ids": [EOS, STOP], "pad_id": PAD, "max_tokens": 14, "temperature": 1.0, "batch": 4}
    return Rollouts(model, device=torch.device("cpu"), **arguments | more)  # type: ignore[arg-type]


def test_it_samples_what_the_models_own_forward_samples(model: Any) -> None:
    """Four slots serve nine prompts, and two tokens end an answer."""
    how = {"seed": 7, "row_ids": range(9)}
    static = rollouts(model, warn=pytest.fail)
    found = static.generate(some_prompts(9), **how)
    expected = rollouts(model, is_static=False).generate(some_prompts(9), **how)
    assert static.is_static
    assert [tokens.tolist() for tokens in found.tokens] == [tokens.tolist() for tokens in expected.tokens]
    assert found.ended.tolist() == expected.ended.tolist()
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_its_likeliest_tokens_are_those_of_transformers(model: Any) -> None:
    """Answer by answer, without padding. With 14 tokens more, windows of 5 to 7 are exceeded."""
    prompts = some_prompts()
    found = rollouts(model, top_k=1, warn=pytest.fail).generate(prompts, seed=0, row_ids=range(6))
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        ids = torch.from_numpy(prompt)[None]
        greedy = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": [EOS, STOP], "pad_token_id": PAD}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        assert tokens.tolist() == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["groups of 1, biases", "groups of 3", "window"])
def test_adjacent_weights_are_one_product(name: str) -> None:
    """As in DeepSpeed's buffers: all matrices in one tensor, all vectors in another."""
    family, more = MODELS[name]
    model, how = make(family, **more), {"seed": 3, "row_ids": range(6)}
    apart = rollouts(model).generate(some_prompts(), **how)
    assert network(model).layers[0].joined is network(model).layers[0].joined_gate is None
    for is_matrix in (True, False):
        parts = [parameter for parameter in model.parameters() if (parameter.ndim == 2) == is_matrix]
        flat = torch.cat([part.data.flatten() for part in parts])
        for part, view in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.data = view.view(part.shape)
    for layer in network(model).layers:
        assert layer.joined is not None and layer.joined_gate is not None
    together = rollouts(model).generate(some_prompts(), **how)
    assert [tokens.tolist() for tokens in together.tokens] == [tokens.tolist() for tokens in apart.tokens]


def test_adapters_are_added_next_to_the_weights() -> None:
    model, how = make("qwen2"), {"seed": 3, "row_ids": range(6)}
    before = rollouts(model).generate(some_prompts(), **how)
    add_lora(model, Lora(rank=4, alpha=8), seed=0)
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at 0
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=numbers)
    found = rollouts(model, warn=pytest.fail).generate(some_prompts(), **how)
    expected = rollouts(model, is_static=False).generate(some_prompts(), **how)
    assert [tokens.tolist() for tokens in found.tokens] == [tokens.tolist() for tokens in expected.tokens]
    assert [tokens.tolist() for tokens in found.tokens] != [tokens.tolist() for tokens in before.tokens]
    assert {layer.gate.adapter is None for layer in network(model).layers} == {False}
