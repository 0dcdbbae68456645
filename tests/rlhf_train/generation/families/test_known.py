"""What the table of families says of rollouts is true; other models fall back and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from env.settings import load_families
from rlhf_train.generation.families.known import network_of
from tests.integration.test_families import FAMILIES
from tests.rlhf_train.generation.families import test_llama_like as llama_like

pytestmark = pytest.mark.pinned

TABLE = load_families()
LONG = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def tiny(family: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 70, "pad_token_id": 1} | {**FAMILIES[family].sizes} | more
    sizes.pop("model_type", None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_the_table_says_which_families_have_a_description(family: str) -> None:
    assert (network_of(tiny(family)) is not None) == (TABLE[family].static is not None)


def test_every_family_with_a_description_is_tried() -> None:
    assert {name for name, row in TABLE.items() if row.static} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("opt", {"activation_function": "gelu"}, "its activation is gelu, not relu"),
        ("opt", {"layer_norm_elementwise_affine": False}, "its norms have no weights"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("llama", {"rope_scaling": LONG}, "its rotary positions are scaled by `longrope`"),
        ("gpt2", {}, "its family has no description there"),
    ],
)
def test_what_a_description_does_not_know_is_said(family: str, more: dict[str, Any], reason: str) -> None:
    _assert_falls_back(tiny(family, **more), reason)


def _assert_falls_back(model: Any, reason: str) -> None:
    warnings: list[str] = []
    made = llama_like.rollouts(model, max_tokens=2, warn=warnings.append)
    assert not made.is_static
    name = type(model).__name__
    assert warnings == [f"rollouts of {name} run by its own forward, which is slower than the static decoder: {reason}"]
    assert len(made.generate(llama_like.some_prompts(2), seed=0, row_ids=[0, 1]).tokens) == 2


def test_a_module_that_is_not_known_is_refused() -> None:
    """A later transformers may add one to a family."""
    model = tiny("llama")
    model.model.layers[1].self_attn.gate = nn.Linear(2, 2)
    _assert_falls_back(model, "an attention has `gate`")


def test_a_rotation_of_a_part_of_a_head_is_refused() -> None:
    model = llama_like.make("llama")
    rotary = getattr(model.model, "rotary_emb", None)
    rotary.inv_freq = rotary.inv_freq[:2]
    assert network_of(model) is None


def test_parts_of_weights_are_refused() -> None:
    model = tiny("llama")
    model.model.norm.weight.ds_id = 3
    assert network_of(model) is None


def test_dynamic_positions_beyond_the_models_are_its_own() -> None:
    """There the frequencies follow the length, which the static decoder does not know."""
    model = llama_like.make("llama", **llama_like.MODELS["dynamic"][1])
    warnings: list[str] = []
    prompts = [torch.arange(6, 6 + 55).remainder(60).add(6).numpy()]
    found = llama_like.rollouts(model, warn=warnings.append).generate(prompts, seed=1, row_ids=[0])
    expected = llama_like.rollouts(model, is_static=False).generate(prompts, seed=1, row_ids=[0])
    assert found.tokens[0].tolist() == expected.tokens[0].tolist()
    assert warnings == [
        "rollouts of LlamaForCausalLM run by its own forward, which is slower than the static decoder: "
        "with 69 tokens its rotary positions are scaled by their number"
    ]
