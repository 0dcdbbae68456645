"""The shapes of models against transformers' own models, and against what PyTorch keeps of them."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from jobs.model_shape import DEFAULTS, PACKED, shape_of
from jobs.spec import Lora
from rlhf_train.data.sequences import Sequences
from rlhf_train.models.adapters import add_lora
from rlhf_train.models.networks import ActorForward, padding
from rlhf_train.models.packed_attention import FAMILIES


@pytest.fixture(autouse=True)
def pytorchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what ZeRO 3 replaces for the whole process: a test before may have used it."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


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


def test_estimates_know_whose_rows_are_packed() -> None:
    assert sorted(PACKED) == sorted(FAMILIES)


class Kernels(TorchDispatchMode):
    """Counts what PyTorch starts, views left out, and the bytes that it reads and writes.

    Those of products and of attention do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started, self.moved = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
        before, after = (
            [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        read = {tensor.untyped_storage().data_ptr() for tensor in before}
        is_view = all(tensor.untyped_storage().data_ptr() in read for tensor in after)
        if (is_view and not name.endswith("_")) or name.startswith(("detach", "empty", "new_empty", "_unsafe_view")):
            return out
        self.started += 1
        if name not in ("mm", "addmm", "bmm", "baddbmm") and "attention" not in name:
            self.moved += sum(tensor.nbytes for tensor in (*before, *after))
        return out


def work_of(fields: dict[str, Any], layers: int, lora: Lora | None) -> np.ndarray:
    """Return the kernels of the two passes, and the bytes that both move for each token."""
    model, batch = model_and_rows(fields, layers, torch.bfloat16)
    if lora is not None:
        add_lora(model, lora, seed=0)
    gc.collect()  # what an engine of another test does at its end must not be counted here
    with Kernels() as forward:
        log_probs, _ = ActorForward(model)(batch)
    with Kernels() as backward:
        log_probs.sum().backward()
    return np.array([forward.started, backward.started, (forward.moved + backward.moved) / batch.input_ids.numel()])


@pytest.mark.parametrize(
    "name",
    [
        "opt-untied",
        "gpt2-inner",
        "pythia",
        "llama-tied",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi3",
        "smollm3",
        "granite",
    ],
)
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_a_layer_starts_and_moves_what_pytorch_does(name: str, lora: Lora | None) -> None:
    fields = {**CONFIGS[name], **dict.fromkeys(("dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)}
    shape, (forward, backward, moved) = shape_of(fields), work_of(fields, 3, lora) - work_of(fields, 2, lora)
    assert shape.kernels(lora) == pytest.approx((forward, backward), rel=0.1)
    assert shape.moved_by_layer(32, 2, lora) == pytest.approx(moved, rel=0.15)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    for family, defaults in DEFAULTS.items():
        config = AutoConfig.for_model(family)
        assert {name: getattr(config, name) for name in defaults if hasattr(config, name)}.items() <= defaults.items()


def model_and_rows(fields: dict[str, Any], layers: int, dtype: torch.dtype) -> tuple[Any, Sequences]:
    """Make a model of so many layers, and four rows of 32 tokens."""
    key = next(name for name in ("n_layer", "num_hidden_layers") if name in fields)
    model = AutoModelForCausalLM.from_config(transformers_config({**fields, key: layers}), dtype=dtype)

    class Tokenizer:
        pad_token_id = 0

    rows = [np.arange(16)] * 4
    pad_id = padding(Tokenizer(), model)  # type: ignore[arg-type]
    return model.train(), Sequences.of(rows, rows, pad_id, torch.device("cpu"))


def numbers_kept(fields: dict[str, Any], layers: int, dtype: torch.dtype) -> float:
    """Count the numbers that autograd keeps of a token, without the model's own weights."""
    model, batch = model_and_rows(fields, layers, dtype)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ActorForward(model)(batch)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return size / dtype.itemsize / batch.input_ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["opt-untied", "gpt2-inner", "pythia", "llama-tied", "qwen3", "granite", "gemma2", "phi3", "falcon"]
)
def test_a_layer_keeps_what_pytorch_keeps(name: str, dtype: torch.dtype) -> None:
    fields = {**CONFIGS[name], **dict.fromkeys(("dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)}
    measured = numbers_kept(fields, 3, dtype) - numbers_kept(fields, 2, dtype)
    expected = shape_of(fields).kept_by_layer(32, is_half=dtype == torch.bfloat16)
    assert expected == pytest.approx(measured, rel=0.15)
