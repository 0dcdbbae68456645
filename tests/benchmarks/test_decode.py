"""What is measured of rollouts is what a run has."""

from __future__ import annotations

import copy

import torch

from benchmarks import decode, work
from rlhf_train.generation.families.opt import network_of


def test_weights_lie_as_the_engine_has_them() -> None:
    model = work.actor_of(work.SIZES["tiny"].actor, 0)
    before = copy.deepcopy(model)
    decode.lay_flat(model)
    assert [layer.joined is not None for layer in network_of(model).layers] == [True, True]
    assert [layer.joined is not None for layer in network_of(before).layers] == [False, False]
    ids = torch.randint(4, 256, (2, 9))
    assert torch.equal(model(ids).logits, before(ids).logits)
