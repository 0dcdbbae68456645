"""What ranks tell each other, on two real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rlhf_train.ranks.collectives import World
from tests.ranks import on_ranks


def test_two_ranks_tell_each_other() -> None:
    on_ranks(2, tell)


def tell(world: World) -> None:
    meetings: list[None] = []
    world = replace(world, meet=lambda: meetings.append(None))
    assert [world.any(flag) for flag in (False, world.rank == 1, True)] == [False, True, True]
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.sum({"one": 1.0, "rank": torch.tensor(world.rank)}) == {"one": 2.0, "rank": 1.0}
    world.barrier()
    assert len(meetings) == 6  # the launcher sees each, and so which rank hangs


def test_what_is_in_no_gpus_memory_goes_over_the_cpus() -> None:
    on_ranks(2, tell_each_its_own)


def tell_each_its_own(world: World) -> None:
    """The group over CPUs has only this rank here: what goes over it never reaches another rank."""
    alone = [dist.new_group([rank], backend="gloo") for rank in range(2)][world.rank]
    world = replace(world, host_group=alone)
    assert world.any(world.rank == 1) == (world.rank == 1)
    assert world.sum({"one": 1.0}) == {"one": 2.0}
    world.barrier()


def test_a_rank_alone_asks_nobody() -> None:
    alone = World(0, 1, torch.device("cpu"), meet=lambda: pytest.fail("it met"))
    assert (alone.any(False), alone.any(True), alone.gather("x")) == (False, True, ["x"])
