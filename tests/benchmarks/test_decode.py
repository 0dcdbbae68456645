"""What is measured of rollouts is what a run has."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import decode, work
from rlhf_train.generation.families.known import network_of


def test_weights_lie_as_the_engine_has_them() -> None:
    model = work.actor_of(work.SIZES["tiny"].actor, 0)
    before = copy.deepcopy(model)
    decode.lay_flat(model)
    assert [layer.joined is not None for layer in network_of(model).layers] == [True, True]
    assert [layer.joined is not None for layer in network_of(before).layers] == [False, False]
    ids = torch.randint(4, 256, (2, 9))
    assert torch.equal(model(ids).logits, before(ids).logits)


@pytest.mark.parametrize(("name", "millions"), [("smollm2-135m", 134.5), ("qwen3-0.6b", 596.0)])
def test_the_shapes_have_the_sizes_of_their_names(name: str, millions: float) -> None:
    """All parameters, as their model cards on the hub say."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**work.SIZES[name].actor))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=2e-3)
    matrices, small = decode.weights_of(model)
    assert matrices + small == model.num_parameters()  # the head is the embedding


def test_both_ways_next_to_ours_are_timed() -> None:
    model = work.actor_of(work.llama_like("llama", 32, 2, "2/1/16", 48, 64), 0)
    prompts = [np.arange(4) + 5] * 2
    assert len(decode.generation_s(model, prompts, 3, "cpu", 1, is_static=False)) == 1
    assert len(decode.static_cache_s(model, prompts, 3, "cpu", 1)) == 1
