"""Processes that have joined each other like a run's ranks, for tests with DeepSpeed engines."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhf_train.ranks.collectives import World
from rlhf_train.worker import leave

FAMILY = ("transformers.models.opt.modeling_opt",)  # as the ranks' own importer has it


def environment(rank: int, count: int) -> Mapping[str, str]:
    """As rlhf_train/launch.py sets it."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}


def join(rank: int, count: int, store: dist.Store) -> World:
    from rlhf_train.engine.deepspeed_engine import connect

    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(minutes=5))
    world = World(rank, count, torch.device("cpu"))
    connect(world, rank)
    return world


def on_ranks(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(world, *arguments)` in `count` new processes.

    `work` is a function of a module; what one raises is raised here. One process has imported what
    it takes seconds to import, and forks all of them.
    """
    multiprocessing.set_forkserver_preload(["rlhf_train.worker", "rlhf_train.steps.ppo", *FAMILY])
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        _rank, (count, store.port, work, arguments), nprocs=count, start_method="forkserver"
    )


def _rank(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment(rank, count))
    torch.set_num_threads(1)
    work(join(rank, count, dist.TCPStore("127.0.0.1", port, count, is_master=False)), *arguments)
    dist.destroy_process_group()
    leave(0)
