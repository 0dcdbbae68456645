"""What ranks tell each other, on two real ranks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rlhf_train.ranks.collectives import World
from tests.ranks import on_ranks


@pytest.mark.parametrize("apart", [False, True], ids=["the default group", "a group over CPUs, as beside NCCL"])
def test_two_ranks_tell_each_other(apart: bool) -> None:
    on_ranks(2, tell, apart)


def tell(world: World, apart: bool) -> None:
    meetings: list[None] = []
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=5)) if apart else None
    world = replace(world, meet=lambda: meetings.append(None), host_group=group)
    assert [world.any(flag) for flag in (False, world.rank == 1, True)] == [False, True, True]
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.sum({"one": 1.0, "rank": torch.tensor(world.rank)}) == {"one": 2.0, "rank": 1.0}
    world.barrier()
    assert len(meetings) == 6  # each is seen by who watches for ranks that hang


def test_a_rank_alone_asks_nobody() -> None:
    alone = World(0, 1, torch.device("cpu"), meet=lambda: pytest.fail("it met"))
    assert (alone.any(False), alone.any(True), alone.gather("x")) == (False, True, ["x"])
