"""The shapes of models, by hand; tests/rlhf_train/plan compares them with transformers."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import ToolkitError
from jobs.model_shape import shape_of
from jobs.spec import Lora

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 320}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
OPT = {"model_type": "opt", "hidden_size": 96, "ffn_dim": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
OPT |= {"vocab_size": 768, "max_position_embeddings": 128}


def test_an_opt_by_hand() -> None:
    layer = 4 * (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96) + 2 * (96 + 96)
    assert shape_of(OPT).causal == 768 * 96 + 130 * 96 + 3 * layer + (96 + 96)
    assert shape_of(OPT).matrices == 3 * 12 * 96 * 96


def test_lora_takes_the_layers_that_it_names() -> None:
    # 3 layers, two matrices of 96 x 96 each, rank 8.
    assert shape_of(OPT).adapters(Lora(rank=8, target_modules=("q_proj", "v_proj"))) == 3 * 2 * 8 * (96 + 96)
    assert shape_of(OPT).adapters(Lora(rank=8, target_modules=("lm_head",))) == 0


def test_an_unknown_family_is_taken_for_a_llama_and_says_so() -> None:
    fields = {**LLAMA, "tie_word_embeddings": False}
    known, guessed = shape_of(fields), shape_of({**fields, "model_type": "newest"})
    assert known.is_known and not guessed.is_known and guessed.causal == known.causal


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"vocab_size": [1]}])
def test_sizes_that_are_wrong_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ToolkitError, match="the size of a model of type 'llama' cannot be told"):
        shape_of({**LLAMA, **change})


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(ToolkitError, match="of type 'newest' cannot be told"):
        shape_of({"model_type": "newest"})
