"""The shapes of models against transformers' own models, and against what PyTorch keeps of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from jobs.model_shape import DEFAULTS, shape_of
from jobs.spec import Lora
from rlhf_train.data.sequences import Sequences
from rlhf_train.models.adapters import add_lora
from rlhf_train.models.networks import ActorForward, padding

GQA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA |= {"num_key_value_heads": 2, "vocab_size": 320}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt-1.3b": {
        "model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "word_embed_proj_dim": 2048, "vocab_size": 50272,
    },
    "opt-350m": {
        "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False, "vocab_size": 50272,
    },
    "opt-galactica": {"model_type": "opt", **OPT, "enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt-untied": {"model_type": "opt", **OPT, "tie_word_embeddings": False, "_remove_final_layer_norm": True},
    "gpt2": {"model_type": "gpt2"},
    "gpt2-inner": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 100, "vocab_size": 320},
    "pythia": {"model_type": "gpt_neox", **GQA},
    "pythia-no-bias": {"model_type": "gpt_neox", **GQA, "attention_bias": False, "tie_word_embeddings": True},
    "llama-tied": {"model_type": "llama", **GQA, "tie_word_embeddings": True, "head_dim": 32},
    "llama-untied": {"model_type": "llama", **GQA, "attention_bias": True, "mlp_bias": True},
    "smollm-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "mistral-7b": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", **GQA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GQA, "head_dim": 32},
    "gemma": {"model_type": "gemma", **GQA, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **GQA, "head_dim": 24},
    "phi3": {"model_type": "phi3", **GQA, **SPECIAL},
    "smollm3": {"model_type": "smollm3", **GQA, **SPECIAL},
    "granite": {"model_type": "granite", **GQA},
    "bloom-560m": {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "falcon": {"model_type": "falcon", **GQA},
    "falcon-40b": {
        "model_type": "falcon", **GQA, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
        "tie_word_embeddings": False,
    },
    "falcon-rw": {
        "model_type": "falcon", **GQA, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True,
    },
}  # fmt: skip


def transformers_config(fields: dict[str, Any]) -> Any:
    fields = dict(fields)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    shape = shape_of(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(CONFIGS[name]))
    assert shape.causal == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["opt-galactica", "gpt2-inner", "pythia", "llama-tied", "phi3", "falcon-40b"])
def test_adapters_are_those_of_peft(name: str) -> None:
    shape, lora = shape_of(CONFIGS[name]), Lora(rank=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(CONFIGS[name]))
        add_lora(model, lora, seed=0)
    assert shape.adapters(lora) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", ["opt-350m", "gpt2-inner", "llama-untied", "qwen2", "gemma2", "falcon-40b"])
def test_a_reward_model_has_a_head_of_one_row(name: str) -> None:
    config = transformers_config(CONFIGS[name])
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert shape_of(CONFIGS[name]).scorer == sum(p.numel() for p in model.parameters())


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    for family, defaults in DEFAULTS.items():
        config = AutoConfig.for_model(family)
        assert {name: getattr(config, name) for name in defaults if hasattr(config, name)}.items() <= defaults.items()


def numbers_kept(fields: dict[str, Any], layers: int, dtype: torch.dtype) -> float:
    """Count the numbers that autograd keeps of a token, without the model's own weights."""
    key = next(name for name in ("n_layer", "num_hidden_layers") if name in fields)
    model = AutoModelForCausalLM.from_config(transformers_config({**fields, key: layers}), dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    class Tokenizer:
        pad_token_id = 0

    rows = [np.arange(16)] * 4
    pad_id = padding(Tokenizer(), model)  # type: ignore[arg-type]
    batch = Sequences.of(rows, rows, pad_id, torch.device("cpu"))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ActorForward(model.train())(batch)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return size / dtype.itemsize / batch.input_ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["opt-untied", "gpt2-inner", "pythia", "llama-tied", "qwen3", "gemma2", "phi3", "falcon"]
)
def test_a_layer_keeps_what_pytorch_keeps(name: str, dtype: torch.dtype) -> None:
    fields = {**CONFIGS[name], **dict.fromkeys(("dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)}
    measured = numbers_kept(fields, 3, dtype) - numbers_kept(fields, 2, dtype)
    expected = shape_of(fields).kept_by_layer(32, is_half=dtype == torch.bfloat16)
    assert expected == pytest.approx(measured, rel=0.15)
