"""What models do to their logits after the head, against transformers' own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jobs.errors import ToolkitError
from rlhf_train.data.sequences import Sequences
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.head import NEVER, LogitTransform, find_transform
from rlhf_train.models.networks import ActorForward

CPU, PAD, EOS, VOCABULARY = torch.device("cpu"), 1, 2, 300
BODY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPED = BODY | {"num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
PLAIN = LogitTransform()
FAMILIES: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "llama": (GROUPED, PLAIN),
    "gpt2": (GPT, PLAIN),
    "gptj": (GPT | {"rotary_dim": 4}, PLAIN),  # its head has a bias
    "gemma2": (GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0}, LogitTransform(cap=3.0)),
    "granite": (GROUPED | {"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    "cohere": (GROUPED | {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
}
numbers = np.random.RandomState(0)
PROMPTS = [numbers.randint(5, VOCABULARY, numbers.randint(2, 9)) for _ in range(4)]
ANSWERS = [numbers.randint(5, VOCABULARY, numbers.randint(1, 7)) for _ in range(4)]


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0], pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.logit_transform = find_transform(model)
    return model


def by_transformers(model: Any, prompt: np.ndarray, answer: np.ndarray, tokens: int | None = None) -> torch.Tensor:
    """Log-probs of the answer's tokens: log softmax of the model's own logits."""
    logits = model(torch.tensor(np.concatenate([prompt, answer]))[None]).logits[0].float()
    log_probs = logits[:, :tokens].log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_transform_is_found_exactly(family: str, dtype: torch.dtype) -> None:
    assert make(family, dtype).logit_transform == FAMILIES[family][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    model = make(family)
    plain = torch.cat([by_transformers(model, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)])
    plain.square().sum().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    found = ActorForward(model)(Sequences.of(PROMPTS, ANSWERS, PAD, CPU))[0]
    found.square().sum().backward()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_sample_from_the_models_own_logits(family: str) -> None:
    model = make(family)
    made = rollouts(model).generate(PROMPTS, seed=0, row_ids=range(4))
    for prompt, tokens, log_probs in zip(PROMPTS, made.tokens, made.log_probs, strict=True):
        expected = by_transformers(model, prompt, tokens)
        torch.testing.assert_close(torch.from_numpy(log_probs), expected, rtol=1e-5, atol=1e-5)


def rollouts(model: Any, **more: Any) -> Rollouts:
    return Rollouts(model, stop_ids=[EOS], pad_id=PAD, max_tokens=10, temperature=1.0, batch=4, device=CPU, **more)


def test_what_is_neither_a_scale_nor_a_cap_is_refused() -> None:
    model = make("llama")
    own = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    model.forward = squared
    with pytest.raises(ToolkitError, match="changes its logits"):
        find_transform(model)


OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}


@pytest.mark.parametrize("is_static", [True, False])
def test_rows_without_a_token_are_never_sampled_and_have_no_probability(is_static: bool) -> None:
    tokens = 60  # of 300: most of what is sampled without the limit lies above
    torch.manual_seed(0)
    config = AutoConfig.for_model("opt", **OPT, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)
    model = AutoModelForCausalLM.from_config(config).eval()
    without = rollouts(model, is_static=is_static).generate(PROMPTS, seed=0, row_ids=range(4))
    assert np.mean(np.concatenate(without.tokens) >= tokens) > 0.5
    model.logit_transform = LogitTransform(tokens=tokens)
    made = rollouts(model, is_static=is_static).generate(PROMPTS, seed=0, row_ids=range(4))
    assert np.concatenate(made.tokens).max() < tokens
    expected = torch.cat([by_transformers(model, *pair, tokens) for pair in zip(PROMPTS, made.tokens, strict=True)])
    torch.testing.assert_close(torch.from_numpy(np.concatenate(made.log_probs)), expected, rtol=1e-5, atol=1e-5)
    log_probs, entropies = ActorForward(model)(Sequences.of(PROMPTS, made.tokens, PAD, CPU), with_entropy=True)
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    assert entropies is not None and 0 < float(entropies.max()) < np.log(tokens)  # ln 300 is 5.7, ln 60 is 4.1
    log_probs.sum().backward()
    unused = model.lm_head.weight.grad[tokens:]
    seen = np.isin(np.arange(tokens, VOCABULARY), np.concatenate(PROMPTS))  # the embedding is the head's weight
    assert not unused[torch.from_numpy(~seen)].any()


def test_a_logit_of_no_probability_is_a_number_in_half_precision() -> None:
    assert torch.isfinite(torch.tensor(NEVER, dtype=torch.float16))
    assert torch.tensor([0.0, NEVER]).softmax(0).tolist() == [1.0, 0.0]
