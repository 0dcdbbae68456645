"""Start every job that we ship, shrunk: tiny models of its families, few rows, one update a step.

Each runs in the flavours that run it: this file is also run inside both images. The job's own file
is read, and all that is not a size stays as it says: losses, schedules, LoRA, checkpointing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from jobs.events import Event, Metrics
from jobs.flavours import flavours_without, model_type_of
from jobs.spec import JOBS_FOLDER, load_job
from rlhf_train.ranks.collectives import World
from tests import in_process, tiny
from tests.integration.test_families import FAMILIES

pytestmark = pytest.mark.pinned

FLAVOUR = "cu118" if int(transformers.__version__.split(".")[0]) < 5 else "cu130"
JOBS = [
    file.stem for file in sorted(JOBS_FOLDER.glob("*.yaml")) if FLAVOUR not in flavours_without(load_job(file.stem))
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("jobs") / "rows", train=40, held_out=4)


def shrunk(name: str, rows: Path) -> dict[str, Any]:
    job = load_job(name)
    tree = job.dump()
    for network, source in (("actor", job.actor_source), ("critic", job.critic_source)):
        if tree[network]["model"] != "actor":
            family = model_type_of(source)
            tree[network]["model"] = {"config": {**FAMILIES[family].sizes, "model_type": family}}
    tree["actor"]["tokenizer_vocabulary"] = 320
    tree["data"] |= {"datasets": [str(rows)], "max_prompt_tokens": 64, "max_response_tokens": 12, "eval_rows": 4}
    for step in ("sft", "reward", "ppo"):
        tree[step] |= {"global_batch": 4, "max_updates": 1}
    tree["ppo"]["rollout_batch"] = 4
    tree["hardware"] |= {"ranks": 1, "device": "cpu", "precision": "float32", "micro_batch": 4}
    return tree


@pytest.mark.parametrize("name", JOBS)
def test_a_job_of_ours_starts_in_this_flavour(name: str, rows: Path, tmp_path: Path, _only_rank: World) -> None:
    events: list[Event] = []
    in_process.train(_only_rank, tmp_path / name, shrunk(name, rows), 1, 2, 3, events=events)
    learned = [event for event in events if isinstance(event, Metrics)]
    assert [event.step for event in learned] == [1, 2, 3]
    assert all(event.grad_norm > 0 for event in learned)
